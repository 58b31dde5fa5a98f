"""``ftc export``: a program as an ONNX file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import command, dialect_option, force_option, task_option, trust_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("program")
@click.option("-o", "--out", required=True, metavar="FILE|DIR")
@click.option("--stages", is_flag=True, help="One file for each stage of a partitioned program, "
              "and stages.json.")  # fmt: skip
@dialect_option
@task_option
@force_option
@trust_option
def export(output: Output, program: str, out: str, stages: bool, **options: Any) -> None:
    """Lower a program to an ONNX file of its own, or each of its stages."""
    from ftc.runtime import render
    from ftc.runtime.export import export as whole
    from ftc.runtime.export_stages import export_stages

    write = export_stages if stages else whole
    found = write(program, Path(out), progress=output.say, **options)
    output.show(found, render.render_export)
