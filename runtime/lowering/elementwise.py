"""Operators that compute element by element, with torch's type promotion.

ONNX wants operands of one type and has no scalars in the torch sense; each
translation casts its operands to the type torch computes in, and a Python
number becomes a constant of that type.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from onnx_ir import Value

from .emitter import Emitter
from .normalization import rms_form
from .table import lowers

aten = torch.ops.aten


def promoted(e: Emitter, *operands: Any) -> torch.dtype:
    """The dtype in which torch computes with these operands."""
    result = _stand_in(e, operands[0])
    for operand in operands[1:]:
        result = torch.empty((), dtype=torch.result_type(result, _stand_in(e, operand)))
        if any(isinstance(o, Value) and e.rank(o) for o in operands):
            result = result[None]
    return result.dtype if isinstance(result, torch.Tensor) else torch.tensor(result).dtype


def _stand_in(e: Emitter, operand: Any) -> Any:
    if isinstance(operand, Value):
        return torch.empty((1,) if e.rank(operand) else (), dtype=e.dtype(operand))
    return 1 if isinstance(operand, torch.SymInt) else operand


def _unary(op_type: str, *operators: Any) -> None:
    """Registers operators that are one ONNX operator on the result's type."""

    @lowers(*operators)
    def translate(e: Emitter, x: Value) -> Value:
        return e.op(op_type, e.cast(x, e.out.dtype))


for _names in (
    "abs neg exp log sqrt reciprocal floor ceil round sign erf sigmoid tanh relu mish softplus",
    "sin cos tan asin acos atan sinh cosh asinh acosh atanh",
):
    for _name in _names.split():
        _unary(_name.capitalize(), getattr(aten, _name).default)
_unary("HardSwish", aten.hardswish.default)


@lowers(aten.rsqrt.default)
def rsqrt(e: Emitter, x: Value) -> Value:
    return e.op("Reciprocal", e.op("Sqrt", e.cast(x, e.out.dtype)))


@lowers(aten.log1p.default)
def log1p(e: Emitter, x: Value) -> Value:
    dtype = e.out.dtype
    return e.op("Log", e.op("Add", e.cast(x, dtype), e.const(1, dtype)))


@lowers(aten.expm1.default)
def expm1(e: Emitter, x: Value) -> Value:
    dtype = e.out.dtype
    return e.op("Sub", e.op("Exp", e.cast(x, dtype)), e.const(1, dtype))


def _logarithm(base: float, operator: Any) -> None:
    @lowers(operator)
    def translate(e: Emitter, x: Value) -> Value:
        natural = e.op("Log", e.cast(x, e.out.dtype))
        return e.op("Mul", natural, e.const(1 / math.log(base), e.out.dtype))


_logarithm(2, aten.log2.default)
_logarithm(10, aten.log10.default)


@lowers(aten.square.default)
def square(e: Emitter, x: Value) -> Value:
    return e.op("Mul", x, x)


@lowers(aten.isnan.default)
def isnan(e: Emitter, x: Value) -> Value:
    return e.op("IsNaN", x) if e.dtype(x).is_floating_point else _false(e, x)


@lowers(aten.isinf.default)
def isinf(e: Emitter, x: Value) -> Value:
    return e.op("IsInf", x) if e.dtype(x).is_floating_point else _false(e, x)


def _false(e: Emitter, x: Value) -> Value:
    return e.expand(e.const(False, torch.bool), e.dims(x))


def _arithmetic(e: Emitter, op_type: str, a: Any, b: Any) -> Value:
    dtype = e.out.dtype
    return e.op(op_type, e.tensor(a, dtype), e.tensor(b, dtype))


def _scaled(e: Emitter, b: Any, alpha: Any) -> Any:
    return b if alpha == 1 else _arithmetic(e, "Mul", b, alpha)


def _is_neutral(e: Emitter, x: Any, number: Any, neutral: float) -> bool:
    """Whether ``number`` is a Python number that changes neither ``x`` nor its type."""
    return (
        isinstance(number, (int, float))
        and number == neutral
        and isinstance(x, Value)
        and e.dtype(x) == e.out.dtype
    )


