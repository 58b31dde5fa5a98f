"""One run of a program the way it is used, to be timed again and again.

A program without a cache runs on inputs. One with a cache reads ``sequence`` new tokens behind
``past`` earlier ones, whose keys and values lie where a conversation keeps them
(:mod:`ftc.runtime.past`); beside it, one without reads all of these tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ftc.graph.cache_inputs import Names
from ftc.graph.cached import is_cached, states, token_limit
from ftc.graph.errors import UsageError
from ftc.graph.signature import Signature

from .engine import Engine
from .past import past_of
from .text import pad

_BEHIND = (64, 512)  # tokens that a new one is measured behind
_PROMPT = 128


def usual_steps(signature: Signature, most: int | None = None) -> list[dict[str, int]]:
    """A prompt, and a token behind two lengths of past.

    Args:
        signature: of a cached program, whose limit of tokens holds too.
        most: tokens of a step, old and new; at least 2.
    """
    bounds = (most, token_limit(signature), _PROMPT + max(_BEHIND))
    limit = min(bound for bound in bounds if bound is not None)
    behind = sorted({min(past, limit - 1) for past in _BEHIND})
    return [_at(signature, min(_PROMPT, limit), 0), *(_at(signature, 1, past) for past in behind)]


def parse_step(signature: Signature, text: str) -> dict[str, int]:
    """Sizes of a step, ``sequence=128,past=0``; what is left out is one row, one token, no past.

    Raises:
        UsageError: for text of another form, or more tokens than the program reads.
    """
    nothing = f"{Names.PAST}=0"  # which other dimensions may not be
    parts = [part for part in text.split(",") if part.strip() != nothing]
    given = signature.parse_sizes(",".join(parts)) if parts else {}
    sizes = {**_at(signature, 1, 0), **given}
    tokens, limit = sum(sizes[d] for d in _lengths(signature)), token_limit(signature)
    if limit is not None and tokens > limit:
        raise UsageError(
            f"{tokens:,} tokens are more than the {limit:,} that this program reads",
            fix=f"choose past and {_lengths(signature)[1]} with a sum of {limit:,} at most",
        )
    return sizes


def token_types(signature: Signature) -> dict[str, torch.dtype]:
    """Types of the inputs, without those of a cache."""
    cached = {Names.MASK, *(spec.name for spec in states(signature))}
    return {n: kind for n, kind in signature.input_types.items() if n not in cached}


def steps(engines: Sequence[Engine], sizes: Mapping[str, int]) -> list[Callable[[], object]]:
    """What to time for each of ``engines``, on the same random inputs.

    Args:
        sizes: of the dynamic dimensions; a cached program's where one of them is.
    """
    cached = [each.program.signature for each in engines if is_cached(each.program.signature)]
    if not cached:
        inputs = engines[-1].program.signature.probe(seed=0, **sizes)
        return [partial(engine, inputs) for engine in engines]
    past, new = (sizes[dim] for dim in _lengths(cached[0]))
    spec, generator = cached[0].inputs[0], torch.Generator().manual_seed(0)
    shape = (sizes[str(spec.shape[0])], past + new)
    ids = torch.randint(spec.low, spec.high, shape, generator=generator)
    return [_step(engine, ids, past) for engine in engines]


def _step(engine: Engine, ids: torch.Tensor, past: int) -> Callable[[], object]:
    signature = engine.program.signature
    if not is_cached(signature):
        return partial(engine, pad(ids.tolist(), signature, None))
    run, tokens = past_of(engine), ids.numpy()
    mask = torch.ones_like(ids).numpy()
    held = run(tokens[:, :past], mask[:, :past], None)[1] if past else None
    return lambda: run(tokens[:, past:], mask, held)


def _at(signature: Signature, new: int, past: int) -> dict[str, int]:
    dim, length = _lengths(signature)
    return {str(signature.inputs[0].shape[0]): 1, length: new, dim: past}


def _lengths(signature: Signature) -> tuple[str, str]:
    """The dimensions of earlier and of new tokens."""
    return Names.PAST, str(signature.inputs[0].shape[1])
