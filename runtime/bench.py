"""Latency of one program against another: interleaved, one process, the same inputs.

Without another program the two engines are compared: the lowered program in
onnxruntime against the same graph in torch. A model that is no bundle is captured
and lowered as it is, so that two programs run in the same engine.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftc.graph.bundle import is_bundle
from ftc.graph.cached import is_cached
from ftc.graph.cost import cost
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.words import listed

from .console import format_sizes
from .engine import MODEL, Engine, OnnxEngine, open_engine
from .measure import Timing, interleaved, machine, noise, ratio
from .steps import parse_step, steps, token_types, usual_steps
from .threads import set_threads
from .torch_engine import TorchEngine

_TEXT_SHAPES = ((8, 128), (4, 128), (2, 128), (1, 128), (1, 64), (1, 32), (1, 16), (1, 8))
LARGE = 13e9
"""Multiply-adds of one run at the larger of the usual shapes: half a second on one core."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Two timings at one shape.

    Attributes:
        sizes: of the dynamic dimensions.
        base, other: wall times; ``other`` is what the ratio is for.
        speedup: how many times as long ``base`` takes as ``other``.
    """

    sizes: dict[str, int]
    base: Timing
    other: Timing
    speedup: float

    @property
    def noise(self) -> str:
        """Why ``speedup`` is to be doubted, in words; empty where it is not."""
        return noise(self.base, self.other)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, times in seconds."""
        return {"sizes": self.sizes, "base": self.base.to_dict(), "other": self.other.to_dict(),
                "speedup": self.speedup, "noise": self.noise}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``ftc bench`` measured."""

    base: str
    other: str
    latencies: tuple[Latency, ...]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"base": self.base, "other": self.other, "machine": self.machine,
                "latencies": [each.to_dict() for each in self.latencies]}  # fmt: skip


def bench(
    source: str,
    against: str | None = None,
    *,
    task: str | None = None,
    threads: int | None = None,
    shapes: Sequence[str] = (),
    seconds: float = 2.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Latency of ``source`` against another program, or against itself in torch.

    Args:
        source, against: a bundle, or a model that can be captured.
        task: what models that are no bundles are captured for.
        threads: of both engines.
        shapes: sizes of dynamic dimensions, ``batch=8,sequence=128``; usual ones by default. Of
            a program with a cache ``past=512`` is how many tokens are there before.
        seconds: to spend on each shape.
        progress: told what runs.

    Raises:
        UsageError: when the two do not take the same inputs.
    """
    set_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        other = _lowered(source, Path(scratch) / "other.onnx", progress, task)
        base: Engine = TorchEngine(other.program)
        if against is not None:
            task = other.program.signature.task
            base = _lowered(against, Path(scratch) / "base.onnx", progress, task)
            _check_inputs(source, other.program, against, base.program)
        sizes = _sizes(shapes, base.program, other.program)
        latencies = compare(base, other, sizes, seconds=seconds, progress=progress)
    names = (f"{source}, graph" if against is None else against, source)
    labels = [f"{name} ({e.label})" for name, e in zip(names, (base, other), strict=True)]
    return Comparison(labels[0], labels[1], latencies, machine())


def _lowered(
    source: str, path: Path, progress: Callable[[str], None], task: str | None = None
) -> Engine:
    """What was named, in onnxruntime; lowered to ``path`` where it has no ONNX file."""
    progress(f"opening {source}")
    folder = Path(source).expanduser()
    if is_bundle(folder) and (folder / MODEL).is_file():
        return open_engine(source, "onnx")
    from .lower import lower, save_onnx

    program = capture(source, task=task)
    progress(f"lowering {source} to ONNX")
    save_onnx(lower(program), path)
    return OnnxEngine(program, path)


def _sizes(shapes: Sequence[str], base: Program, other: Program) -> list[dict[str, int]]:
    cached = next((p.signature for p in (other, base) if is_cached(p.signature)), None)
    if cached is None:
        return [other.signature.parse_sizes(s) for s in shapes] or usual_shapes(base)
    return [parse_step(cached, text) for text in shapes] or usual_steps(cached)


def _check_inputs(source: str, program: Program, against: str, other: Program) -> None:
    mine, theirs = (token_types(p.signature) for p in (program, other))
    if mine != theirs:
        raise UsageError(
            f"{source} takes {_beyond(mine, theirs)}, but {against} takes {_beyond(theirs, mine)}",
            fix="compare programs of one model",
        )


def _beyond(types: Mapping[str, torch.dtype], others: Mapping[str, torch.dtype]) -> str:
    odd = [f"{name} ({str(kind).removeprefix('torch.')})"
           for name, kind in types.items() if others.get(name) != kind]  # fmt: skip
    return listed(odd) if odd else "none of these"


def compare(
    base: Engine,
    other: Engine,
    shapes: Sequence[dict[str, int]],
    *,
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Latency, ...]:
    """Times both engines in turns at each shape, on the same random inputs."""
    found = []
    for sizes in shapes:
        progress(f"measuring {format_sizes(sizes)}")
        runs = zip(("base", "other"), steps((base, other), sizes), strict=True)
        times = interleaved(dict(runs), seconds=seconds)
        speedup = ratio(times["base"], times["other"])
        found.append(Latency(dict(sizes), times["base"], times["other"], speedup))
    return tuple(found)


def usual_shapes(program: Program, most: float = LARGE) -> list[dict[str, int]]:
    """A small and a large shape: one short row; and tokens for about ``most`` multiply-adds.

    A program without a sequence is measured at one row and at eight; one without
    dynamic dimensions at the shape that it has; one with a cache at steps that long.
    """
    dims, limits = program.signature.dims, program.signature.limits
    if is_cached(program.signature):
        sizes = program.signature.sizes()
        tokens = math.prod(sizes[str(dim)] for dim in program.signature.inputs[0].shape)
        each = cost(program).operations / tokens
        return usual_steps(program.signature, max(2, int(most / each)))
    if not dims:
        return [{}]
    if len(dims) == 1:
        return [{dims[0]: 1}, {dims[0]: min(8, limits.get(dims[0], 8))}]
    shapes = [
        {d: min(n, limits.get(d, n)) for d, n in zip(dims, pair, strict=False)}
        for pair in _TEXT_SHAPES
    ]
    each = cost(program).operations / math.prod(program.signature.sizes().values())
    large = next((s for s in shapes if each * math.prod(s.values()) <= most), shapes[-1])
    small = shapes[-2] if math.prod(large.values()) > math.prod(shapes[-2].values()) else shapes[-1]
    return [small, large] if small != large else [small]
