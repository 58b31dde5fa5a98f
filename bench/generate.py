"""Generation beside others: SmolLM2 with a cache, at 4 bits, every route in turns.

    python bench/generate.py [--keep FOLDER] [--only WORDS] [--threads 1,2] [--rounds N]
                             [--json FILE] [--png FILE]

With one thread all routes are open in one process and take turns, so a machine that changes
speed changes it for all. With several each has a process of its own, one after the other:
threads of one that wait for work spin, and would take the cores of the next. A first token
is the whole prompt read; a cached token is the median over rounds of tokens after a prompt
of so many. Memory is the peak of a process of its own that reads 128 tokens and says 64,
with and without what it held before the model was opened. Perplexity goes through the
cache, token by token, on prose that nothing was calibrated on. With ``--keep`` what was
made stays in a folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from generate_routes import ROUTES, Speaker
from models import Missing, smollm2

from ftc.runtime.measure import Timing, interleaved, machine, ratio

PROMPTS, CACHED = (32, 128, 512), (32, 64, 128, 512, 1024)
BASE = "onnxruntime-genai int4"
BESIDE = ("onnxruntime-genai", "openvino", "nncf")
_WINDOW = 128


@dataclass
class Row:
    """One route: seconds by threads and by tokens, as ``1 thread, cached 32``.

    Attributes:
        megabytes: of what is shipped; peak, beyond: of memory, in all and over what the
            process held before.
        seconds: medians; against: times as long as the same of :data:`BASE`.
        missing: why there is nothing.
    """

    route: str
    megabytes: float | None = None
    perplexity: float | None = None
    peak: float | None = None
    beyond: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    against: dict[str, float] = field(default_factory=dict)
    missing: str = ""


def tokens(count: int) -> list[int]:
    """The beginning of the prose, in tokens of the model."""
    from transformers import AutoTokenizer

    from ftc.tests.prose import paragraphs

    path = smollm2()
    found = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids: list[int] = found("\n\n".join(paragraphs()))["input_ids"]
    assert len(ids) >= count
    return ids[:count]


def timed(folder: Path, names: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """All routes in turns, in this process: samples by what was measured and by route."""
    speakers = {name: ROUTES[name].open(folder / slug(name), threads) for name in names}
    ids, found = tokens(max(CACHED)), {}
    for length in PROMPTS:
        runs = {n: (lambda s=s, k=length: s.first(ids[:k])) for n, s in speakers.items()}
        found[f"first {length}"] = interleaved(runs, seconds=0, least=max(3, rounds // 4))
    for length in CACHED:
        for speaker in speakers.values():
            speaker.first(ids[:length])
        runs = {n: (lambda s=s: s.more(1)) for n, s in speakers.items()}
        found[f"cached {length}"] = interleaved(runs, seconds=0, least=rounds)
    return {k: {n: t.samples for n, t in each.items()} for k, each in found.items()}


def remembered(folder: Path, name: str) -> dict[str, float]:
    """Peak memory of this process, in all and beyond what it held before, in millions of bytes."""
    import torch  # noqa: F401  (every route's process has it)

    before = _memory("VmRSS")
    speaker = ROUTES[name].open(folder / slug(name), 1)
    speaker.first(list(range(100, 228)))
    speaker.more(64)
    peak = _memory("VmHWM")
    return {"peak": peak, "beyond": peak - before}


def _memory(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key))


def perplexity(speaker: Speaker, windows: list[list[int]]) -> float:
    """Of the next token, through the cache."""
    losses = []
    for window in windows:
        for scores, token in zip(speaker.score(window), window[1:], strict=True):
            wide = scores.astype(np.float64)
            peak = wide.max()
            losses.append(peak + math.log(np.exp(wide - peak).sum()) - wide[token])
    return math.exp(sum(losses) / len(losses))


def judged(folder: Path, name: str, windows: int) -> float:
    """Perplexity of a route, computed once for a folder."""
    path = folder / f"{slug(name)}.perplexity.json"
    if not path.exists():
        ids = tokens(windows * _WINDOW)
        each = [ids[i : i + _WINDOW] for i in range(0, len(ids), _WINDOW)]
        path.write_text(json.dumps(perplexity(ROUTES[name].open(folder / slug(name), 1), each)))
    return float(json.loads(path.read_text()))


def slug(name: str) -> str:
    """A name of a folder."""
    return name.replace(" ", "-")


def apart(*words: str, threads: int = 1) -> Any:
    """What this script prints as JSON when it is called so, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, __file__, *words], env=environment,
                          stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    """The rows."""
    rows = [Row(name) for name in ROUTES if options.only in name]
    for row in rows:
        say(row.route)
        made, scratch = folder / slug(row.route), folder / f"{slug(row.route)}.part"
        try:
            if not made.exists():
                ROUTES[row.route].prepare(smollm2(), scratch)
                scratch.rename(made)
            row.megabytes = ROUTES[row.route].megabytes(made)
            row.perplexity = judged(folder, row.route, options.windows)
            vars(row).update(apart("--memory-of", row.route, "--keep", str(folder)))
        except Missing as missing:
            row.missing = str(missing)
        except Exception as error:  # one tool that fails must not take the table with it
            row.missing = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    names = [row.route for row in rows if not row.missing]
    for threads in options.threads:
        say(f"{threads} threads: timing")
        found: dict[str, dict[str, list[float]]] = {}
        for group in [names] if threads == 1 else [[name] for name in names]:
            words = ["--time", "|".join(group), "--keep", str(folder)]
            words += ["--rounds", str(options.rounds), "--threads", str(threads)]
            for what, samples in apart(*words, threads=threads).items():
                found.setdefault(what, {}).update(samples)
        for row in rows:
            for what, samples in found.items():
                fill(row, f"{threads} thread, {what}", samples)
    return rows


