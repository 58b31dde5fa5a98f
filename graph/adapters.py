"""Adapters: parameters that were added to a model to be trained in its place.

Which parameters those are is read off their names, and what they compute off the
graph; nothing is kept beside it. A low-rank adapter (LoRA, Hu et al., arXiv
2106.09685, equation 3) of a product with the weight ``W`` is

    y = x W^T + b + s (dropout(x) A^T) B^T,    A [rank, in],  B [out, rank]

with ``A`` and ``B`` in parameters ``W_lora_A`` and ``W_lora_B``. The factor ``s``
is on the thin value between them, and left out where it is 1; so is dropout of 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .program import Program

aten = torch.ops.aten

LORA_A, LORA_B = "_lora_A", "_lora_B"
PREFIX_KEY, PREFIX_VALUE = ".prefix_key", ".prefix_value"
SOFT_PROMPT = ".soft_prompt"
_KINDS = {
    "lora": re.compile(r"_lora_[AB]$"),
    "prefix": re.compile(r"\.prefix_(key|value)$"),
    "prompt": re.compile(r"\.soft_prompt$"),
}


def adapter_kind(name: str) -> str | None:
    """``lora``, ``prefix`` or ``prompt`` for a parameter that is part of one; None for others."""
    return next((kind for kind, form in _KINDS.items() if form.search(name)), None)


def adapter_parameters(program: Program) -> tuple[str, ...]:
    """Names of the parameters that belong to adapters, in the program's order."""
    return tuple(name for name, _ in program.module.named_parameters() if adapter_kind(name))


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A low-rank adapter at one product: ``total = base + scale * B(A(dropout(x)))``.

    Attributes:
        weight: logical name of the weight it adapts.
        base: the product without it.
        total: the addition.
        scale: alpha / rank.
        dropout: the probability.
    """

    weight: str
    base: fx.Node
    total: fx.Node
    scale: float
    dropout: float

    @property
    def a(self) -> str:
        """Name of ``A``, ``[rank, in]`` (of a convolution ``[rank, in, ...]``)."""
        return self.weight + LORA_A

    @property
    def b(self) -> str:
        """Name of ``B``, ``[out, rank]`` (of a convolution ``[out, rank, 1, ...]``)."""
        return self.weight + LORA_B


def lora_adapters(program: Program) -> tuple[LoraAdapter, ...]:
    """Every low-rank adapter at every product, in graph order."""
    found = (_adapter(node) for node in program.graph.nodes if node.op == "call_function")
    return tuple(each for each in found if each is not None)


def _adapter(node: fx.Node) -> LoraAdapter | None:
    """The adapter whose ``B`` the product ``node`` multiplies by."""
    weight = _reads(node, LORA_B)
    if weight is None or len(node.users) != 1:
        return None
    thin: Any = node.args[0]
    scale = 1.0
    if thin.target is aten.mul.Tensor:
        thin, scale = thin.args
    if _reads(thin, LORA_A) != weight:
        return None
    x: Any = thin.args[0]
    own = x.target is aten.dropout.default and all(_reads(user, LORA_A) for user in x.users)
    dropout = float(x.args[1]) if own else 0.0
    (total,) = node.users
    others = [n for n in total.all_input_nodes if n is not node]
    if total.target is not aten.add.Tensor or len(others) != 1:
        return None
    return LoraAdapter(weight, others[0], total, float(scale), dropout)


def _reads(node: Any, suffix: str) -> str | None:
    """``W`` where ``node`` multiplies by the parameter ``W`` + ``suffix``."""
    weight = node.args[1] if isinstance(node, fx.Node) and len(node.args) > 1 else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    name = str(weight.target)
    return name.removesuffix(suffix) if name.endswith(suffix) else None
