"""Stages, schedules and plans as tables."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from .console import count, duration, format_sizes, megabytes, table
from .plan import Plans
from .stage_report import StageReport


def render_stages(report: StageReport, console: Console) -> None:
    """One row a stage, then one a schedule."""
    console.print(f"[bold]{escape(report.source)}[/]  {len(report.stages)} stages, one microbatch "
                  f"of {format_sizes(report.sizes)} on {report.device}\n")  # fmt: skip
    mean = sum(each.seconds for each in report.stages) / len(report.stages)
    made = table("stage", "parameters", "forward", "backward", "of the mean", "state MB",
                 "activations MB", "sends MB", "values")  # fmt: skip
    for i, (each, sent) in enumerate(zip(report.stages, report.crossing, strict=True)):
        made.add_row(
            str(i), count(each.parameters), duration(each.forward), duration(each.backward),
            f"{each.seconds / mean:.2f}", megabytes(each.weights), megabytes(each.saved),
            megabytes(each.sent) if sent else "", escape(", ".join(sent[:3])),
        )  # fmt: skip
    console.print(made)
    for name, where in report.shared.items():
        console.print(f"[dim]{escape(name)} is in stages {', '.join(map(str, where))}: "
                      "its gradient is their sum[/]")  # fmt: skip
    console.print(f"\n{report.microbatches} microbatches, simulated:\n")
    rows = table("schedule", "devices", "step", "bubble", "peak MB a device")
    for line in report.timelines:
        rows.add_row(line.schedule, str(line.devices), duration(line.seconds),
                     f"{line.bubble:.0%}", megabytes(max(line.peak)))  # fmt: skip
    console.print(rows)
    console.print("[dim]times are a model's: their ratios hold better than their sizes. State is "
                  "weights, gradients and AdamW's moments[/]")  # fmt: skip


def render_plans(plans: Plans, console: Console) -> None:
    """The fastest ways first, and the commands for the first."""
    console.print(f"[bold]{escape(plans.source)}[/]  {plans.devices} x {plans.device}, a step of "
                  f"{plans.batch} at {format_sizes(plans.sizes)}\n")  # fmt: skip
    made = table("schedule", "pipelines", "devices in each", "stages", "microbatch", "microbatches",
                 "step", "bubble", "peak GB")  # fmt: skip
    for each in plans.found:
        made.add_row(
            each.schedule, str(each.replicas), str(each.devices), str(each.stages),
            str(each.microbatch), str(each.microbatches), duration(each.seconds),
            f"{each.bubble:.0%}", f"{each.peak / 1e9:.3g}",
        )  # fmt: skip
    console.print(made)
    console.print(f"\n{plans.tried} ways were simulated; the fastest is a mesh of "
                  f"[bold]{plans.found[0].mesh}[/]")  # fmt: skip
    for command in plans.commands:
        console.print(f"  [bold]{escape(command)}[/]", soft_wrap=True)
