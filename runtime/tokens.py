"""Texts as rows of tokens, whatever runs on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftc.graph.cache_inputs import is_state
from ftc.graph.errors import UsageError

Dim = int | str
IDS, TYPES = "input_ids", "token_type_ids"
NO_SCORES = "no output holds scores for each token"


def made_of_text(inputs: Iterable[tuple[str, str]]) -> bool:
    """Whether inputs, names and roles, are what a tokenizer makes, and a cache where one is."""
    given = dict(inputs)
    return IDS in given and all(
        name in (IDS, TYPES) or is_state(name) or role == "mask" for name, role in given.items()
    )


def per_token(tokens: Sequence[Dim], outputs: Mapping[str, Sequence[Dim]], otherwise: str) -> str:
    """The output ``[batch, sequence, width]``, where tokens are ``[batch, sequence]``.

    Raises:
        UsageError: saying ``otherwise``, when there is none.
    """
    for name, shape in outputs.items():
        if len(shape) == 3 and tuple(shape[:2]) == tuple(tokens[:2]):
            return name
    raise UsageError(
        f"{otherwise}; outputs: {', '.join(outputs)}", fix="give tensors: --input FILE.npz"
    )


def count_tokens(text: str, tokenizer: Any) -> int:
    """How many tokens a text has, special ones included."""
    return len(tokenizer(text)[IDS])


def token_rows(
    tokenizer: Any, texts: Sequence[str], *, known: int, length: int | None = None
) -> list[list[int]]:
    """The tokens of each text.

    Args:
        tokenizer: of transformers.
        texts: one a row.
        known: how many tokens the model's table has.
        length: of the longest row; longer texts are cut.

    Raises:
        UsageError: for a text without a token, or a token that is not known.
    """
    cut = {} if length is None else {"truncation": True, "max_length": length}
    found = [list(tokenizer(text, **cut)[IDS]) for text in texts]
    for text, row in zip(texts, found, strict=True):
        if not row:
            raise UsageError(f"the text {text!r} has no tokens", fix="write a word")
    largest = max(map(max, found), default=0)
    if largest >= known:
        raise UsageError(
            f"the tokenizer gives token {largest}, and the model knows the {known} from 0 on",
            fix="the tokenizer's files belong to another model: copy those of this one",
        )
    return found
