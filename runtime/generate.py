"""Tokens one after the other: scores of a :class:`~ftc.runtime.decoder.Decoder`, and a choice.

Texts of different length are one batch where the program has a cache, padded on the left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ftc.graph.errors import UsageError

from .decoder import Decoder
from .engine import Engine
from .sampling import Sampler, Sampling
from .spoken import check_room

_GREEDY = Sampling()


def next_tokens(
    source: Engine | Decoder, rows: Sequence[Sequence[int]], how: Sampling = _GREEDY
) -> Iterator[list[int]]:
    """The next token of every row, then the one after it, as far as the program's positions go.

    Args:
        source: what gives scores; a decoder knows what it read before.
        rows: ids of each text, of one length or, with a cache, of any.
        how: the likeliest token by default.

    Raises:
        UsageError: for no text, one without a token, or one that leaves no room for another.
    """
    decoder = source if isinstance(source, Decoder) else Decoder(source)
    if not rows or not all(rows):
        raise UsageError("a text has no tokens", fix="write a word")
    check_room(max(map(len, rows)), decoder.limit)
    return _tokens(decoder, [list(row) for row in rows], Sampler(how))


def _tokens(decoder: Decoder, rows: list[list[int]], choose: Sampler) -> Iterator[list[int]]:
    while decoder.limit is None or max(map(len, rows)) <= decoder.limit:
        chosen = choose(decoder(rows), rows).tolist()
        for row, token in zip(rows, chosen, strict=True):
            row.append(token)
        yield chosen
