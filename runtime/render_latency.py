"""Latencies of two programs as a table: medians, quartiles, and which ratios to doubt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from .console import format_sizes, spread, table

if TYPE_CHECKING:
    from .bench import Latency
    from .measure import Timing


def render_latencies(
    latencies: Sequence[Latency], engines: tuple[str, str], names: tuple[str, str], console: Console
) -> None:
    """One row a shape; below it, why a ratio is noisy, and what ran the two."""
    if not latencies:
        return
    made = table("latency", *names, "speed")
    for each in latencies:
        made.add_row(format_sizes(each.sizes), _timing(each.base), _timing(each.other),
                     _speed(each))  # fmt: skip
    console.print(made)
    for each in latencies:
        if each.noise:
            where = format_sizes(each.sizes)
            console.print(f"[yellow]noisy[/] at {where}: {each.noise}")
    labels = "; ".join(f"{n}: {escape(e)}" for n, e in zip(names, engines, strict=True))
    console.print(f"[dim]median (quartiles), interleaved. {labels}[/]")


def _timing(timing: Timing) -> str:
    return spread(timing.median, *timing.quartiles)


def _speed(each: Latency) -> str:
    """``1.52× faster``; yellow where it is slower, and marked where it is noisy."""
    faster = each.speedup >= 1
    number = each.speedup if faster else 1 / each.speedup
    text = f"{number:.2f}× {'faster' if faster else 'slower'}"
    if each.noise:
        return f"[yellow]noisy[/] {text}"
    return f"[green]{text}[/]" if faster else f"[yellow]{text}[/]"
