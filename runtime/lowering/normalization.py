"""Normalisations and softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from onnx_ir import Value

from .emitter import Emitter, constant_array
from .table import Unsupported, lowers

aten = torch.ops.aten


@lowers(aten.layer_norm.default)
def layer_norm(
    e: Emitter, x: Value, normalized_shape: Sequence[int], weight: Value | None = None,
    bias: Value | None = None, eps: float = 1e-5, cudnn_enable: bool = True,
) -> Value:  # fmt: skip
    if weight is None:
        weight = e.const(torch.ones(tuple(normalized_shape)), e.dtype(x))
    return e.op("LayerNormalization", x, weight, bias, axis=-len(normalized_shape), epsilon=eps)


@lowers(aten.native_layer_norm.default)
def native_layer_norm(
    e: Emitter, x: Value, normalized_shape: Sequence[int], weight: Value | None,
    bias: Value | None, eps: float,
) -> Sequence[Value | None]:  # fmt: skip
    out = e.out
    e.out = out[0]
    return [layer_norm(e, x, normalized_shape, weight, bias, eps), None, None]


@lowers(aten.rms_norm.default)
def rms_norm(
    e: Emitter, x: Value, normalized_shape: Sequence[int], weight: Value | None = None,
    eps: float | None = None,
) -> Value:  # fmt: skip
    if weight is None:
        weight = e.const(torch.ones(tuple(normalized_shape)), e.dtype(x))
    epsilon = torch.finfo(e.dtype(x)).eps if eps is None else eps
    return e.op("RMSNormalization", x, weight, axis=-len(normalized_shape), epsilon=epsilon)


def rms_form(e: Emitter, scale: Any, x: Any) -> Value | None:
    """``scale * (x / sqrt(mean(x^2) + eps))``, traced in six nodes, as one operator.

    Half the time in onnxruntime. None where ``x`` was not made like that.
    """
    if not (isinstance(scale, Value) and isinstance(x, Value) and e.out.dtype == torch.float32):
        return None
    makers = _makers(x, (("Mul", 1), ("Reciprocal", 0), ("Sqrt", 0), ("Add", 0),
                         ("ReduceMean", 0), ("Mul", 0)))  # fmt: skip
    if makers is None:
        return None
    product, _, _, addition, mean, square = makers
    source = product.inputs[0]
    epsilon, axes = constant_array(addition.inputs[1]), constant_array(mean.inputs[1])
    if epsilon is None or epsilon.size != 1 or axes is None or axes.tolist() != [-1]:
        return None
    if list(square.inputs) != [source, source] or e.dtype(source) != torch.float32:
        return None
    if e.dims(scale) != e.dims(source)[-1:]:
        return None
    return e.op("RMSNormalization", source, scale, axis=-1, epsilon=float(epsilon.item()))


def _makers(x: Value, chain: Sequence[tuple[str, int]]) -> list[Any] | None:
    """The nodes that made ``x``, followed through the given input of each; None for other ones."""
    found = []
    value: Value | None = x
    for op_type, position in chain:
        maker = value.producer() if value is not None else None
        if maker is None or maker.op_type != op_type:
            return None
        found.append(maker)
        value = maker.inputs[position]
    return found


@lowers(aten.batch_norm.default, aten.instance_norm.default)
def batch_norm(
    e: Emitter, x: Value, weight: Value | None, bias: Value | None, mean: Value | None,
    var: Value | None, training: bool, momentum: float, eps: float, cudnn_enabled: bool = False,
) -> Value:  # fmt: skip
    channels = e.dims(x)[1]
    if not isinstance(channels, int):
        raise Unsupported("a symbolic number of channels")
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    weight = weight if weight is not None else e.const(ones, e.dtype(x))
    bias = bias if bias is not None else e.const(zeros, e.dtype(x))
    if e.node is not None and e.node.target is aten.instance_norm.default:
        if mean is not None and not training:
            raise Unsupported("instance_norm with running statistics")
        return e.op("InstanceNormalization", x, weight, bias, epsilon=eps)
    if training or mean is None or var is None:
        raise Unsupported("batch_norm with the statistics of the batch (lower it in eval mode)")
    return e.op("BatchNormalization", x, weight, bias, mean, var, epsilon=eps)


@lowers(aten.group_norm.default)
def group_norm(
    e: Emitter, x: Value, num_groups: int, weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, cudnn_enabled: bool = True,
) -> Value:  # fmt: skip
    dims, dtype = e.dims(x), e.dtype(x)
    elements = math.prod(dims[1:])
    groups = e.reshape(x, [dims[0], num_groups, elements // num_groups])
    ones = e.const(torch.ones(num_groups), dtype)
    zeros = e.const(torch.zeros(num_groups), dtype)
    normal = e.op("InstanceNormalization", groups, ones, zeros, epsilon=eps, dims=e.dims(groups))
    y = e.reshape(normal, dims)
    per_channel = [dims[1], *[1] * (len(dims) - 2)]
    if weight is not None:
        y = e.op("Mul", y, e.reshape(weight, per_channel))
    return y if bias is None else e.op("Add", y, e.reshape(bias, per_channel))


@lowers(aten.softmax.int)
def softmax(e: Emitter, x: Value, dim: int, dtype: Any = None) -> Value:
    return e.op("Softmax", e.cast(x, e.out.dtype), axis=dim)


@lowers(aten._softmax.default)
def core_softmax(e: Emitter, x: Value, dim: int, half_to_float: bool) -> Value:
    return softmax(e, x, dim)


@lowers(aten.log_softmax.int)
def log_softmax(e: Emitter, x: Value, dim: int, dtype: Any = None) -> Value:
    return e.op("LogSoftmax", e.cast(x, e.out.dtype), axis=dim)


@lowers(aten._log_softmax.default)
def core_log_softmax(e: Emitter, x: Value, dim: int, half_to_float: bool) -> Value:
    return log_softmax(e, x, dim)


@lowers(aten.cosine_similarity.default)
def cosine_similarity(e: Emitter, a: Value, b: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    dtype = e.out.dtype
    lengths = [e.op("Max", e.op("ReduceL2", x, [dim], keepdims=0), e.const(eps, dtype))
               for x in (a, b)]  # fmt: skip
    product = e.op("ReduceSum", e.op("Mul", a, b), [dim], keepdims=0)
    return e.op("Div", product, e.op("Mul", *lengths))
