"""Low rank: a product becomes two thinner ones, by truncated SVD.

With ``W = U S V^T`` of shape ``[out, in]`` and rank ``r``,

    y = W x + b   ~   B (A x) + b,    A = S_r^(1/2) V_r^T  [r, in],   B = U_r S_r^(1/2)  [out, r]

which is the best approximation of ``W`` of that rank (Eckart and Young, 1936).
It pays where ``r (in + out) < in out``; a product where it does not is left as
it is. ``U`` and ``S`` come from the eigenvectors of the smaller Gram matrix in
float64, several times faster than a full SVD and as good for a truncation.

The truncation minimises the error of *weights*, not of outputs. A trained
transformer's weights have nearly full rank, so large cuts ruin it: the default
asks for 99.99 % of the energy, and says so when no weight has that to give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.products import Product, products
from ftc.graph.program import Program
from ftc.graph.provenance import describe
from ftc.graph.rewriter import Rewriter
from ftc.graph.select import select

from .base import Context, Effect, Pass

aten = torch.ops.aten
_DEFAULT_ENERGY = 0.9999


@dataclass(frozen=True)
class LowRank(Pass):
    """Factor products into two thinner ones by truncated SVD.

    Options (``ratio``, ``rank`` and ``energy`` exclude each other):
        ratio: keep this fraction of each product's parameters, in (0, 1].
        rank: keep this many singular values of every product.
        energy: keep this fraction of the sum of squared singular values, in (0, 1];
            0.9999 when nothing is given.
        select: which products, a selector.
    """

    name: ClassVar[str] = "lowrank"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    forbids: ClassVar[frozenset[str]] = frozenset({"quantized"})

    ratio: float | None = None
    rank: int | None = None
    energy: float | None = None
    select: str = "product"

    def __post_init__(self) -> None:
        given = [o for o in ("ratio", "rank", "energy") if getattr(self, o) is not None]
        if len(given) > 1:
            raise UsageError(
                f"lowrank takes one of ratio, rank, energy, not {' and '.join(given)}",
                fix=f"keep {given[0]} and drop the rest",
            )
        for option in ("ratio", "energy"):
            number = getattr(self, option)
            if number is not None and not 0 < number <= 1:
                raise UsageError(
                    f"lowrank{{{option}={number}}}: {option} lies in (0, 1]",
                    fix=f"lowrank{{{option}=0.9}}",
                )
        if self.rank is not None and self.rank < 1:
            raise UsageError(
                f"lowrank{{rank={self.rank}}}: rank is 1 or more", fix="lowrank{rank=64}"
            )

    def requires(self, program: Program) -> None:
        """A rank beyond a selected product's full rank is refused."""
        if self.rank is None:
            return
        for product, weight in self._chosen(program):
            if self.rank > min(weight.shape):
                raise PreconditionError(
                    f"{self.spec}: rank exceeds min{tuple(weight.shape)} of {product.weight}",
                    where=describe(product.node),
                    fix=f"choose rank <= {min(weight.shape)}, or narrow the selection with select=",
                )

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Factors every selected product where that makes it smaller."""
        saved, kept, shared = 0, [], 0
        for product, weight in self._chosen(rw.program):
            if len(rw.get_attr(product.weight).users) > 1:
                shared += 1
                continue
            out_features, in_features = weight.shape
            left, values = _spectrum(weight)
            rank = self._rank(values, out_features, in_features)
            if rank * (out_features + in_features) >= out_features * in_features:
                kept.append(product.weight)
                continue
            self._factor(rw, product, weight, left[:, :rank], values[:rank])
            saved += out_features * in_features - rank * (out_features + in_features)
        self._say(rw, saved, len(kept), shared)

    def _chosen(self, program: Program) -> list[tuple[Product, Tensor]]:
        names = select(self.select, program)
        return [
            (p, program.tensor(p.weight).detach()) for p in products(program) if p.weight in names
        ]

    def _rank(self, values: Tensor, out_features: int, in_features: int) -> int:
        if self.rank is not None:
            return self.rank
        if self.ratio is not None:
            budget = self.ratio * out_features * in_features
            return max(1, min(len(values), int(budget / (out_features + in_features))))
        energy = values.square().cumsum(0)
        wanted = (self.energy or _DEFAULT_ENERGY) * energy[-1]
        return min(len(values), int((energy < wanted).sum()) + 1)

    def _factor(
        self, rw: Rewriter, product: Product, weight: Tensor, left: Tensor, values: Tensor
    ) -> None:
        root = values.sqrt()
        inverse = torch.where(root > 0, 1 / root, torch.zeros_like(root))
        a = (left * inverse).T @ weight.double()
        b = left * root
        trainable = rw.program.tensor(product.weight).requires_grad
        bias = product.node.args[2] if product.bias is not None else None
        rw.remove_tensor(product.weight)
        with rw.at(product.node):
            inner = rw.add_parameter(f"{product.weight}.A", a.to(weight.dtype), trainable=trainable)
            outer = rw.add_parameter(f"{product.weight}.B", b.to(weight.dtype), trainable=trainable)
            thin = rw.call(aten.linear.default, product.x, inner)
            new = rw.call(aten.linear.default, thin, outer, *([] if bias is None else [bias]))
        rw.replace(product.node, new)

    def _say(self, rw: Rewriter, saved: int, kept: int, shared: int) -> None:
        if rw.modified:
            rw.note(f"factored {rw.modified} products, {saved:,} parameters fewer")
        if kept:
            rw.note(f"left {kept} products as they are: their factors would be larger")
        if shared:
            rw.note(f"left {shared} products as they are: others read the same weight")
        if not rw.modified and self == LowRank(select=self.select):
            rw.note(
                "nothing pays at the default energy of 0.9999: "
                "ask for a cut with ratio=, rank= or energy="
            )


def _spectrum(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors ``[out, k]`` and singular values ``[k]``, descending, in float64."""
    matrix = weight.double()
    if matrix.shape[0] <= matrix.shape[1]:
        squares, left = torch.linalg.eigh(matrix @ matrix.T)
        return left.flip(1), squares.flip(0).clamp_min(0).sqrt()
    squares, right = torch.linalg.eigh(matrix.T @ matrix)
    values = squares.flip(0).clamp_min(0).sqrt()
    left = matrix @ right.flip(1)
    scale = torch.where(values > 0, 1 / values, torch.zeros_like(values))
    return left * scale, values
