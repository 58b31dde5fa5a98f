"""``ftc passes``: what passes there are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .options import command

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("name", required=False)
def passes(output: Output, name: str | None) -> None:
    """List the passes, or show one with every option."""
    from ftc.runtime import render

    if not name and not output.json:  # a line each needs no pass, and no torch, imported
        from ftc.passes.outline import outlines

        return output.print(render.render_passes, outlines())
    from ftc.passes import registry

    passes = (registry.get(name),) if name else registry.loadable()
    found = [registry.describe(each) for each in passes]
    if output.json:
        return output.data([asdict(each) for each in found])
    return output.print(render.render_pass, found[0])
