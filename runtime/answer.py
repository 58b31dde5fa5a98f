"""``ftc run``: texts or tensors in, what the program's task makes of them out.

See :mod:`ftc.runtime.predict` for how each task's outputs are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from ftc.graph.errors import UsageError

from .console import duration, table
from .continuation import Asked, Pace, pieces
from .decoder import Decoder
from .engine import Engine
from .spoken import check_text_task

if TYPE_CHECKING:
    from torch import Tensor

    from .predict import Labelled

Write = Callable[[str], None]
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program said.

    Attributes:
        engine: what ran it.
        task: of the program.
        texts: as given; empty for tensors.
        vectors: embeddings ``[texts, width]``, and
        pooling: how they were made.
        labelled: labels, or filled gaps, for each text.
        continuations: generated text, for each text, and
        pace: how fast it came.
        tensors: outputs by name, for tensors.
        notes: what has to be known of the answer: texts that were cut.
    """

    engine: str
    task: str
    texts: tuple[str, ...]
    vectors: Tensor | None = None
    pooling: str = ""
    labelled: tuple[tuple[Labelled, ...], ...] = ()
    continuations: tuple[str, ...] = ()
    pace: Pace | None = None
    tensors: dict[str, Tensor] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: everything, unrounded."""
        head: dict[str, Any] = {"engine": self.engine, "task": self.task,
                                "texts": list(self.texts), "notes": list(self.notes)}  # fmt: skip
        if self.vectors is not None:
            similarity = (self.vectors @ self.vectors.T).tolist()
            return {**head, "pooling": self.pooling, "embeddings": self.vectors.tolist(),
                    "similarity": similarity}  # fmt: skip
        if self.tensors is not None:
            return {**head, "outputs": {n: t.tolist() for n, t in self.tensors.items()}}
        if self.continuations:
            pace = self.pace.to_dict() if self.pace else {}
            return {**head, "continuations": list(self.continuations), **pace}
        found = [[{"text": each.text, "guesses": [[g.text, g.probability] for g in each.guesses]}
                  for each in group] for group in self.labelled]  # fmt: skip
        return {**head, "labels": found}


def answer_text(engine: Engine, texts: Sequence[str], *, asked: Asked, write: Write) -> Answer:
    """Asks a program of a text task.

    Args:
        engine: what runs the program.
        texts: one or more.
        asked: how a text goes on.
        write: gets a continuation piece by piece, with the text before it.

    Raises:
        UsageError: for a program that takes no text, or a text that does not fit its task.
        Stopped: when a continuation is interrupted.
    """
    task, given = engine.spoken.task, tuple(texts)
    check_text_task(task)
    if task == "causal-lm":
        return _continue(engine, given, asked, write)
    from .lengths import cut_texts  # what follows takes torch
    from .predict import classify, embed, fill_masks
    from .text import need_tokenizer

    program = engine.program
    notes = tuple(map(str, cut_texts(program, given, need_tokenizer(program))))
    if task == "feature-extraction":
        vectors, pooling = embed(engine, given)
        return Answer(engine.label, task, given, vectors, pooling, notes=notes)
    ask = fill_masks if task in ("masked-lm", "pretraining") else classify
    labelled = tuple(tuple(ask(engine, text)) for text in given)
    return Answer(engine.label, task, given, labelled=labelled, notes=notes)


class Stopped(KeyboardInterrupt):
    """Somebody had read enough: what came until then is on the screen."""


def _continue(engine: Engine, texts: tuple[str, ...], asked: Asked, write: Write) -> Answer:
    """Writes a text only with its first piece: one that is refused is not shown.

    Several texts with a cache are one batch, and written when all have ended.
    """
    spoken = engine.spoken
    prompts = spoken.tokens_of(texts)
    pace = Pace()
    with stoppable(write):
        if len(texts) > 1 and spoken.cached:
            said = [""] * len(texts)
            for new in pieces(Decoder(engine), prompts, asked, pace):
                said = [before + piece for before, piece in zip(said, new, strict=True)]
            write("".join(f"{text}{end}\n" for text, end in zip(texts, said, strict=True)))
        else:
            said = [_stream(engine, text, ids, asked, pace, write)
                    for text, ids in zip(texts, prompts, strict=True)]  # fmt: skip
    notes = () if pace.full is None else (
        f"there are {pace.full:,} tokens, and the model takes no more: here the "
        f"{'text ends' if len(texts) == 1 else 'longest text ends, and the others with it'}",
    )  # fmt: skip
    return Answer(engine.label, spoken.task, texts, continuations=tuple(said), pace=pace,
                  notes=notes)  # fmt: skip


def _stream(
    engine: Engine, text: str, ids: list[int], asked: Asked, pace: Pace, write: Write
) -> str:
    said: list[str] = []
    for (piece,) in pieces(Decoder(engine), [ids], asked, pace):
        write(piece if said else text + piece)
        said.append(piece)
    write("\n")
    return "".join(said)


@contextmanager
def stoppable(write: Write) -> Iterator[None]:
    """What is interrupted within ends its line.

    Raises:
        Stopped: for a KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        write("\n")
        raise Stopped from None


