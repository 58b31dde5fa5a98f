"""What a program costs: parameters, bytes, and operations at given sizes.

*Parameters* are logical weights: elements of float parameters and of quantized
data, each tensor once however many names it has; scales, zero points and
buffers are not weights. *Bytes* are the storage of every tensor, each once.
*Operations* are multiply-adds: ``rows * in * out`` for a product, ``L * S * (E +
Ev)`` a head for attention, and one an element for everything that computes
element by element; moving data costs none. Nothing is run: sizes come from the
fake values, so a cost at any batch and sequence takes milliseconds.

A new operator is one line: ``@formula("ftc.my_op")`` on a function of the node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload

from . import shapes
from .program import Program
from .provenance import provenance
from .symbols import SizesAt

Formula = Callable[[fx.Node, SizesAt], int]
_FORMULAS: dict[str, Formula] = {}


@dataclass(frozen=True, slots=True)
class NodeCost:
    """Cost of one node, or of several together.

    Attributes:
        parameters: weights that this node is the first to read.
        bytes: storage of the tensors that this node is the first to read.
        operations: multiply-adds.
        activation_bytes: size of the values it makes; a view makes none.
    """

    parameters: int = 0
    bytes: int = 0
    operations: int = 0
    activation_bytes: int = 0

    def __add__(self, other: NodeCost) -> NodeCost:
        return NodeCost(
            self.parameters + other.parameters,
            self.bytes + other.bytes,
            self.operations + other.operations,
            self.activation_bytes + other.activation_bytes,
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a program.

    Attributes:
        parameters, bytes, operations, activation_bytes: sums over ``nodes``;
            activations are all values ever made, not the peak.
        sizes: the size of each dynamic dimension that this holds for.
        nodes: one entry for each node that costs anything, in graph order.
        assumed: symbols whose size the inputs do not determine, taken as 1.
    """

    parameters: int
    bytes: int
    operations: int
    activation_bytes: int
    sizes: Mapping[str, int]
    nodes: Mapping[fx.Node, NodeCost]
    assumed: tuple[str, ...] = ()


def cost(program: Program, **sizes: int) -> Cost:
    """The cost of ``program``.

    Args:
        program: gets fake values if it has none; nothing else about it changes.
        sizes: sizes of dynamic dimensions; the others are the signature's defaults.

    Raises:
        UsageError: for a dimension that the program has not.
    """
    chosen = program.signature.sizes(**sizes)
    if shapes.fake_mode(program.graph) is None:
        shapes.propagate(program.module, program.signature)
    at = SizesAt(program, chosen)
    held = _held(program)
    nodes: dict[fx.Node, NodeCost] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            weights, storage = held.get(node, (0, 0))
            made = 0 if _is_view(node) else at.nbytes(node)
            each = NodeCost(weights, storage, operations(node, at), made)
        else:
            each = NodeCost(*held.get(node, (0, 0)))
        if each != _FREE:
            nodes[node] = each
    total = sum(nodes.values(), _FREE)
    return Cost(
        total.parameters, total.bytes, total.operations, total.activation_bytes,
        chosen, nodes, tuple(sorted(at.assumed)),
    )  # fmt: skip


_FREE = NodeCost()


def operations(node: fx.Node, at: SizesAt) -> int:
    """Multiply-adds of one ``call_function`` node at given sizes."""
    if not isinstance(node.target, OpOverload) or _is_view(node):
        return 0
    name = operator_name(node)
    if name in _MOVES:
        return 0
    return _FORMULAS.get(name, _elements)(node, at)


def operator_name(node: fx.Node) -> str:
    """``aten.linear`` for a node that calls ``aten.linear.default``."""
    return str(getattr(node.target, "overloadpacket", node.target))


def by_module(cost: Cost, depth: int) -> dict[str, NodeCost]:
    """Cost by the first ``depth`` parts of the module path, in order of first appearance.

    Nodes outside every submodule are under ``""``.
    """
    table: dict[str, NodeCost] = {}
    for node, each in cost.nodes.items():
        path = provenance(node).module
        key = ".".join(path.split(".")[:depth])
        table[key] = table.get(key, _FREE) + each
    return table


def formula(*names: str) -> Callable[[Formula], Formula]:
    """Registers how many multiply-adds the operators ``names`` (``aten.linear``) take."""

    def register(function: Formula) -> Formula:
        _FORMULAS.update(dict.fromkeys(names, function))
        return function

    return register


