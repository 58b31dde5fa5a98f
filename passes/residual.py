"""What 4 bits lose of a weight, held as a thin product beside it.

    y = x W'^T + B (A x) + b',    B A the best of its rank for  tr((E - B A) G (E - B A)^T)

with ``E = W - W'`` the rounding error and ``G`` the second moments of the product's
inputs, so the correction goes where inputs are (LQER, arXiv 2402.02446; the metric is
that of :mod:`ftc.graph.spectrum`). The factors are quantized to 8 bits in their turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.graph.rewriter import Rewriter
from ftc.graph.spectrum import damped_root, spectrum

aten = torch.ops.aten
_DAMPING = 0.01


@dataclass(frozen=True)
class Residual:
    """``A [rank, in]`` and ``B [out, rank]``."""

    a: Tensor
    b: Tensor

    def weight(self) -> Tensor:
        """``[out, in]``, float32."""
        return self.b.float() @ self.a.float()

    def add(self, rw: Rewriter, name: str, reader: fx.Node, product: fx.Node) -> fx.Node:
        """``product`` plus the correction, of the input of the float product ``reader``."""
        parts = [
            rw.add_parameter(f"{name}.residual.{part}", tensor, trainable=False)
            for part, tensor in (("A", self.a), ("B", self.b))
        ]
        thin = rw.call(aten.linear.default, reader.args[0], parts[0])
        return rw.call(aten.add.Tensor, product, rw.call(aten.linear.default, thin, parts[1]))


def largest_rank(out: int, width: int) -> int:
    """The largest rank whose factors are less than half of a weight ``[out, in]``."""
    return (out * width - 1) // (2 * (out + width))


def residual(weight: Tensor, rounded: Tensor, rank: int, gram: Tensor | None) -> Residual | None:
    """The correction of ``rounded [out, in]`` towards ``weight``; None where it would not be thin.

    A weight of other axes (a convolution's) gets none.

    Args:
        weight: float.
        rounded: what its codes stand for.
        rank: of the correction; 0: none.
        gram: second moments of the inputs ``[in, in]``; None: all directions alike.
    """
    if not rank or weight.dim() != 2:
        return None
    out, width = weight.shape
    if rank > largest_rank(out, width):
        return None
    root = None if gram is None else damped_root(gram, _DAMPING)
    error = weight.float() - rounded.float()
    a, b = spectrum(error, right=root).factors(rank)
    return Residual(a.to(weight.dtype), b.to(weight.dtype))
