"""The two factors of a low-rank weight, replaced by others of another rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ftc.graph.rewriter import Rewriter

aten = torch.ops.aten


def set_factors(
    rw: Rewriter, first: fx.Node, second: fx.Node, a: Tensor, b: Tensor
) -> tuple[fx.Node, fx.Node]:
    """Gives the products ``second(first(x))`` other weights; returns the new ones.

    Args:
        first: the product with ``A``.
        second: the product with ``B``, which alone reads ``first``.
        a: ``[rank, in]``.
        b: ``[out, rank]``, times ``a`` what the two are to multiply by.
    """
    x: Any = first.args[0]
    weights: tuple[Any, Any] = first.args[1], second.args[1]
    for weight, tensor in zip(weights, (a, b), strict=True):
        rw.set_tensor(str(weight.target), tensor.contiguous())
    with rw.at(second):
        thin = rw.call(aten.linear.default, x, weights[0])
        new = rw.call(aten.linear.default, thin, weights[1], *second.args[2:])
    rw.replace(second, new)
    rw.erase(first)
    return thin, new
