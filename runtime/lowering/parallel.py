"""Operators of a program that is cut over ranks: in a file one rank has all of it."""

from __future__ import annotations

from typing import Any

import torch
from onnx_ir import Value

from ftc.graph import parallel_ops  # noqa: F401  (registers torch.ops.ftc)

from .emitter import Emitter
from .quantized import quantized_linear, row_peak
from .table import lowers

ftc_ops: Any = torch.ops.ftc


@lowers(ftc_ops.parallel_copy.default, ftc_ops.parallel_reduce.default)
def same(e: Emitter, x: Value) -> Value:
    return x


@lowers(ftc_ops.parallel_gather.default)
def gather(e: Emitter, x: Value, axis: int, length: int) -> Value:
    return x


@lowers(ftc_ops.parallel_part.default)
def part(e: Emitter, x: Value, axis: int, segments: Any, blocks: Any) -> Value:
    return x


@lowers(ftc_ops.parallel_rows.default)
def rows(e: Emitter, ids: Value, rows: int) -> tuple[Value, Value]:
    return ids, e.const(1, torch.float32)


@lowers(ftc_ops.parallel_peak.default)
def peak(e: Emitter, x: Value) -> Value:
    return row_peak(e, x)


@lowers(ftc_ops.quantized_linear_at.default)
def quantized_linear_at(
    e: Emitter, x: Value, peak: Value, data: Value, scale: Value, zero_point: Value | None,
    bits: int, group_size: int,
) -> Value:  # fmt: skip
    how = bits, group_size, "row"  # the peak of a whole row is its own
    return quantized_linear(e, x, data, scale, zero_point, None, *how)
