"""The routes of ``train.py``: one run of ``ftc train``, of the Trainer, or of PEFT in it.

Each runs in a process of its own. Before every step it waits until it is told to go on,
and then says how long the step before took, so the steps of all routes are taken in
turns although each is a whole run of its own.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from models import minilm

BATCH, LENGTH, RANK, TOKENS = 16, 64, 8, 20
LABELS = ("negative", "neutral", "positive")
FULL_RATE, ADAPTER_RATE, TOKENS_RATE = 5e-5, 1e-3, 1e-2
ROWS = {  # row -> (whom it is beside, ftc's passes, learning rate)
    "full": ("Trainer", "", FULL_RATE),
    "ffn": ("Trainer", 'freeze{train="ffn|head"}', 2 * FULL_RATE),
    "lora": ("PEFT", f'lora{{rank={RANK},alpha=16,target="*.query.weight|*.value.weight"}}',
             ADAPTER_RATE),
    "prefix": ("PEFT", f"prefix{{tokens={TOKENS}}}", TOKENS_RATE),
    "prompt": ("PEFT", f"prompt{{tokens={TOKENS}}}", TOKENS_RATE),
}  # fmt: skip
_FFN = re.compile(r"layer\.\d+\.(intermediate|output)\.dense|^classifier")


class Turns:
    """When this process may take a step, and the seconds of its processor that steps took."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._last: float | None = None

    def begin(self) -> None:
        """Says what the last step took, and waits."""
        self._pipe.send(self._last)
        self._pipe.recv()
        self._start = time.process_time()

    def end(self) -> None:
        """The step is done; what comes until the next one still belongs to this turn."""
        self._last = time.process_time() - self._start


def prepare(folder: Path, sentences: int, held_out: int) -> None:
    """Writes sentences (``examples/labelled_sentences.py``) and a model with a new head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    import labelled_sentences

    with redirect_stdout(sys.stderr):
        labelled_sentences.main(str(folder / "all.jsonl"))
    lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines()
    for name, part in (("eval", lines[:held_out]), ("train", lines[held_out:][:sentences])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(LABELS))
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder / "model")


def route(pipe: Connection, folder: Path, row: str, ours: bool, steps: int) -> None:
    """One run, from start to end; the last thing that it says is what it found."""
    import torch

    torch.set_num_threads(1)
    run = run_ftc if ours else run_transformers
    try:
        with redirect_stdout(sys.stderr):
            found = run(Turns(pipe), folder, row, steps)
    except Exception as error:
        pipe.send({"failed": f"{type(error).__name__}: {error}"})
        raise
    pipe.send({**found, "memory": peak_memory()})


def run_ftc(turns: Turns, folder: Path, row: str, steps: int) -> dict[str, Any]:
    """One run of ``ftc train``."""
    from ftc.runtime.training import trainer
    from ftc.runtime.training.config import TrainConfig
    from ftc.runtime.training.run import train

    step = trainer.Trainer._step

    def timed(self: Any, batches: Any) -> None:
        turns.begin()
        step(self, batches)
        turns.end()

    trainer.Trainer._step = timed  # type: ignore[method-assign]
    _, passes, rate = ROWS[row]
    report = train(TrainConfig(
        program=str(folder / "model"), data=str(folder / "train.jsonl"), passes=passes,
        objective="sequence-classification", eval=str(folder / "eval.jsonl"),
        out=str(folder / f"out-{row}"), batch=BATCH, length=LENGTH, learning_rate=rate,
        steps=steps, evaluate_every=10**9, save_every=10**9,
    ), force=True)  # fmt: skip
    assert report.after is not None
    return {"trainable": report.trainable, "accuracy": report.after["accuracy"],
            "loss": report.after["loss"]}  # fmt: skip


def run_transformers(turns: Turns, folder: Path, row: str, steps: int) -> dict[str, Any]:
    """One run of the Trainer in ftc's order, with PEFT where the row has it."""
    import torch
    import transformers

    from ftc.runtime.training.data.order import Order

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    model = _learning(plain, row)

    def examples(name: str) -> list[dict[str, Any]]:
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        tokens = tokenizer([r["text"] for r in rows], truncation=True, max_length=LENGTH)
        return [{**{k: tokens[k][i] for k in tokens}, "labels": LABELS.index(r["label"])}
                for i, r in enumerate(rows)]  # fmt: skip

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

    training = examples("train")
    order = Order(len(training), BATCH)
    epochs = range(-(-steps // order.steps_per_epoch))
    indices = [i for epoch in epochs for step in order.steps(epoch) for b in step for i in b]

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return indices

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH, max_steps=steps,
        per_device_eval_batch_size=BATCH, learning_rate=ROWS[row][2], report_to=[],
        save_strategy="no", logging_steps=10**9, use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    loop = Ordered(
        model, arguments, train_dataset=training, eval_dataset=examples("eval"),
        data_collator=transformers.DataCollatorWithPadding(tokenizer), callbacks=[Callback()],
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )  # fmt: skip
    loop.train()
    found = loop.evaluate()
    return {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "accuracy": float(found["eval_accuracy"]),
            "loss": float(found["eval_loss"])}  # fmt: skip


def _learning(model: Any, row: str) -> Any:
    """The model with PEFT's adapters, or with what else learns in this row."""
    if row == "ffn":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(_FFN.search(name)) and "attention" not in name)
    if ROWS[row][0] != "PEFT":
        return model
    import peft

    if row == "lora":
        config: Any = peft.LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=16,
                                      target_modules=["query", "value"])  # fmt: skip
    else:
        made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[row]
        config = made(task_type="SEQ_CLS", num_virtual_tokens=TOKENS)
    return peft.get_peft_model(model, config)


def peak_memory() -> int:
    """Bytes that this process held at most; unlike ``ru_maxrss`` without its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found is not None:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
