"""``ftc inspect --sensitivity`` as a table: one row a weight, the most sensitive first."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.markup import escape

from ftc.passes.registry import get

from .console import megabytes, small, table
from .sensitivity import Sensitivities, Sensitivity

_SHOWN = 25


def render_sensitivities(found: Sensitivities, console: Console) -> None:
    """Drift and bytes saved of every pass on each weight alone."""
    specs = sorted({each.spec for each in found.found}, key=lambda s: -_mean(found, s))
    rows: dict[str, dict[str, Sensitivity]] = {}
    for each in found.found:  # the largest drift first: so are the rows
        rows.setdefault(each.weight, {})[each.spec] = each
    console.print(f"[bold]{escape(found.source)}[/]  drift when one weight is quantized\n")
    made = table("weight", *(column for spec in specs for column in (spec, "MB less")))
    for weight, cells in list(rows.items())[:_SHOWN]:
        made.add_row(escape(weight), *(text for spec in specs for text in _cells(cells.get(spec))))
    console.print(made)
    if len(rows) > _SHOWN:
        console.print(f"[dim]and {len(rows) - _SHOWN} weights that matter less: all with --json[/]")
    console.print(f"[dim]relative error of the output, measured on {escape(found.inputs)}[/]")
    console.print("\nto leave the worst as it is:")
    for spec in specs:
        worst = next(each for each in found.found if each.spec == spec)
        console.print(f"  [bold]{escape(_without(spec, worst.weight))}[/]", soft_wrap=True)


def _mean(found: Sensitivities, spec: str) -> float:
    drifts = [each.drift for each in found.found if each.spec == spec]
    return sum(drifts) / len(drifts)


def _cells(each: Sensitivity | None) -> tuple[str, str]:
    return ("", "") if each is None else (small(each.drift), megabytes(each.saved))


def _without(spec: str, weight: str) -> str:
    """``--passes 'int8{select="product | embedding - a.weight"}'``, as a shell reads it."""
    each = get(spec.partition("{")[0])
    text = each(select=f"product | embedding - {weight}").spec  # type: ignore[call-arg]
    return f"--passes {shlex.quote(text)}"
