"""Texts longer than a program's positions: which they are, and how much of them is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftc.graph.program import Program

from .tokens import count_tokens


@dataclass(frozen=True, slots=True)
class Cut:
    """A text of which only the beginning was used.

    Attributes:
        place: its number among the texts, from 1.
        tokens: that it has, special ones included.
        kept: that were used.
    """

    place: int
    tokens: int
    kept: int

    def __str__(self) -> str:
        return (
            f"text {self.place} has {self.tokens:,} tokens, and the program takes {self.kept:,}: "
            "what comes after them was left out"
        )


def cut_texts(program: Program, texts: Sequence[str], tokenizer: Any) -> tuple[Cut, ...]:
    """Those of ``texts`` that are longer than the program's limit."""
    limit = program.signature.limits.get("sequence")
    if limit is None:
        return ()
    counts = (count_tokens(text, tokenizer) for text in texts)
    return tuple(Cut(n, count, limit) for n, count in enumerate(counts, 1) if count > limit)
