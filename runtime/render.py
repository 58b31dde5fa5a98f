"""Results as tables for people. Every number says what it was measured on and by what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from .console import cosine, count, format_sizes, megabytes, small, table
from .render_latency import render_latencies

if TYPE_CHECKING:
    from ftc.graph.program import PassRecord, Program
    from ftc.passes.outline import Outline
    from ftc.passes.registry import Description

    from .bench import Comparison
    from .evaluate import Evaluation
    from .export import Export
    from .predict import Labelled
    from .summary import Row, Summary, Weight


def render_summary(
    summary: Summary,
    console: Console,
    *,
    layers: bool = False,
    weights: Sequence[Weight] | None = None,
    graph: Program | None = None,
) -> None:
    """What a program is; with its layers, some of its weights, or its graph as text."""
    if graph is not None:
        from ftc.graph.printer import print_graph

        console.file.write(print_graph(graph))
        return
    _head(summary, console)
    console.print(_rows(summary.roles, "weights", operations=False))
    if layers:
        console.print()
        console.print(_rows(summary.layers, "layer", operations=True))
    if weights is not None:
        console.print()
        console.print(_weights(weights))
    if summary.history:
        console.print()
        console.print(_history(summary.history))
    for note in summary.notes:
        console.print(f"[dim]{escape(note)}[/]")
    if summary.files:
        sizes = ", ".join(f"{n} {megabytes(s)}" for n, s in summary.files.items() if s > 5e4)
        console.print(f"\n[dim]files (MB): {escape(sizes)}[/]")


def _head(summary: Summary, console: Console) -> None:
    console.print(
        f"[bold]{escape(summary.source)}[/]  {summary.task}  [dim]{summary.fingerprint}[/]"
    )
    for word, specs in (("input", summary.inputs), ("output", summary.outputs)):
        for name, spec in specs.items():
            console.print(f"  {word:6} {escape(name)}: {escape(spec)}")
    for name, limit in summary.limits.items():
        console.print(f"  {name} is at most {limit}")
    console.print(
        f"  {count(summary.parameters)} parameters, {megabytes(summary.bytes)} MB, {summary.nodes} "
        f"nodes, {count(summary.operations)} multiply-adds at {format_sizes(summary.sizes)}\n"
    )


def _rows(rows: Sequence[Row], name: str, *, operations: bool) -> object:
    made = table(name, "tensors", "params", "MB", *(["ops"] if operations else []))
    for row in rows:
        extra = [count(row.operations)] if operations else []
        made.add_row(escape(row.name), str(row.tensors), count(row.parameters),
                     megabytes(row.bytes), *extra)  # fmt: skip
    return made


def _weights(weights: Sequence[Weight]) -> object:
    made = table("weight", "role", "type", "shape", "kB", left=3)
    for each in weights:
        shape = " × ".join(map(str, each.shape))
        made.add_row(escape(each.name), " ".join(each.roles), each.dtype, shape,
                     f"{each.bytes / 1e3:,.1f}")  # fmt: skip
    total = sum(each.bytes for each in weights) / 1e3
    made.add_row(f"{len(weights)} weights", "", "", "", f"{total:,.1f}", style="bold")
    return made


def _history(history: Sequence[PassRecord]) -> object:
    made = table("history", "rewrites", "params", "MB", "drift", "cosine min")
    for each in history:
        drift = each.drift
        made.add_row(
            escape(each.spec), str(each.modified), count(each.parameters), megabytes(each.bytes),
            "none" if drift is None else small(drift.relative),
            "" if drift is None or each.effect == "exact" else cosine(drift.cosine_min),
        )  # fmt: skip
    return made


def render_comparison(found: Comparison, console: Console) -> None:
    """Latencies of two programs."""
    render_latencies(found.latencies, (found.base, found.other), ("against", "this"), console)
    if any(each.noise for each in found.latencies):
        console.print("more --seconds, or a quieter machine, tells more")
    instructions = " ".join(found.machine["instructions"]) or "no vector instructions known"
    console.print(f"[dim]{escape(found.machine['processor'])}, {found.machine['cores']} cores, "
                  f"{instructions}[/]")  # fmt: skip


def render_evaluation(found: Evaluation, console: Console) -> None:
    """One metric, beside that of another program."""
    console.print(f"{found.metric} [bold]{found.value:.4f}[/]  [dim]{escape(found.engines[0])}[/]")
    if found.against is not None:
        console.print(
            f"against    [bold]{found.against:.4f}[/]  [dim]{escape(found.engines[1])}[/]"
        )
    for name, number in found.details.items():
        console.print(
            f"  {name}: {number:.4f}" if isinstance(number, float) else f"  {name}: {number:,}"
        )
    console.print(f"[dim]{escape(found.data)}[/]")


def render_labels(found: Sequence[Labelled], console: Console) -> None:
    """Labels with their probabilities or numbers, a line for each text, token or gap."""
    numbers = any(each.number for each in found)
    made = table("text", "label", "number" if numbers else "probability", left=2)
    for each in found:
        for place, guess in enumerate(each.guesses):
            made.add_row("" if place else escape(each.text), escape(guess.text),
                         f"{guess.probability:.4f}")  # fmt: skip
    console.print(made)


def render_passes(passes: Sequence[Outline], console: Console) -> None:
    """All passes, one line each."""
    made = table("pass", "effect", "what it does", left=3)
    for each in passes:
        made.add_row(f"[bold]{escape(each.name)}[/]", each.effect, escape(each.summary))
    console.print(made)
    console.print("\n[dim]ftc passes NAME shows a pass with its options[/]")


def render_pass(found: Description, console: Console) -> None:
    """One pass with every option."""
    console.print(f"[bold]{escape(found.name)}[/] ({found.effect}): {escape(found.summary)}\n")
    made = table("option", "default", "type", "what it does", left=4)
    for each in found.options:
        made.add_row(escape(each.name), escape(each.default), escape(each.type), escape(each.help))
    console.print(made if found.options else "it has no options")


def render_export(found: Export, console: Console) -> None:
    """What was written, and how far it is from the graph: parity has held it to rounding."""
    from .parity import TOLERANCE

    console.print(f"[bold]{escape(found.path)}[/]  {megabytes(found.bytes)} MB", soft_wrap=True)
    rounding = "rounding" if found.drift.relative <= TOLERANCE else (
        "what rounding makes of activations that are quantized at run time"
    )  # fmt: skip
    console.print(
        f"onnxruntime computes what the graph does: relative error {small(found.drift.relative)}, "
        f"which is {rounding} [dim](on {escape(found.drift.inputs)})[/]"
    )
    if found.decomposed:
        console.print(f"lowered through their decomposition: {', '.join(found.decomposed)}")
    for note in found.notes:
        console.print(note)
