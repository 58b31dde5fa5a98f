"""What commands share: how one is declared, and the options that several take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

engine_option = click.option("--engine", type=click.Choice(["onnx", "torch"]),
                             help="What runs it; onnxruntime by default.")  # fmt: skip
task_option = click.option("--task", metavar="TASK", help="What to capture for; by default what "
                           "the model's folder says.")  # fmt: skip
trust_option = click.option("--trust", is_flag=True, help="Allow a .pt2 archive: loading one runs "
                            "code of its author's.")  # fmt: skip
dialect_option = click.option("--dialect", default="onnxruntime", help="Operators of the file.",
                              type=click.Choice(["onnxruntime", "standard"]))  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Replace what is there.")
threads_option = click.option("--threads", type=int, metavar="N")


def hardware_option(default: str) -> Callable[[Any], Any]:
    """``--device``: what training is planned for."""
    return click.option("--device", default=default, metavar="NAME",
                        help=f"What runs a stage: cpu, a100, h100 or here; {default}.")  # fmt: skip


def command(function: Callable[..., Any]) -> click.Command:
    """Declares a command of the function's name; adds ``--json`` and ``--debug``.

    Args:
        function: gets the :class:`~ftc.runtime.console.Output` to write to, then its
            options. A progress line that it started is taken away at its end.
    """

    @functools.wraps(function)
    def call(json: bool, debug: bool, **options: Any) -> Any:
        from ftc.runtime.console import Output

        output = Output(json)
        try:
            return function(output, **options)
        finally:
            output.say.stop()

    # Click lists parameters from the last to the first.
    call.__click_params__ = [  # type: ignore[attr-defined]
        click.Option(["--debug"], is_flag=True, help="Show tracebacks and warnings."),
        click.Option(["--json"], is_flag=True, help="Print JSON for machines."),
        *call.__click_params__,  # type: ignore[attr-defined]
    ]
    return click.command(function.__name__)(call)
