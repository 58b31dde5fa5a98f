"""``ftc run``: ask a program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ftc.graph.errors import UsageError

from .options import command, engine_option, threads_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output


@command
@click.argument("out")
@click.option("--text", "texts", multiple=True, metavar="TEXT", help="May be given several times.")
@click.option("--input", "tensors", metavar="FILE", help="Tensors by name: .npz or .safetensors.")
@engine_option
@click.option("--max-new-tokens", "most", type=click.IntRange(1), default=32, show_default=True)
@threads_option
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
