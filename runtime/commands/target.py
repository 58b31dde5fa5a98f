"""``ftc target``: a machine that programs run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .options import command

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("name", default="native")
@click.option("--measure", is_flag=True, help="Measure this machine again.")
def target(output: Output, name: str, measure: bool) -> None:
    """Show a machine that programs run on: its kernels and what they take."""
    from ftc.runtime import kernels
    from ftc.runtime.render_target import render_target

    found = kernels.Description(kernels.resolve(name, measure=measure, progress=output.say))
    output.show(found, render_target)
