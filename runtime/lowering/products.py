"""Matrix products.

``linear`` holds its weight as ``[out, in]`` and ONNX multiplies by ``[in, out]``:
the transpose is a node, and where nothing else reads the weight it is folded
into the initializer when the graph is finished (:mod:`.finish`). A weight that
is shared with a table keeps the node, so the file holds it once; onnxruntime
folds it at load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from onnx_ir import Value

from .emitter import Emitter
from .table import lowers

aten = torch.ops.aten


@lowers(aten.linear.default)
def linear(e: Emitter, x: Value, weight: Value, bias: Value | None = None) -> Value:
    product = e.op("MatMul", x, e.transpose(weight, range(e.rank(weight))[::-1]))
    return product if bias is None else e.op("Add", product, bias)


@lowers(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(e: Emitter, a: Value, b: Value) -> Value:
    return e.op("MatMul", a, b)


@lowers(aten.addmm.default, aten.baddbmm.default, aten.addbmm.default)
def addmm(e: Emitter, bias: Value, a: Value, b: Value, beta: Any = 1, alpha: Any = 1) -> Value:
    return e.op("Add", _times(e, e.op("MatMul", a, b), alpha), _times(e, bias, beta))


def _times(e: Emitter, x: Value, factor: Any) -> Value:
    return x if factor == 1 else e.op("Mul", x, e.tensor(factor, e.dtype(x)))


@lowers(aten.einsum.default)
def einsum(e: Emitter, equation: str, operands: Sequence[Value], path: Any = None) -> Value:
    if len(operands) == 1 and (perm := _permutation(equation)) is not None:
        return e.transpose(operands[0], perm)
    return e.op("Einsum", *operands, equation=equation)


def _permutation(equation: str) -> list[int] | None:
    """The order of axes when an equation of one operand only permutes them."""
    source, _, target = equation.replace(" ", "").partition("->")
    if "." in source or sorted(source) != sorted(target) or len(set(source)) != len(source):
        return None
    return [source.index(axis) for axis in target]


@lowers(aten.outer.default)
def outer(e: Emitter, a: Value, b: Value) -> Value:
    return e.op("Mul", e.unsqueeze(a, 1), e.unsqueeze(b, 0))


@lowers(aten.bilinear.default)
def bilinear(e: Emitter, a: Value, b: Value, weight: Value, bias: Value | None = None) -> Value:
    y = e.op("Einsum", a, weight, b, equation="...i,oij,...j->...o")
    return y if bias is None else e.op("Add", y, bias)
