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
from typing import Any, ClassVar

import torch
from torch import Tensor

from .program import Program
from .sequence import POSITIONS
from .signature import InputSpec, Signature

#: Key and value of the metadata of an ONNX file in which past and present may be one buffer.
IN_PLACE = ("cache", "in place")

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Names:
    """Names of the inputs and outputs of a cache."""

    PAST: ClassVar[str] = "past"
    MASK: ClassVar[str] = "past_mask"

    @staticmethod
    def past(number: int) -> tuple[str, str]:
        """Keys and values that come in at an attention."""
        return f"past_key_{number}", f"past_value_{number}"

    @staticmethod
    def present(number: int) -> tuple[str, str]:
        """Keys and values that go out at an attention."""
        return f"present_key_{number}", f"present_value_{number}"

    @staticmethod
    def total(sequence: str) -> str:
        """The dimension of all tokens, of which there may be a limit."""
        return f"{Names.PAST}+{sequence}"


def states(signature: Signature) -> tuple[InputSpec, ...]:
    """The inputs of keys and values; empty for a program without a cache."""
    return tuple(i for i in signature.inputs if i.name.startswith(("past_key_", "past_value_")))


def is_cached(signature: Signature) -> bool:
    """Whether a program takes the keys and values of earlier tokens."""
    return bool(states(signature))


def present_of(past: str) -> str:
    """The output that the next run takes as the input ``past``."""
    return past.replace("past_", "present_", 1)


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


def text_limit(program: Program) -> int | None:
    """How many tokens of a text, old and new, a program reads at most; None where no limit is.

    Those of a folded prompt do not count.
    """
    signature = program.signature
    if not is_cached(signature):
        return signature.limits.get("sequence")
    limit = token_limit(signature)
    return limit if limit is None else limit - len(start_of(program).ids)


def misfit(signature: Signature, tensors: Mapping[str, Tensor]) -> str | None:
    """An input of ``signature.start`` whose tensor is not what a run could begin behind."""
    specs = {spec.name: spec for spec in (signature.inputs[0], *states(signature))}
    names, lengths = signature.start, set[int]()
    for name, held in names.items():
        spec, tensor = specs.get(name), tensors.get(held)
        if spec is None or tensor is None or tensor.dtype != spec.dtype:
            return name
        fixed = [1, *(size for size in spec.shape[1:] if isinstance(size, int))]
        free = 1 if name == signature.inputs[0].name else 2
        sizes = list(tensor.shape)
        if len(sizes) != len(spec.shape) or sizes[:free] + sizes[free + 1 :] != fixed:
            return name
        lengths.add(sizes[free])
    return None if not names or (names.keys() == specs.keys() and len(lengths) == 1) else "start"


def step_inputs(
    signature: Signature, ids: Tensor, mask: Tensor, past: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Inputs of one step.

    Args:
        ids: of the new tokens, ``[batch, new]``.
        mask: of past and new tokens, ``[batch, past + new]``.
        past: keys and values by the names of inputs; all or, at the start, none.
    """
    batch, new = ids.shape
    count = mask.shape[1] - new
    made = {}
    for spec in signature.inputs:
        if spec.name == Names.MASK:
            made[spec.name] = mask[:, :count].to(spec.dtype)
        elif spec.name in past:
            made[spec.name] = past[spec.name]
        elif Names.PAST in spec.shape:
            sizes: Any = (batch, spec.shape[1], count, spec.shape[3])
            made[spec.name] = torch.zeros(sizes, dtype=spec.dtype)
        elif spec.role == "mask":
            made[spec.name] = mask[:, count:].to(spec.dtype)
        elif spec.name == POSITIONS:
            places = (mask.cumsum(1) - 1).clamp_min(0)
            made[spec.name] = places[:, count:].to(spec.dtype)
        elif spec is signature.inputs[0]:
            made[spec.name] = ids.to(spec.dtype)
        else:
            made[spec.name] = torch.full((batch, new), spec.low, dtype=spec.dtype)
    return made


def pad_left(rows: Sequence[Tensor], fill: int = 0) -> tuple[Tensor, Tensor]:
    """Texts of different length as one batch: ids and mask, ``[batch, longest]``."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return ids, mask


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
    ids, mask = pad_left(rows)
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
