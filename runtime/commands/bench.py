"""``ftc bench``: latency of one program against another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import command, task_option, threads_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("out", metavar="MODEL")
@click.option("--against", metavar="OTHER", help="Another bundle or model; by default the same "
              "graph in torch.")  # fmt: skip
@task_option
@threads_option
@click.option("--shapes", multiple=True, metavar="SIZES", help="batch=8,sequence=128; may be given "
              "several times.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0), default=2.0, show_default=True,
              help="To spend on each shape.")  # fmt: skip
def bench(output: Output, out: str, **options: Any) -> None:
    """Measure latency of a bundle or model against another: medians, quartiles."""
    from ftc.runtime import bench as benching
    from ftc.runtime import render

    output.show(benching.bench(out, progress=output.say, **options), render.render_comparison)
