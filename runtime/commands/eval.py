"""``ftc eval``: a metric on the user's data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from .options import command, engine_option, threads_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("out")
@click.option("--data", required=True, metavar="FILE", help="Text, or JSONL with text and label.")
@click.option("--metric", required=True, metavar="METRIC", help="perplexity, accuracy or cosine.")
@click.option("--against", metavar="MODEL", help="Another program on the same data.")
@engine_option
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Texts, or windows, at most.")
@click.option("--length", type=click.IntRange(2), default=128, show_default=True,
              help="Tokens in a window of perplexity.")  # fmt: skip
@threads_option
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
    from ftc.runtime.engine import open_engine
    from ftc.runtime.threads import set_threads

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
