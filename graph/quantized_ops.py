"""Operators of a quantized graph: what torch runs, differentiates and re-exports.

Each backend lowers them its own way; the functions here are the reference. They
compute in float on integer values, exactly as far as float32 goes, so that a
program drifts from its lowered form by rounding alone.

``quantized_linear`` with ``activation="row"`` gives each row of ``x`` a step of its
own, so that no row depends on those beside it: with ``m`` the row's largest magnitude,

    y = m/127 * (s_w * (q_x q_w^T)) + b,    q_x = round(127 x / m)

``"block"`` does the same for each group of a row, which is what onnxruntime's
MatMulNBits does at accuracy level 4:

    x ~ q_x m / 127

and ``"tensor"`` is the step and zero point of ONNX's DynamicQuantizeLinear, one of
each for all rows: a single outlier ruins it. ``"static"`` is one step for all rows too,
which is given, and what is beyond it is clipped:

    q_x = clamp(round(x / step), -128, 127)

The gradient towards ``x`` is that of the
dequantized weight (straight through the rounding); weights get none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .quantize import dequantize as _dequantize

ACTIVATIONS = ("none", "row", "tensor", "block", "static")
_BLOCK = 1 << 17  # codes that are floats at a time: half a megabyte, which stays in the cache
ROW_STEP = 1 / 127
"""Of the codes of a row whose largest magnitude is 1."""


@torch.library.custom_op("ftc::dequantize", mutates_args=())
def dequantize(
    data: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """The float weight ``[out, ...]`` of codes ``data`` (see :mod:`ftc.graph.quantize`)."""
    return _dequantize(data, scale, zero_point, bits)


@dequantize.register_fake
def _(data: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    shape = (*data.shape[:-1], width(data, bits)) if bits == 4 else data.shape
    return data.new_empty(shape, dtype=torch.float32)


def width(data: Tensor, bits: int) -> int:
    """``in`` of codes ``[out, in]``, which at 4 bits are two a byte."""
    return data.shape[-1] * 2 if bits == 4 else data.shape[-1]


@torch.library.custom_op("ftc::quantized_embedding", mutates_args=())
def quantized_embedding(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    indices: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    """Float32 rows ``[..., dim]`` of a quantized table ``[rows, dim]`` at ``indices`` ``[...]``."""
    zero = None if zero_point is None else zero_point[indices].flatten(0, -2)
    picked = data[indices].flatten(0, -2)
    rows = _dequantize(picked, scale[indices].flatten(0, -2), zero, bits)
    return rows.view(*indices.shape, rows.shape[-1])


@quantized_embedding.register_fake
def _(
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    indices: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    return scale.new_empty((*indices.shape, width(data, bits)), dtype=torch.float32)


@torch.library.custom_op("ftc::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    activation: str,
    step: Tensor | None = None,
) -> Tensor:
    """``x W^T + b`` with a quantized ``W``.

    Args:
        x: float ``[..., in]``.
        data, scale, zero_point: codes of ``W`` ``[out, in]`` (see :mod:`ftc.graph.quantize`).
        bias: float ``[out]`` or None.
        activation: ``none``, ``row``, ``tensor``, ``block`` or ``static``: how ``x`` is
            quantized at run time.
        step: of ``static``, a float scalar above 0; None for the others.
    """
    if activation in ("none", "block") or x.numel() == 0:
        weight = _dequantize(data, scale, zero_point, bits).to(x.dtype)
        seen = block_round(x, group_size) if activation == "block" else x
        return torch.nn.functional.linear(seen, weight, bias)
    if activation == "row":
        y = row_linear(x, row_peak(x), data, scale, zero_point, bits)
    elif activation == "static":
        assert step is not None, "static steps are given"
        y = _code_product(*static_quantize(x, step), data, scale, zero_point, bits)
    else:
        y = _code_product(*dynamic_quantize(x), data, scale, zero_point, bits)
    return y if bias is None else y + bias


def row_linear(
    x: Tensor, peak: Tensor, data: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    """``x W^T`` with each row of ``x`` on 255 steps up to its ``peak`` ``[..., 1]``."""
    return _code_product(*row_quantize(x, peak), data, scale, zero_point, bits) * peak


def _code_product(
    codes: Tensor, step: Tensor, data: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    """``step codes W^T`` of integers as floats."""
    if scale.shape[1] == 1 and zero_point is None and bits == 8:
        return _integer_product(codes, data) * (step * scale[:, 0])
    return torch.nn.functional.linear(codes, _dequantize(data, scale, zero_point, bits)) * step


def _integer_product(codes: Tensor, data: Tensor) -> Tensor:
    """``codes data^T``, some rows of ``data`` at a time: its floats are four times its size."""
    rows = max(1, _BLOCK // data.shape[1])
    parts = [torch.nn.functional.linear(codes, d.to(codes.dtype)) for d in torch.split(data, rows)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@quantized_linear.register_fake
def _(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    activation: str,
    step: Tensor | None = None,
) -> Tensor:
    assert x.shape[-1] == width(data, bits), f"x {x.shape} by a weight {data.shape}"
    return x.new_empty((*x.shape[:-1], data.shape[0]))


def row_peak(x: Tensor) -> Tensor:
    """Largest magnitude of each row, ``[..., 1]``; of zeros the smallest normal number."""
    return x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def row_quantize(x: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """``(q, 1/127)`` with ``x ~ q peak / 127``: integers in [-127, 127] as floats."""
    step = torch.tensor(ROW_STEP, dtype=x.dtype)
    return torch.round(x * peak.reciprocal() / step), step


def static_quantize(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """``(q, step)`` with ``x ~ q step``: integers in [-128, 127] as floats."""
    step = step.to(x.dtype)
    return torch.round(x / step).clamp(-128, 127), step


def block_round(x: Tensor, group_size: int) -> Tensor:
    """``x`` ``[..., in]`` on 255 steps for each group of each row; 0: the row is one group."""
    size = group_size or x.shape[-1]
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    return (torch.round(blocks * inverse) * step).view(x.shape)


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(q - z, s)`` of ONNX's DynamicQuantizeLinear: integers as floats, and a scalar."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = (high - low) / 255
    step = torch.where(step > 0, step, torch.ones_like(step))
    zero = torch.round(-low / step).clamp(0, 255)
    return (torch.round(x / step) + zero).clamp(0, 255) - zero, step


@torch.library.custom_op("ftc::quantize_states", mutates_args=())
def quantize_states(x: Tensor, step: Tensor) -> Tensor:
    """Keys or values as int8 codes, ``clamp(round(x / step), -128, 127)``.

    Args:
        x: float ``[batch, heads, length, dim]``.
        step: float ``[heads, 1, dim]``, above 0.
    """
    return torch.round(x / step).clamp_(-128, 127).to(torch.int8)


@quantize_states.register_fake
def _(x: Tensor, step: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@torch.library.custom_op("ftc::dequantize_states", mutates_args=())
def dequantize_states(codes: Tensor, step: Tensor) -> Tensor:
    """Float32 keys or values of their codes: ``codes step``."""
    return codes.float().mul_(step)


@dequantize_states.register_fake
def _(codes: Tensor, step: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, data, scale, zero_point, bias, bits, group_size = inputs[:7]
    ctx.save_for_backward(data, scale, zero_point)
    ctx.has_bias, ctx.dtype, ctx.how = bias is not None, x.dtype, (bits, group_size)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    data, scale, zero_point = ctx.saved_tensors
    weight = torch.ops.ftc.dequantize(data, scale, zero_point, *ctx.how).to(ctx.dtype)
    into_x = grad @ weight if ctx.needs_input_grad[0] else None
    into_bias = None
    if ctx.has_bias and ctx.needs_input_grad[4]:
        into_bias = grad.flatten(0, -2).sum(0)
    return into_x, None, None, None, into_bias, None, None, None, None


quantized_linear.register_autograd(_backward, setup_context=_save)
