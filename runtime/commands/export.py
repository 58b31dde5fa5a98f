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
@dialect_option
@task_option
@force_option
@trust_option
def export(output: Output, program: str, out: str, **options: Any) -> None:
    """Lower a program to an ONNX file of its own."""
    from ftc.runtime import export as exporting
    from ftc.runtime import render

    found = exporting.export(program, Path(out), progress=output.say, **options)
    output.show(found, render.render_export)
