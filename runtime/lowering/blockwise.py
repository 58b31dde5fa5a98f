"""Weights of 4 or 8 bits in groups, as onnxruntime's blocked operators take them.

A product is ``com.microsoft::MatMulNBits``, a table lookup ``GatherBlockQuantized``.
Both read the same bytes, which at 4 bits are those that the program holds (two
codes a byte, the low nibble first, codes moved by 8 so that they are 0 to 15), and
at 8 bits its codes moved by 128: as ``[out, groups, group / 2]``
the one, as ``[rows, dim / 2]`` the other (8 bits: no half), so a tied table is in the file once.
Accuracy level 4 is the kernel that multiplies integers: it rounds each group of
the activations to 255 steps, which is ``activation="block"`` of
``ftc::quantized_linear``. With ``"none"`` the activations stay in float.

Scales may be float16, and are cast: onnxruntime does that once, at load.
"""

from __future__ import annotations

import torch
from onnx_ir import Value

from ftc.graph.quantize import pack

from .emitter import Emitter

DOMAIN = "com.microsoft"
_MOVED = "ftc.unsigned"
_LEVEL = {"none": 0, "block": 4}


def has_kernel(group_size: int, activation: str = "none") -> bool:
    """Whether the blocked operators know this grouping: powers of two from 16."""
    return group_size >= 16 and group_size & (group_size - 1) == 0 and activation in _LEVEL


def block_linear(
    e: Emitter, x: Value, data: Value, scale: Value, zero_point: Value | None,
    bias: Value | None, bits: int, group_size: int, activation: str,
) -> Value:  # fmt: skip
    """``x W^T + b`` for ``data`` ``[out, in]``, packed to ``[out, in / 2]`` at 4 bits."""
    data = _bytes(data, e, bits)
    rows, width = e.dims(data)
    each = group_size * bits // 8
    blocks = e.reshape(data, [rows, width // each, each])
    flat = e.reshape(scale, [e.dims(scale)[0] * e.dims(scale)[1]])
    return e.op(
        "MatMulNBits", x, blocks, e.cast(flat, e.dtype(x)), _points(e, zero_point, bits), None,
        bias, domain=DOMAIN, dims=e.sizes.dims(e.out), K=width * 8 // bits, N=rows, bits=bits,
        block_size=group_size, accuracy_level=_LEVEL[activation],
    )  # fmt: skip


def block_rows(
    e: Emitter, data: Value, scale: Value, zero_point: Value | None, indices: Value,
    bits: int, group_size: int,
) -> Value:  # fmt: skip
    """Rows of a table ``[rows, dim]``, packed to ``[rows, dim / 2]`` at 4 bits."""
    dtype = torch.float32
    return e.op(
        "GatherBlockQuantized", _bytes(data, e, bits), indices, e.cast(scale, dtype),
        _points(e, zero_point, bits),
        domain=DOMAIN, dtype=dtype, dims=e.sizes.dims(e.out), bits=bits, block_size=group_size,
        gather_axis=0, quantize_axis=1,
    )  # fmt: skip


def nibbles(e: Emitter, data: Value) -> Value:
    """Codes 0 to 15, one an element, of packed ``[..., n]``: ``[..., 2 n]``, in plain operators."""
    dims = e.dims(data)
    low = e.op("BitwiseAnd", data, e.const(15, torch.uint8), dims=dims)
    high = e.op("BitShift", data, e.const(4, torch.uint8), direction="RIGHT", dims=dims)
    pair = e.op("Concat", e.unsqueeze(low, -1), e.unsqueeze(high, -1), axis=-1, dims=(*dims, 2))
    return e.reshape(pair, [*dims[:-1], dims[-1] * 2])


def _bytes(data: Value, e: Emitter, bits: int) -> Value:
    """The bytes of codes: at 8 bits moved by 128, one new constant for all readers of a weight."""
    if bits == 4:
        return data
    if _MOVED not in data.meta:
        held = data.const_value
        assert held is not None and data.name is not None, "codes are constants"
        data.meta[_MOVED] = e.weight(data.name, _unsigned(held.raw))  # type: ignore[attr-defined]
    moved: Value = data.meta[_MOVED]
    return moved


def _unsigned(codes: torch.Tensor) -> torch.Tensor:
    """``codes + 128`` of int8, as uint8."""
    return codes.contiguous().view(torch.uint8) ^ 128


def _points(e: Emitter, zero_point: Value | None, bits: int) -> Value | None:
    """Zero points ``[out, groups]``, at 4 bits packed; a last odd one is beside an 8."""
    if zero_point is None:
        return None
    if bits == 8:
        return _bytes(zero_point, e, bits)
    held = zero_point.const_value
    assert held is not None, "zero points are constants"
    points = held.raw  # type: ignore[attr-defined]
    return e.const(pack(torch.nn.functional.pad(points, (0, points.shape[1] % 2))), torch.uint8)
