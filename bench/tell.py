"""What the scripts here tell: progress on stderr, and pictures where matplotlib is there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def figure_of(names: Sequence[str], width: float) -> tuple[Any, list[Any]]:
    """A figure, and in it a panel for each name; None, and a word about it, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say('no picture: pip install "ftc[bench]" brings matplotlib')
        return None, []
    figure = Figure(figsize=(width * len(names), 5), layout="constrained")
    panels = list(figure.subplots(1, len(names), squeeze=False)[0])
    for axes, name in zip(panels, names, strict=True):
        axes.set(title=name)
    return figure, panels


def label_accuracy(axes: Any, measure: str) -> None:
    """The upright axis: ``measure``, on a logarithmic scale where it is a perplexity."""
    axes.set(ylabel=measure)
    if measure == "perplexity":
        axes.set_yscale("log")