def answer_tensors(engine: Engine, path: Path) -> Answer:
    """Runs a program on the tensors of a file.

    Raises:
        UsageError: when they do not fit its inputs.
    """
    from .tensors import out_of_range, read_tensors

    inputs = read_tensors(path, engine.program.signature)
    try:
        outputs = engine(inputs)
    except (RuntimeError, IndexError, ValueError, UsageError) as error:
        about_indices = re.search("index|indices", str(error))
        if about_indices and (beyond := out_of_range(inputs, engine.program.signature)):
            raise UsageError(f"{path}: {beyond[0]}", fix=beyond[1]) from error
        if isinstance(error, UsageError):
            raise
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in inputs.items())
        raise UsageError(
            f"the program does not run on {path}: {str(error).splitlines()[0]}",
            where=shapes,
            fix="ftc inspect shows the sizes it takes",
        ) from error
    return Answer(engine.label, engine.program.signature.task, (), tensors=outputs)


def render_answer(answer: Answer, console: Console) -> None:
    """The answer as tables; a continuation was written already as it came."""
    if answer.vectors is not None:
        _render_vectors(answer, answer.vectors, console)
    if answer.labelled:
        from .render import render_labels

        for group in answer.labelled:
            render_labels(group, console)
    if answer.tensors is not None:
        _render_tensors(answer.tensors, console)
    for note in answer.notes:
        console.print(f"[yellow]note[/]: {escape(note)}")
    speed = f"; {describe_pace(answer.pace)}" if answer.pace and answer.pace.first else ""
    console.print(f"[dim]{escape(answer.engine)}{speed}[/]")


def describe_pace(pace: Pace) -> str:
    """``first token after 120 ms, then 51.2 tokens/s``; empty where none came."""
    if pace.first is None:
        return ""
    then = f", then {pace.rate:.1f} tokens/s" if pace.rate else ""
    return f"first token after {duration(pace.first)}{then}"


def _render_vectors(answer: Answer, vectors: Tensor, console: Console) -> None:
    made = table("text", "embedding", "norm", left=2)
    for text, vector in zip(answer.texts, vectors, strict=True):
        first = ", ".join(f"{x:+.4f}" for x in vector[:_SHOWN].tolist())
        made.add_row(escape(_short(text)), rf"\[{first}, …]", f"{vector.norm():.4f}")
    console.print(made)
    console.print(f"[dim]{vectors.shape[1]} numbers each, {answer.pooling}, normalised; "
                  "all of them with --json[/]")  # fmt: skip
    if len(vectors) > 1:
        numbers = range(1, len(vectors) + 1)
        made = table("cosine", *map(str, numbers), title="")
        for number, text, row in zip(numbers, answer.texts, vectors @ vectors.T, strict=True):
            made.add_row(f"{number} {escape(_short(text))}", *(f"{x:.4f}" for x in row.tolist()))
        console.print(made)


def _render_tensors(tensors: dict[str, Tensor], console: Console) -> None:
    made = table("output", "shape", "first numbers", left=3)
    for name, tensor in tensors.items():
        first = ", ".join(f"{x:.4g}" for x in tensor.flatten()[:_SHOWN].tolist())
        made.add_row(escape(name), " × ".join(map(str, tensor.shape)), first)
    console.print(made)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
