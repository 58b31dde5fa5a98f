"""Activation functions, and dropout, which is none when a program is deployed."""

from __future__ import annotations

import torch
from onnx_ir import Value

from .elementwise import clamp
from .emitter import Emitter
from .table import Unsupported, lowers

aten = torch.ops.aten


@lowers(aten.silu.default)
def silu(e: Emitter, x: Value) -> Value:
    # onnxruntime fuses the second form into the first when it loads; its Swish is slower.
    if not e.standard and e.dtype(x) == torch.float32:
        return e.op("QuickGelu", x, domain="com.microsoft", alpha=1.0)
    return e.op("Mul", x, e.op("Sigmoid", x))


@lowers(aten.gelu.default)
def gelu(e: Emitter, x: Value, approximate: str = "none") -> Value:
    return e.op("Gelu", x, approximate=approximate)


@lowers(aten.softplus.default)
def softplus(e: Emitter, x: Value, beta: float = 1, threshold: float = 20) -> Value:
    # Beyond the threshold torch returns x itself, which differs by less than exp(-threshold).
    if beta == 1:
        return e.op("Softplus", x)
    factor = e.const(beta, e.dtype(x))
    return e.op("Div", e.op("Softplus", e.op("Mul", x, factor)), factor)


@lowers(aten.leaky_relu.default)
def leaky_relu(e: Emitter, x: Value, negative_slope: float = 0.01) -> Value:
    return e.op("LeakyRelu", x, alpha=float(negative_slope))


@lowers(aten.elu.default)
def elu(e: Emitter, x: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    if input_scale != 1:
        raise Unsupported("an elu of a scaled input")
    y = e.op("Elu", x, alpha=float(alpha))
    return y if scale == 1 else e.op("Mul", y, e.const(scale, e.dtype(x)))


@lowers(aten.hardsigmoid.default)
def hardsigmoid(e: Emitter, x: Value) -> Value:
    return e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


@lowers(aten.prelu.default)
def prelu(e: Emitter, x: Value, weight: Value) -> Value:
    trailing = max(e.rank(x) - 2, 0)
    return e.op("PRelu", x, e.reshape(weight, [*e.dims(weight), *[1] * trailing]))


@lowers(aten.hardtanh.default)
def hardtanh(e: Emitter, x: Value, min_val: float = -1, max_val: float = 1) -> Value:
    return clamp(e, x, min_val, max_val)


@lowers(aten.relu6.default)
def relu6(e: Emitter, x: Value) -> Value:
    return clamp(e, x, 0, 6)


@lowers(aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
def dropout(e: Emitter, x: Value, p: float, train: bool) -> Value:
    if train and p > 0:
        raise Unsupported("the program is in train mode (lower it in eval mode)")
    return x
