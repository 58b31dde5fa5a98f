"""Comparisons, logic, bits, and choices between two values."""

from __future__ import annotations

import math
from typing import Any

import torch
from onnx_ir import Value

from .elementwise import promoted
from .emitter import Emitter
from .table import lowers

aten = torch.ops.aten


def _comparison(name: str, op_type: str, *, negated: bool = False) -> None:
    packet = getattr(aten, name)

    @lowers(packet.Tensor, packet.Scalar)
    def translate(e: Emitter, a: Any, b: Any) -> Value:
        dtype = promoted(e, a, b)
        if dtype == torch.bool and op_type != "Equal":
            dtype = torch.int32
        result = e.op(op_type, e.tensor(a, dtype), e.tensor(b, dtype))
        return e.op("Not", result) if negated else result


_comparison("eq", "Equal")
_comparison("ne", "Equal", negated=True)
_comparison("gt", "Greater")
_comparison("ge", "GreaterOrEqual")
_comparison("lt", "Less")
_comparison("le", "LessOrEqual")


def _logical(op_type: str, *operators: Any) -> None:
    @lowers(*operators)
    def translate(e: Emitter, a: Any, b: Any) -> Value:
        return e.op(op_type, e.tensor(a, torch.bool), e.tensor(b, torch.bool))


_logical("And", aten.logical_and.default)
_logical("Or", aten.logical_or.default)
_logical("Xor", aten.logical_xor.default)


def _bitwise(op_type: str, *operators: Any) -> None:
    @lowers(*operators)
    def translate(e: Emitter, a: Any, b: Any) -> Value:
        dtype = e.out.dtype
        name = op_type if dtype == torch.bool else f"Bitwise{op_type}"
        return e.op(name, e.tensor(a, dtype), e.tensor(b, dtype))


for _op, _dunder, _word in (("And", "__and__", "and"), ("Or", "__or__", "or"),
                            ("Xor", "__xor__", "xor")):  # fmt: skip
    _plain, _bits = getattr(aten, _dunder), getattr(aten, f"bitwise_{_word}")
    _bitwise(_op, _plain.Tensor, _plain.Scalar, _bits.Tensor, _bits.Scalar)


@lowers(aten.logical_not.default)
def logical_not(e: Emitter, x: Value) -> Value:
    return e.op("Not", e.cast(x, torch.bool))


@lowers(aten.bitwise_not.default)
def bitwise_not(e: Emitter, x: Value) -> Value:
    return e.op("Not" if e.dtype(x) == torch.bool else "BitwiseNot", x)


@lowers(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(e: Emitter, condition: Value, a: Any, b: Any) -> Value:
    dtype = e.out.dtype
    if dtype == torch.bool:
        picked = e.op("And", condition, e.tensor(a, dtype))
        return e.op("Or", picked, e.op("And", e.op("Not", condition), e.tensor(b, dtype)))
    return e.op("Where", e.cast(condition, torch.bool), e.tensor(a, dtype), e.tensor(b, dtype))


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(e: Emitter, x: Value, mask: Value, value: Any) -> Value:
    return where(e, mask, _bounded(value, e.out.dtype), x)


def _bounded(value: Any, dtype: torch.dtype) -> Any:
    """An infinity in an integer type becomes that type's limit, as torch casts it."""
    if isinstance(value, float) and math.isinf(value) and not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return limits.max if value > 0 else limits.min
    return value
