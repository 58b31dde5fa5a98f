"""What training a program costs: seconds and bytes of each node, forward and backward.

A node computes and moves; the slower of the two is its time (the roofline of
Williams et al., 2009)::

    forward  = overhead + max(multiply-adds / rate, bytes read and written / bandwidth)
    backward = (gradients it computes) * forward, for a product
               (gradient through it)   * twice its forward, elementwise

A product has a gradient for its input where something before it trains, and one
for its weight where that trains; what is frozen, and all that no trained weight
comes before, costs no backward. On the device ``here`` seconds are measured instead
(:mod:`ftc.graph.measured_cost`). Memory is what a step holds: weights, their
gradients, the optimizer's two moments, and the values that backward reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload

from . import shapes
from .cost import operations, operator_name
from .errors import UsageError, nearest
from .measured_cost import measured_seconds
from .program import Program
from .signature import Signature
from .symbols import SizesAt

_USUAL = {"batch": 8}
_LENGTH = 128
_MOMENTS = 2  # AdamW's, each of a weight's size
_EXPENSIVE = {  # operators that take several instructions an element: multiply-adds of each
    "aten.gelu": 12, "aten.silu": 10, "aten.sigmoid": 8, "aten.tanh": 10, "aten.softmax": 12,
    "aten._softmax": 12, "aten.exp": 8, "aten.erf": 10, "aten.layer_norm": 6, "aten.rsqrt": 2,
    "aten.pow": 3, "aten.sin": 8, "aten.cos": 8, "aten.log_softmax": 12, "aten.group_norm": 6,
    "aten.batch_norm": 6, "aten.dropout": 10,
}  # fmt: skip
_PRODUCTS = frozenset(
    f"aten.{name}" for name in (
        "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d",
        "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "_grouped_mm",
        "scaled_dot_product_attention",
    )
) | {"ftc.quantized_linear"}  # fmt: skip
_SAVES_RESULT = frozenset(
    f"aten.{name}" for name in ("softmax", "_softmax", "log_softmax", "relu", "sigmoid", "tanh",
                                "exp", "sqrt", "rsqrt", "reciprocal")
)  # fmt: skip
_SAVES_NOTHING = frozenset(
    f"aten.{name}" for name in (
        "add", "sub", "rsub", "neg", "cat", "stack", "mean", "sum", "clone", "contiguous", "to",
        "_to_copy", "pad", "constant_pad_nd", "masked_fill", "where", "avg_pool2d", "roll", "flip",
        "upsample_nearest2d", "index", "gather", "embedding", "adaptive_avg_pool2d", "dropout",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Device:
    """What one device does in a second; ratios matter more than sizes.

    Attributes:
        rate: multiply-adds of products.
        bandwidth: bytes of memory, read or written.
        overhead: seconds to start an operator.
        link: bytes from one device to the next.
        latency: seconds until the first of them arrives.
        measured: seconds of nodes are those of this machine; the rates tell nothing.
    """

    rate: float
    bandwidth: float
    overhead: float
    link: float
    latency: float
    measured: bool = False


_CPU = Device(4.4e10, 1.7e10, 4e-6, 2e9, 5e-5)
DEVICES: Mapping[str, Device] = {
    "cpu": _CPU,
    "a100": Device(9e13, 1.4e12, 8e-6, 2e11, 1e-5),
    "h100": Device(2.5e14, 2.4e12, 8e-6, 3.5e11, 1e-5),
    "here": replace(_CPU, measured=True),
}


@dataclass(frozen=True, slots=True)
class NodeTraining:
    """Cost of one node in a training step.

    Attributes:
        forward, backward: seconds; backward is all of it.
        weights: the part of backward that computes gradients of weights.
        saved: bytes of values that backward reads and no node before it saved.
    """

    forward: float
    backward: float
    weights: float
    saved: int


def find_device(name: str) -> Device:
    """The device called ``name``.

    Raises:
        UsageError: with the names there are.
    """
    if name not in DEVICES:
        raise UsageError(f"no device {name!r}", fix=nearest(name, DEVICES))
    return DEVICES[name]


def usual_sizes(signature: Signature, **sizes: int) -> dict[str, int]:
    """Sizes of a training step: those given; else a batch of 8, and 128 or the limit of the rest.

    Raises:
        UsageError: as :meth:`Signature.sizes`.
    """
    usual = {name: min(_USUAL.get(name, _LENGTH), signature.limits.get(name, _LENGTH))
             for name in signature.dims}  # fmt: skip
    return signature.sizes(**{**usual, **sizes})


def training_costs(
    program: Program, sizes: Mapping[str, int], device: Device
) -> dict[fx.Node, NodeTraining]:
    """The cost of every ``call_function`` node.

    Args:
        program: gets fake values if it has none; ``requires_grad`` says what trains.
        sizes: one for each dynamic dimension.
        device: what runs it.
    """
    if shapes.fake_mode(program.graph) is None:
        shapes.propagate(program.module, program.signature)
    costs = _Costs(program, SizesAt(program, sizes), device).run()
    if not device.measured:
        return costs
    seconds = measured_seconds(program, sizes)
    return {node: NodeTraining(*seconds[node], cost.saved) for node, cost in costs.items()}


def weight_bytes(program: Program) -> dict[fx.Node, tuple[str, int]]:
    """Name and bytes in a training step of the tensor that each ``get_attr`` node reads.

    A weight that trains counts four times: itself, its gradient, two moments.
    """
    found = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = program.tensor(str(node.target))
            trains = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            size = min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
            found[node] = str(node.target), size * (2 + _MOMENTS if trains else 1)
    return found


class _Costs:
    def __init__(self, program: Program, at: SizesAt, device: Device) -> None:
        self.program, self.at, self.device = program, at, device
        self.trained: set[fx.Node] = set()
        self.saved: set[fx.Node] = set()

    def run(self) -> dict[fx.Node, NodeTraining]:
        costs: dict[fx.Node, NodeTraining] = {}
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                tensor = self.program.tensor(str(node.target))
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                    self.trained.add(node)
            elif node.op == "call_function":
                costs[node] = self._node(node)
        return costs

    def _node(self, node: fx.Node) -> NodeTraining:
        through = [each for each in node.all_input_nodes if each in self.trained]
        if through and _is_float(node):
            self.trained.add(node)
        forward = self._forward(node)
        if node not in self.trained:
            return NodeTraining(forward, 0.0, 0.0, 0)
        if operator_name(node) not in _PRODUCTS:
            return NodeTraining(forward, 2 * forward, 0.0, self._saved(node))
        factors = [each for each in through if _is_wide(each)]
        weights = sum(each.op == "get_attr" for each in factors) * forward
        return NodeTraining(forward, max(len(factors), 1) * forward, weights, self._saved(node))

    def _forward(self, node: fx.Node) -> float:
        val, device = node.meta.get(shapes.VAL), self.device
        if not isinstance(val, (Tensor, tuple, list)) or _is_view(node):
            return 0.0
        name = operator_name(node)
        made = self.at.nbytes(node)
        read = made if name in ("aten.embedding", "aten.slice", "aten.index") else sum(
            self.at.nbytes(each) for each in node.all_input_nodes)  # fmt: skip
        work = operations(node, self.at)
        if name in _EXPENSIVE:
            work = _EXPENSIVE[name] * self.at.numel(node)
        elif name not in _PRODUCTS:
            work = 0
        return device.overhead + max(work / device.rate, (made + read) / device.bandwidth)

    def _saved(self, node: fx.Node) -> int:
        """Bytes that this node is the first to keep for its backward."""
        name = operator_name(node)
        keeps: list[fx.Node] = []
        extra = 0
        if name in _SAVES_RESULT:
            keeps = [node]
        elif name == "aten.dropout":
            extra = self.at.numel(node)  # a mask of one byte an element
        elif name == "aten.scaled_dot_product_attention":
            keeps = [node, *node.all_input_nodes]
        elif name in _PRODUCTS or name in ("aten.mul", "aten.div"):
            keeps = self._factors(node)
        elif name not in _SAVES_NOTHING and not _is_view(node):
            keeps = node.all_input_nodes
        found = extra
        for each in map(_base, keeps):
            if each.op == "call_function" and each not in self.saved and _is_float(each):
                self.saved.add(each)
                found += self.at.nbytes(each)
        return found

    def _factors(self, node: fx.Node) -> list[fx.Node]:
        """Inputs of a product that the gradient of another input reads."""
        inputs = node.all_input_nodes
        squared = len(node.args) > 1 and node.args[0] is node.args[1]
        return [
            each
            for each in inputs
            if squared or any(other in self.trained for other in inputs if other is not each)
        ]


def _is_float(node: fx.Node) -> bool:
    val: Any = node.meta.get(shapes.VAL)
    if isinstance(val, (tuple, list)):
        return any(isinstance(each, Tensor) and each.is_floating_point() for each in val)
    return isinstance(val, Tensor) and val.is_floating_point()


def _is_wide(node: fx.Node) -> bool:
    """Whether it is a factor of a product, not a bias."""
    val = node.meta.get(shapes.VAL)
    return isinstance(val, Tensor) and val.dim() > 1


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return True
    return any(result.alias_info is not None for result in target._schema.returns)


def _base(node: fx.Node) -> fx.Node:
    """What ``node`` is a view of."""
    while node.op == "call_function" and _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
