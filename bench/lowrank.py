"""Low rank beside other ways to do it: what each costs in accuracy, at the same size.

Every route cuts the same share of the weights of the model's products, calibrated on
Python's documentation and judged on English prose that it was not calibrated on.

    python bench/lowrank.py [--model minilm|smollm2|all] [--removed 20 40] [--only WORDS]
                            [--int8] [--recover STEPS] [--windows N] [--json FILE] [--png FILE]

``plain``, ``diagonal`` (ASVD) and ``whitened`` (SVD-LLM) keep one share of every product,
``ftc`` shares ranks out under one budget. MiniLM: cosine of mean-pooled sentence
embeddings to those of the original, mean and least, and the rank correlation of the
sentences' similarities. SmolLM2: perplexity in windows of 128 tokens, and its ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from lowrank_judge import Model
from tell import figure_of, label_accuracy, say

from ftc.graph.errors import FtcError
from ftc.graph.fisher import Moments, moments
from ftc.graph.program import Program
from ftc.passes import lowrank_metric
from ftc.passes.pipeline import Pipeline
from ftc.passes.text import parse_pass
from ftc.runtime.measure import machine
from ftc.runtime.recover import recover

ROUTES = {
    "plain": "lowrank{{ratio={0},method=plain}}",
    "diagonal": "lowrank{{ratio={0},method=diagonal}}",
    "whitened": "lowrank{{ratio={0},method=whitened}}",
    "ftc": "lowrank{{budget={0}}}",
}
SHARES = [10, 20, 30, 40, 60]


@dataclass
class Row:
    """One route at one share.

    Attributes:
        route: its name, with what came after.
        removed: share of the products' weights that was asked for.
        found: share that was removed.
        accuracy: figures by name.
        seconds: wall time of the passes; statistics count at the first share only.
        failed: why there is nothing.
    """

    route: str
    removed: float
    found: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str = ""


class Statistics:
    """Moments of one model, collected once for a method and not again for each share."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, dict[str, Any]]] = {}

    def __call__(self, program: Program, *given: Any, **options: Any) -> Moments:
        """As :func:`ftc.graph.fisher.moments`, of the nodes of ``program``."""
        nodes = {node.name: node for node in program.graph.nodes}
        key = f"{options['gradients']} {bool(options['by_outputs'])}"
        if key not in self._known:
            found = vars(moments(program, *given, **options))
            self._known[key] = {part: {n.name: v for n, v in of.items()}
                                for part, of in found.items()}  # fmt: skip
        return Moments(**{part: {nodes[name]: v for name, v in of.items()}
                          for part, of in self._known[key].items()})  # fmt: skip


class Table:
    """The rows of one model, in a file as they come: a run that was cut off goes on there."""

    def __init__(self, model: str, path: Path | None) -> None:
        self._model, self._path = model, path
        known = json.loads(path.read_text()) if path and path.exists() else {}
        self.rows = [Row(**each) for each in known.get(model, [])]

    def lacks(self, route: str, removed: float) -> bool:
        """Whether this row is still to be made."""
        return all((row.route, row.removed) != (route, removed) for row in self.rows)

    def add(self, row: Row) -> None:
        """Keeps one more."""
        self.rows.append(row)
        if self._path:
            held = json.loads(self._path.read_text()) if self._path.exists() else {}
            held |= {"machine": machine(), self._model: [asdict(each) for each in self.rows]}
            self._path.write_text(json.dumps(held, indent=1) + "\n")


def measure(model: Model, table: Table, options: argparse.Namespace) -> None:
    """Every route at every share."""
    lowrank_metric.moments = Statistics()  # type: ignore[assignment]
    for removed in (percent / 100 for percent in options.removed):
        for name, spec in ROUTES.items():
            if options.only in name:
                Route(model, table, name, removed)(spec.format(round(1 - removed, 4)), options)


