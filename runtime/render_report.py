"""The report of a compilation, and the plan of one, as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from .console import cosine, count, duration, format_sizes, megabytes, small, table
from .render_latency import render_latencies

if TYPE_CHECKING:
    from ftc.graph.program import Drift

    from .report import CompileReport, Plan, Step
    from .shipped import Shipped

_LARGE_ERROR, _SMALL_COSINE = 0.2, 0.95
"""A result beyond either is another model until somebody has measured that it is not."""


def render_report(report: CompileReport, console: Console, *, timing: bool = False) -> None:
    """The table of steps, latency, notes, and what to do next."""
    console.print(
        f"[bold]{escape(report.source)}[/] → [bold]{escape(report.out)}[/]  {report.task}\n"
    )
    console.print(_steps(report.steps))
    console.print(
        f"[dim]MB: millions of bytes. ops: multiply-adds at {format_sizes(dict(report.sizes))}. "
        f"drift: relative error against the step before.[/]\n"
    )
    _total(report.total, console)
    if report.shipped is not None:
        _on_disk(report.shipped, console)
    _speed(report, console)
    _notes(report, console)
    if timing:
        _phases(report, console)
    if report.shipped is not None:
        _next(report.shipped, console)


def _next(shipped: Shipped, console: Console) -> None:
    console.print(f"\nnext: [bold]{escape(shipped.command)}[/]", soft_wrap=True)
    if shipped.inputs:
        console.print(f"[dim]where FILE.npz holds {escape(', '.join(shipped.inputs))}[/]")


def _on_disk(shipped: Shipped, console: Console) -> None:
    """Sizes of source and bundle; the bundle has the weights twice, for two uses."""
    source = shipped.source_bytes
    before = f"source {megabytes(source)} MB, " if source else ""
    uses = (("model.safetensors", "to go on with"), ("model.onnx", "to run"))
    parts = [
        f"{name} {megabytes(size)} {use}"
        for name, use in uses
        if (size := sum(s for n, s in shipped.files.items() if n.startswith(name)))
    ]
    whole = megabytes(sum(shipped.files.values()))
    console.print(f"on disk: {before}bundle {whole} MB ({', '.join(parts)})\n")


def _steps(steps: Sequence[Step]) -> object:
    made = table("step", "params", "MB", "ops", "drift", "cosine min", "time")
    for step in steps:
        made.add_row(
            escape(step.name), count(step.parameters), megabytes(step.bytes),
            count(step.operations), *_drift(step), duration(step.seconds) if step.effect else "",
        )  # fmt: skip
    return made


def _drift(step: Step) -> tuple[str, str]:
    if step.drift is None:
        return ("none" if step.effect else "", "")
    exact = step.effect == "exact"
    return small(step.drift.relative), "" if exact else cosine(step.drift.cosine_min)


def _total(drift: Drift | None, console: Console) -> None:
    if drift is None:
        console.print("the passes changed the inputs: result and original cannot be compared")
        return
    console.print(
        f"result against original: relative error [bold]{small(drift.relative)}[/], "
        f"cosine mean {drift.cosine_mean:.4f}, min {cosine(drift.cosine_min)}"
    )
    console.print(f"[dim]drift was measured on {escape(drift.inputs)}[/]")
    if drift.relative > _LARGE_ERROR or drift.cosine_mean < _SMALL_COSINE:
        console.print(
            f"[bold red]this changed the model[/]: its outputs are off by {drift.relative:.0%}. "
            "Measure what that costs with ftc eval, and train it or choose milder options"
        )


def _speed(report: CompileReport, console: Console) -> None:
    render_latencies(report.latencies, report.engines, ("original", "result"), console)
    if any(each.noise for each in report.latencies):
        call = f"ftc bench {report.out} --against {report.source}"
        console.print(f"to measure longer: [bold]{escape(call)}[/]", soft_wrap=True)


def _notes(report: CompileReport, console: Console) -> None:
    lines = [("capture", report.notes), *((step.name, step.notes) for step in report.steps)]
    if any(notes for _, notes in lines):
        console.print()
    for name, notes in lines:
        if notes:
            console.print(f"[bold]{escape(name)}[/]: {escape('; '.join(notes))}")


def _phases(report: CompileReport, console: Console) -> None:
    made = table("phase", "wall", "processor", title="\ntime")
    for name, (wall, cpu) in report.phases.items():
        made.add_row(name, duration(wall), duration(cpu))
    walls, cpus = zip(*report.phases.values(), strict=True)
    made.add_row("whole", duration(sum(walls)), duration(sum(cpus)), style="bold")
    console.print(made)


def render_plan(plan: Plan, console: Console) -> None:
    """What a dry run found."""
    original = plan.original
    console.print(f"[bold]{escape(plan.source)}[/]  {plan.task}: {count(original.parameters)} "
                  f"parameters, {megabytes(original.bytes)} MB")  # fmt: skip
    console.print(f"would run  [bold]{escape(plan.pipeline)}[/]")
    console.print(f"would save [bold]{escape(plan.out)}[/]")
    for note in plan.notes:
        console.print(f"capture: {escape(note)}")
