"""Weights as matrices, whatever reads them: products, convolutions, tables.

=============  ==========================================  ==========================
reader         what it computes                            its matrix ``W``
=============  ==========================================  ==========================
product        ``y = x W^T + b``, rows of ``x [..., in]``  ``[out, in]``
convolution    the same, rows are the patches of ``x``     ``[out, in * kernel]``
gather         ``E = W[ids]``                              ``[vocabulary, width]``
=============  ==========================================  ==========================

A table may also have products that read it (a tied head): one matrix for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .cost import argument
from .program import Program
from .shapes import shape

aten = torch.ops.aten

POINTWISE: dict[Any, Any] = {
    aten.conv1d.default: aten.conv1d.default,
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.default: aten.conv2d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.default: aten.conv3d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
"""Convolutions, with the one that mixes channels at each position in its turn."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight that its readers all multiply by as one matrix.

    Attributes:
        weight: name of the parameter.
        nodes: its readers: one product, one convolution, or gathers and products.
    """

    weight: str
    nodes: tuple[fx.Node, ...]

    @property
    def node(self) -> fx.Node:
        """Its first reader."""
        return self.nodes[0]

    @property
    def is_table(self) -> bool:
        """Whether rows of it are looked up."""
        return any(is_gather(node) for node in self.nodes)

    @property
    def is_product(self) -> bool:
        """Whether it has one reader, which is ``linear(x, W, b)``."""
        return not self.is_table and not is_convolution(self.node)

    def of(self, program: Program) -> Tensor:
        """The matrix ``[out, in]``, detached, a view of the parameter."""
        return program.tensor(self.weight).detach().flatten(1)


def matrices(program: Program) -> Iterator[Matrix | str]:
    """Every float weight of a canonical program that is one matrix, in the order of first use.

    Of a weight that products or gathers read and that is none, its name.
    """
    seen: set[str] = set()
    for node in list(program.graph.nodes):
        read = _weight(node)
        if read is None or str(read.target) in seen:
            continue
        name = str(read.target)
        seen.add(name)
        nodes = tuple(read.users)
        yield Matrix(name, nodes) if _is_one(read, nodes) else name


def _is_one(read: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether all that read a weight multiply by it, as one matrix."""
    if any(_weight(node) is not read for node in nodes):
        return False
    if len(nodes) == 1:
        return True
    return any(map(is_gather, nodes)) and not any(map(is_convolution, nodes))


def is_convolution(node: fx.Node) -> bool:
    """Whether ``node`` is one with its channels in one group."""
    return node.target in POINTWISE and bool(argument(node, "groups") == 1)


def is_gather(node: fx.Node) -> bool:
    """Whether ``node`` looks up rows of a table."""
    return node.target is aten.embedding.default


def _weight(node: fx.Node) -> fx.Node | None:
    """The node that reads the weight of ``node``, where it is a parameter's own."""
    args: Any = node.args
    if is_gather(node):
        read = args[0]
    elif node.target is aten.linear.default or is_convolution(node):
        read = args[1]
        bias = args[2] if len(args) > 2 else None
        if bias is not None and bias.op != "get_attr":
            return None
    else:
        return None
    return read if isinstance(read, fx.Node) and read.op == "get_attr" else None


def source(node: fx.Node) -> fx.Node:
    """What the moments of a reader's inputs are kept by: products with one input share them."""
    x: Any = node.args[0]
    return x if node.target is aten.linear.default else node


def output_rows(node: fx.Node, value: Tensor) -> Tensor:
    """What a reader made, as rows ``[n, out]``."""
    if is_convolution(node):
        value = value.movedim(-len(_kernel(node)) - 1, -1)
    return value.flatten(0, -2)


def input_rows(node: fx.Node, x: Tensor) -> Tensor:
    """What a product or a convolution multiplied, as rows ``[n, in]``: patches are unfolded.

    A patch is what a convolution with the identity for a weight makes.
    """
    if not is_convolution(node):
        return x.flatten(0, -2)
    inner = shape(argument(node, "weight"))[1:]
    width = torch.Size(inner).numel()
    unit = torch.eye(width, dtype=x.dtype).view(width, *inner)
    return output_rows(node, _convolved(node, x, unit))


def input_level(node: fx.Node, x: Tensor) -> float:
    """Mean square of what a product or a convolution multiplied, over all rows and columns."""
    if not is_convolution(node):
        return float(x.float().square().mean())
    inner = torch.Size(shape(argument(node, "weight"))[1:])
    ones = torch.ones(1, *inner, dtype=x.dtype)
    return float(_convolved(node, x.square(), ones).mean()) / inner.numel()


def _kernel(node: fx.Node) -> tuple[int, ...]:
    return shape(argument(node, "weight"))[2:]


def _convolved(node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    target: Any = node.target
    made: Tensor = target(x, weight, None, *node.args[3:])
    return made
