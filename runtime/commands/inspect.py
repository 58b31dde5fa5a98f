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

_SUMMARY = ("ir", "layers", "shape", "selector")
_SENSITIVITY = ("bits", "calib", "picture", "selector")
_STAGES = ("shape", "microbatches", "picture", "device", "cores")
_FOR = {"sensitivity": _SENSITIVITY, "stages": _STAGES}
_WORDS = {"selector": "select"}


@command
@click.argument("model")
@click.option("--ir", is_flag=True, help="The graph as text.")
@click.option("--layers", is_flag=True, help="Cost by layer.")
@click.option("--select", "selector", metavar="SELECTOR", help="The weights that a selector means.")
@click.option("--shape", metavar="SIZES", help="Count at batch=8,sequence=128.")
@click.option("--sensitivity", is_flag=True, help="How far the output drifts when one weight "
              "alone is quantized: of each weight, or of those of --select.")  # fmt: skip
@click.option("--bits", metavar="N,N", help="For --sensitivity: 8, 4 or both, the default.")
@click.option("--calib", metavar="FILE|TEXT", help="For --sensitivity: what to measure on.")
@click.option("--stages", is_flag=True, help="What each stage of a partitioned program costs, and "
              "the schedules that run them, simulated.")  # fmt: skip
@click.option("--microbatches", type=int, metavar="N", help="For --stages: of a step; twice the "
              "stages by default.")  # fmt: skip
@click.option("--device", metavar="NAME", help="For --stages: cpu (default), a100, h100 or here.")
@click.option("--cores", type=click.IntRange(min=1), metavar="N", help="For --stages: that the "
              "devices share, where they are processes on one machine.")  # fmt: skip
@click.option("--picture", metavar="FILE.png", help="A picture of what --sensitivity or --stages "
              "shows.")  # fmt: skip
@task_option
@trust_option
def inspect(
    output: Output,
    model: str,
    sensitivity: bool,
    stages: bool,
    task: str | None,
    trust: bool,
    **options: Any,
) -> None:
    """Show what MODEL or a bundle is: interface, weights, operations, history."""
    if sensitivity and stages:
        raise UsageError("--stages does not go with --sensitivity", fix="leave out --stages")
    mode = "sensitivity" if sensitivity else "stages" if stages else None
    taken = _FOR[mode] if mode else _SUMMARY
    for name in [each for each in options if each not in taken]:
        if options.pop(name):
            word = _WORDS.get(name, name)
            if mode:
                raise UsageError(f"--{word} does not go with --{mode}", fix=f"leave out --{word}")
            other = next(each for each, names in _FOR.items() if name in names)
            raise UsageError(f"--{word} is for --{other}", fix=f"--{other} --{word}")
    show = {"sensitivity": _sensitivity, "stages": _stages, None: _summary}[mode]
    show(output, model, {"task": task, "trust": trust}, **options)


def _summary(
    output: Output, model: str, how: dict[str, Any], *, selector: str | None,
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
    output: Output, model: str, how: dict[str, Any], *, selector: str | None,
    bits: str | None, calib: str | None, picture: str | None,
) -> None:  # fmt: skip
    from ftc.graph.sources import capture
    from ftc.runtime import sensitivity
    from ftc.runtime.pictures import check_picture
    from ftc.runtime.render_sensitivity import render_sensitivities

    passes = sensitivity.passes_for(bits or "8,4")
    if picture:
        check_picture(Path(picture))
    output.say(f"reading {model}")
    found = sensitivity.inspect_sensitivity(
        capture(model, **how), model, passes, selector=selector, calib=calib, progress=output.say
    )
    if picture:
        sensitivity.draw(found.found, Path(picture))
    output.show(found, render_sensitivities)


def _stages(
    output: Output, model: str, how: dict[str, Any], *, shape: str | None,
    microbatches: int | None, device: str | None, cores: int | None, picture: str | None,
) -> None:  # fmt: skip
    from ftc.graph.sources import capture
    from ftc.runtime import stage_report
    from ftc.runtime.pictures import check_picture
    from ftc.runtime.render_stages import render_stages

    if picture:
        check_picture(Path(picture))
    output.say(f"reading {model}")
    found = stage_report.report_stages(
        capture(model, **how), model, shape=shape, microbatches=microbatches,
        device=device or "cpu", cores=cores,
    )  # fmt: skip
    if picture:
        stage_report.draw_timelines(found.timelines, Path(picture))
    output.show(found, render_stages)
