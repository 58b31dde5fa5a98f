"""``ftc inspect``: what a model or a bundle is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftc.graph.errors import UsageError

from .options import command, task_option, trust_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output

_OF_SUMMARY = ("ir", "layers", "shape")
_OF_SENSITIVITY = ("bits", "calib", "picture")


@command
@click.argument("model")
@click.option("--ir", is_flag=True, help="The graph as text.")
@click.option("--layers", is_flag=True, help="Cost by layer.")
@click.option("--select", "selector", metavar="SELECTOR", help="The weights that a selector means.")
@click.option("--shape", metavar="SIZES", help="Count operations at batch=8,sequence=128.")
@click.option("--sensitivity", is_flag=True, help="How far the output drifts when one weight "
              "alone is quantized: of each weight, or of those of --select.")  # fmt: skip
@click.option("--bits", metavar="N,N", help="For --sensitivity: 8, 4 or both, the default.")
@click.option("--calib", metavar="FILE|TEXT", help="For --sensitivity: what to measure on.")
@click.option("--picture", metavar="FILE.png", help="For --sensitivity: a picture of it.")
@task_option
@trust_option
def inspect(
    output: Output,
    model: str,
    selector: str | None,
    sensitivity: bool,
    task: str | None,
    trust: bool,
    **options: Any,
) -> None:
    """Show what MODEL or a bundle is: interface, weights, operations, history."""
    show = _sensitivity if sensitivity else _summary
    for name in _OF_SUMMARY if sensitivity else _OF_SENSITIVITY:
        if options.pop(name):
            word = "does not go with" if sensitivity else "is for"
            fix = f"leave out --{name}" if sensitivity else f"--sensitivity --{name}"
            raise UsageError(f"--{name} {word} --sensitivity", fix=fix)
    show(output, model, {"task": task, "trust": trust}, selector, **options)


def _summary(
    output: Output, model: str, how: dict[str, Any], selector: str | None,
    ir: bool, layers: bool, shape: str | None,
) -> None:  # fmt: skip
    from ftc.graph.printer import print_graph
    from ftc.graph.sources import capture
    from ftc.runtime import render, summary

    output.say(f"reading {model}")
    program = capture(model, **how)
    sizes = program.signature.parse_sizes(shape) if shape else None
    found = summary.summarize(program, model, sizes)
    weights = summary.selected(program, selector) if selector else None
    if not output.json:
        return output.print(render.render_summary, found, layers=layers, weights=weights,
                            graph=program if ir else None)  # fmt: skip
    more: dict[str, Any] = {"graph": print_graph(program)} if ir else {}
    if weights:
        more["weights"] = [asdict(each) for each in weights]
    return output.data({**found.to_dict(), **more})


def _sensitivity(
    output: Output, model: str, how: dict[str, Any], selector: str | None,
    bits: str | None, calib: str | None, picture: str | None,
) -> None:  # fmt: skip
    from ftc.graph.sources import capture
    from ftc.runtime import sensitivity
    from ftc.runtime.render_sensitivity import render_sensitivities

    passes = sensitivity.passes_for(bits or "8,4")
    if picture:
        sensitivity.check_picture(Path(picture))
    output.say(f"reading {model}")
    found = sensitivity.inspect_sensitivity(
        capture(model, **how), model, passes, selector=selector, calib=calib, progress=output.say
    )
    if picture:
        sensitivity.draw(found.found, Path(picture))
    output.show(found, render_sensitivities)
