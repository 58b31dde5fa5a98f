"""``ftc target``: a machine, its kernels and what they take, as a table."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from ftc.graph.target import WORDS

from .console import duration, table
from .kernels import Description


def render_target(found: Description, console: Console) -> None:
    """The target, its kernels, and their times at one shape beside float."""
    given = found.target
    bits = 8 if given.wide else 7
    console.print(f"[bold]{given.name}[/]  {escape(given.words)}")
    console.print(f"instruction sets: {', '.join(sorted(given.features)) or 'none assumed'}")
    console.print(f"integer products use {bits} of the 8 bits of a weight\n")
    what = table("kernel", "what it is", left=2)
    for kernel in given.kernels:
        what.add_row(kernel, f"[dim]{WORDS[kernel]}[/]")
    console.print(what)
    if given.table is None:
        console.print(
            "\nnobody measured this machine: the first kernel of the list is taken. "
            "On such a machine: [bold]ftc target native --measure[/]"
        )
        return
    times, (inputs, outputs) = found.times(), found.shape
    made = table("rows", *times)
    for i, rows in enumerate(found.rows):
        made.add_row(str(rows), *(_cell(each[i], times["float"][i]) for each in times.values()))
    console.print()
    console.print(made)
    console.print(f"[dim]one product {inputs} to {outputs}; x: times as fast as float[/]")
    console.print(f"[dim]{escape(given.table.origin)}[/]")


def _cell(seconds: float, base: float) -> str:
    """``69 us  2.4x``"""
    return f"{duration(seconds)}  {base / seconds:.2f}x"