def _held(program: Program) -> dict[fx.Node, tuple[int, int]]:
    """``(parameters, bytes)`` of the tensors that each node is the first to read."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    seen: set[tuple[Any, ...]] = set()
    held: dict[fx.Node, tuple[int, int]] = {}
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = program.tensor(str(node.target))
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)
        if key in seen:
            continue
        seen.add(key)
        reader = min(node.users, key=order.__getitem__, default=node)
        is_weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        weights = tensor.numel() if is_weight else coded_weights(node, tensor)
        storage = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        before = held.get(reader, (0, 0))
        held[reader] = (before[0] + weights, before[1] + storage)
    return held


def coded_weights(node: fx.Node, tensor: Tensor) -> int:
    """How many weights are quantized in ``tensor``, which ``node`` reads: two a byte at 4 bits."""
    for user in node.users:
        if _is_ours(user) and argument(user, "data") is node:
            return tensor.numel() * (8 // int(argument(user, "bits")))
    return 0


def argument(node: fx.Node, name: str) -> Any:
    """The argument ``name`` of an operator's schema at ``node``, its default where left out."""
    assert isinstance(node.target, OpOverload)
    if name in node.kwargs:
        return node.kwargs[name]
    for position, declared in enumerate(node.target._schema.arguments):
        if declared.name == name:
            given = position < len(node.args)
            return node.args[position] if given else declared.default_value
    return None


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "ftc"


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return isinstance(node.meta.get(shapes.VAL), Tensor)  # getitem of a split
    return any(r.alias_info is not None for r in target._schema.returns)


_MOVES_DATA = (
    "embedding", "index", "index_select", "gather", "scatter", "index_put", "masked_fill",
    "where", "cat", "stack", "clone", "contiguous", "reshape", "flatten", "repeat",
    "repeat_interleave", "roll", "flip", "pad", "constant_pad_nd", "to", "_to_copy", "copy",
    "arange", "full", "full_like", "ones", "ones_like", "zeros", "zeros_like", "new_ones",
    "new_zeros", "new_full", "empty", "empty_like", "scalar_tensor", "tril", "triu", "sym_size",
    "dropout", "feature_dropout", "alpha_dropout", "tile", "one_hot",
)  # fmt: skip
_MOVES = frozenset(f"aten.{name}" for name in _MOVES_DATA)


def _elements(node: fx.Node, at: SizesAt) -> int:
    """One an element of the largest value in or out: elementwise operators and reductions."""
    inputs = (at.numel(argument) for argument in node.all_input_nodes)
    return max(at.numel(node), *inputs, 0)


@formula(
    "aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot",
    "aten._grouped_mm", "transformers.grouped_mm_fallback",
)  # fmt: skip
def _matmul(node: fx.Node, at: SizesAt) -> int:
    return at.numel(node) * at.shape(node.args[0])[-1]


@formula("ftc.quantized_linear")
def _quantized_linear(node: fx.Node, at: SizesAt) -> int:
    return at.numel(node) * at.shape(argument(node, "x"))[-1]


@formula("aten.addmm", "aten.baddbmm", "aten.addmv")
def _add_matmul(node: fx.Node, at: SizesAt) -> int:
    return at.numel(node) * at.shape(node.args[1])[-1]


@formula("aten.einsum")
def _einsum(node: fx.Node, at: SizesAt) -> int:
    """The product of the sizes of all indices: exact for two operands; one is only permuted."""
    operands: Any = node.args[1]
    if len(operands) == 1:
        return 0
    sizes: dict[str, int] = {}
    broadcast = 1
    terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=True):
        shape = at.shape(operand)
        before, dots, after = term.partition("...")
        tail = len(shape) - len(after)
        sizes.update(zip(before, shape, strict=False))
        sizes.update(zip(after, shape[tail:], strict=True))
        if dots:
            broadcast = max(broadcast, math.prod(shape[len(before) : tail]))
    return broadcast * math.prod(sizes.values())


@formula(
    "aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution",
    "aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d",
)  # fmt: skip
def _convolution(node: fx.Node, at: SizesAt) -> int:
    """Elements made times taps read for each; a transposed one counts what it spreads."""
    taps = math.prod(at.shape(node.args[1])[1:])
    transposed = "transpose" in str(node.target) or bool(argument(node, "transposed"))
    return at.numel(node.args[0] if transposed else node) * taps


@formula("aten.scaled_dot_product_attention")
def _attention(node: fx.Node, at: SizesAt) -> int:
    query, key, value = (at.shape(a) for a in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
