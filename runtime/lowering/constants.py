"""Casts, constants and ranges; copies that copy nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from onnx_ir import Value

from .emitter import Emitter
from .table import Unsupported, lowers

aten = torch.ops.aten


@lowers(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.to.prim_other,
        aten.type_as.default, aten._to_copy.default, aten.contiguous.default,
        aten.clone.default, aten.alias.default, aten.detach.default, aten.detach_.default,
        aten.lift_fresh_copy.default, aten.lift_fresh.default,
        aten._conj.default, aten.view.dtype)  # fmt: skip
def to(e: Emitter, x: Value, *place: Any, dtype: Any = None, memory_format: Any = None) -> Value:
    if e.node is not None and e.node.target is aten.view.dtype and e.dtype(x) != e.out.dtype:
        raise Unsupported("a view of the bits as another type")
    return e.cast(x, e.out.dtype)


@lowers(operator.getitem)
def getitem(e: Emitter, values: tuple[Any, ...], index: int) -> Value:
    if values[index] is None:
        raise Unsupported(f"result {index} of {e.node and e.node.args[0]} has no form in ONNX")
    return values[index]


@lowers(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(e: Emitter, *bounds: Any, dtype: Any = None) -> Value:
    kind = e.out.dtype
    if all(isinstance(b, (int, float)) for b in bounds):
        return e.const(torch.arange(*bounds, dtype=kind), kind)
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1)}.get(len(bounds), bounds)
    given = [int(b) if isinstance(b, float) and not kind.is_floating_point else b
             for b in (start, end, step)]  # fmt: skip
    return e.op("Range", *(e.tensor(b, kind) for b in given))


def _filled(e: Emitter, value: Any) -> Value:
    """A tensor of the result's shape and type, every element ``value``."""
    dims = e.sizes.dims(e.out)
    return e.expand(e.tensor(value, e.out.dtype), dims)


@lowers(aten.full.default, aten.full_like.default)
def full(e: Emitter, _like: Any, value: Any, dtype: Any = None) -> Value:
    return _filled(e, value)


@lowers(aten.new_full.default)
def new_full(e: Emitter, x: Value, size: Any, value: Any, dtype: Any = None) -> Value:
    return _filled(e, value)


@lowers(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default,
        aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)  # fmt: skip
def zeros(e: Emitter, _like: Any, size: Any = None, dtype: Any = None) -> Value:
    # An empty tensor may hold anything, so zeros are right for it too.
    return _filled(e, 0)


@lowers(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(e: Emitter, _like: Any, size: Any = None, dtype: Any = None) -> Value:
    return _filled(e, 1)


@lowers(aten.scalar_tensor.default)
def scalar_tensor(e: Emitter, value: Any, dtype: Any = None) -> Value:
    return e.tensor(value, e.out.dtype)


@lowers(aten.eye.default, aten.eye.m)
def eye(e: Emitter, n: Any, m: Any = None, dtype: Any = None) -> Value:
    rows = e.unsqueeze(_range(e, n), 1)
    columns = e.unsqueeze(_range(e, n if m is None else m), 0)
    return e.op("Equal", rows, columns)


def _range(e: Emitter, end: Any) -> Value:
    zero, one = e.const(0, torch.int64), e.const(1, torch.int64)
    return e.op("Range", zero, e.scalar(end), one, dims=(e.sizes.canonical(end),))


@lowers(aten.item.default, aten._local_scalar_dense.default)
def item(e: Emitter, x: Value) -> Any:
    if not isinstance(e.out, torch.SymInt):
        raise Unsupported("a number that is no size, read out of a tensor at run time")
    e.sizes.register_scalar(e.reshape(e.cast(x, torch.int64), [1]), e.out)
    return e.out
