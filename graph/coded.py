"""A weight in codes: what any way of rounding to groups makes, before it is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .quantize import dequantize


@dataclass(frozen=True)
class Coded:
    """``w ~ (q - z) s``, a step and a zero point for each group.

    Attributes:
        codes: int8 ``[out, in]``; at 4 bits in [-8, 7], one an element.
        scale: float16 or float32 ``[out, groups]``, above 0.
        zero_point: int8 ``[out, groups]``, or None where all are 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def weight(self) -> Tensor:
        """The float32 weight ``[out, in]`` that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero_point)


def short(scale: Tensor) -> Tensor:
    """Steps in float16 where each is one already (:func:`ftc.graph.ranges.storable`)."""
    half = scale.half()
    return half if torch.equal(half.float(), scale) else scale
