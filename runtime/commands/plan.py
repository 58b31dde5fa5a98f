"""``ftc plan``: stages, microbatches and a schedule for a number of devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import command, hardware_option, task_option, trust_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("model")
@click.option("--devices", type=int, required=True, metavar="N", help="How many there are.")
@click.option("--memory", required=True, metavar="SIZE", help="Of each device: 80GB.")
@click.option("--batch", type=int, default=64, metavar="N", help="Rows of a whole step; 64.")
@click.option("--shape", metavar="SIZES", help="The other sizes: sequence=512.")
@hardware_option("h100")
@task_option
@trust_option
def plan(output: Output, model: str, task: str | None, trust: bool, **options: Any) -> None:
    """Choose stages, microbatches and a schedule for training on several devices."""
    from ftc.graph.sources import capture
    from ftc.runtime import plan as planning
    from ftc.runtime.render_stages import render_plans

    output.say(f"reading {model}")
    program = capture(model, task=task, trust=trust)
    output.show(planning.plan(program, model, progress=output.say, **options), render_plans)
