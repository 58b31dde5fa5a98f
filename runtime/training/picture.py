"""The loss over the steps, as a PNG: what was trained on and, where there is one, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .log import Record

_WINDOW = 0.02


def draw_loss(records: Sequence[Record], path: Path) -> bool:
    """Writes the picture; False where matplotlib is not installed.

    Args:
        records: as :class:`~ftc.runtime.training.log.Log` keeps them.
        path: ends in ``.png``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [(r["step"], r["loss"]) for r in records if "loss" in r]
    evaluations = [(r["step"], r["evaluation"]["loss"]) for r in records if "evaluation" in r]
    if steps:
        x, y = zip(*steps, strict=True)
        axes.plot(x, y, color="0.8", linewidth=1)
        axes.plot(x, _smooth(y), color="C0", label="training, smoothed")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="C1", label="evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if steps or evaluations:
        axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True


def _smooth(values: Sequence[float]) -> list[float]:
    """The exponential mean over about a fiftieth of the run."""
    keep = 1 - 1 / max(1.0, _WINDOW * len(values))
    mean, made = values[0], []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        made.append(mean)
    return made