@lowers(aten.add.Tensor, aten.add.Scalar)
def add(e: Emitter, a: Any, b: Any, alpha: Any = 1) -> Value:
    if _is_neutral(e, a, b, 0):
        return a
    if e.out.dtype == torch.bool:
        return e.op("Or", a, b)
    return _arithmetic(e, "Add", a, _scaled(e, b, alpha))


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def sub(e: Emitter, a: Any, b: Any, alpha: Any = 1) -> Value:
    if _is_neutral(e, a, b, 0):
        return a
    return _arithmetic(e, "Sub", a, _scaled(e, b, alpha))


@lowers(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(e: Emitter, a: Any, b: Any, alpha: Any = 1) -> Value:
    return _arithmetic(e, "Sub", b, _scaled(e, a, alpha))


@lowers(aten.mul.Tensor, aten.mul.Scalar)
def mul(e: Emitter, a: Any, b: Any) -> Value:
    if _is_neutral(e, a, b, 1):
        return a
    if e.out.dtype == torch.bool:
        return e.op("And", e.cast(a, torch.bool), e.cast(b, torch.bool))
    if (norm := rms_form(e, a, b) or rms_form(e, b, a)) is not None:
        return norm
    return _arithmetic(e, "Mul", a, b)


@lowers(aten.div.Tensor, aten.div.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode,
        aten.true_divide.Tensor, aten.floor_divide.default)  # fmt: skip
def div(e: Emitter, a: Any, b: Any, rounding_mode: str | None = None) -> Value:
    if e.node is not None and e.node.target is aten.floor_divide.default:
        rounding_mode = "floor"
    if _is_neutral(e, a, b, 1):
        return a
    dtype = e.out.dtype
    a, b = e.tensor(a, dtype), e.tensor(b, dtype)
    if rounding_mode is None:
        return e.op("Div", a, b)
    if dtype.is_floating_point:
        whole = e.op("Div", a, b)
        if rounding_mode == "floor":
            return e.op("Floor", whole)
        return e.op("Mul", e.op("Sign", whole), e.op("Floor", e.op("Abs", whole)))
    if rounding_mode == "floor":
        a = e.op("Sub", a, e.op("Mod", a, b))
    return e.op("Div", a, b)


@lowers(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(e: Emitter, a: Any, b: Any) -> Value:
    dtype = e.out.dtype
    a, b = e.tensor(a, dtype), e.tensor(b, dtype)
    if not dtype.is_floating_point:
        return e.op("Mod", a, b)
    return e.op("Sub", a, e.op("Mul", e.op("Floor", e.op("Div", a, b)), b))


@lowers(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(e: Emitter, a: Any, b: Any) -> Value:
    return e.op("Mod", e.tensor(a, e.out.dtype), e.tensor(b, e.out.dtype), fmod=1)


@lowers(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(e: Emitter, a: Any, b: Any) -> Value:
    dtype = e.out.dtype
    if b == 2:
        base = e.tensor(a, dtype)
        return e.op("Mul", base, base)
    if b == 0.5:
        return e.op("Sqrt", e.tensor(a, dtype))
    return _arithmetic(e, "Pow", a, b)


@lowers(aten.maximum.default, aten.max.other)
def maximum(e: Emitter, a: Any, b: Any) -> Value:
    return _arithmetic(e, "Max", a, b)


@lowers(aten.minimum.default, aten.min.other)
def minimum(e: Emitter, a: Any, b: Any) -> Value:
    return _arithmetic(e, "Min", a, b)


@lowers(aten.clamp.default, aten.clamp.Tensor, aten.clip.default)
def clamp(e: Emitter, x: Value, min: Any = None, max: Any = None) -> Value:
    dtype = e.out.dtype
    x = e.cast(x, dtype)
    if not isinstance(min, Value) and not isinstance(max, Value):
        bounds = [None if b is None else e.tensor(b, dtype) for b in (min, max)]
        return e.op("Clip", x, *bounds)
    if min is not None:
        x = e.op("Max", x, e.tensor(min, dtype))
    return x if max is None else e.op("Min", x, e.tensor(max, dtype))


@lowers(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(e: Emitter, x: Value, min: Any) -> Value:
    return clamp(e, x, min, None)


@lowers(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(e: Emitter, x: Value, max: Any) -> Value:
    return clamp(e, x, None, max)
