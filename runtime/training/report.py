"""What a run did: for JSON, as a table for people, and in the history of its program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ftc.graph.cost import cost
from ftc.graph.printer import fingerprint
from ftc.graph.program import PassRecord, Program
from ftc.runtime.console import count, duration, table

from .config import TrainConfig


@dataclass(frozen=True, slots=True)
class TrainReport:
    """One run.

    Attributes:
        program, out: as the user named them.
        objective: its text form.
        steps: that were done, of ``planned``.
        planned: steps that were asked for.
        epochs: how often the data was seen.
        trainable, parameters: elements that learn, and all.
        examples, tokens: seen.
        seconds: that steps took.
        first_loss, last_loss: of the first and the last logged step; None without steps.
        before, after: loss and metrics on the evaluation data.
        best_step: where the weights are from, when not from the last step.
        memory: peak of the process, in bytes.
        notes: what was decided, one sentence each.
    """

    program: str
    out: str
    objective: str
    steps: int
    planned: int
    epochs: float
    trainable: int
    parameters: int
    examples: int
    tokens: int
    seconds: float
    first_loss: float | None
    last_loss: float | None
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None
    best_step: int | None
    memory: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def render_train(report: TrainReport, console: Console) -> None:
    """The run in a few lines, the metrics before and after, and what to do next."""
    title = f"[bold]{escape(report.program)}[/]"
    if report.out:
        title += f" → [bold]{escape(report.out)}[/]"
    console.print(f"{title}  {escape(report.objective)}\n")
    share = report.trainable / max(report.parameters, 1)
    console.print(f"{count(report.trainable)} of {count(report.parameters)} parameters learn "
                  f"({100 * share:.3g}%)")  # fmt: skip
    if report.steps:
        console.print(_speed(report))
        console.print(f"loss {report.first_loss:.4f} → {report.last_loss:.4f}")
    metrics = report.after or report.before
    if metrics:
        made = table("evaluation", *metrics)
        for name, found in (("before", report.before), ("after", report.after)):
            if found:
                made.add_row(name, *(f"{value:.4f}" for value in found.values()))
        console.print(made)
    for note in report.notes:
        console.print(f"[dim]{escape(note)}[/]", soft_wrap=True)
    if report.out:
        console.print(f"\nnext: [bold]ftc export {escape(report.out)} -o model.onnx[/]",
                      soft_wrap=True)  # fmt: skip


def _speed(report: TrainReport) -> str:
    rate = report.tokens / max(report.seconds, 1e-9)
    text = (f"{report.steps:,} steps, {report.epochs:.3g} epochs: {count(report.examples)} rows "
            f"read in {duration(report.seconds)}, {count(rate)} tokens/s, "
            f"{count(report.memory)}B at most")  # fmt: skip
    if report.best_step is not None:
        text += f"; the weights are those of step {report.best_step:,}, the best"
    return text


def recorded(program: Program, config: TrainConfig, report: TrainReport) -> Program:
    """The program with the training in its history."""
    total = cost(program)
    spec = f"train{{objective={report.objective},steps={report.steps}}}"
    notes = [
        f"{report.trainable:,} of {report.parameters:,} parameters learned from "
        f"{Path(config.data).name}, {report.epochs:.3g} epochs, seed {config.seed}"
    ]
    if report.last_loss is not None:
        notes.append(
            f"loss {report.first_loss:.4f} at the start, {report.last_loss:.4f} at the end"
        )
    notes += [f"{name} {value:.4f} on the evaluation data"
              for name, value in (report.after or {}).items()]  # fmt: skip
    record = PassRecord(
        spec, "approximate", report.steps, ("trained",), None, total.parameters, total.bytes,
        total.operations, report.seconds, tuple(notes), fingerprint(program),
    )  # fmt: skip
    return replace(program, history=(*program.history, record))
