"""``ftc run``: ask a program."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ftc.graph.errors import UsageError

from .options import command, engine_option, threads_option

if TYPE_CHECKING:
    from ftc.runtime.console import Output
    from ftc.runtime.continuation import Asked
    from ftc.runtime.engine import Engine


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
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="Ends before this text.")
@click.option("--chat", is_flag=True, help="Converse: each text, or each line typed, is a turn.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="In torch: through torch.compile.")
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
    stops: tuple[str, ...],
    chat: bool,
    device: Literal["cpu", "cuda"],
    compiled: bool,
    threads: int | None,
) -> None:
    """Ask a compiled program: an embedding, a filled gap, a continuation, a label."""
    from ftc.runtime import answer
    from ftc.runtime.continuation import Asked
    from ftc.runtime.engine import open_engine
    from ftc.runtime.sampling import Sampling
    from ftc.runtime.threads import set_threads

    if (tensors is not None and (texts or chat)) or (tensors is None and not (texts or chat)):
        raise UsageError("give texts or tensors", fix='--text "..." or --input FILE.npz')
    asked = Asked(most, Sampling(temperature, top_k, top_p, penalty, seed), stops)
    set_threads(threads)
    output.say(f"opening {out}")
    opened = open_engine(out, engine, device=device, compiled=compiled)
    if tensors is not None:
        return output.show(answer.answer_tensors(opened, Path(tensors)), answer.render_answer)
    if chat:
        return _converse(output, opened, texts, asked)
    write = (lambda _: None) if output.json else output.write
    said = answer.answer_text(opened, texts, asked=asked, write=write)
    return output.show(said, answer.render_answer)


def _converse(output: Output, engine: Engine, texts: tuple[str, ...], asked: Asked) -> None:
    """Turns of a conversation; an interrupt ends an answer, and between answers all of it."""
    from ftc.runtime.answer import Stopped, describe_pace, stoppable
    from ftc.runtime.chat import Chat
    from ftc.runtime.continuation import Pace

    chat = Chat(engine, asked)
    write = (lambda _: None) if output.json else output.write
    output.say.stop()
    paces = []
    for text in texts or _lines(write):
        pace = Pace()
        try:
            with stoppable(write):
                for piece in chat.say(text, pace):
                    write(piece)
        except Stopped:
            if texts:
                raise
            continue
        write(f"\n({describe_pace(pace)})\n")
        paces.append(pace.to_dict())
    if output.json:
        output.data({"engine": engine.label, "messages": chat.messages, "paces": paces})


def _lines(write: Callable[[str], None]) -> Iterator[str]:
    """What is typed, until the end of the input or an interrupt."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        write(prompt)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            write("\n" if prompt else "")
            return
        if line.strip():
            yield line.strip()
