"""Sums, means, extremes and norms along axes; running sums; sorting.

An empty list of axes means all of them, in torch and here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from onnx_ir import Value

from .emitter import Emitter
from .table import Unsupported, lowers

aten = torch.ops.aten

Axes = int | Sequence[int] | None


def reduce(e: Emitter, op_type: str, x: Value, dim: Axes, keepdim: bool) -> Value:
    """One reducing operator along ``dim`` (None or empty: all axes)."""
    axes = [dim] if isinstance(dim, int) else list(dim or [])
    if e.rank(x) == 0:
        return x
    return e.op(op_type, x, axes or None, keepdims=int(keepdim))


@lowers(aten.sum.dim_IntList)
def sum_(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return reduce(e, "ReduceSum", e.cast(x, e.out.dtype), dim, keepdim)


@lowers(aten.mean.dim)
def mean(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False, dtype: Any = None) -> Value:
    x = e.cast(x, e.out.dtype)
    if not keepdim and (pieces := _pieces(e, x, dim)) is not None:
        source, size = pieces
        kernel = {"kernel_shape": [size], "strides": [size]}
        return e.op("AveragePool", source, dims=e.dims(x)[:-1], **kernel)
    return reduce(e, "ReduceMean", x, dim, keepdim)


def _pieces(e: Emitter, x: Value, dim: Axes) -> tuple[Value, int] | None:
    """``x`` as ``[a, b, n * size]`` and ``size``, where the mean is over pieces of its last axis.

    Such means are those of a pooling: one operator for two.
    """
    maker, dims = x.producer(), e.dims(x)
    if maker is None or maker.op_type != "Reshape" or e.dtype(x) != torch.float32:
        return None
    axes = [dim] if isinstance(dim, int) else list(dim or [])
    source = maker.inputs[0]
    assert source is not None
    whole = e.dims(source)
    split = len(dims) == 4 and axes in ([-1], [3]) and dims[:2] == whole[:2] and len(whole) == 3
    return (source, dims[3]) if split and isinstance(dims[3], int) else None


@lowers(aten.sum.default)
def sum_all(e: Emitter, x: Value, dtype: Any = None) -> Value:
    return sum_(e, x)


@lowers(aten.mean.default)
def mean_all(e: Emitter, x: Value, dtype: Any = None) -> Value:
    return mean(e, x)


@lowers(aten.prod.default, aten.prod.dim_int)
def prod(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return reduce(e, "ReduceProd", e.cast(x, e.out.dtype), dim, keepdim)


@lowers(aten.amax.default, aten.max.default)
def amax(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False) -> Value:
    return reduce(e, "ReduceMax", x, dim, keepdim)


@lowers(aten.amin.default, aten.min.default)
def amin(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False) -> Value:
    return reduce(e, "ReduceMin", x, dim, keepdim)


@lowers(aten.max.dim)
def max_dim(e: Emitter, x: Value, dim: int, keepdim: bool = False) -> Sequence[Value]:
    return [reduce(e, "ReduceMax", x, dim, keepdim),
            e.op("ArgMax", x, axis=dim, keepdims=int(keepdim))]  # fmt: skip


@lowers(aten.min.dim)
def min_dim(e: Emitter, x: Value, dim: int, keepdim: bool = False) -> Sequence[Value]:
    return [reduce(e, "ReduceMin", x, dim, keepdim),
            e.op("ArgMin", x, axis=dim, keepdims=int(keepdim))]  # fmt: skip


@lowers(aten.argmax.default)
def argmax(e: Emitter, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _arg(e, "ArgMax", x, dim, keepdim)


@lowers(aten.argmin.default)
def argmin(e: Emitter, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    return _arg(e, "ArgMin", x, dim, keepdim)


def _arg(e: Emitter, op_type: str, x: Value, dim: int | None, keepdim: bool) -> Value:
    if dim is not None:
        return e.op(op_type, x, axis=dim, keepdims=int(keepdim))
    found = e.op(op_type, e.op("Reshape", x, [-1]), axis=0, keepdims=0)
    return e.reshape(found, e.sizes.dims(e.out)) if keepdim else found


@lowers(aten.any.default, aten.any.dim, aten.any.dims)
def any_(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False) -> Value:
    return reduce(e, "ReduceMax", _truth(e, x), dim, keepdim)


@lowers(aten.all.default, aten.all.dim, aten.all.dims)
def all_(e: Emitter, x: Value, dim: Axes = None, keepdim: bool = False) -> Value:
    return reduce(e, "ReduceMin", _truth(e, x), dim, keepdim)


def _truth(e: Emitter, x: Value) -> Value:
    """0 or 1 as int32, which onnxruntime reduces; it has no such kernel for bool."""
    return e.cast(e.cast(x, torch.bool), torch.int32)


def count(e: Emitter, x: Value, dim: Axes) -> Value | int:
    """How many elements are reduced along ``dim``."""
    dims = e.dims(x)
    axes = [dim] if isinstance(dim, int) else list(dim or range(len(dims)))
    return math.prod(dims[a] for a in axes)


@lowers(aten.var.correction, aten.var.dim, aten.var.default)
def var(
    e: Emitter, x: Value, dim: Any = None, unbiased: bool = True, keepdim: bool = False,
    correction: Any = None,
) -> Value:  # fmt: skip
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    less = (1 if unbiased else 0) if correction is None else correction
    centred = e.op("Sub", x, reduce(e, "ReduceMean", x, dim, True))
    square = e.op("Mul", centred, centred, dims=e.dims(x))
    if less == 0:
        return reduce(e, "ReduceMean", square, dim, keepdim)
    total = reduce(e, "ReduceSum", square, dim, keepdim)
    elements = e.sizes.canonical(count(e, x, dim)) - less
    dtype = e.dtype(x)
    if isinstance(elements, (int, float)):
        return e.op("Div", total, e.const(max(elements, 0), dtype))
    divisor = e.cast(e.op("Squeeze", e.sizes.value(elements), [0]), dtype)
    return e.op("Div", total, divisor)


@lowers(aten.std.correction, aten.std.dim, aten.std.default)
def std(
    e: Emitter, x: Value, dim: Any = None, unbiased: bool = True, keepdim: bool = False,
    correction: Any = None,
) -> Value:  # fmt: skip
    return e.op("Sqrt", var(e, x, dim, unbiased, keepdim, correction))


@lowers(aten.var_mean.correction)
def var_mean(
    e: Emitter, x: Value, dim: Any = None, correction: Any = None, keepdim: bool = False
) -> Sequence[Value]:
    mean = reduce(e, "ReduceMean", x, dim, keepdim)
    return [var(e, x, dim, True, keepdim, correction), mean]


@lowers(aten.logsumexp.default)
def logsumexp(e: Emitter, x: Value, dim: Axes, keepdim: bool = False) -> Value:
    return reduce(e, "ReduceLogSumExp", x, dim, keepdim)


@lowers(aten.linalg_vector_norm.default)
def vector_norm(
    e: Emitter, x: Value, ord: float = 2, dim: Axes = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    op_type = {2: "ReduceL2", 1: "ReduceL1", math.inf: "ReduceMax"}.get(ord)
    if op_type is None:
        raise Unsupported(f"a norm of order {ord}")
    x = e.cast(x, e.out.dtype)
    if ord == math.inf:
        x = e.op("Abs", x, dims=e.dims(x))
    return reduce(e, op_type, x, dim, keepdim)


@lowers(aten.norm.ScalarOpt_dim, aten.norm.Scalar)
def norm(e: Emitter, x: Value, p: Any = 2, dim: Axes = None, keepdim: bool = False) -> Value:
    return vector_norm(e, x, 2 if p is None else p, dim, keepdim)


@lowers(aten.cumsum.default)
def cumsum(e: Emitter, x: Value, dim: int, dtype: Any = None) -> Value:
    return e.op("CumSum", e.cast(x, e.out.dtype), e.scalar(dim))


@lowers(aten.topk.default)
def topk(
    e: Emitter, x: Value, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Sequence[Value]:
    return _top(e, x, e.sizes.value(k), dim, largest, sorted)


@lowers(aten.sort.default, aten.sort.stable)
def sort(
    e: Emitter, x: Value, dim: int = -1, descending: bool = False, stable: Any = None
) -> Sequence[Value]:
    return _top(e, x, e.sizes.value(e.dims(x)[dim]), dim, descending, True)


@lowers(aten.argsort.default)
def argsort(e: Emitter, x: Value, dim: int = -1, descending: bool = False) -> Value:
    return sort(e, x, dim, descending)[1]


def _top(e: Emitter, x: Value, k: Value, dim: int, largest: bool, ordered: bool) -> Sequence[Value]:
    if e.rank(x) == 0:
        raise Unsupported("sorting a scalar")
    return e.op("TopK", x, k, axis=dim, largest=int(largest), sorted=int(ordered), outputs=2,
                dtype=(e.dtype(x), torch.int64))  # fmt: skip
