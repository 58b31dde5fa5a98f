"""Tokens one after the other: from a cached program, or from one that computes all anew.

A program without a cache is run on the whole text for each token. One with a cache (the
pass ``cache``) reads the text once, and then one token at a time: what a step returns as
present keys and values is the past of the next. Texts of different length are one batch,
padded on the left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ftc.graph.cached import is_cached, pad_left, present_of, states, step_inputs, token_limit
from ftc.graph.errors import UsageError
from ftc.graph.program import Program

from .engine import Engine
from .sampling import Sampler, Sampling
from .text import pad

_GREEDY = Sampling()


def most_tokens(program: Program) -> int | None:
    """How many tokens, old and new, a program reads at most."""
    signature = program.signature
    if is_cached(signature):
        return token_limit(signature)
    return signature.limits.get("sequence")


def next_tokens(
    engine: Engine, rows: Sequence[Sequence[int]], how: Sampling = _GREEDY
) -> Iterator[list[int]]:
    """The next token of every row, then the one after it, as far as the program's positions go.

    Args:
        engine: runs a program whose first output is scores ``[batch, sequence, vocabulary]``.
        rows: ids of each text, of one length or, with a cache, of any.
        how: the likeliest token by default.

    Raises:
        UsageError: for no text, one without a token, or one that leaves no room for another.
    """
    limit = most_tokens(engine.program)
    if not rows or not all(rows):
        raise UsageError("a text has no tokens", fix="write a word")
    longest = max(map(len, rows))
    if limit is not None and longest >= limit:
        raise UsageError(
            f"the text has {longest:,} tokens, and the program takes {limit:,}, new ones included",
            fix=f"give a text of fewer than {limit:,} tokens",
        )
    steps = _cached if is_cached(engine.program.signature) else _anew
    return steps(engine, [list(row) for row in rows], Sampler(how), limit)


def _cached(
    engine: Engine, rows: list[list[int]], choose: Sampler, limit: int | None
) -> Iterator[list[int]]:
    signature = engine.program.signature
    kept = {present_of(spec.name): spec.name for spec in states(signature)}
    scores = signature.output_names[0]
    ids, mask = pad_left([torch.tensor(row) for row in rows])
    past: Mapping[str, Tensor] = {}
    while True:
        found = engine(step_inputs(signature, ids, mask, past))
        chosen = choose(found[scores][:, -1], rows)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.append(token)
        yield chosen.tolist()
        if limit is not None and mask.shape[1] >= limit:
            return
        past = {name: found[present] for present, name in kept.items()}
        ids = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


def _anew(
    engine: Engine, rows: list[list[int]], choose: Sampler, limit: int | None
) -> Iterator[list[int]]:
    if len({len(row) for row in rows}) > 1:
        raise UsageError(
            "texts of different length need a cache", fix="compile with --task generate"
        )
    signature = engine.program.signature
    scores = signature.output_names[0]
    while limit is None or len(rows[0]) < limit:
        chosen = choose(engine(pad(rows, signature, None))[scores][:, -1], rows).tolist()
        for row, token in zip(rows, chosen, strict=True):
            row.append(token)
        yield chosen
