"""``ftc compile``: from a model to a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ftc.graph.errors import UsageError

from .options import command, dialect_option, force_option, task_option, trust_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("model")
@click.option("--passes", default="", metavar="SPEC", help="Passes, joined by commas: "
              "lowrank{ratio=0.8},int8. See `ftc passes`.")  # fmt: skip
@click.option("-o", "--out", required=True, metavar="OUT", help="The folder to write.")
@task_option
@click.option("--calib", metavar="FILE|TEXT", help="What to probe and calibrate on: text, a text "
              "file, .npz or .safetensors; by default Python's documentation.")  # fmt: skip
@click.option("--target", default="portable", show_default=True, help="The machine that runs it.")
@click.option("--shapes", metavar="SIZES", help="Choose kernels for batch=1:8,sequence=1:128.")
@dialect_option
@click.option("--max-drift", type=float, metavar="X", help="Largest relative error accepted.")
@click.option("--recover", type=int, metavar="STEPS", help="Train what lowrank made, on the "
              "calibration text, to say what the model said.")  # fmt: skip
@click.option("--print-ir-after", multiple=True, metavar="PASS", help="Print the graph after "
              "a pass, or after all.")  # fmt: skip
@click.option("--timing", is_flag=True, help="Show the time of each phase.")
@click.option("--dry-run", is_flag=True, help="Capture and show what would run; write nothing.")
@force_option
@trust_option
def compile(
    output: Output,
    model: str,
    print_ir_after: tuple[str, ...],
    timing: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Capture MODEL, rewrite it, prove it, lower it and save it as OUT."""
    if not options["passes"].strip() and options["task"] != "generate":
        raise UsageError("no passes are named", fix="--passes int8, or --passes cleanup to lower "
                         "the model as it is")  # fmt: skip
    from ftc.runtime import compile as compiling
    from ftc.runtime import render_report as render

    if dry_run:
        kept = {k: options[k] for k in ("passes", "out", "task", "target", "force", "trust")}
        found = compiling.plan(model, progress=output.say, **kept)
        return output.show(found, render.render_plan)
    observer = _printer(print_ir_after) if print_ir_after else None
    report = compiling.compile_model(model, progress=output.say, observer=observer, **options)
    return output.show(report, render.render_report, timing=timing)


def _printer(names: tuple[str, ...]) -> Any:
    """Prints graphs on stderr: stdout is for the report."""
    from ftc.passes import pipeline, registry

    for name in names:
        if name != "all":
            registry.get(name)
    return pipeline.PrintIr(names, lambda text: click.echo(text, err=True))
