"""Targets: the machine that will run a program, what is right there, and what it costs.

A quantized product can be computed by several kernels. Which of them are
*right* depends on the instruction set: without VNNI (or ARM's dot product) a
CPU adds two products ``u8 * s8`` in 16 bits, and weights beyond 64 saturate
(:mod:`ftc.graph.quantize`). Which of them is *fast* depends on the machine and
on the rows that are multiplied at once, so it is measured
(:mod:`ftc.runtime.kernels`). One kernel's seconds for ``[rows, in] x [in, out]``:

    t(rows, in, out) = fixed(rows) + slope(rows) * in * out

with ``fixed`` and ``slope`` fitted at a few numbers of rows, straight lines
between them, and proportional to the rows beyond the last.
"""

from __future__ import annotations

import math
import platform
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import UsageError, nearest

Kernel = Literal["integer", "blocked", "float", "blocked4"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
WORDS: Mapping[str, str] = {
    "integer": "8-bit weights per channel, each row of activations quantized at run time",
    "blocked": "8-bit weights in groups, activations quantized group by group",
    "float": "no quantization",
    "blocked4": "4-bit weights in groups, activations quantized group by group",
}
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
_DOT = frozenset({"asimddp", "i8mm"})
_UNMEASURED = (
    "its costs were never measured, so the first that is right there; "
    "--target native on such a machine measures them"
)
_WORTH_IT = 0.9  # float must take less than this of the quantized time to be worth its bytes


@dataclass(frozen=True, slots=True)
class Point:
    """Cost of one kernel at a number of rows: seconds, and seconds for each weight."""

    rows: int
    fixed: float
    slope: float


@dataclass(frozen=True, slots=True)
class CostTable:
    """What each kernel takes.

    Attributes:
        origin: who measured it, where and with what, in words.
        measured: whether it was measured on the target itself.
        points: for each kernel its points, rows ascending.
    """

    origin: str
    measured: bool
    points: Mapping[str, tuple[Point, ...]]

    def seconds(self, kernel: str, rows: int, inputs: int, outputs: int) -> float:
        """Time of one product; the unit is seconds where ``measured``, else comparable only.

        Raises:
            KeyError: for a kernel that is not in the table.
        """
        points = self.points[kernel]
        at = bisect_left([p.rows for p in points], rows)
        if at == len(points):
            return rows / points[-1].rows * _time(points[-1], inputs, outputs)
        after, before = points[at], points[max(at - 1, 0)]
        high, low = _time(after, inputs, outputs), _time(before, inputs, outputs)
        if after is before or rows <= before.rows:
            return low
        return low + (high - low) * (rows - before.rows) / (after.rows - before.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        points = {k: [[p.rows, p.fixed, p.slope] for p in v] for k, v in self.points.items()}
        return {"origin": self.origin, "measured": self.measured, "points": points}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> CostTable:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: for values that are no table.
        """
        try:
            points = {
                str(kernel): tuple(Point(int(r), float(f), float(s)) for r, f, s in rows)
                for kernel, rows in given["points"].items()
            }
            table = cls(str(given["origin"]), bool(given["measured"]), points)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no cost table: {error!r}") from error
        if not points or any(not rows or list(rows) != sorted(rows, key=_rows)
                             for rows in points.values()):  # fmt: skip
            raise ValueError("a cost table without points, or out of order")
        return table


def _rows(point: Point) -> int:
    return point.rows


def _time(point: Point, inputs: int, outputs: int) -> float:
    return point.fixed + point.slope * inputs * outputs


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel of one product.

    Attributes:
        kernel: which.
        speed: times as fast as float, geometric mean over the shapes; None without a table.
        reason: one clause.
    """

    kernel: Kernel
    speed: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of machine.

    Attributes:
        name: ``portable``, ``avx2``, ...
        features: its instruction sets that matter here, by the kernel's names for them.
        kernels: which exist there and are right, the one preferred without costs first.
        wide: whether integer products are right with all 8 bits of a weight; else 7.
        table: what they cost, or None where nobody measured.
        words: what it is, for people.
    """

    name: str
    features: frozenset[str]
    kernels: tuple[Kernel, ...]
    wide: bool
    table: CostTable | None
    words: str

    def choose(
        self, work: Sequence[tuple[int, int, int]], kernels: Sequence[Kernel] | None = None
    ) -> Choice:
        """The kernel that takes least for one product over all shapes it will meet.

        Least is the least geometric mean, so that a small shape, which is run more
        often, counts as much as a large one. Float has to be a tenth faster than the
        best quantized kernel, since its weights are four times as large.

        Args:
            work: ``(rows, in, out)`` at each shape.
            kernels: those that the product has a form for; all of the target's by default.
        """
        able = [k for k in self.kernels if kernels is None or k in kernels]
        if not able:
            return Choice("float", None, f"no other kernel of {self.name} fits")
        if self.table is None or not work:
            why = _UNMEASURED if self.table is None else "no shapes were named"
            return Choice(able[0], None, why)
        means = {k: _mean(self.table, k, work) for k in {*able, "float"} if k in self.table.points}
        judged = {k: t / (_WORTH_IT if k == "float" else 1) for k, t in means.items() if k in able}
        best = min(able, key=lambda k: judged.get(k, math.inf))
        if best not in judged:
            return Choice(able[0], None, "its kernels are not in the table")
        speed = means["float"] / means[best] if "float" in means else None
        return Choice(best, speed, "quantizing does not pay" if best == "float" else "fastest")


def _mean(table: CostTable, kernel: str, work: Sequence[tuple[int, int, int]]) -> float:
    """Geometric mean of the seconds over ``work``."""
    logs = [math.log(max(table.seconds(kernel, *each), 1e-12)) for each in work]
    return math.exp(sum(logs) / len(logs))


def target(name: str) -> Target:
    """The target called ``name``; ``native`` is this machine.

    Raises:
        UsageError: for an unknown name, with the nearest one.
    """
    from .target_tables import shipped

    if name == "native":
        return _native()
    if name not in _NAMED:
        raise UsageError(f"unknown target {name!r}", fix=nearest(name, names()))
    given = _NAMED[name]
    return replace(given, table=shipped(name))


def names() -> tuple[str, ...]:
    """Every target's name, ``native`` last."""
    return (*_NAMED, "native")


def with_table(given: Target, table: CostTable) -> Target:
    """``given`` with measured costs."""
    return replace(given, table=table)


_CPU: tuple[Kernel, ...] = ("integer", "blocked", "float", "blocked4")
_NAMED = {
    each.name: each
    for each in (
        Target("portable", frozenset(), _CPU, False, None, "any CPU; right everywhere"),
        Target("avx2", frozenset({"avx2"}), _CPU, False, None, "x86-64 with AVX2, without VNNI"),
        Target("avx512-vnni", frozenset({"avx2", "avx512f", "avx512_vnni"}), _CPU, True, None,
               "x86-64 with AVX-512 and VNNI"),
        Target("arm-dotprod", frozenset({"asimddp"}), _CPU, True, None,
               "64-bit ARM with the dot-product instructions"),
        Target("cuda", frozenset({"cuda"}), ("blocked4", "blocked", "float"), True, None,
               "an NVIDIA GPU: weights in groups, activations in float"),
    )
}  # fmt: skip


def _native() -> Target:
    found = features()
    wide = bool(found & (_VNNI | _DOT))
    return Target("native", found, _CPU, wide, None, processor())


@cache
def features() -> frozenset[str]:
    """Instruction sets of this machine that decide about kernels, by Linux's names for them."""
    known = {"avx2", "avx512f", *_VNNI, *_DOT}
    if flags := _cpuinfo("flags") or _cpuinfo("Features"):
        return frozenset(flags.split()) & known
    import numpy

    config: Any = numpy.show_config(mode="dicts")
    simd = config.get("SIMD Extensions", {})
    lines = {*simd.get("baseline", ()), *simd.get("found", ())}
    words = {"AVX2": "avx2", "AVX512F": "avx512f", "AVX512_ICL": "avx512_vnni",
             "AVX512_SPR": "avx512_vnni", "ASIMDDP": "asimddp"}  # fmt: skip
    return frozenset(words[line] for line in lines if line in words)


def processor() -> str:
    """The processor's name, as it tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """The first value of ``key`` in Linux's list, empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == key), "")
