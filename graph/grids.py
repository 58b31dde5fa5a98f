"""Weights that are on a 4-bit grid already: a file of 4-bit weights, read as floats.

Each group of such a weight has at most 16 values, evenly spaced,

    w_j = q_j s + m,    q_j in 0 .. 15

(``d`` and ``m`` of GGUF's Q4_1; ``m = -8 d`` in its Q4_0). Rounding it to any
other grid would lose what the first rounding left, so the grid is found and kept.
A zero point is an integer ``z``, and ``-m / s`` need not be one. What is left,
``r = m + z s``, adds ``r`` to all weights of a group, so it multiplies the sum of
the group's inputs:

    y_i = sum_g s_ig sum_j (q_ij - z_ig) x_j  +  sum_g size r_ig X_g,    X_g = mean_{j in g} x_j

The second sum is a product with the ``in / size`` columns ``size r``, which are
quantized in groups like the others: :func:`keep_grid` appends them to the weight,
and its input is to be extended by the groups' means. ``r`` is at most ``s / 2``, and
its own rounding at most a thirtieth of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .coded import Coded
from .quantize import Scheme
from .ranges import round_to, search_range

_LEVELS = 15  # steps between the lowest and the highest of 16 codes
_OFF = 2e-3  # of a step: float16 factors and float32 sums are a hundred times closer
_SAMPLE = 64  # rows that are looked at before the whole weight is
_WHOLE = (1.0,)


@dataclass(frozen=True)
class Kept:
    """A weight on its own grid.

    Attributes:
        coded: codes ``[out, in]``; with ``extra`` columns more where zero points
            have remainders.
        extra: how many columns multiply groups' means (the last of them are zeros).
    """

    coded: Coded
    extra: int


def keep_grid(weight: Tensor, scheme: Scheme) -> Kept | None:
    """``weight`` on the 4-bit grid that it is on already; None when it is on none.

    Args:
        weight: float ``[out, in]``.
        scheme: 4 bits; ``group_size`` divides ``in``.
    """
    size = scheme.group_size
    groups = weight.detach().float().reshape(weight.shape[0], -1, size)
    if _steps(groups[:_SAMPLE]) is None or (found := _steps(groups)) is None:
        return None
    low, step = found
    codes = torch.round((groups - low.unsqueeze(-1)) / step.unsqueeze(-1)).clamp_(0, _LEVELS)
    if scheme.symmetric:
        zero = torch.full_like(low, 8)
    else:
        zero = torch.round(-low / step).clamp_(0, _LEVELS)
    rest = low + zero * step
    signed = (codes - 8).flatten(1).to(torch.int8)
    point = None if scheme.symmetric else (zero - 8).to(torch.int8)
    coded = Coded(signed, _short(step), point)
    if bool((rest.abs() <= _OFF * step).all()):
        return Kept(coded, 0)
    if scheme.symmetric:
        return None  # remainders would be as large as the weights
    return _with_remainders(coded, size * rest, scheme)


def _steps(groups: Tensor) -> tuple[Tensor, Tensor] | None:
    """Lowest value and step of each group ``[..., size]``; None when one is on no grid."""
    low, span = groups.amin(-1), groups.amax(-1) - groups.amin(-1)
    flat = span <= 1e-6 * groups.abs().amax(-1)
    step = torch.where(flat, low.abs(), span / _LEVELS)
    low = torch.where(flat, low.clamp(max=0), low)
    step = torch.where(step > 0, step, torch.ones_like(step))
    todo = ~(flat | _fits(groups, low, step))
    for levels in range(_LEVELS - 1, 0, -1):
        if not bool(todo.any()):
            break
        shorter = span[todo] / levels
        fits = _fits(groups[todo], low[todo], shorter)
        step[todo] = torch.where(fits, shorter, step[todo])
        todo[todo.clone()] = ~fits
    return None if bool(todo.any()) else (low, step)


def _fits(groups: Tensor, low: Tensor, step: Tensor) -> Tensor:
    place = (groups - low.unsqueeze(-1)) / step.unsqueeze(-1)
    return ((place - place.round()).abs() <= _OFF).all(-1)


def _short(scale: Tensor) -> Tensor:
    """``scale`` in float16 where that is the same number: it came from there."""
    half = scale.half()
    return half if bool(((half.float() - scale).abs() <= 1e-6 * scale).all()) else scale


def _with_remainders(coded: Coded, rest: Tensor, scheme: Scheme) -> Kept:
    """``coded`` with the columns ``rest`` ``[out, groups]`` behind it, in whole groups."""
    extra = -(-rest.shape[1] // scheme.group_size) * scheme.group_size
    columns = pad(rest, (0, extra - rest.shape[1])).view(len(rest), -1, scheme.group_size)
    scale, zero = search_range(columns, torch.ones(scheme.group_size), scheme, _WHOLE)
    codes = round_to(columns, scale, zero, scheme) + zero.unsqueeze(-1)
    assert coded.zero_point is not None
    whole = Coded(
        torch.cat((coded.codes, codes.flatten(1).to(torch.int8)), 1),
        torch.cat((coded.scale, scale.to(coded.scale.dtype)), 1),
        torch.cat((coded.zero_point, zero.to(torch.int8)), 1),
    )
    return Kept(whole, extra)
