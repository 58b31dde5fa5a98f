"""Which range of a group of weights to cover with 16 codes.

Covering all of it is not best: with a smaller step most weights are rounded
more finely, and the few outside the range are clipped. For each group the step
and zero point are searched that make

    sum_j h_j (w_j - (q_j - z) s)^2,    q_j = clamp(round(w_j / s) + z)

least, with ``h_j`` the mean square of the input that ``w_j`` multiplies: the
error of the outputs, were the inputs uncorrelated. At the end the step is the
least-squares solution for the codes found. Both neighbours of the zero point
that would centre the range are tried, since rounding it moves the range.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .quantize import Scheme

_SMALLEST = 2.0**-17  # float16 is subnormal here, and within half a percent
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


def search_range(
    groups: Tensor, importance: Tensor, scheme: Scheme, shrink: tuple[float, ...] = _SHRINK
) -> tuple[Tensor, Tensor]:
    """Step and zero point of each group.

    Args:
        groups: float32 ``[..., size]``.
        importance: ``h``, 0 or more, broadcast to ``groups``.
        scheme: its bits and symmetry.
        shrink: parts of the whole range to try.

    Returns:
        ``scale`` float32 ``[...]``, above 0, of float16's values where they are in
        its range; ``zero_point`` float32 ``[...]``, whole numbers, 0 for a
        symmetric scheme.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for step, point in _candidates(low, high, scheme, shrink):
        error = _error(groups, importance, step, point, scheme)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, point, zero)
    finer = _refined(groups, importance, scale, zero, scheme)
    better = _error(groups, importance, finer, zero, scheme) < best
    return torch.where(better, finer, scale), zero


def round_to(groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """``q - z``, whole numbers in float32, of weights ``[..., size]``."""
    low, high = -scheme.half, scheme.half - 1
    point = zero.unsqueeze(-1)
    return (groups / scale.unsqueeze(-1)).round_().clamp_(low - point, high - point)


def storable(scale: Tensor) -> Tensor:
    """``scale`` rounded to float16 where that is precise, else as it is; 1 for 0."""
    half = scale.half().float()
    fits = half.isfinite() & (scale >= _SMALLEST)
    return torch.where(scale > 0, torch.where(fits, half, scale), torch.ones_like(scale))


def _error(
    groups: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme
) -> Tensor:
    """What is to be made least, for each group."""
    restored = round_to(groups, scale, zero, scheme).mul_(scale.unsqueeze(-1))
    return (restored.sub_(groups).square_() * importance).sum(-1)


def _candidates(
    low: Tensor, high: Tensor, scheme: Scheme, shrink: tuple[float, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    bottom, top = -scheme.half, scheme.half - 1
    if scheme.symmetric:
        peak = torch.maximum(high.abs(), low.abs())
        for part in shrink:
            for codes in (-bottom, top):  # the negative side has a code more
                yield storable(peak * part / codes), torch.zeros_like(low)
        return
    middle, span = (low + high) / 2, high - low
    # A group of one value: zero, or the step is the value.
    span = torch.where(span > 0, span, middle.abs() * (top - bottom))
    for part in shrink:
        step = storable(span * part / (top - bottom))
        centred = (bottom + top) / 2 - middle / step
        for point in (centred.floor(), centred.ceil()):
            yield step, point.clamp(bottom, top)


def _refined(
    groups: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme
) -> Tensor:
    """The least-squares step for the codes that ``scale`` gives; ``scale`` where there is none."""
    codes = round_to(groups, scale, zero, scheme)
    weighted = codes * importance
    square = (weighted * codes).sum(-1)
    step = (weighted * groups).sum(-1) / square
    return torch.where((square > 0) & (step > 0), storable(step), scale)
