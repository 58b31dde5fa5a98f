"""Makes ONNX nodes: names, constants, casts, and the few shapes that must be computed.

The same operator on the same inputs is one node, however often it is asked for
(hash-consing: every operator emitted is pure), so translations need not think
about sharing: a row maximum, a mask, a ``Shape`` appears once. ``reshape`` and
``transpose`` look at what made their input and cancel against it; what nobody
reads is dropped at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import Value
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor, fx

from ftc.graph.provenance import provenance

from .sizes import Dims, Sizes, free_form
from .table import Unsupported

if TYPE_CHECKING:
    from ftc.graph.program import Program

_RESHAPES = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Flatten"})
_BOOLEAN = frozenset(
    {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "IsNaN", "IsInf"}
)
_INTEGER = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})

Number = bool | int | float


class Emitter:
    """Collects the nodes of one ONNX graph.

    Attributes:
        node: the fx node being lowered; new nodes are named after it.
        out: its fake value, from which a translation reads the result's dtype and shape.
        nodes: emitted nodes, in order.
        initializers: weights and constants, in order.
        sizes: symbolic sizes (:class:`~ftc.runtime.lowering.sizes.Sizes`).
        replaced: values with an equal one made later, which an output is taken from.
        standard: whether only operators of ONNX itself may be emitted.
    """

    def __init__(self, program: Program, standard: bool = False) -> None:
        self.standard = standard
        self.node: fx.Node | None = None
        self.out: Any = None
        self.nodes: list[ir.Node] = []
        self.initializers: list[Value] = []
        self.sizes = Sizes(self, program)
        self._dtypes: dict[Value, torch.dtype] = {}
        self._dims: dict[Value, Dims] = {}
        self._made: dict[tuple[Any, ...], tuple[Value, ...]] = {}
        self._weights: dict[tuple[Any, ...], Value] = {}
        self.replaced: dict[Value, Value] = {}
        self._taken: set[str] = {*program.signature.input_names, *program.signature.output_names}

    def op(
        self,
        op_type: str,
        *inputs: Value | Sequence[int] | None,
        outputs: int = 1,
        dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
        dims: Dims | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Emits one operator, a standard one unless ``domain`` says whose.

        Args:
            inputs: values, lists of ints (an int64 constant), None for one left out.
            outputs: how many results it has.
            dtype: element type of the results, or of each of them; by default what the operator's
                kind says, else the first input's.
            dims: shape of the result, where known.
            domain: whose operator it is; ONNX's own by default.
            attributes: ints, floats, strings and lists of those; None is left out.

        Returns:
            The result, or a tuple of ``outputs`` results.
        """
        given = [x if isinstance(x, Value) or x is None else self.const(x, torch.int64)
                 for x in inputs]  # fmt: skip
        while given and given[-1] is None:
            given.pop()
        kept = {k: v for k, v in attributes.items() if v is not None}
        key = (domain, op_type, outputs, *map(id, given), *((k, str(v)) for k, v in kept.items()))
        if (made := self._made.get(key)) is None:
            made = self._emit(op_type, given, outputs, kept, domain)
            kinds = dtype if isinstance(dtype, tuple) else (dtype,) * outputs
            for value, kind in zip(made, kinds, strict=True):
                self._dtypes[value] = kind or self._result_dtype(op_type, given)
                if dims is not None:
                    self._dims[value] = dims
            self._made[key] = made
        return made[0] if outputs == 1 else made

    def const(self, data: Number | Sequence[Any] | Tensor, dtype: torch.dtype) -> Value:
        """A constant; equal constants are one initializer."""
        tensor = torch.as_tensor(data, dtype=dtype, device="cpu").contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        key = ("const", dtype, tuple(tensor.shape), raw)
        if (known := self._weights.get(key)) is None:
            known = self._initializer(f"constant_{len(self._weights)}", tensor)
            self._weights[key] = known
        return known

    def weight(self, name: str, tensor: Tensor) -> Value:
        """The initializer that holds ``tensor``: no copy is made, and each storage has one.

        A transposed view is written in its own order when the model is serialized.
        """
        key = ("weight", tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if (known := self._weights.get(key)) is None:
            known = self._weights[key] = self._initializer(name, tensor)
        return known

    def input(self, name: str, dtype: torch.dtype, dims: Dims, shape: Sequence[int | str]) -> Value:
        """A graph input with named dynamic dimensions."""
        value = Value(name=name, type=ir.TensorType(from_torch_dtype(dtype)), shape=ir.Shape(shape))
        self.describe(value, dtype, dims)
        return value

    def describe(self, value: Value, dtype: torch.dtype, dims: Dims) -> None:
        """Records what a value is."""
        self._dtypes[value], self._dims[value] = dtype, dims
        self.sizes.register(value, dims)

    def dtype(self, value: Value) -> torch.dtype:
        """The element type of a value."""
        return self._dtypes[value]

    def dims(self, value: Value) -> Dims:
        """The canonical shape of a value that stands for a node of the graph.

        Raises:
            Unsupported: for a value made inside a translation without a shape.
        """
        if value not in self._dims:
            raise Unsupported(f"the shape of {value.name} is not known")
        return self._dims[value]

    def rank(self, value: Value) -> int:
        """The number of dimensions of a value."""
        return len(self.dims(value))

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """``value`` as ``dtype``; itself when it is that already."""
        if self._dtypes[value] == dtype:
            return value
        to = int(from_torch_dtype(dtype))
        return self.op("Cast", value, to=to, dtype=dtype, dims=self._dims.get(value))

    def tensor(self, operand: Any, dtype: torch.dtype) -> Value:
        """An operand, be it a value, a number or a symbolic size, as a value of ``dtype``."""
        if isinstance(operand, Value):
            return self.cast(operand, dtype)
        if isinstance(operand, torch.SymInt):
            return self.cast(self.scalar(operand), dtype)
        if isinstance(operand, (bool, int, float)):
            return self.const(operand, dtype)
        raise Unsupported(f"an operand of type {type(operand).__name__}")

    def scalar(self, size: Any) -> Value:
        """An integer or a symbolic size as an int64 value of shape ``[]``."""
        if isinstance(size, int):
            return self.const(size, torch.int64)
        return self.op("Squeeze", self.sizes.value(size), [0], dims=())

    def reshape(self, value: Value, sizes: Sequence[Any]) -> Value:
        """``value`` in another shape; reshapes of reshapes are one, a reshape to the same none."""
        dims = tuple(map(self.sizes.canonical, sizes))
        while (maker := value.producer()) is not None and maker.op_type in _RESHAPES:
            if self._dims.get(maker.inputs[0]) is None:
                break
            value = maker.inputs[0]
        if self._dims.get(value) == dims:
            return value
        if 0 in dims:
            return self.op("Reshape", value, self.sizes.shape_value(dims), allowzero=1, dims=dims)
        target = self.sizes.shape_value(free_form(self._dims.get(value, ()), dims))
        return self.op("Reshape", value, target, dims=dims)

    def transpose(self, value: Value, perm: Sequence[int]) -> Value:
        """Axes of ``value`` in the order ``perm``; transposes of transposes are one or none."""
        perm = tuple(p % len(perm) for p in perm)
        maker = value.producer()
        if maker is not None and maker.op_type == "Transpose":
            before = maker.attributes["perm"].as_ints()
            value, perm = maker.inputs[0], tuple(before[p] for p in perm)
        if perm == tuple(range(len(perm))):
            return value
        known = self._dims.get(value)
        dims = tuple(known[p] for p in perm) if known is not None else None
        return self.op("Transpose", value, perm=list(perm), dims=dims)

    def expand(self, value: Value, sizes: Sequence[Any]) -> Value:
        """``value`` broadcast to a shape; itself when it has that shape."""
        dims = tuple(map(self.sizes.canonical, sizes))
        known = self._dims.get(value)
        if known == dims:
            return value
        target: Sequence[Any] = dims
        if known is not None:
            # Expand broadcasts both ways: a size that is there already may be 1 in the target.
            lead = len(dims) - len(known)
            target = [1 if i >= lead and d == known[i - lead] else d for i, d in enumerate(dims)]
        return self.op("Expand", value, self.sizes.shape_value(target), dims=dims)

    def unsqueeze(self, value: Value, axis: int) -> Value:
        """A new dimension of size 1 at ``axis`` of the result."""
        known = self._dims.get(value)
        if known is None:
            return self.op("Unsqueeze", value, [axis])
        axis %= len(known) + 1
        dims = (*known[:axis], 1, *known[axis:])
        return self.op("Unsqueeze", value, [axis], dims=dims)

    def identity(self, value: Value) -> Value:
        """A copy of ``value`` with a name of its own, for an output that needs one."""
        (copy,) = self._emit("Identity", [value], 1, {})
        return copy

    def _emit(
        self, op_type: str, inputs: list[Value | None], outputs: int, attributes: dict[str, Any],
        domain: str = "",
    ) -> tuple[Value, ...]:  # fmt: skip
        base = self.node.name if self.node is not None else "graph"
        name = self._unique(f"{base}_{op_type}")
        results = [
            Value(name=name if outputs == 1 else self._unique(f"{name}_{i}"))
            for i in range(outputs)
        ]
        node = ir.Node(
            domain, op_type, inputs, ir.convenience.convert_attributes(attributes),
            outputs=results, name=name, metadata_props=self._origin(),
        )  # fmt: skip
        self.nodes.append(node)
        return tuple(results)

    def _origin(self) -> dict[str, str] | None:
        if self.node is None:
            return None
        place = provenance(self.node)
        origin = {"module": place.module, "source": place.source}
        if place.made_by != "capture":
            origin["made_by"] = place.made_by
        return {k: v for k, v in origin.items() if v}

    def replace(self, value: Value, by: Value) -> None:
        """Says that ``by``, made later, is equal to ``value``."""
        self.describe(by, self._dtypes[value], self._dims[value])
        self.replaced[value] = by

    def rename(self, value: Value, name: str) -> None:
        """Gives a result the name of the fx node it stands for."""
        value.name = self._unique(name)

    def _result_dtype(self, op_type: str, inputs: list[Value | None]) -> torch.dtype:
        if op_type in _BOOLEAN:
            return torch.bool
        if op_type in _INTEGER:
            return torch.int64
        first = inputs[1] if op_type == "Where" else inputs[0]
        assert first is not None, op_type
        return self._dtypes[first]

    def _initializer(self, name: str, tensor: Tensor) -> Value:
        name = self._unique(name)
        held: Any = TorchTensor(tensor.detach(), name=name)
        value = Value(name=name, const_value=held, shape=held.shape, type=ir.TensorType(held.dtype))
        self.initializers.append(value)
        self._dtypes[value], self._dims[value] = tensor.dtype, tuple(tensor.shape)
        return value

    def _unique(self, name: str) -> str:
        free, count = name, 1
        while free in self._taken:
            count += 1
            free = f"{name}_{count}"
        self._taken.add(free)
        return free


def constant_array(value: Value) -> np.ndarray | None:
    """The contents of an initializer of at most 64 elements; None for any other value."""
    held = value.const_value
    if held is None or math.prod(held.shape.numpy()) > 64:
        return None
    return held.numpy()
