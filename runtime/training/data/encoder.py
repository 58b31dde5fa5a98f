"""Text to tokens in parallel, and rows of tokens to a program's inputs, padded on the right."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.signature import Signature
from ftc.runtime.text import need_tokenizer
from ftc.runtime.tokens import IDS, TYPES

_USUAL_LENGTH = 128
IGNORED = -100
"""A target that no loss is taken of."""


@dataclass(frozen=True)
class Encoder:
    """A program's tokenizer and inputs.

    Attributes:
        signature: whose inputs are made.
        tokenizer: of transformers.
        length: tokens of the longest row; longer texts are cut.
    """

    signature: Signature
    tokenizer: Any
    length: int

    @classmethod
    def of(cls, program: Program, length: int | None = None) -> Encoder:
        """The encoder of ``program``.

        Args:
            program: takes text and has a tokenizer.
            length: tokens of a row at most; by default 128, or the program's limit if less.

        Raises:
            UsageError: for a program without text, or a length beyond its limit.
        """
        limit = program.signature.limits.get("sequence")
        if length is not None and (length < 2 or length > (limit or length)):
            bound = f"2 to {limit}" if limit else "2 or more"
            raise UsageError(f"length={length} is out of range", fix=f"use {bound}")
        usual = min(_USUAL_LENGTH, limit or _USUAL_LENGTH)
        return cls(program.signature, need_tokenizer(program), length or usual)

    @property
    def vocabulary(self) -> int:
        """Tokens that the program knows."""
        return next(spec.high for spec in self.signature.inputs if spec.name == IDS)

    @property
    def masked(self) -> bool:
        """Whether the program takes a mask, so that rows of different length go together."""
        return any(spec.role == "mask" for spec in self.signature.inputs)

    @property
    def fingerprint(self) -> str:
        """Changes with what the tokenizer does."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None:
            stored: Any = sorted(self.tokenizer.get_vocab().items())
        else:
            stored = {k: v for k, v in json.loads(fast.to_str()).items()
                      if k not in ("padding", "truncation")}  # fmt: skip
        text = json.dumps([type(self.tokenizer).__name__, stored], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def special(self, name: str) -> int:
        """The id of a special token, ``mask`` or ``sep``.

        Raises:
            UsageError: when the tokenizer has none.
        """
        found = getattr(self.tokenizer, f"{name}_token_id", None)
        if found is None:
            raise UsageError(
                f"the tokenizer has no {name} token", fix="choose another objective or tokenizer"
            )
        return int(found)

    def tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None,
               **options: Any) -> Any:  # fmt: skip
        """What the tokenizer makes of texts (and their second parts), cut at ``length``.

        Args:
            texts: encoded in parallel, by as many threads as there are cores.
            pairs: second texts of each row, or None.
            options: of the tokenizer; by default texts are cut.
        """
        given = {"truncation": True, "max_length": self.length, **options}
        arguments = (list(texts),) if pairs is None else (list(texts), list(pairs))
        with _parallel():
            return self.tokenizer(*arguments, **given)

    def inputs(self, rows: Sequence[Tensor], types: Sequence[Tensor] | None = None) -> dict[
        str, Tensor]:  # fmt: skip
        """Inputs ``[len(rows), longest row]`` of rows of token ids.

        Raises:
            UsageError: when rows differ in length and the program takes no mask.
        """
        lengths = [len(row) for row in rows]
        if not self.masked and len(set(lengths)) > 1:
            raise UsageError(
                "this program takes no attention mask: rows of different length do not fit",
                fix="batch=1, or an objective with packed rows",
            )
        filler = getattr(self.tokenizer, "pad_token_id", None) or 0
        made = {IDS: stack(rows, filler), TYPES: stack(types, 0) if types else None}
        mask = stack([torch.ones_like(row) for row in rows], 0)
        return {spec.name: self._input(spec, made, mask) for spec in self.signature.inputs}

    def _input(self, spec: Any, made: dict[str, Tensor | None], mask: Tensor) -> Tensor:
        found = mask if spec.role == "mask" else made.get(spec.name)
        return (torch.zeros_like(mask) if found is None else found).to(spec.dtype)


def stack(rows: Sequence[Tensor], filler: int) -> Tensor:
    """Rows of different length as one int64 tensor, filled on the right."""
    whole = torch.full((len(rows), max(map(len, rows))), filler, dtype=torch.int64)
    for index, row in enumerate(rows):
        whole[index, : len(row)] = row
    return whole


@contextmanager
def _parallel() -> Iterator[None]:
    """The tokenizer's threads, which the command line switches off for single texts."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
