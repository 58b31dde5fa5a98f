"""The two factors of a low-rank weight: made of a product, replaced by others of another rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ftc.graph.products import Product
from ftc.graph.rewriter import Rewriter
from ftc.graph.spectrum import Spectrum

aten = torch.ops.aten


def factor(rw: Rewriter, product: Product, found: Spectrum, rank: int) -> int:
    """Replaces one product by two; how many parameters that saves."""
    a, b = found.factors(rank)
    trainable = rw.program.tensor(product.weight).requires_grad
    bias = product.node.args[2] if product.bias is not None else None
    rw.remove_tensor(product.weight)
    with rw.at(product.node):
        inner = rw.add_parameter(f"{product.weight}.A", a, trainable=trainable)
        outer = rw.add_parameter(f"{product.weight}.B", b, trainable=trainable)
        thin = rw.call(aten.linear.default, product.x, inner)
        new = rw.call(aten.linear.default, thin, outer, *([] if bias is None else [bias]))
    rw.replace(product.node, new)
    return found.weight.numel() - a.numel() - b.numel()


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
