"""The command line: parse, call, print.

Exit status: 0 done, 1 a promise or a budget was broken, 2 the call was wrong,
70 a bug in ftc, 130 interrupted. A user's mistake never shows a traceback.
Everything heavy is imported within commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ftc.graph.errors import UsageError, nearest
from ftc.runtime.exit import run_command

if TYPE_CHECKING:
    from ftc.runtime.console import Output

engine_option = click.option("--engine", type=click.Choice(["onnx", "torch"]),
                             help="What runs it; onnxruntime by default.")  # fmt: skip
task_option = click.option("--task", metavar="TASK", help="What to capture for; by default what "
                           "the model's folder says.")  # fmt: skip
trust_option = click.option("--trust", is_flag=True, help="Allow a .pt2 archive: loading one runs "
                            "code of its author's.")  # fmt: skip
dialect_option = click.option("--dialect", default="onnxruntime", help="Operators of the file.",
                              type=click.Choice(["onnxruntime", "standard"]))  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Replace what is there.")


class Commands(click.Group):
    """Commands in the order of the text below, and the nearest one for a misspelt name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order they were written."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Refuses an unknown command with the nearest one."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.commands:
            raise UsageError(f"no command is called {name!r}", fix=nearest(name, self.commands))
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("ftc"), prog_name="ftc")
def ftc() -> None:
    """The fine-tune compiler: capture a model, rewrite it, prove it, ship it."""


def command(function: Callable[..., Any]) -> click.Command:
    """Registers a command; adds --json and --debug, and a progress line on stderr."""

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
    return ftc.command(function.__name__.rstrip("_"))(call)


@command
@click.argument("model")
@click.option("--passes", required=True, metavar="SPEC", help="Passes, joined by commas: "
              "lowrank{ratio=0.8},int8. See `ftc passes`.")  # fmt: skip
@click.option("-o", "--out", required=True, metavar="OUT", help="The folder to write.")
@task_option
@click.option("--calib", metavar="FILE|TEXT", help="What to probe and calibrate on: text, a text "
              "file, .npz or .safetensors; by default Python's documentation.")  # fmt: skip
@click.option("--target", default="portable", show_default=True, help="The machine that runs it.")
@click.option("--shapes", metavar="SIZES", help="Choose kernels for batch=1:8,sequence=1:128.")
@dialect_option
@click.option("--max-drift", type=float, metavar="X", help="Largest relative error accepted.")
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
    from ftc.runtime import compile as compiling
    from ftc.runtime import render

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


@command
@click.argument("out")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="May be given several times.")
@click.option("--input", "tensors", metavar="FILE", help="Tensors by name: .npz or .safetensors.")
@engine_option
@click.option("--max-new-tokens", "most", type=click.IntRange(1), default=32, show_default=True)
@click.option("--threads", type=int, metavar="N")
def run(
    output: Output,
    out: str,
    texts: tuple[str, ...],
    tensors: str | None,
    engine: Literal["onnx", "torch"] | None,
    most: int,
    threads: int | None,
) -> None:
    """Ask a compiled program: an embedding, a filled gap, a continuation, a label."""
    from ftc.runtime import answer
    from ftc.runtime.engine import open_engine, set_threads

    if bool(texts) == (tensors is not None):
        raise UsageError("give texts or tensors", fix='--text "..." or --input FILE.npz')
    set_threads(threads)
    output.say(f"opening {out}")
    opened = open_engine(out, engine)
    if tensors is not None:
        return output.show(answer.answer_tensors(opened, Path(tensors)), answer.render_answer)
    write = (lambda _: None) if output.json else output.write
    said = answer.answer_text(opened, texts, most=most, write=write)
    return output.show(said, answer.render_answer)


@command
@click.argument("out")
@click.option("--data", required=True, metavar="FILE", help="Text, or JSONL with text and label.")
@click.option("--metric", required=True, metavar="METRIC", help="perplexity, accuracy or cosine.")
@click.option("--against", metavar="MODEL", help="Another program on the same data.")
@engine_option
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Texts, or windows, at most.")
@click.option("--length", type=click.IntRange(2), default=128, show_default=True,
              help="Tokens in a window of perplexity.")  # fmt: skip
@click.option("--threads", type=int, metavar="N")
def eval(
    output: Output,
    out: str,
    data: str,
    metric: str,
    against: str | None,
    engine: Literal["onnx", "torch"] | None,
    limit: int | None,
    length: int,
    threads: int | None,
) -> None:
    """Measure a compiled program on data, alone or against another."""
    from ftc.runtime import evaluate, render
    from ftc.runtime.engine import open_engine, set_threads

    evaluate.check_call(metric, against is not None)
    set_threads(threads)
    output.say(f"opening {out}")
    first = open_engine(out, engine)
    if against:
        output.say(f"opening {against}")
    other = open_engine(against, task=first.program.signature.task) if against else None
    found = evaluate.evaluate(first, Path(data), metric, against=other, limit=limit, length=length,
                              progress=output.say)  # fmt: skip
    output.show(found, render.render_evaluation)


@command
@click.argument("out")
@click.option("--against", metavar="OTHER", help="A bundle or a model; by default the same graph "
              "in torch.")  # fmt: skip
@click.option("--threads", type=int, metavar="N")
@click.option("--shapes", multiple=True, metavar="SIZES", help="batch=8,sequence=128; may be given "
              "several times.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0), default=2.0, show_default=True,
              help="To spend on each shape.")  # fmt: skip
def bench(output: Output, out: str, **options: Any) -> None:
    """Measure latency against another program: interleaved, medians, quartiles."""
    from ftc.runtime import bench as benching
    from ftc.runtime import render

    output.show(benching.bench(out, progress=output.say, **options), render.render_comparison)


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


@command
@click.argument("name", required=False)
def passes(output: Output, name: str | None) -> None:
    """List the passes, or show one with every option."""
    from ftc.passes import registry
    from ftc.runtime import render

    passes = (registry.get(name),) if name else registry.loadable()
    found = [registry.describe(each) for each in passes]
    if output.json:
        return output.data([asdict(each) for each in found])
    if name:
        return output.print(render.render_pass, found[0])
    return output.print(render.render_passes, found)


@command
@click.argument("name", default="native")
@click.option("--measure", is_flag=True, help="Measure this machine again.")
def target(output: Output, name: str, measure: bool) -> None:
    """Show a machine that programs run on: its kernels and what they take."""
    from ftc.runtime import kernels
    from ftc.runtime.render_target import render_target

    found = kernels.Description(kernels.resolve(name, measure=measure, progress=output.say))
    output.show(found, render_target)


def main() -> None:
    """The entry point of ``ftc``."""
    sys.exit(run_command(ftc, sys.argv[1:]))
