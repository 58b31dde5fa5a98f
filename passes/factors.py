"""The two factors of a low-rank weight: made of a weight, replaced by others of another rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from ftc.graph.matrices import POINTWISE, Matrix, is_convolution, is_gather
from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter

from .biases import with_values

aten = torch.ops.aten


def factor(rw: Rewriter, matrix: Matrix, a: Tensor, b: Tensor, bias: Tensor | None = None) -> int:
    """Makes every reader of a weight read its factors; how many parameters that saves.

    Args:
        matrix: the weight, of ``rw``'s program.
        a: ``A [rank, in]``.
        b: ``B [out, rank]``.
        bias: ``[out]``, of a product, in place of what it has; None: that.
    """
    old = rw.program.tensor(matrix.weight)
    if is_convolution(matrix.node):
        a, b = a.view(-1, *old.shape[1:]), b[(..., *[None] * (old.dim() - 2))]
    rw.remove_tensor(matrix.weight)
    inner, outer = (rw.add_parameter(f"{matrix.weight}.{part}", tensor, trainable=old.requires_grad)
                    for part, tensor in (("A", a), ("B", b)))  # fmt: skip
    for node in matrix.nodes:
        own = node.args[2] if len(node.args) > 2 and not is_gather(node) else None
        if bias is not None:
            own = with_values(rw, own, f"{matrix.weight}.bias", bias)
        with rw.at(node):
            rw.replace(node, _factored(rw, node, inner, outer, own))
    rw.program = replace(rw.program, ties=tuple(_tied(rw.program, matrix.weight)))
    return old.numel() - a.numel() - b.numel()


def _tied(program: Program, weight: str) -> Iterator[frozenset[str]]:
    """The ties, with those of a weight handed on to both of its factors."""
    for tie in program.ties:
        if weight in tie:
            yield from (frozenset(f"{name}.{part}" for name in tie) for part in ("A", "B"))
        else:
            yield tie


def _factored(rw: Rewriter, node: fx.Node, a: fx.Node, b: fx.Node, bias: Any) -> fx.Node:
    """What a reader becomes."""
    args, target = node.args, cast(Any, node.target)
    if is_gather(node):  # the rows of B, then all of A
        return rw.call(aten.matmul.default, rw.call(target, b, *args[1:]), a)
    if is_convolution(node):
        thin = rw.call(target, args[0], a, None, *args[3:])
        return rw.call(POINTWISE[target], thin, b, bias)
    thin = rw.call(aten.linear.default, args[0], a)
    return rw.call(aten.linear.default, thin, b, *([] if bias is None else [bias]))


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
