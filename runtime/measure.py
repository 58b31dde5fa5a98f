"""Measuring time so that two numbers can be compared.

A machine that other work shares changes speed while one measures, so things to
compare run *interleaved*: one call of each a round, the order turning with every
round, after a warm-up that is not counted. What is reported is the median and the
quartiles, and as the ratio the median of the rounds' own ratios:

    ratio = median_i (a_i / b_i)

Every timing is labelled by what ran it and on which machine (:func:`machine`).
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
_PACKAGES = ("torch", "onnxruntime", "transformers", "numpy")
_WIDE, _BUSY = 1.5, 2.0
"""A ratio's upper quartile over its lower, and a median over the fastest round: beyond these
other work on the machine was measured too."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall times of one thing, in seconds, one for each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the rounds were faster."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the rounds was faster than the first, a quarter slower than the second."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Median, quartiles (seconds) and the number of rounds."""
        low, high = self.quartiles
        return {"median": self.median, "quartiles": [low, high], "rounds": len(self.samples)}


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 0.5,
    least: int = 3,
    most: int = 200,
) -> dict[str, Timing]:
    """Times several things in turns.

    Args:
        runs: what to call, by label.
        seconds: wall time to spend on all of them together, warm-up apart.
        least: rounds that are made however long they take.
        most: rounds that are enough.

    Returns:
        A timing for every label; their samples belong together round by round.
    """
    labels = list(runs)
    samples: dict[str, list[float]] = {label: [] for label in labels}
    for run in runs.values():
        run()
    start = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - start > seconds:
            break
        first = turn % len(labels)
        for label in labels[first:] + labels[:first]:
            begin = time.perf_counter()
            runs[label]()
            samples[label].append(time.perf_counter() - begin)
    return {label: Timing(tuple(times)) for label, times in samples.items()}


def ratio(a: Timing, b: Timing) -> float:
    """How many times as long ``a`` takes as ``b``: the median of the rounds' ratios."""
    return ratios(a, b).median


def ratios(a: Timing, b: Timing) -> Timing:
    """How many times as long ``a`` takes as ``b``, round by round."""
    return Timing(tuple(x / y for x, y in zip(a.samples, b.samples, strict=True)))


def noise(a: Timing, b: Timing) -> str:
    """Why the ratio of two timings is to be doubted, in words; empty where it is not."""
    found = []
    low, high = ratios(a, b).quartiles
    if high > _WIDE * low:
        found.append(f"the quartiles of the rounds' ratios are {low:.2g} and {high:.2g}")
    if max(t.median / min(t.samples) for t in (a, b)) > _BUSY:
        found.append(f"half of the rounds took over {_BUSY:g} times as long as the fastest")
    if a.quartiles[0] <= b.quartiles[1] and b.quartiles[0] <= a.quartiles[1]:
        found.append("the quartiles overlap")
    return ", ".join(found)


@cache
def machine(*packages: str) -> dict[str, Any]:
    """The processor, its instruction sets that matter here, cores, and versions of the engines.

    Args:
        packages: others whose version matters; None for one that is not installed.
    """
    return {
        "processor": _processor(),
        "instructions": [name for name in _INSTRUCTIONS if name in _flags()],
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in (*_PACKAGES, *packages)},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str:
    """The first value of ``key`` in /proc/cpuinfo, empty elsewhere than on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((v.strip() for k, _, v in (line.partition(":") for line in lines)
                 if k.strip() == key), "")  # fmt: skip


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> frozenset[str]:
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())
