"""Every product with a weight, in whatever form the graph holds it.

``aten.linear`` is the canonical form (:mod:`ftc.graph.products`). Before
canonicalization a product may also be ``addmm``, ``mm``, ``matmul``, ``bmm``,
``einsum`` or a convolution; after a pass it may be quantized, or two products
in a row (a low rank factorization). Structure is found on all of them, so what
is read here is which tensor is the weight, which is the input, and how wide the
result is.

The *logical name* of a weight is its parameter's name, or, for codes in a
buffer ``NAME.quantized``, ``NAME``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx

from ftc.graph.cost import argument, operator_name
from ftc.graph.program import Program

_CODES = ".quantized"
_MATMULS = frozenset({"aten.mm", "aten.matmul", "aten.bmm", "aten._grouped_mm",
                      "transformers.grouped_mm_fallback"})  # fmt: skip
_ADD_MATMULS = frozenset({"aten.addmm", "aten.baddbmm"})
CONVOLUTIONS = frozenset(
    f"aten.{name}"
    for name in ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d",
                 "conv_transpose2d", "conv_transpose3d")
)  # fmt: skip
PASSING = frozenset(
    f"aten.{name}"
    for name in ("t", "transpose", "permute", "numpy_T", "view", "reshape", "unsqueeze", "squeeze",
                 "expand", "contiguous", "to", "_to_copy", "clone", "alias", "detach", "flatten",
                 "unflatten", "type_as", "dropout")
) | {"ftc.dequantize"}  # fmt: skip
"""Operators that hand on the elements of their first argument."""


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """One product with a weight.

    Attributes:
        node: the node that computes it.
        x: its input.
        weight: logical name of the weight.
        bias: name of the bias that the operator itself adds, or None.
        width: features (or channels) of the result.
        first: the product that feeds this one directly when the two are one
            factored product; else None.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    width: int
    first: WeightProduct | None = None

    @property
    def source(self) -> fx.Node:
        """The input of the whole, dropout left out: that of the first factor if there is one."""
        if self.first:
            return self.first.source
        x: Any = self.x
        while operator_name(x) == "aten.dropout":
            x = x.args[0]
        return cast(fx.Node, x)

    @property
    def names(self) -> frozenset[str]:
        """Logical names of its weights and biases, factors included."""
        own = {self.weight} | ({self.bias} if self.bias else set())
        return frozenset(own) | (self.first.names if self.first else frozenset())

    @property
    def is_convolution(self) -> bool:
        """Whether it slides over positions."""
        return operator_name(self.node) in CONVOLUTIONS


def logical_parameters(program: Program) -> frozenset[str]:
    """Names of all weights of a program: parameters, and quantized weights by their prefix."""
    names = {name for name, _ in program.module.named_parameters()}
    codes = (name for name, _ in program.module.named_buffers() if name.endswith(_CODES))
    return frozenset(names | {name.removesuffix(_CODES) for name in codes})


def through(node: Any) -> Any:
    """What ``node`` shows after casts, views and transpositions are taken away."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if operator_name(node) not in PASSING:
            return node
        node = node.args[0]
    return node


class Weights:
    """Which nodes of a program read weights, and which multiply by one."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.names = logical_parameters(program)

    def name(self, node: Any) -> str | None:
        """Logical name of the weight that ``node`` is a view of; None when it is none."""
        reader = through(node)
        if not isinstance(reader, fx.Node) or reader.op != "get_attr":
            return None
        name = str(reader.target).removesuffix(_CODES)
        return name if name in self.names else None

    def tensor(self, name: str) -> Tensor:
        """The tensor of a logical name: the parameter, or its codes."""
        codes = name + _CODES
        try:
            return self._program.tensor(codes)
        except AttributeError:
            return self._program.tensor(name)

    def product(self, node: fx.Node) -> WeightProduct | None:
        """``node`` as a product with a weight; None when it is something else."""
        if node.op != "call_function":
            return None
        form = _FORMS.get(operator_name(node))
        operands = form(node, self) if form else None
        if operands is None:
            return None
        x, weight, bias, width = operands
        name = self.name(weight)
        if name is None or self.name(x) is not None or not isinstance(x, fx.Node):
            return None
        return WeightProduct(node, x, name, self.name(bias), width)


