"""Whether what a token gives to others depends on what comes after it.

In a causal model the keys and values of a prompt are the same whatever follows, so
they can be computed once. An attention is causal when no query may see a key after it,
which its flag says, or its mask: a mask depends on sizes and padding alone, so its
values at one small size are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from .cost import argument
from .observe import values
from .program import Program
from .sequence import Sequence, token_inputs
from .structure.flow import RawCore

_LENGTH = 8


def sees_ahead(program: Program, sequence: Sequence, cores: Iterable[RawCore]) -> fx.Node | None:
    """The first attention core of which some query sees a later token; None where none does."""
    masks: dict[fx.Node, fx.Node] = {}
    for raw in cores:
        if raw.softmax is None and argument(raw.node, "is_causal"):
            continue
        if raw.mask is None:
            return raw.node
        masks[raw.node] = raw.mask
    length = min(_LENGTH, program.signature.limits.get(sequence.dim, _LENGTH))
    probe = token_inputs(program, sequence, torch.full((length,), sequence.neutral_id()))
    found = values(program, probe, set(masks.values()))
    return next((core for core, mask in masks.items() if _shows_later(found[mask])), None)


def _shows_later(mask: Tensor) -> bool:
    """Whether a mask ``[..., queries, keys]`` shows a query a later key."""
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    square = shown.expand(*shown.shape[:-2], shown.shape[-1], shown.shape[-1])
    return bool(square.triu(1).any())
