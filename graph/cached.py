"""What a cached program takes and gives: names, and one run of a text piece by piece.

=======================  ===================================================
``past_mask``            ``[batch, past]``, 0 where a row has padding
``past_key_N``           ``[batch, kv_heads, past, dim]`` of the attention N
``past_value_N``         the same
``present_key_N``        ``[batch, kv_heads, past+sequence, dim]``
``present_value_N``      the same
=======================  ===================================================

``past`` may be 0. What a run returns as present is the past of the next.

A program may begin behind a text of its own, a folded prompt: ``signature.start`` names the
tensors that hold its ids ``[1, length]``, and its keys and values ``[1, kv_heads, length, dim]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache_inputs import Names, TokenInput, is_state, pad_left, present_of, step_arrays
from .program import Program
from .signature import InputSpec, Signature, dtype_name

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def states(signature: Signature) -> tuple[InputSpec, ...]:
    """The inputs of keys and values; empty for a program without a cache."""
    return tuple(i for i in signature.inputs if is_state(i.name))


def is_cached(signature: Signature) -> bool:
    """Whether a program takes the keys and values of earlier tokens."""
    return bool(states(signature))


def token_limit(signature: Signature) -> int | None:
    """How many tokens, past and new, a cached program reads at most; None where no limit is.

    Those of a folded prompt count.
    """
    return signature.limits.get(Names.total(str(signature.inputs[0].shape[1])))


@dataclass(frozen=True, slots=True)
class Start:
    """What every text of a cached program begins behind.

    Attributes:
        ids: of a folded prompt; none where there is no prompt.
        states: its keys and values ``[1, kv_heads, length, dim]``, by the inputs that take them.
    """

    ids: tuple[int, ...] = ()
    states: Mapping[str, Tensor] = field(default_factory=dict)

    def past(self, batch: int) -> dict[str, Tensor]:
        """Keys and values ``[batch, kv_heads, length, dim]``, without a copy."""
        return {name: held.expand(batch, -1, -1, -1) for name, held in self.states.items()}


def start_of(program: Program) -> Start:
    """What the texts of ``program`` begin behind."""
    held = {name: program.tensor(tensor) for name, tensor in program.signature.start.items()}
    if not held:
        return Start()
    ids = held.pop(program.signature.inputs[0].name)
    return Start(tuple(ids[0].tolist()), held)


def step_inputs(
    signature: Signature, ids: Tensor, mask: Tensor, past: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Inputs of one step.

    Args:
        ids: of the new tokens, int64 ``[batch, new]``, on the processor.
        mask: of past and new tokens, int64 ``[batch, past + new]``.
        past: keys and values by the names of inputs; all or, at the start, none.
    """
    count = mask.shape[1] - ids.shape[1]
    kept = states(signature)
    tokens = [TokenInput(s.name, dtype_name(s.dtype), s.role, s.low)
              for s in signature.inputs if s not in kept]  # fmt: skip
    arrays = step_arrays(tokens, ids.numpy(), mask.numpy())
    made = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for spec in kept:
        sizes: Any = (len(ids), spec.shape[1], count, spec.shape[3])
        known = past.get(spec.name)
        made[spec.name] = torch.zeros(sizes, dtype=spec.dtype) if known is None else known
    return {spec.name: made[spec.name] for spec in signature.inputs}


def run_in_pieces(
    run: Run, rows: Sequence[Tensor], pieces: Sequence[int], signature: Signature | None = None
) -> dict[str, Tensor]:
    """Runs texts piece by piece: rows of the model's own outputs, joined where all are given.

    Args:
        run: a cached program, or what runs one.
        rows: ids of each text.
        pieces: how many tokens each run reads; those of the longest text in all.
        signature: of the program; by default ``run`` is one.
    """
    signature = signature or run.signature  # type: ignore[attr-defined]
    ids, mask = map(torch.from_numpy, pad_left([row.numpy() for row in rows]))
    kept = {present_of(spec.name): spec.name for spec in states(signature)}
    past: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    start = 0
    for piece in pieces:
        end = start + piece
        out = run(step_inputs(signature, ids[:, start:end], mask[:, :end], past))
        past = {into: out[name] for name, into in kept.items()}
        for name in out.keys() - kept.keys():
            parts.setdefault(name, []).append(out[name])
        start = end
    whole = all(spec.shape[1] != 1 for spec in signature.outputs if spec.name in parts)
    return {n: torch.cat(found, 1) if whole else found[-1] for n, found in parts.items()}
