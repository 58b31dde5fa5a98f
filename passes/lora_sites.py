"""Where a low-rank adapter can be added, and what its two products are there.

A product with a float or quantized weight is one site. Two products that are the
factors ``W.A`` and ``W.B`` of a low-rank weight are one site ``W``. A convolution is
one where its channels are in one group: its adapter is a convolution to ``rank``
channels, then one of size 1. Products of one matrix a batch element (experts) are
none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ftc.graph.adapters import adapter_kind
from ftc.graph.cost import argument
from ftc.graph.matrices import POINTWISE
from ftc.graph.products import plain_input
from ftc.graph.rewriter import Rewriter
from ftc.graph.shapes import shape
from ftc.graph.structure import Structure
from ftc.graph.structure.weights import WeightProduct

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class LoraSite:
    """A product that can have an adapter.

    Attributes:
        node: the product; of a factored one, that with the second factor.
        weight: logical name of its weight, ``W`` for the factors ``W.A`` and ``W.B``.
        names: of the weights that it multiplies by.
        first: the product with the first factor, or None.
    """

    node: fx.Node
    weight: str
    names: frozenset[str]
    first: fx.Node | None = None

    @property
    def x(self) -> fx.Node:
        """Its input ``[..., in]``, of a convolution ``[batch, in, ...]``."""
        return plain_input(self.first or self.node)

    @property
    def is_convolution(self) -> bool:
        """Whether it slides over positions."""
        return self.node.target in POINTWISE

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of a row of the adapter's first weight: ``[in]``, or ``[in, kernel...]``."""
        of = argument(self.node, "weight") if self.is_convolution else self.x
        return shape(of)[1:] if self.is_convolution else shape(of)[-1:]

    @property
    def width(self) -> int:
        """``out``."""
        return int(shape(self.node)[1 if self.is_convolution else -1])

    @property
    def largest_rank(self) -> int:
        """The rank beyond which an adapter is as good as a weight of its own."""
        return min(self.width, math.prod(self.inner))

    def apply(self, rw: Rewriter, x: fx.Node, a: fx.Node, b: fx.Node, scale: float) -> fx.Node:
        """``scale * B(A(x))`` as new nodes at the current point; no factor where it is 1."""
        target: Any = self.node.target if self.is_convolution else aten.linear.default
        thin = rw.call(target, x, a, *((None, *self.node.args[3:]) if self.is_convolution else ()))
        if scale != 1:
            thin = rw.call(aten.mul.Tensor, thin, scale)
        return rw.call(POINTWISE.get(target, target), thin, b)


def lora_sites(structure: Structure) -> tuple[list[LoraSite], list[frozenset[str]]]:
    """The sites in graph order, and the weights of each product that is none."""
    sites, unfit = [], []
    factors = {site.first for p in structure.products.values() if (site := _factored(p))}
    for node, product in structure.products.items():
        if adapter_kind(product.weight) or node in factors:
            continue
        own = frozenset({product.weight})
        if (site := _factored(product)) is not None:
            sites.append(site)
        elif _fits(node):
            sites.append(LoraSite(node, product.weight, own))
        else:
            unfit.append(own)
    return sites, unfit


def counts(structure: Structure, sites: Iterable[LoraSite]) -> str:
    """``attention (24), ffn (12)``: the roles whose products can have adapters."""
    names = [site.names for site in sites]
    found = {role: sum(bool(n & own) for n in names) for role, own in structure.roles.items()}
    return ", ".join(f"{role} ({count})" for role, count in found.items() if count) or "nothing"


def _factored(product: WeightProduct) -> LoraSite | None:
    """The site of two products that lowrank made of one."""
    first, whole = product.first, product.weight.removesuffix(".B")
    if first is None or product.weight != f"{whole}.B" or first.weight != f"{whole}.A":
        return None
    return LoraSite(product.node, whole, frozenset({product.weight, first.weight}), first.node)


def _fits(node: fx.Node) -> bool:
    if node.target in POINTWISE:
        return bool(argument(node, "groups") == 1)
    return str(node.target) in ("aten.linear.default", "ftc.quantized_linear.default")
