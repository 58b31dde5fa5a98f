"""ftc's quantized operators: in those that onnxruntime has a kernel for, or standard ones.

With the activation quantized by row, ``m`` the largest magnitude of each row:

    q = QuantizeLinear(x * (1 / m), 1/127, 128)
    y = m * MatMulIntegerToFloat(q, W, 1/127, s, 128) + b

The steps are constants, so no row depends on the rows beside it. In standard
operators the product is ``Cast(MatMulInteger(q, W, 128)) * (1/127 * s)``, which
onnxruntime does not fuse, since it folds the constants first: up to a tenth slower.
With one scale for all rows it is

    q, a, z = DynamicQuantizeLinear(x)
    y = Cast(MatMulInteger(q, W, z)) * (a * s) + b

which is one kernel, whatever the instruction set; the order of the operands is the
one that onnxruntime's fusion looks for. Everything before the integer product is
shared by products with the same input. A static step is a constant, so it is the first
of these forms without ``m``: nothing is computed from ``x`` but its codes.

A weight that is used in float is ``(Cast(codes) - z) * s``, which onnxruntime
computes once, at load. ``DequantizeLinear`` would be computed in every run, and
before a product it would make onnxruntime quantize the activations as well.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx_ir import Value

from ftc.graph.quantized_ops import ROW_STEP

from .blockwise import DOMAIN, block_linear, block_rows, has_kernel, nibbles
from .emitter import Emitter
from .table import lowers

ftc_ops: Any = torch.ops.ftc


@lowers(ftc_ops.dequantize.default)
def dequantize(
    e: Emitter, data: Value, scale: Value, zero_point: Value | None, bits: int, group_size: int
) -> Value:
    data, zero_point = _plain(e, data, zero_point, bits)
    scale, dims = e.cast(scale, torch.float32), e.dims(data)
    if group_size:
        split = (dims[0], e.dims(scale)[1], group_size)
        per_group = [*e.dims(scale), 1]
    else:
        split, per_group = dims, [dims[0], *[1] * (len(dims) - 1)]
    codes = e.reshape(e.cast(data, e.dtype(scale)), split)
    if zero_point is not None:
        zero = e.cast(e.reshape(zero_point, per_group), e.dtype(scale))
        codes = e.op("Sub", codes, zero, dims=split)
    return e.reshape(e.op("Mul", codes, e.reshape(scale, per_group), dims=split), dims)


@lowers(ftc_ops.quantized_embedding.default)
def quantized_embedding(
    e: Emitter, data: Value, scale: Value, zero_point: Value | None, indices: Value, bits: int,
    group_size: int,
) -> Value:  # fmt: skip
    if not e.standard and has_kernel(group_size):
        return block_rows(e, data, scale, zero_point, indices, bits, group_size)
    dtype, dims = torch.float32, e.sizes.dims(e.out)
    data, zero_point = _plain(e, data, zero_point, bits)
    scale = e.cast(scale, dtype)
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
    bias: Value | None, bits: int, group_size: int, activation: str, step: Value | None = None,
) -> Value:  # fmt: skip
    fused = not e.standard and has_kernel(group_size, activation)
    if fused and (bits == 4 or activation == "block"):
        return block_linear(e, x, data, scale, zero_point, bias, bits, group_size, activation)
    data, zero_point = _plain(e, data, zero_point, bits)
    peak = None
    if activation in ("none", "block"):
        x = x if activation == "none" else _block_round(e, x, group_size)
        y = e.op("MatMul", x, _float_weight(e, data, scale, zero_point, group_size))
    else:
        if activation == "row":
            peak = row_peak(e, x)
            x = e.op("Mul", x, e.op("Reciprocal", peak))
        if step is not None:
            codes = _static_codes(e, x, e.cast(step, e.dtype(x)))
        elif peak is not None:
            codes = _static_codes(e, x, e.const(ROW_STEP, e.dtype(x)))
        else:
            codes = _tensor_codes(e, x)
        y = _integer_product(e, *codes, data, scale, zero_point, group_size)
    if peak is not None:
        y = e.op("Mul", y, peak)
    return y if bias is None else e.op("Add", y, bias)


def _plain(
    e: Emitter, data: Value, zero_point: Value | None, bits: int
) -> tuple[Value, Value | None]:
    """Codes one an element, int8, and zero points; packed ones are unpacked, once, at load."""
    if bits == 8:
        return data, zero_point
    moved = e.cast(nibbles(e, data), torch.float32)  # onnxruntime subtracts no bytes
    codes = e.op("Sub", moved, e.const(8, torch.float32), dims=e.dims(moved))
    return e.cast(codes, torch.int8), zero_point


def _block_round(e: Emitter, x: Value, group_size: int) -> Value:
    """Each group of each row on 255 steps of its largest magnitude."""
    dims = e.dims(x)
    size = group_size or dims[-1]
    blocks = e.reshape(x, [*dims[:-1], dims[-1] // size, size])
    step = e.op("Div", row_peak(e, blocks), e.const(127, e.dtype(x)))
    whole = e.op("Round", e.op("Div", blocks, step))
    return e.reshape(e.op("Mul", whole, step, dims=e.dims(blocks)), dims)


def row_peak(e: Emitter, x: Value) -> Value:
    """Largest magnitude of each row, never 0."""
    largest = e.op("ReduceMax", e.op("Abs", x), [-1], keepdims=1)
    return e.op("Max", largest, e.const(torch.finfo(e.dtype(x)).tiny, e.dtype(x)))


def _static_codes(e: Emitter, x: Value, step: Value) -> tuple[Value, Value, Value]:
    """Codes uint8 of ``x`` by a step that is known, the step, and the zero point."""
    zero = e.const(128, torch.uint8)
    codes = e.op("QuantizeLinear", x, step, zero, dtype=torch.uint8)
    return codes, step, zero


def _tensor_codes(e: Emitter, x: Value) -> tuple[Value, Value, Value]:
    """Codes uint8, step and zero point of ``x`` as a whole."""
    kinds = (torch.uint8, e.dtype(x), torch.uint8)
    codes, step, zero = e.op("DynamicQuantizeLinear", x, outputs=3, dtype=kinds)
    return codes, step, zero


def _integer_product(
    e: Emitter, codes: Value, step: Value, zero: Value, data: Value, scale: Value,
    zero_point: Value | None, group_size: int,
) -> Value:  # fmt: skip
    """``x W^T`` with ``x = (codes - zero) step``."""
    dtype = e.dtype(step)
    if group_size:
        centred = e.op("Sub", e.cast(codes, dtype), e.cast(zero, dtype))
        product = e.op("MatMul", centred, _float_weight(e, data, scale, zero_point, group_size))
        return e.op("Mul", product, step)
    scale, weight = _flat(e, scale), e.transpose(data, [1, 0])
    weight_zero = None if zero_point is None else _flat(e, zero_point)
    if step.const_value is not None and not e.standard:
        return e.op("MatMulIntegerToFloat", codes, weight, step, scale, zero, weight_zero,
                    domain=DOMAIN, dtype=dtype)  # fmt: skip
    product = e.op("MatMulInteger", codes, weight, zero, weight_zero, dtype=torch.int32)
    return e.op("Mul", e.cast(product, dtype), e.op("Mul", step, scale))


def _float_weight(
    e: Emitter, data: Value, scale: Value, zero_point: Value | None, group_size: int
) -> Value:
    """The weight ``[in, out]`` in float."""
    return e.transpose(dequantize(e, data, scale, zero_point, 8, group_size), [1, 0])


def _flat(e: Emitter, x: Value) -> Value:
    """``[out, 1]`` as ``[out]``."""
    return e.reshape(x, [e.dims(x)[0]])
