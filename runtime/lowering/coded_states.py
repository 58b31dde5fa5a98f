"""Keys and values of a cache in 8 bits: codes between the runs, floats where something reads them.

onnxruntime's ``GroupQueryAttention`` takes the codes of the past and the new keys and values in
float, and gives the codes of all; :func:`coded` finds these around an attention. Where it does
not stand, they are floats again in each run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from onnx_ir import Value

from ftc.graph import quantized_ops  # noqa: F401  (registers torch.ops.ftc)

from .emitter import Emitter
from .table import lowers

ops: Any = torch.ops.ftc
_FLOATS, _STEP = "ftc.floats", "ftc.step"
_LENGTH = 2


class Coded(NamedTuple):
    """Keys or values that an attention reads, as a cache in 8 bits has them.

    Attributes:
        whole: codes of all of them, ``[batch, heads, past + length, dim]``.
        past: codes of those of earlier runs.
        new: those of this run, in float.
        step: of the codes, ``[heads, 1, dim]``.
    """

    whole: Value
    past: Value
    new: Value
    step: Value


@lowers(ops.quantize_states.default)
def quantize_states(e: Emitter, x: Value, step: Value) -> Value:
    low, high = (e.const(n, e.dtype(x)) for n in (-128, 127))
    whole = e.op("Round", e.op("Div", x, step, dims=e.dims(x)), dims=e.dims(x))
    codes: Value = e.cast(e.op("Clip", whole, low, high, dims=e.dims(x)), torch.int8)
    codes.meta[_FLOATS], codes.meta[_STEP] = x, step
    return codes


@lowers(ops.dequantize_states.default)
def dequantize_states(e: Emitter, codes: Value, step: Value) -> Value:
    floats: Value = e.op("Mul", e.cast(codes, torch.float32), step, dims=e.dims(codes))
    floats.meta[_FLOATS], floats.meta[_STEP] = codes, step
    return floats


def coded(e: Emitter, floats: Value) -> Coded | None:
    """What ``floats`` ``[batch, heads, past + length, dim]`` were made of; None for any others."""
    whole, step = floats.meta.get(_FLOATS), floats.meta.get(_STEP)
    maker = whole.producer() if isinstance(whole, Value) else None
    if whole is None or maker is None or maker.op_type != "Concat" or len(maker.inputs) != 2:
        return None
    past, codes = maker.inputs
    new = codes.meta.get(_FLOATS) if codes is not None else None
    if past is None or codes is None or new is None or codes.meta[_STEP] is not step:
        return None
    if maker.attributes["axis"].as_int() != _LENGTH:
        return None
    return Coded(whole, past, new, step)
