"""``ftc run``: texts or tensors in, what the program's task makes of them out.

See :mod:`ftc.runtime.predict` for how each task's outputs are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from ftc.graph.errors import UsageError

from .console import table
from .engine import Engine
from .lengths import cut_texts
from .predict import Labelled, check_text_task, classify, embed, fill_masks, generate
from .render import render_labels
from .sampling import Sampling
from .tensors import out_of_range, read_tensors
from .text import need_tokenizer

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
        continuations: generated text, for each text.
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
            return {**head, "continuations": list(self.continuations)}
        found = [[{"text": each.text, "guesses": [[g.text, g.probability] for g in each.guesses]}
                  for each in group] for group in self.labelled]  # fmt: skip
        return {**head, "labels": found}


def answer_text(
    engine: Engine, texts: Sequence[str], *, most: int, write: Write, how: Sampling | None = None
) -> Answer:
    """Asks a program of a text task.

    Args:
        engine: what runs the program.
        texts: one or more.
        most: new tokens of a continuation.
        write: gets a continuation piece by piece, with the text before it.
        how: its tokens are chosen; the likeliest by default.

    Raises:
        UsageError: for a program that takes no text, or a text that does not fit its task.
    """
    program, task = engine.program, engine.program.signature.task
    check_text_task(program)
    asked = tuple(texts)
    if task == "causal-lm":
        found = tuple(_continue(engine, text, most, write, how) for text in asked)
        return Answer(engine.label, task, asked, continuations=found)
    notes = tuple(map(str, cut_texts(program, asked, need_tokenizer(program))))
    if task == "feature-extraction":
        vectors, pooling = embed(engine, asked)
        return Answer(engine.label, task, asked, vectors, pooling, notes=notes)
    ask = fill_masks if task in ("masked-lm", "pretraining") else classify
    labelled = tuple(tuple(ask(engine, text)) for text in asked)
    return Answer(engine.label, task, asked, labelled=labelled, notes=notes)


def _continue(engine: Engine, text: str, most: int, write: Write, how: Sampling | None) -> str:
    """Writes the text only with the first piece: a text that is refused is not shown."""
    pieces = generate(engine, text, most=most, how=how)
    said = [next(pieces, "")]
    write(text + said[0])
    for piece in pieces:
        said.append(piece)
        write(piece)
    write("\n")
    return "".join(said)


def answer_tensors(engine: Engine, path: Path) -> Answer:
    """Runs a program on the tensors of a file.

    Raises:
        UsageError: when they do not fit its inputs.
    """
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
    for group in answer.labelled:
        render_labels(group, console)
    if answer.tensors is not None:
        _render_tensors(answer.tensors, console)
    for note in answer.notes:
        console.print(f"[yellow]note[/]: {escape(note)}")
    console.print(f"[dim]{escape(answer.engine)}[/]")


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
