"""Whether what a token gives to others depends on what comes after it.

In a causal model the keys and values of a prompt are the same whatever follows, so
they can be computed once. An attention is causal when no query may see a key after it,
which its flag says, or its mask: a mask depends on sizes and padding alone, so its
values at one small size are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .cost import argument
from .observe import values
from .program import Program
from .sequence import Sequence, token_inputs
from .structure.flow import RawCore

_LENGTH = 8
_UNHIDDEN = "nothing that was found in this attention hides later tokens"


@dataclass(frozen=True, slots=True)
class Ahead:
    """An attention of which a query may see a later token.

    Attributes:
        core: its node.
        why: what was found, in words.
    """

    core: fx.Node
    why: str


def sees_ahead(program: Program, sequence: Sequence, cores: Iterable[RawCore]) -> Ahead | None:
    """The first attention core of which some query may see a later token; None where none does."""
    masks: dict[fx.Node, fx.Node] = {}
    for raw in cores:
        if raw.softmax is None and argument(raw.node, "is_causal"):
            continue
        if raw.mask is None:
            return Ahead(raw.node, _UNHIDDEN)
        masks[raw.node] = raw.mask
    length = min(_LENGTH, program.signature.limits.get(sequence.dim, _LENGTH))
    probe = token_inputs(program, sequence, torch.full((length,), sequence.neutral_id()))
    found = values(program, probe, set(masks.values()))
    for core, mask in masks.items():
        shown = _shown(found[mask])
        if shown.triu(1).any():
            why = _UNHIDDEN if shown.all() else "tokens of this model see those after them"
            return Ahead(core, why)
    return None


def _shown(mask: Tensor) -> Tensor:
    """Where a mask ``[..., queries, keys]`` shows a query a key, ``[..., keys, keys]``."""
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return shown.expand(*shown.shape[:-2], shown.shape[-1], shown.shape[-1])
