"""Text in, tensors out: rows of tokens for a program's inputs.

Drift says most on real text, so a program with a tokenizer is probed with some:
the text the user gave, or prose of Python's own documentation, which every
CPython carries as ``pydoc_data.topics``. Rows of different lengths are padded on
the right, so that the mask matters.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftc.graph.cached import is_cached, step_inputs
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.signature import Signature
from ftc.passes.context import Inputs

from .spoken import Spoken
from .tokens import IDS, TYPES, made_of_text, token_rows

PROBE_TOKENS = (20, 13)
CALIBRATION = ((3, 64), *((8, 32),) * 12)
"""Rows and tokens of each entry of the calibration data. The first is for passes that want
extremes and look at no other; the rest, short as most texts are, for second moments."""


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraphs, and where they are from, in words."""

    paragraphs: tuple[str, ...]
    source: str


def default_text() -> Text:
    """Prose of Python's documentation: paragraphs without markup of their own."""
    from pydoc_data.topics import topics

    return Text(tuple(_prose("\n\n".join(topics.values()))), "Python's documentation")


def read_text(given: str | None) -> Text:
    """The text a user named.

    Args:
        given: a file (of text, or ``.jsonl`` with the field ``text``), or the text
            itself; None: :func:`default_text`.

    Raises:
        UsageError: for a folder, or a file that is not there, is not text, or is empty.
    """
    if given is None:
        return default_text()
    path = Path(given)
    looks_like_file = not re.search(r"\s", given) and ("/" in given or bool(path.suffix))
    if not (looks_like_file or _exists(path)):
        return Text((given,), "the given text")
    if path.suffix in (".jsonl", ".ndjson"):
        from .examples import read_examples  # which reads files with what is here

        return Text(tuple(" ".join(e.text.split()) for e in read_examples(path)), path.name)
    body = read_file(path)
    paragraphs = tuple(" ".join(p.split()) for p in re.split(r"\n\s*\n", body) if p.strip())
    if not paragraphs:
        raise UsageError(f"{path} holds no text", fix="name a file with prose")
    return Text(paragraphs, path.name)


def read_file(path: Path) -> str:
    """A text file, whole.

    Raises:
        UsageError: naming it, when it cannot be read as UTF-8.
    """
    if not path.name:
        raise UsageError("no text is given", fix="name a text file, or write the text itself")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"there is no file {path}", fix="name one, or write the text itself"
        ) from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder", fix="name a file in it") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text: {error}", fix="save it as UTF-8") from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", fix="name a text file"
        ) from None


def takes_text(signature: Signature) -> bool:
    """Whether a program's inputs are what a tokenizer makes, and a cache if it has one."""
    return made_of_text((spec.name, spec.role) for spec in signature.inputs)


def need_tokenizer(program: Program) -> Any:
    """The program's tokenizer.

    Raises:
        UsageError: when it takes no text, or came without one.
    """
    return Spoken.of(program).tokenizer


def encode(
    tokenizer: Any, signature: Signature, texts: Sequence[str], *, length: int | None = None
) -> dict[str, Tensor]:
    """Rows of tokens, padded on the right.

    Args:
        tokenizer: of transformers.
        signature: whose inputs to make, each ``[len(texts), longest row]``.
        texts: one a row.
        length: the longest row; longer texts are cut. By default the program's limit.
    """
    return pad(rows(tokenizer, signature, texts, length=length), signature, tokenizer)


def rows(
    tokenizer: Any, signature: Signature, texts: Sequence[str], *, length: int | None = None
) -> list[list[int]]:
    """The tokens of each text, cut at ``length`` and at the program's limit.

    Raises:
        UsageError: for a text without a token, or one that the model does not know.
    """
    limits = [n for n in (length, signature.limits.get("sequence")) if n is not None]
    known = next(spec.high for spec in signature.inputs if spec.name == IDS)
    return token_rows(tokenizer, texts, known=known, length=min(limits, default=None))


def pad(tokens: Sequence[Sequence[int]], signature: Signature, tokenizer: Any) -> dict[str, Tensor]:
    """Inputs of ``signature`` from rows of tokens; the mask is 1 where there is one.

    Behind a cache they are those of a first step, whose past is empty.

    Raises:
        UsageError: when rows differ in length and the program takes no mask.
    """
    longest = max(map(len, tokens))
    masked = any(spec.role == "mask" for spec in signature.inputs)
    if not masked and min(map(len, tokens)) < longest:
        raise UsageError(
            "this program takes no attention mask: rows of different length do not fit",
            fix="give one text at a time",
        )
    filler = getattr(tokenizer, "pad_token_id", None) or 0
    ids = torch.full((len(tokens), longest), filler, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(tokens):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    if is_cached(signature):
        return step_inputs(signature, ids, mask, {})
    made = {IDS: ids, TYPES: torch.zeros_like(ids)}
    return {s.name: (mask if s.role == "mask" else made[s.name]).to(s.dtype)
            for s in signature.inputs}  # fmt: skip


def text_probe(program: Program, text: Text, found: Any) -> dict[str, Tensor]:
    """One probe of two short rows of real text, the second shorter than the first."""
    tokens = _filled(
        found, program.signature, text.paragraphs, max(PROBE_TOKENS), len(PROBE_TOKENS)
    )
    masked = any(spec.role == "mask" for spec in program.signature.inputs)
    lengths = PROBE_TOKENS if masked else (min(PROBE_TOKENS),) * len(PROBE_TOKENS)
    cut = [row[:n] for row, n in zip(tokens, lengths, strict=False)]
    return pad(cut if masked else [r[: min(map(len, cut))] for r in cut], program.signature, found)


def calibration(program: Program, text: Text, found: Any) -> tuple[Inputs, ...]:
    """Rows of real text for passes that learn statistics: :data:`CALIBRATION`, one entry each."""
    made: list[Inputs] = []
    for length in dict.fromkeys(length for _, length in CALIBRATION):
        counts = [count for count, each in CALIBRATION if each == length]
        left = iter(_filled(found, program.signature, text.paragraphs, length, sum(counts)))
        for count in counts:
            if some := list(itertools.islice(left, count)):
                shortest = min(map(len, some))
                made.append(pad([row[:shortest] for row in some], program.signature, found))
    return tuple(made)


def _filled(
    found: Any, signature: Signature, paragraphs: Sequence[str], length: int, count: int
) -> list[list[int]]:
    """``count`` rows of up to ``length`` tokens, of paragraphs joined, spread over the text."""
    limit = signature.limits.get("sequence", length)
    step = max(1, len(paragraphs) // count)
    made = []
    for start in range(0, len(paragraphs), step):
        words, index = paragraphs[start], start + 1
        while len(words) < 8 * length and index < min(len(paragraphs), start + step):
            words, index = f"{words} {paragraphs[index]}", index + 1
        made.append(rows(found, signature, [words], length=min(length, limit))[0])
    return made[:count]


def _prose(text: str) -> Iterator[str]:
    """Paragraphs that are sentences: no code, no lists, no tables, little markup."""
    for block in re.split(r"\n\s*\n", text):
        words = " ".join(block.split())
        plain = block[:1].isupper() and len(words) > 150 and words.endswith((".", "!", "?"))
        if plain and not re.search(r"::|[`|<>=\[\]]{2}|\n\s{4}", block):
            yield words.replace('"', "").replace("*", "")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text too long to be a name
        return False