_Operands = tuple[Any, Any, Any, int] | None


def _linear(node: fx.Node, weights: Weights) -> _Operands:
    weight: Any = node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    return node.args[0], weight, bias, _size(weight, 0)


def _quantized_linear(node: fx.Node, weights: Weights) -> _Operands:
    data = argument(node, "data")
    return argument(node, "x"), data, argument(node, "bias"), _size(data, 0)


def _convolution(node: fx.Node, weights: Weights) -> _Operands:
    bias = node.args[2] if len(node.args) > 2 else None
    return node.args[0], node.args[1], bias, _size(node, 1)


def _matmul(node: fx.Node, weights: Weights) -> _Operands:
    left, right = node.args[:2]
    if weights.name(right):
        return left, right, None, _size(right, -1)
    return right, left, None, _size(left, -2)


def _add_matmul(node: fx.Node, weights: Weights) -> _Operands:
    bias, x, weight = node.args[:3]
    return x, weight, bias, _size(weight, -1)


def _einsum(node: fx.Node, weights: Weights) -> _Operands:
    operands: Any = node.args[1]
    if len(operands) != 2:
        return None
    terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
    place = 1 if weights.name(operands[1]) else 0
    kept = [_size(operands[place], i) for i, letter in enumerate(terms[place])
            if letter not in terms[1 - place]]  # fmt: skip
    return operands[1 - place], operands[place], None, math.prod(kept)


def _size(node: Any, axis: int) -> int:
    """A fixed size of a node's value; 0 where it is unknown or dynamic."""
    fake = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(fake, Tensor) or not -fake.dim() <= axis < fake.dim():
        return 0
    size = fake.shape[axis]
    return size if isinstance(size, int) else 0


_FORMS: dict[str, Callable[[fx.Node, Weights], _Operands]] = {
    "aten.linear": _linear,
    "ftc.quantized_linear": _quantized_linear,
    "aten.einsum": _einsum,
    **dict.fromkeys(_MATMULS, _matmul),
    **dict.fromkeys(_ADD_MATMULS, _add_matmul),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
}


def weight_products(program: Program) -> dict[fx.Node, WeightProduct]:
    """Every product with a weight by its node, in graph order; factors joined to what they feed."""
    weights = Weights(program)
    found: dict[fx.Node, WeightProduct] = {}
    for node in program.graph.nodes:
        product = weights.product(node)
        if product is None:
            continue
        x: Any = through(product.x)
        first = found.get(through(x.args[0]) if _is_factor(x) else x)
        if first is not None and first.bias is None and _feeds_only(first.node, node):
            product = WeightProduct(
                node, product.x, product.weight, product.bias, product.width, first
            )
        found[node] = product
    return found


def _feeds_only(node: fx.Node, target: fx.Node) -> bool:
    """Whether ``node`` reaches ``target`` and nothing else, through views and factors alone."""
    while len(node.users) == 1:
        (node,) = node.users
        if node is target:
            return True
        if operator_name(node) not in PASSING and not _is_factor(node):
            return False
    return False


def _is_factor(node: fx.Node) -> bool:
    """Whether ``node`` multiplies by a number."""
    return operator_name(node) == "aten.mul" and isinstance(node.args[1], (int, float))


def read_by(program: Program, operators: frozenset[str]) -> Iterator[tuple[fx.Node, str]]:
    """``(node, weight)`` for every operator of a set that reads a weight as its first argument."""
    weights = Weights(program)
    for node in program.graph.nodes:
        if node.op == "call_function" and operator_name(node) in operators and node.args:
            name = weights.name(node.args[0])
            if name:
                yield node, name
