"""Quantization beside others: latency, size and accuracy of every route, in one run.

Each route turns the same model into something that runs; all of them are timed in
turns in one process, one thread, and judged on English prose that nothing was
calibrated on. A route whose package is missing is a row that says so.

    python bench/quantize.py [--model minilm|smollm2|all] [--quick] [--only WORDS]
                             [--keep FOLDER] [--json FILE] [--png FILE]

MiniLM: cosine of mean-pooled sentence embeddings to those of torch in float32.
SmolLM2: perplexity in windows of 128 tokens, and the ratio to that of torch.
Ratios of latency are to torch eager and, in brackets, to the torch exporter's
model in onnxruntime. With ``--keep``, what was made and judged stays in a folder: a
second run there times only, which is what a machine has to be quiet for.
``pip install "ftc[bench]"`` brings the other packages.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from models import Missing
from quantize_routes import ROUTES, Feed, Model, Run, minilm, smollm2
from tell import figure_of, label_accuracy, say

from ftc.runtime.measure import Timing, interleaved, machine, ratio

BASE, EXPORTED = "torch eager fp32", "onnxruntime fp32, torch exporter"
SHAPES = {"minilm": ((1, 32), (1, 128), (8, 32), (8, 128)), "smollm2": ((1, 1), (1, 128))}
QUICK = {"minilm": ((1, 32), (8, 128)), "smollm2": ((1, 1), (1, 128))}


@dataclass
class Row:
    """One route of one model.

    Attributes:
        route: its name.
        megabytes: of what is shipped, in millions of bytes.
        accuracy: cosine mean and min, or perplexity and its ratio to float32.
        seconds: median latency by shape; speed and exported: times as fast as torch
            eager and as the torch exporter's model.
        missing: why there is nothing.
    """

    route: str
    megabytes: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    exported: dict[str, float] = field(default_factory=dict)
    missing: str = ""


def measure(model: Model, scratch: Path, options: argparse.Namespace) -> list[Row]:
    """The rows of one model."""
    rows, runs = [], {}
    known = Judged(scratch / "judged.json", options.quick)
    for name, make in ROUTES.items():
        wanted = name in (BASE, EXPORTED) or options.only in name
        if model.name not in make.models or not wanted:
            continue
        rows.append(row := Row(name))
        say(f"{model.name}: {name}")
        try:
            runs[name], row.megabytes = make(model, scratch)
            judge = partial(judged, model, runs[name], runs[BASE], options.quick)
            row.accuracy = known(name, judge)
        except Missing as missing:
            row.missing = str(missing)
        except Exception as error:  # one tool that fails must not take the table with it
            row.missing = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            runs.pop(name, None)
    time_all(model, rows, runs, options)
    return rows


class Judged:
    """Accuracies by route, each computed once for a folder."""

    def __init__(self, path: Path, quick: bool) -> None:
        self._path, self._quick = path, quick

    def __call__(self, route: str, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
        """That of ``route``, from the file where it is there."""
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        key = f"{route}, quick" if self._quick else route
        if key not in known:
            known[key] = compute()
            self._path.write_text(json.dumps(known, indent=1) + "\n")
        found: dict[str, float] = known[key]
        return found


def time_all(model: Model, rows: list[Row], runs: dict[str, Run], options: Any) -> None:
    """Fills in latencies: every route in turns, at each shape."""
    for batch, length in (QUICK if options.quick else SHAPES)[model.name]:
        shape = f"{batch}x{length}"
        say(f"{model.name}: timing {shape}")
        feed = model.random(batch, length)
        seconds = options.seconds * len(runs)
        times = interleaved({n: partial(r, feed) for n, r in runs.items()}, seconds=seconds)
        for row in rows:
            if row.route in times:
                fill(row, shape, times)


def fill(row: Row, shape: str, times: dict[str, Timing]) -> None:
    """One row at one shape."""
    row.seconds[shape] = times[row.route].median
    row.speed[shape] = ratio(times[BASE], times[row.route])
    if EXPORTED in times:
        row.exported[shape] = ratio(times[EXPORTED], times[row.route])


def judged(model: Model, run: Run, base: Run, quick: bool) -> dict[str, float]:
    """Accuracy of a route on the model's text."""
    if model.name == "smollm2":
        value, exact = (perplexity(each, model.texts(quick)) for each in (run, base))
        return {"perplexity": value, "ratio": value / exact}
    pairs = [(pooled(run, feed), pooled(base, feed)) for feed in model.texts(quick)]
    got, want = (np.concatenate(each) for each in zip(*pairs, strict=True))
    cosine = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    return {"cosine": float(cosine.mean()), "least": float(cosine.min())}


