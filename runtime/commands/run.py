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
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="0 for the likeliest token, 1 for the model's own distribution.",
)
@click.option("--top-k", type=int, default=0, help="Of so many tokens one is drawn; 0: of all.")
@click.option("--top-p", type=float, default=1.0, help="Of so much probability one is drawn.")
@click.option(
    "--repetition-penalty",
    "penalty",
    type=float,
    default=1.0,
    help="Above 1: what was said already is less likely.",
)
@click.option("--seed", type=int, default=0, help="The same seed draws the same tokens.")
@threads_option
def run(
    output: Output,
    out: str,
    texts: tuple[str, ...],
    tensors: str | None,
    engine: Literal["onnx", "torch"] | None,
    most: int,
    temperature: float,
    top_k: int,
    top_p: float,
    penalty: float,
    seed: int,
    threads: int | None,
) -> None:
    """Ask a compiled program: an embedding, a filled gap, a continuation, a label."""
    from ftc.runtime import answer
    from ftc.runtime.engine import open_engine, set_threads
    from ftc.runtime.sampling import Sampling

    if bool(texts) == (tensors is not None):
        raise UsageError("give texts or tensors", fix='--text "..." or --input FILE.npz')
    how = Sampling(temperature, top_k, top_p, penalty, seed)
    set_threads(threads)
    output.say(f"opening {out}")
    opened = open_engine(out, engine)
    if tensors is not None:
        return output.show(answer.answer_tensors(opened, Path(tensors)), answer.render_answer)
    write = (lambda _: None) if output.json else output.write
    said = answer.answer_text(opened, texts, most=most, write=write, how=how)
    return output.show(said, answer.render_answer)
