"""Measures what each kernel takes on this machine, in seconds, and remembers it.

Every kernel is a model of one product in onnxruntime, one thread, timed in turns
with the others at a few shapes and numbers of rows; a point of the cost table
(:class:`ftc.graph.target.CostTable`) is the line through the medians at one
number of rows. The table is kept in the user's cache folder under the
processor's name and onnxruntime's version, since both decide.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ftc.graph.target import (
    KERNELS,
    WORDS,
    CostTable,
    Kernel,
    Point,
    Target,
    features,
    processor,
    target,
    with_table,
)

from .measure import interleaved
from .one_product import one_product

ROWS = (1, 8, 32, 128, 512)
SHAPES = ((256, 256), (512, 1024), (1024, 1024))
_SECONDS = 0.06

Progress = Callable[[str], None]


def resolve(name: str, *, measure: bool = False, progress: Progress = lambda _: None) -> Target:
    """The target called ``name``; for ``native`` with costs, measured now or remembered.

    Args:
        name: of a target.
        measure: measure again even when there is a table. Only this machine can be measured.
        progress: told what is measured.

    Raises:
        UsageError: for an unknown name, or a measurement of another machine.
    """
    from ftc.graph.errors import UsageError

    found = target(name)
    if name != "native":
        if measure:
            raise UsageError(
                f"{name} cannot be measured: only this machine can",
                fix="ftc target native --measure",
            )
        return found
    table = None if measure else remembered()
    if table is None:
        table = measure_table(progress=progress)
        remember(table)
    return with_table(found, table)


def measure_table(
    rows: Sequence[int] = ROWS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    seconds: float = _SECONDS,
    progress: Progress = lambda _: None,
) -> CostTable:
    """The cost table of this machine.

    Args:
        rows: numbers of rows to measure at.
        shapes: ``(in, out)`` of the products; two sizes at least.
        seconds: wall time for each shape at each number of rows, all kernels together.
        progress: told how far it is.
    """
    rng = np.random.default_rng(0)
    times: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for done, (inputs, outputs) in enumerate(shapes):
        progress(f"measuring kernels, {done + 1} of {len(shapes)}")
        products = {kernel: one_product(kernel, inputs, outputs) for kernel in KERNELS}
        for count in rows:
            x = rng.standard_normal((count, inputs)).astype(np.float32)
            runs = {str(kernel): partial(run, x) for kernel, run in products.items()}
            for kernel, timing in interleaved(runs, seconds=seconds, least=5).items():
                times.setdefault((kernel, count), []).append((inputs * outputs, timing.median))
    points: dict[str, tuple[Point, ...]] = {
        kernel: growing(Point(count, *line(times[kernel, count])) for count in sorted(rows))
        for kernel in KERNELS
    }
    return CostTable(f"measured on {processor()}, onnxruntime {_version()}, 1 thread", True, points)


def line(samples: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """``(fixed, slope)``, neither negative, of the line ``t = fixed + slope * n``.

    The least squares of *relative* errors, so that small products count as much.
    """
    size = np.array([n for n, _ in samples], dtype=float)
    time = np.array([t for _, t in samples], dtype=float)
    design = np.stack([1 / time, size / time], 1)
    fixed, slope = np.linalg.lstsq(design, np.ones(len(samples)), rcond=None)[0]
    if slope <= 0:
        return float(np.median(time)), 0.0
    if fixed <= 0:
        return 0.0, float(1 / np.mean(size / time))
    return float(fixed), float(slope)


def growing(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points whose costs never fall with the rows, as a few noisy medians may."""
    made: list[Point] = []
    for point in points:
        last = made[-1] if made else point
        made.append(Point(point.rows, max(point.fixed, last.fixed), max(point.slope, last.slope)))
    return tuple(made)


def remember(table: CostTable, folder: Path | None = None) -> Path:
    """Writes the table of this machine; returns the file."""
    path = _file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(table.to_dict(), file, indent=1)
    os.replace(file.name, path)
    return path


def remembered(folder: Path | None = None) -> CostTable | None:
    """The table of this machine that was written before; None without a readable one."""
    try:
        return CostTable.from_dict(json.loads(_file(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _file(folder: Path | None) -> Path:
    key = json.dumps([processor(), sorted(features()), _version(), KERNELS, SHAPES])
    return (folder or _cache()) / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _cache() -> Path:
    """The user's cache folder of ftc."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "ftc"


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


@dataclass(frozen=True, slots=True)
class Description:
    """What ``ftc target`` shows.

    Attributes:
        target: which.
        rows: numbers of rows of the table below.
        shape: ``(in, out)`` that its times are for.
    """

    target: Target
    rows: tuple[int, ...] = ROWS
    shape: tuple[int, int] = (512, 512)

    def times(self) -> Mapping[Kernel, tuple[float, ...]]:
        """Times of each kernel in the table, at each number of rows."""
        table = self.target.table
        if table is None:
            return {}
        known = [kernel for kernel in self.target.kernels if kernel in table.points]
        return {k: tuple(table.seconds(k, r, *self.shape) for r in self.rows) for k in known}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; seconds."""
        given = self.target
        return {
            "name": given.name, "words": given.words, "features": sorted(given.features),
            "kernels": {kernel: WORDS[kernel] for kernel in given.kernels},
            "integer_weight_bits": 8 if given.wide else 7,
            "table": None if given.table is None else given.table.to_dict(),
            "example": {"shape": list(self.shape), "rows": list(self.rows),
                        "seconds": {k: list(v) for k, v in self.times().items()}},
        }  # fmt: skip
