"""Sensitivity: how far the output drifts when one weight alone is changed by a pass.

For each weight and each pass, the pass runs on that weight only (its ``select``
option) and the drift of the program's output is measured on the probes. The
result tells which weights to leave alone, and is the same for int8, int4 and
low rank: anything that is a pass with a selector can be asked about.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftc.graph.cost import cost
from ftc.graph.errors import UsageError, nearest
from ftc.graph.program import Program
from ftc.graph.select import select
from ftc.graph.target import target
from ftc.passes.base import Context, Pass
from ftc.passes.pipeline import Pipeline

from .console import duration
from .pictures import figure_class, save_picture
from .probes import make_context

_PASSES = {"8": "int8", "4": "int4{method=rtn}"}
"""What ``--bits`` means. Rounding to nearest, because calibrating each weight takes minutes."""
_LAYERS_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one pass on one weight does.

    Attributes:
        weight: logical name of the weight.
        spec: the pass, without its selector.
        drift: relative error of the output against the program before.
        saved: bytes that the program is smaller.
    """

    weight: str
    spec: str
    drift: float
    saved: int


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """What ``ftc inspect --sensitivity`` found.

    Attributes:
        source: the program, as the user named it.
        inputs: what drift was measured on, in words.
        found: one entry for each weight and pass, the largest drift first.
    """

    source: str
    inputs: str
    found: tuple[Sensitivity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def passes_for(bits: str) -> tuple[Pass, ...]:
    """The passes that ``8,4`` asks about, in that order.

    Raises:
        UsageError: for bits that no pass quantizes to.
    """
    wanted = [each.strip() for each in bits.split(",")]
    for each in wanted:
        if each not in _PASSES:
            raise UsageError(f"no pass quantizes to {each!r} bits", fix=nearest(each, _PASSES))
    return Pipeline.parse(",".join(_PASSES[each] for each in dict.fromkeys(wanted))).passes


def inspect_sensitivity(
    program: Program,
    source: str,
    passes: Sequence[Pass],
    *,
    selector: str | None = None,
    calib: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Sensitivities:
    """The sensitivity of a program's weights, on text where it takes text.

    Args:
        program: not changed.
        source: the program, as the user named it.
        passes: see :func:`passes_for`.
        selector: which weights to ask about; by default all that a pass quantizes.
        calib: what to measure drift on, as for ``ftc compile``.
        progress: told how many runs are done and how long the rest takes.

    Raises:
        UsageError: for a selector that matches nothing, calibration data that does not
            fit, or when no pass changes any of these weights.
    """
    weights = select(selector, program) if selector else None
    ctx = make_context(program, calib, target("portable"), None, None, 0)
    begin = time.monotonic()

    def told(done: int, total: int) -> None:
        left = (time.monotonic() - begin) / done * (total - done) if done else None
        rest = f", {duration(left)} left" if left else ""
        progress(f"sensitivity: {done} of {total} runs{rest}")

    found = measure_sensitivity(program, passes, ctx, weights=weights, progress=told)
    if not found:
        why = "quantized already" if "quantized" in program.facts else "too small, or not read so"
        raise UsageError(
            f"no pass changes any of these weights: they are {why}",
            where=f"{source}: {', '.join(each.spec for each in passes)}",
            fix="ask about the model that this was compiled from"
            if "quantized" in program.facts
            else "ftc inspect MODEL --select SELECTOR shows what a selector means",
        )
    worst_first = sorted(found, key=lambda each: -each.drift)
    return Sensitivities(source, ctx.probe_source, tuple(worst_first))


def measure_sensitivity(
    program: Program,
    passes: Sequence[Pass],
    ctx: Context,
    *,
    weights: Iterable[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sensitivity]:
    """Runs every pass on every weight alone.

    Args:
        program: not changed; passes they need are run first.
        passes: each with a ``select`` option.
        ctx: the probes. Its budget is not applied.
        weights: logical names; by default all that a pass selects by itself.
        progress: told how many runs are done, of how many.

    Returns:
        One entry for each weight that a pass changes, in the order of the graph.

    Raises:
        UsageError: for a pass that selects no weights.
    """
    for each in passes:
        if "select" not in {f.name for f in dataclasses.fields(each)}:
            raise UsageError(
                f"{each.name} has no select option, so it cannot run on one weight",
                fix="ask about int8, int4 or lowrank",
            )
    free = dataclasses.replace(ctx, max_drift=None)
    bases = {each: _base(program, each, free) for each in passes}
    asked = [(each, name) for each in passes for name in _names(bases[each], each, weights)]
    found: list[Sensitivity] = []
    for done, (each, name) in enumerate(asked):
        progress(done, len(asked))
        alone = dataclasses.replace(each, select=name)  # type: ignore[call-arg]
        record = alone(bases[each], free).record
        if record.modified and record.drift is not None:
            saved = cost(bases[each]).bytes - record.bytes
            found.append(Sensitivity(name, each.spec, record.drift.relative, saved))
    progress(len(asked), len(asked))
    return found


def draw(found: Sequence[Sensitivity], path: Path) -> None:
    """Writes a picture: drift of each weight, one row of bars a pass, worst first.

    Raises:
        UsageError: without matplotlib.
        WriteError: when the disk is full; an old picture stays.
    """
    specs = list(dict.fromkeys(each.spec for each in found))
    figure = figure_class()(figsize=(10, 3.2 * max(1, len(specs))), layout="constrained")
    for axis, spec in zip(figure.subplots(len(specs), squeeze=False)[:, 0], specs, strict=True):
        rows = sorted((s for s in found if s.spec == spec), key=lambda s: -s.drift)
        rows = rows[:_LAYERS_SHOWN]
        axis.bar(range(len(rows)), [s.drift for s in rows], color="#3b6ea5")
        axis.set_xticks(range(len(rows)), [s.weight for s in rows], rotation=90, fontsize=5)
        axis.set_yscale("log")
        axis.set_ylabel("drift of the output")
        axis.set_title(f"{spec}, one weight at a time", fontsize=9)
    save_picture(figure, path)


def _base(program: Program, each: Pass, ctx: Context) -> Program:
    """``program`` after the passes that ``each`` needs (``canonicalize``, ``smooth``)."""
    needed = [p for p, reason in Pipeline([each]).plan(program) if reason is not None]
    return Pipeline(needed).run(program, ctx).program if needed else program


def _names(program: Program, each: Pass, weights: Iterable[str] | None) -> list[str]:
    """Weights to ask a pass about, in the order the graph reads them."""
    wanted = select(str(each.select), program)  # type: ignore[attr-defined]
    chosen = wanted if weights is None else wanted & frozenset(weights)
    order = {name: i for i, (name, _) in enumerate(program.tensors())}
    return sorted((n for n in chosen if n in order), key=order.__getitem__)
