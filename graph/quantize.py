"""The arithmetic of quantization, apart from any graph.

A weight ``w`` of shape ``[out, ...]`` is seen as rows of ``in`` elements, each
row as groups of ``group_size`` (0: the whole row is one group). Two schemes:

- symmetric: ``s = max|w| / qmax``, ``q = round(w / s)``, ``w ~ q s``;
- affine, the textbook min-max scheme on ``2^n - 1`` steps (``n = 7`` with a reduced range):
  ``s = (max - min) / (2^n - 1)``, ``q = round((w - min) / s) - 2^(n-1)``,
  ``w ~ (q - z) s`` with ``z`` the integer that stands for zero.

The rounding error of either is at most ``s / 2`` per element for every value
inside the range (Jacob et al., arXiv 1712.05877, section 2.1).

Codes of 4 bits are stored two a byte (:func:`pack`): ``byte = (q_2j + 8) |
(q_2j+1 + 8) << 4``, the order of ONNX's UINT4 and of MatMulNBits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PreconditionError

PAIR = 128
"""A CPU with AVX2 and no VNNI multiplies ``u8`` by ``s8``, and adds the products of inputs
``2 j`` and ``2 j + 1`` in 16 bits, which saturate: ``255 (|a| + |b|) <= 32767`` has to hold.
Codes within [-64, 64] (what onnxruntime calls a reduced range) keep it for any two; the
largest *sum* of a row is far below twice the largest weight, so bounding the sum gives a
step that is a third smaller."""
_ALMOST = PAIR - 0.1  # so that two codes which are both rounded up stay within it


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight is quantized.

    Attributes:
        bits: 4 or 8; the width that is stored.
        group_size: elements that share a scale along a row; 0 is the whole row.
        symmetric: no zero point.
        reduce_range: at 8 bits keep the sum of two neighbours' magnitudes within 128
            (:data:`PAIR`), which costs half a bit to one bit.
        per_tensor: all rows have the scale and zero point of the whole weight; they are
            repeated, so that readers find those of their row in any scheme.
    """

    bits: int = 8
    group_size: int = 0
    symmetric: bool = True
    reduce_range: bool = False
    per_tensor: bool = False

    @property
    def half(self) -> int:
        """Affine codes are ``-half`` to ``half - 1``; any two of 7 bits are within a pair's."""
        return PAIR // 2 if self.bits == 8 and self.reduce_range else int(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest magnitude of a symmetric code."""
        return int(2 ** (self.bits - 1)) - 1


def choose_qparams(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group.

    Args:
        weight: float ``[out, ...]``.

    Returns:
        ``scale`` float32 ``[out, groups]``, never 0; ``zero_point`` int8 of that
        shape, or None for a symmetric scheme.

    Raises:
        PreconditionError: when ``group_size`` does not divide a row, or the
            weight holds a NaN or an infinity.
    """
    groups = _groups(weight, scheme.group_size)
    if scheme.symmetric:
        peak = _shared(groups.abs().amax(-1), scheme)
        scale = peak / scheme.qmax
        if scheme.reduce_range and scheme.bits == 8:
            scale = torch.maximum(scale, _shared(_largest_pair(groups), scheme) / _ALMOST)
        return _positive(scale, peak), None
    low = -_shared(-groups.amin(-1).clamp(max=0), scheme)
    high = _shared(groups.amax(-1).clamp(min=0), scheme)
    scale = _positive((high - low) / (2 * scheme.half - 1), high - low)
    zero = torch.round(-low / scale) - scheme.half
    return scale, zero.to(torch.int8)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes of ``weight``: int8, in the shape of ``weight``."""
    groups = _groups(weight, scheme.group_size)
    codes = torch.round(groups / scale.unsqueeze(-1))
    if zero_point is None:
        codes = codes.clamp_(-scheme.qmax, scheme.qmax)
    else:
        codes = codes.add_(zero_point.unsqueeze(-1)).clamp_(-scheme.half, scheme.half - 1)
    return codes.to(torch.int8).view(weight.shape)


def dequantize(data: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int = 8) -> Tensor:
    """Float32 values of codes ``[out, ...]``.

    Args:
        data: int8 ``[out, ...]``, or at 4 bits packed uint8 ``[out, in / 2]``.
        scale: float ``[out, groups]``.
        zero_point: int8 ``[out, groups]`` or None.
        bits: 4 or 8.
    """
    codes = unpack(data) if bits == 4 else data
    groups = codes.reshape(*scale.shape, -1).to(torch.float32)
    if zero_point is not None:
        groups -= zero_point.unsqueeze(-1)
    groups *= scale.unsqueeze(-1)
    return groups.view(codes.shape)


def pack(codes: Tensor) -> Tensor:
    """Codes in [-8, 7], int8 ``[..., 2 n]``, as uint8 ``[..., n]``: even ones in low nibbles."""
    assert codes.shape[-1] % 2 == 0, f"{codes.shape} has an odd number of codes a row"
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def is_reduced(codes: Tensor) -> bool:
    """Whether codes of 8 bits ``[out, ...]`` have a reduced range (:data:`PAIR`)."""
    return bool((_largest_pair(codes.flatten(1).to(torch.int16)) <= PAIR).all())


def unpack(data: Tensor) -> Tensor:
    """The inverse of :func:`pack`: int8 ``[..., 2 n]`` of uint8 ``[..., n]``."""
    nibbles = torch.stack((data & 15, data >> 4), -1).flatten(-2)
    return nibbles.to(torch.int8) - 8


def relative_error(weight: Tensor, restored: Tensor) -> float:
    """``|w - w'| / |w|`` in the Frobenius norm; 0 for a zero weight."""
    norm = float(torch.linalg.vector_norm(weight))
    return float(torch.linalg.vector_norm(weight - restored)) / norm if norm else 0.0


def _groups(weight: Tensor, group_size: int) -> Tensor:
    rows = weight.detach().reshape(weight.shape[0], -1)
    width = rows.shape[1]
    size = group_size or width
    if width % size:
        raise PreconditionError(
            f"group_size={size} does not divide a row of {width}",
            fix=f"choose a divisor of {width}, or 0 for one group a row",
        )
    return rows.reshape(weight.shape[0], width // size, size)


def _shared(largest: Tensor, scheme: Scheme) -> Tensor:
    """``[out, groups]`` itself, or its largest everywhere where one scale serves all."""
    return largest.amax().expand_as(largest).contiguous() if scheme.per_tensor else largest


def _largest_pair(groups: Tensor) -> Tensor:
    """Largest ``|a| + |b|`` of inputs ``2 j`` and ``2 j + 1`` in each group ``[..., size]``."""
    sizes = torch.nn.functional.pad(groups.abs(), (0, groups.shape[-1] % 2))
    return (sizes[..., 0::2] + sizes[..., 1::2]).amax(-1)


def _positive(scale: Tensor, spread: Tensor) -> Tensor:
    """A scale of 1 for a group of zeros: its codes are 0 whatever the scale."""
    if not bool(torch.isfinite(scale).all()):
        raise PreconditionError(
            "the weight holds a NaN or an infinity",
            fix="repair the checkpoint: quantization needs finite weights",
        )
    tiny = torch.finfo(torch.float32).tiny
    return torch.where((spread > 0) & (scale >= tiny), scale, torch.ones_like(scale)).float()
