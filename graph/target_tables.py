"""Costs of machines other than this one, with where the figures come from.

None of them is a measurement of the machine that will run the program; each says
so in its origin. A target without figures has no table, and then the first
kernel that is right there is taken.

Without VNNI only ratios to the float product are known, at one row and at 32 and
more, of which an AMD Zen 3 core with AVX2 was measured (float 45 G multiply-adds
a second, memory 18.8 GB/s). Float time is modelled from these two limits,

    t = in * out * max(4 bytes / memory, rows / speed)

and each other kernel takes its ratio of that. Fixed costs are not known.
"""

from __future__ import annotations

from .target import CostTable, Point

_SPEED, _MEMORY = 45e9, 18.8e9
_ROWS = (1, 8, 32, 128, 512)

# Times as fast as float, at 1, 8, 32 and more rows. The ratio at 8 lies between its neighbours.
_AVX2_RATIOS = {
    "integer": (2.3, 2.0, 1.8, 1.8, 1.8),
    "blocked": (2.2, 1.2, 0.7, 0.7, 0.7),
    "float": (1.0, 1.0, 1.0, 1.0, 1.0),
    "blocked4": (3.5, 1.8, 0.95, 0.95, 0.95),
}
_AVX2_ORIGIN = (
    "ratios to float on an AMD Zen 3 (AVX2, no VNNI), float modelled from its limits; "
    "not measured on your machine"
)

# (rows, fixed seconds, seconds for each weight)
_VNNI = {
    "integer": ((1, 1.06e-05, 2.19e-11), (8, 1.24e-05, 5.37e-11), (32, 1.55e-05, 2.03e-10),
                (128, 2.7e-05, 8.35e-10), (512, 9.25e-05, 3.2e-09)),
    "blocked": ((1, 7.24e-06, 2.04e-11), (8, 9.01e-06, 1.12e-10), (32, 1.53e-05, 4.44e-10),
                (128, 3.72e-05, 1.79e-09), (512, 0.00013, 7.1e-09)),
    "float": ((1, 5.42e-06, 5.35e-11), (8, 5.77e-06, 1.53e-10), (32, 5.77e-06, 6.27e-10),
              (128, 5.77e-06, 2.49e-09), (512, 5.77e-06, 9.75e-09)),
    "blocked4": ((1, 7.05e-06, 2.31e-11), (8, 8.73e-06, 1.27e-10), (32, 1.5e-05, 4.96e-10),
                 (128, 3.49e-05, 2.01e-09), (512, 0.000117, 8.06e-09)),
}  # fmt: skip
_VNNI_ORIGIN = (
    "an AMD Zen 4 (AVX-512, VNNI), onnxruntime 1.32, 1 thread; not measured on your machine"
)


def shipped(name: str) -> CostTable | None:
    """The table of a named target; None where nobody measured one.

    ``portable`` has that of AVX2 without VNNI, the slowest of the known machines.
    """
    if name in ("portable", "avx2"):
        return CostTable(_AVX2_ORIGIN, False, _of_ratios())
    if name == "avx512-vnni":
        points = {k: tuple(Point(*point) for point in v) for k, v in _VNNI.items()}
        return CostTable(_VNNI_ORIGIN, False, points)
    return None


def _of_ratios() -> dict[str, tuple[Point, ...]]:
    base = [max(4 / _MEMORY, rows / _SPEED) for rows in _ROWS]
    return {
        kernel: tuple(
            Point(rows, 0.0, time / ratio)
            for rows, time, ratio in zip(_ROWS, base, ratios, strict=True)
        )
        for kernel, ratios in _AVX2_RATIOS.items()
    }
