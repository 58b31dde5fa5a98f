"""``ftc inspect``: what a model or a bundle is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .options import command, task_option, trust_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("model")
@click.option("--ir", is_flag=True, help="The graph as text.")
@click.option("--layers", is_flag=True, help="Cost by layer.")
@click.option("--select", "selector", metavar="SELECTOR", help="The weights that a selector means.")
@click.option("--shape", metavar="SIZES", help="Count operations at batch=8,sequence=128.")
@task_option
@trust_option
def inspect(
    output: Output,
    model: str,
    ir: bool,
    layers: bool,
    selector: str | None,
    shape: str | None,
    task: str | None,
    trust: bool,
) -> None:
    """Show what MODEL (or a compiled bundle) is: interface, weights, operations, history."""
    from ftc.graph.printer import print_graph
    from ftc.graph.sources import capture
    from ftc.runtime import render, summary
    from ftc.runtime.bench import parse_shape

    output.say(f"reading {model}")
    program = capture(model, task=task, trust=trust)
    sizes = parse_shape(shape, program.signature) if shape else None
    found = summary.summarize(program, model, sizes)
    weights = summary.selected(program, selector) if selector else None
    if not output.json:
        return output.print(render.render_summary, found, layers=layers, weights=weights,
                            graph=program if ir else None)  # fmt: skip
    more: dict[str, Any] = {"graph": print_graph(program)} if ir else {}
    if weights:
        more["weights"] = [asdict(each) for each in weights]
    return output.data({**found.to_dict(), **more})