def pooled(run: Run, feed: Feed) -> Any:
    """Mean of the token embeddings that the mask lets in, ``[rows, width]``."""
    mask = feed["attention_mask"][..., None]
    return (run(feed) * mask).sum(1) / mask.sum(1)


def perplexity(run: Run, feeds: list[Feed]) -> float:
    """Of the next token, over all windows."""
    losses = []
    for feed in feeds:
        scores = run(feed)[:, :-1].astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        logs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        losses.append(-np.take_along_axis(logs, feed["input_ids"][:, 1:, None], -1).mean())
    return float(np.exp(np.mean(losses)))


def show(name: str, rows: list[Row]) -> None:
    """Prints a table: speed against torch eager, and against the exporter's model in brackets."""
    shapes = list(next(row.seconds for row in rows if row.seconds))
    names = list(next(row.accuracy for row in rows if row.accuracy))
    head = "".join(f"{each:>14}" for each in shapes) + f"{'MB':>8}"
    print(f"\n{name:36}{head}{''.join(f'{each:>12}' for each in names)}")
    for row in rows:
        if row.missing:
            print(f"{row.route:36}  {row.missing}")
            continue
        cells = "".join(f"{row.speed[s]:6.2f} ({row.exported.get(s, float('nan')):.2f})".rjust(14)
                        for s in shapes)  # fmt: skip
        numbers = "".join(f"{row.accuracy[each]:12.4f}" for each in names)
        print(f"{row.route:36}{cells}{row.megabytes or 0:8.1f}{numbers}")


def picture(found: dict[str, list[Row]], path: Path) -> None:
    """Accuracy against latency at each model's largest shape, a point a route."""
    figure, panels = figure_of(list(found), 8)
    for axes, rows in zip(panels, found.values(), strict=bool(panels)):
        shown = [row for row in rows if row.seconds]
        shape, measure_name = list(shown[0].seconds)[-1], next(iter(shown[0].accuracy))
        for number, row in enumerate(shown, 1):
            color = "tab:red" if row.route.startswith("ftc") else "tab:gray"
            x, y = row.seconds[shape] * 1e3, row.accuracy[measure_name]
            axes.plot(x, y, "o", color=color, label=f"{number}  {row.route}")
            axes.annotate(str(number), (x, y), fontsize=7, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
        axes.set(xlabel=f"ms at {shape}")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), handlelength=0)
        label_accuracy(axes, measure_name)
    if figure:
        figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["minilm", "smollm2", "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="less text, two shapes")
    parser.add_argument("--only", default="", help="routes whose name has these words")
    parser.add_argument("--seconds", type=float, help="for each route at each shape")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of what is made and judged")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args()
    options.seconds = options.seconds or (0.5 if options.quick else 2.0)
    names = ["minilm", "smollm2"] if options.model == "all" else [options.model]
    found: dict[str, list[Row]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.keep / name if options.keep else Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            found[name] = measure({"minilm": minilm, "smollm2": smollm2}[name](), folder, options)
        show(name, found[name])
    if options.json:
        rows = {name: [asdict(row) for row in each] for name, each in found.items()}
        options.json.write_text(json.dumps({"machine": machine(), **rows}, indent=1) + "\n")
    if options.png:
        picture(found, options.png)


if __name__ == "__main__":
    main()