def fill(row: Row, what: str, samples: dict[str, list[float]]) -> None:
    """One number of one row."""
    if row.route in samples:
        own = Timing(tuple(samples[row.route]))
        row.seconds[what] = own.median
        if BASE in samples:
            row.against[what] = ratio(own, Timing(tuple(samples[BASE])))


def show(rows: list[Row]) -> None:
    """A table: milliseconds, and in brackets times as long as :data:`BASE`."""
    for row in rows:
        print(f"\n{row.route}: {row.missing}" if row.missing else
              f"\n{row.route}: {row.megabytes:.1f} MB, perplexity {row.perplexity:.2f}, peak "
              f"{row.peak:.0f} MB, {row.beyond:.0f} beyond what was there before")  # fmt: skip
        for what, seconds in row.seconds.items():
            per = f", {1 / seconds:.0f} tokens/s" if "cached" in what else ""
            print(
                f"  {what:24}{seconds * 1e3:9.2f} ms  ({row.against.get(what, math.nan):.2f}){per}"
            )


def picture(rows: list[Row], path: Path) -> None:
    """Milliseconds a cached token by how many are cached, a line a route."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        points = [(n, row.seconds.get(f"1 thread, cached {n}", math.nan) * 1e3) for n in CACHED]
        axes.plot(*zip(*points, strict=True), marker="o", label=row.route)
    axes.set(xlabel="tokens before", ylabel="ms a token, one thread", xscale="log", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of what is made and judged")
    parser.add_argument("--only", default="", help="routes whose name has these words")
    parser.add_argument(
        "--threads",
        type=lambda t: [int(n) for n in t.split(",")],
        default=[1, 2],
        help="numbers of them",
    )
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--windows", type=int, default=40, help="of 128 tokens, for perplexity")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    parser.add_argument("--time", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.time:
        names = options.time.split("|")
        print(json.dumps(timed(options.keep, names, options.threads[0], options.rounds)))
        return
    if options.memory_of:
        print(json.dumps(remembered(options.keep, options.memory_of)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder, options)
    show(rows)
    here = machine(*BESIDE)
    print("\n" + ", ".join(f"{name} {here[name] or 'not installed'}" for name in BESIDE))
    if options.json:
        found = {"machine": here, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.png:
        picture(rows, options.png)


if __name__ == "__main__":
    main()
