"""Convolutions, pooling and resampling of images and signals.

torch also takes a single image without a batch; it gets a batch of one and
loses it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx_ir import Value

from .emitter import Emitter
from .table import Unsupported, lowers

aten = torch.ops.aten


def _batched(e: Emitter, x: Value, rank: int, body: Callable[[Value], Value]) -> Value:
    """``body`` of ``x`` with a batch dimension, and its result without one if ``x`` had none."""
    if e.rank(x) == rank:
        return body(x)
    result = body(e.unsqueeze(x, 0))
    return e.op("Squeeze", result, [0])


def _spread(value: Any, count: int) -> list[int]:
    """``3`` or ``[3]`` as ``[3, 3]``."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


@lowers(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)  # fmt: skip
def conv(
    e: Emitter, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    kernel = [int(k) for k in e.dims(weight)[2:]]
    axes = len(kernel)
    dilations = _spread(dilation, axes)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = _spread(0 if padding == "valid" else padding, axes) * 2
    return _batched(e, x, axes + 2, lambda x: e.op(
        "Conv", x, weight, bias, kernel_shape=kernel, strides=_spread(stride, axes), pads=pads,
        dilations=dilations, group=groups))  # fmt: skip


@lowers(aten.convolution.default)
def convolution(
    e: Emitter, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    if transposed:
        return conv_transpose(e, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(e, x, weight, bias, stride, padding, dilation, groups)


@lowers(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    e: Emitter, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1,
    padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    kernel = [int(k) for k in e.dims(weight)[2:]]
    axes = len(kernel)
    return _batched(e, x, axes + 2, lambda x: e.op(
        "ConvTranspose", x, weight, bias, kernel_shape=kernel, strides=_spread(stride, axes),
        pads=_spread(padding, axes) * 2, output_padding=_spread(output_padding, axes),
        dilations=_spread(dilation, axes), group=groups))  # fmt: skip


@lowers(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    e: Emitter, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:  # fmt: skip
    axes = _axes(e, kernel_size)
    kernel = _spread(kernel_size, axes)
    return _batched(e, x, axes + 2, lambda x: e.op(
        "MaxPool", x, kernel_shape=kernel, strides=_spread(stride, axes) or kernel,
        pads=_spread(padding, axes) * 2, dilations=_spread(dilation, axes),
        ceil_mode=int(ceil_mode)))  # fmt: skip


@lowers(aten.max_pool2d_with_indices.default)
def max_pool_with_indices(e: Emitter, x: Value, *how: Any) -> Sequence[Value | None]:
    e.out = e.out[0]
    return [max_pool(e, x, *how), None]


@lowers(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    e: Emitter, x: Value, kernel_size: Any, stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Value:  # fmt: skip
    if divisor_override is not None:
        raise Unsupported("an average with a divisor of its own")
    axes = _axes(e, kernel_size)
    kernel = _spread(kernel_size, axes)
    return _batched(e, x, axes + 2, lambda x: e.op(
        "AveragePool", x, kernel_shape=kernel, strides=_spread(stride, axes) or kernel,
        pads=_spread(padding, axes) * 2, ceil_mode=int(ceil_mode),
        count_include_pad=int(count_include_pad)))  # fmt: skip


def _axes(e: Emitter, kernel_size: Any) -> int:
    """How many axes a pooling runs over: its operator's name says so."""
    assert e.node is not None
    name = str(e.node.target)
    return next((n for n in (1, 2, 3) if f"pool{n}d" in name), len(_spread(kernel_size, 1)))


@lowers(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool2d.default)  # fmt: skip
def adaptive_avg_pool(e: Emitter, x: Value, output_size: Any) -> Value:
    sizes = _spread(output_size, 1)
    before = e.dims(x)[-len(sizes) :]
    if all(s == 1 for s in sizes):
        return e.op("ReduceMean", x, list(range(-len(sizes), 0)), keepdims=1)
    if not all(isinstance(b, int) and b % s == 0 for b, s in zip(before, sizes, strict=True)):
        raise Unsupported("an adaptive pooling whose windows differ in size")
    kernel = [b // s for b, s in zip(before, sizes, strict=True)]
    return _batched(e, x, len(sizes) + 2, lambda x: e.op(
        "AveragePool", x, kernel_shape=kernel, strides=kernel))  # fmt: skip


@lowers(aten.adaptive_max_pool2d.default)
def adaptive_max_pool(e: Emitter, x: Value, output_size: Any) -> Sequence[Value | None]:
    if math.prod(_spread(output_size, 2)) != 1:
        raise Unsupported("an adaptive pooling to more than one value")
    return [e.op("ReduceMax", x, [-2, -1], keepdims=1), None]


def _resize(e: Emitter, x: Value, factors: Any, **how: Any) -> Value:
    """``Resize`` by the factors given, else to the size that the result has."""
    if factors is not None:
        scales = e.const([1.0, 1.0, *factors], torch.float32)
        return e.op("Resize", x, None, scales, **how)
    return e.op("Resize", x, None, None, e.sizes.shape_value(e.out.shape), **how)


@lowers(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
def upsample_nearest(e: Emitter, x: Value, output_size: Any, scale_factors: Any = None) -> Value:
    return _resize(e, x, scale_factors, mode="nearest", nearest_mode="floor",
                   coordinate_transformation_mode="asymmetric")  # fmt: skip


@lowers(aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec)
def upsample_linear(
    e: Emitter, x: Value, output_size: Any, align_corners: bool, scale_factors: Any = None
) -> Value:
    return _resize(e, x, scale_factors, mode="linear",
                   coordinate_transformation_mode=_corners(align_corners))  # fmt: skip


@lowers(aten.upsample_bicubic2d.vec)
def upsample_cubic(
    e: Emitter, x: Value, output_size: Any, align_corners: bool, scale_factors: Any = None
) -> Value:
    return _resize(e, x, scale_factors, mode="cubic", cubic_coeff_a=-0.75,
                   coordinate_transformation_mode=_corners(align_corners))  # fmt: skip


def _corners(align: bool) -> str:
    return "align_corners" if align else "half_pixel"