@dataclass(frozen=True)
class Route:
    """One route at one share, with what may come after it."""

    model: Model
    table: Table
    name: str
    removed: float

    def __call__(self, spec: str, options: argparse.Namespace) -> None:
        """Adds its rows, as far as they are missing; what they share is made once."""
        wanted = [""] + [", int8"] * options.int8
        if options.recover and self.name == "ftc":
            wanted += [", recovered"] + [", recovered, int8"] * options.int8
        wanted = [after for after in wanted if self.table.lacks(self.name + after, self.removed)]
        made: dict[str, tuple[Program, float]] = {}
        for after in wanted:
            say(f"{self.model.name}: {self.name}{after}, {self.removed:.0%} removed")
            row = Row(self.name + after, self.removed)
            try:
                done, row.seconds = self._made(after, spec, options, made)
                row.found, row.accuracy = self.model.removed(done), self.model.judged(done)
            except FtcError as error:
                row.failed = str(error).splitlines()[0]
            self.table.add(row)

    def _made(
        self, after: str, spec: str, options: argparse.Namespace, made: dict[str, Any]
    ) -> tuple[Program, float]:
        """The program and the wall time of its passes."""
        if after in made:
            return made[after]
        ctx = self.model.ctx
        if not after:
            made[""] = self._timed(lambda: parse_pass(spec)(self.model.program, ctx).program)
            return made[""]
        before, _, last = after.rpartition(", ")
        cut, spent = self._made(before, spec, options, made)
        if last == "int8":
            done, seconds = self._timed(lambda: Pipeline.parse("int8").run(cut, ctx).program)
        else:
            original = self.model.program
            done, seconds = self._timed(lambda: recover(cut, original, ctx, options.recover))
        made[after] = done, spent + seconds
        return made[after]

    @staticmethod
    def _timed(make: Callable[[], Program]) -> tuple[Program, float]:
        start = time.perf_counter()
        return make(), time.perf_counter() - start


def show(name: str, rows: Sequence[Row]) -> None:
    """Prints a table."""
    names = list(dict.fromkeys(name for row in rows for name in row.accuracy))
    print(f"\n{name:20}{'removed':>9}{'found':>8}" + "".join(f"{n:>14}" for n in names)
          + f"{'seconds':>9}")  # fmt: skip
    for row in rows:
        if row.failed:
            print(f"{row.route:20}{row.removed:9.0%}  {row.failed}")
            continue
        cells = "".join(f"{row.accuracy[n]:14.4g}" for n in names)
        print(f"{row.route:20}{row.removed:9.0%}{row.found:8.1%}{cells}{row.seconds:9.0f}")


def picture(found: dict[str, list[Row]], path: Path) -> None:
    """Accuracy against the share removed, a line a route."""
    figure, panels = figure_of(list(found), 6)
    for axes, rows in zip(panels, found.values(), strict=bool(panels)):
        rows = [row for row in rows if not row.failed]
        measure_name = next(iter(rows[0].accuracy))
        for route in dict.fromkeys(row.route for row in rows):
            own = sorted((row.removed, row.accuracy[measure_name])
                         for row in rows if row.route == route)  # fmt: skip
            axes.plot(*zip(*own, strict=True), label=route,
                      marker="o", linestyle="--" if "int8" in route else "-")  # fmt: skip
        axes.set(xlabel="share of weights removed")
        label_accuracy(axes, measure_name)
        axes.legend(fontsize=7)
    if figure:
        figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["minilm", "smollm2", "all"], default="all")
    parser.add_argument("--removed", type=int, nargs="+", default=SHARES, metavar="PERCENT")
    parser.add_argument("--only", default="", help="routes whose name has these words")
    parser.add_argument("--int8", action="store_true", help="each also with int8 after it")
    parser.add_argument("--recover", type=int, metavar="STEPS", help="ftc also with recovery")
    parser.add_argument("--windows", type=int, default=16, help="of SmolLM2's prose")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows in it are not made again")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args()
    found: dict[str, list[Row]] = {}
    for name in ("minilm", "smollm2"):
        table = Table(name, options.json)
        if options.model in (name, "all"):
            measure(Model(name, options.windows), table, options)
        if table.rows:
            found[name] = sorted(table.rows, key=lambda row: row.removed)
            show(name, found[name])
    if options.png:
        picture(found, options.png)


if __name__ == "__main__":
    main()
