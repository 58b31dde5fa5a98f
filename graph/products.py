"""Products with a weight: the nodes that hold nearly all parameters and operations.

After ``canonicalize`` every float product is ``aten.linear(x, W, b)`` with ``W``
of shape ``[out, in]`` read straight from a parameter, and every quantized one is
``ftc.quantized_linear``. A pass that rewrites products iterates
:func:`products` and needs to know no other form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from .program import Program

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Product:
    """``y = x W^T + b`` with a float weight.

    Attributes:
        node: the ``aten.linear.default`` node.
        weight: name of the parameter ``W``, ``[out, in]``.
        bias: name of the parameter ``b``, ``[out]``, or None.
    """

    node: fx.Node
    weight: str
    bias: str | None

    @property
    def x(self) -> fx.Node:
        """Its input, ``[..., in]``, as the graph is now: a rewrite may have replaced it."""
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        return x


def products(program: Program) -> Iterator[Product]:
    """The float products of a canonical program, in graph order."""
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.target is not aten.linear.default:
            continue
        weight = node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
            continue
        if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
            continue
        yield Product(node, str(weight.target), str(bias.target) if bias is not None else None)


def is_product(node: fx.Node) -> bool:
    """Whether ``node`` multiplies by a weight: float or quantized linear, or a convolution."""
    return node.op == "call_function" and str(node.target) in _PRODUCTS


_PRODUCTS = frozenset(
    {
        "aten.linear.default",
        "ftc.quantized_linear.default",
        "aten.conv1d.default",
        "aten.conv2d.default",
        "aten.conv3d.default",
        "aten.convolution.default",
    }
)


def plain_input(node: fx.Node) -> fx.Node:
    """``x`` of a quantized product, without the means of its groups that int4 may append to it."""
    appended = _appended(node)
    return cast(fx.Node, node.args[0]) if appended is None else appended[0]


def appended_share(node: fx.Node) -> float:
    """What a weight of an appended column adds to each weight of its group.

    ``w mean(x) = sum_i (w / n) x_i`` for a group of ``n``: ``1 / n``. Programs of before the
    means append sums: 1. And 0 where nothing is appended.
    """
    appended = _appended(node)
    if appended is None:
        return 0.0
    _, second = appended
    return 1 / int(second.args[0].args[2][-1]) if second.target is aten.mean.dim else 1.0


def _appended(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """``x`` of a product of ``cat(x, what its groups come to, ...)``, and the second of these."""
    x: Any = node.args[0]
    if x.target is not aten.cat.default:
        return None
    first, second = x.args[0][:2]
    groups = second.args[0] if second.target in (aten.mean.dim, aten.sum.dim_IntList) else second
    appended = groups.target is aten.unflatten.int and groups.args[0] is first
    return (first, second) if appended else None
