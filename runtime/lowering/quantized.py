"""ftc's quantized operators, in standard operators that onnxruntime fuses at load.

With the activation quantized by row, ``m`` the largest magnitude of each row:

    q, a, z = DynamicQuantizeLinear(x / m)
    y = m * (Cast(MatMulInteger(q, W, z)) * (a * s)) + b

``DynamicQuantizeLinear`` to the last product in the parenthesis are one kernel
in onnxruntime, whatever the instruction set; the order of the operands is the
one that its fusion looks for. Everything before the integer product is shared by
products with the same input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx_ir import Value

import ftc.graph.quantized_ops  # noqa: F401  (registers torch.ops.ftc)

from .emitter import Emitter
from .table import lowers

ftc_ops: Any = torch.ops.ftc


@lowers(ftc_ops.dequantize.default)
def dequantize(
    e: Emitter, data: Value, scale: Value, zero_point: Value | None, bits: int, group_size: int
) -> Value:
    if group_size:
        return e.op("DequantizeLinear", data, scale, zero_point, axis=1, block_size=group_size,
                    dtype=e.dtype(scale))  # fmt: skip
    zero = None if zero_point is None else _flat(e, zero_point)
    return e.op("DequantizeLinear", data, _flat(e, scale), zero, axis=0, dtype=e.dtype(scale))


@lowers(ftc_ops.quantized_embedding.default)
def quantized_embedding(
    e: Emitter, data: Value, scale: Value, zero_point: Value | None, indices: Value, bits: int,
    group_size: int,
) -> Value:  # fmt: skip
    dtype = e.dtype(scale)
    dims = e.sizes.dims(e.out)
    rows = e.cast(e.op("Gather", data, indices, axis=0, dims=dims), dtype)
    step = e.op("Gather", scale, indices, axis=0)
    zero = (
        None if zero_point is None else e.cast(e.op("Gather", zero_point, indices, axis=0), dtype)
    )
    groups = e.dims(scale)[1]
    if groups != 1:
        rows = e.reshape(rows, [*dims[:-1], groups, dims[-1] // groups])
        step = e.op("Unsqueeze", step, [-1])
        zero = None if zero is None else e.op("Unsqueeze", zero, [-1])
    if zero is not None:
        rows = e.op("Sub", rows, zero, dims=e.dims(rows))
    return e.reshape(e.op("Mul", rows, step, dims=e.dims(rows)), dims)


@lowers(ftc_ops.quantized_linear.default)
def quantized_linear(
    e: Emitter, x: Value, data: Value, scale: Value, zero_point: Value | None,
    bias: Value | None, bits: int, group_size: int, activation: str,
) -> Value:  # fmt: skip
    peak = None
    if activation == "none":
        y = e.op("MatMul", x, _float_weight(e, data, scale, zero_point, group_size))
    else:
        if activation == "row":
            peak = _row_peak(e, x)
            x = e.op("Div", x, peak)
        y = _integer_product(e, x, data, scale, zero_point, group_size)
    if peak is not None:
        y = e.op("Mul", y, peak)
    return y if bias is None else e.op("Add", y, bias)


def _row_peak(e: Emitter, x: Value) -> Value:
    """Largest magnitude of each row, never 0."""
    largest = e.op("ReduceMax", e.op("Abs", x), [-1], keepdims=1)
    return e.op("Max", largest, e.const(torch.finfo(e.dtype(x)).tiny, e.dtype(x)))


def _integer_product(
    e: Emitter, x: Value, data: Value, scale: Value, zero_point: Value | None, group_size: int
) -> Value:
    """``x W^T`` with ``x`` quantized as a whole."""
    dtype = e.dtype(x)
    codes, step, zero = e.op("DynamicQuantizeLinear", x, outputs=3,
                             dtype=(torch.uint8, dtype, torch.uint8))  # fmt: skip
    if group_size:
        centred = e.op("Sub", e.cast(codes, dtype), e.cast(zero, dtype))
        product = e.op("MatMul", centred, _float_weight(e, data, scale, zero_point, group_size))
        return e.op("Mul", product, step)
    weight_zero = None if zero_point is None else _flat(e, zero_point)
    product = e.op("MatMulInteger", codes, e.transpose(data, [1, 0]), zero, weight_zero,
                   dtype=torch.int32)  # fmt: skip
    return e.op("Mul", e.cast(product, dtype), e.op("Mul", step, _flat(e, scale)))


def _float_weight(
    e: Emitter, data: Value, scale: Value, zero_point: Value | None, group_size: int
) -> Value:
    """The weight ``[in, out]`` in float; onnxruntime multiplies by the codes themselves."""
    codes = e.transpose(data, [1, 0])
    turn: Callable[[Value], Value] = lambda t: e.transpose(t, [1, 0])  # noqa: E731
    if not group_size:
        turn = lambda t: _flat(e, t)  # noqa: E731
    zero = None if zero_point is None else turn(zero_point)
    return e.op("DequantizeLinear", codes, turn(scale), zero, axis=0 if group_size else 1,
                block_size=group_size or None, dtype=e.dtype(scale))  # fmt: skip


def _flat(e: Emitter, x: Value) -> Value:
    """``[out, 1]`` as ``[out]``."""
    return e.reshape(x, [e.dims(x)[0]])
