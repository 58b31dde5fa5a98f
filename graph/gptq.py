"""Rounding whose errors are made good by the weights that are still to be rounded.

GPTQ (Frantar et al., arXiv 2210.17323): with ``H = G + lambda I`` the damped Gram
matrix of the inputs and ``U`` upper triangular with ``U^T U = H^-1``, the columns
of ``W`` are rounded one after another, and each error is spread over the columns
that follow, as far as their inputs correlate:

    e_j = (w_j - q(w_j)) / U_jj,    w_k <- w_k - e_j U_jk    for k > j

A group's range is chosen when its first column is reached, for the weights as
they are then. Groups with the largest inputs go first (the paper's act_order, as
far as groups of neighbours allow), because the first are rounded with the most
room behind them.

Layers before the product are quantized too, so its inputs are off: ``x'`` and not
``x``. What reproduces the float outputs best is then another weight,

    argmin_V E|x W^T - x' V^T|^2 = W + W (C - G) H^-1,    C = E x^T x',  G = E x'^T x'

and that one is rounded, taken half way (:data:`PULL`): all the way follows the
calibration data too closely.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .coded import Coded, short
from .gram import cholesky_of_inverse
from .quantize import Scheme
from .ranges import search_range

DAMPING = 0.2
"""``lambda`` in units of the mean of ``diag G``. The usual 0.01 follows a few thousand tokens too
closely: MiniLM's cosine is .981 with it and .985 from 0.1 to 0.3; SmolLM2's head 1.026 and 1.018
of the perplexity."""
PULL = 0.5

_BLOCK = 128
_ROWS = 4096  # rounded together: a table has ten times as many


@dataclass(frozen=True)
class Curvature:
    """What the inputs of products say about their weights: the same for all that read them.

    Attributes:
        order: of the columns, as they are rounded ``[in]``.
        factor: ``U`` in that order, float32 ``[in, in]``.
        importance: ``diag G`` in that order ``[in]``.
        shift: ``(C - G)`` with its columns in that order ``[in, in]``; None where ``x'`` is ``x``.
    """

    order: Tensor
    factor: Tensor
    importance: Tensor
    shift: Tensor | None

    @classmethod
    def of(
        cls, gram: Tensor, group_size: int, *, cross: Tensor | None = None, damping: float = DAMPING
    ) -> Curvature:
        """From calibration data.

        Args:
            gram: ``E x'^T x'`` ``[in, in]``, of the inputs that the products will have.
            group_size: divides ``in``.
            cross: ``E x^T x'`` ``[in, in]`` with the inputs of the float model; None: the same.
            damping: above 0.
        """
        order = _order(gram.diagonal(), group_size)
        factor = cholesky_of_inverse(gram[order][:, order], damping).float()
        shift = None if cross is None else (cross - gram)[:, order]
        return cls(order, factor, gram.diagonal()[order].float(), shift)


def compensate(weight: Tensor, curvature: Curvature, scheme: Scheme) -> Coded:
    """Rounds ``weight`` to 4 bits so that its outputs on the calibration data change least.

    Args:
        weight: float ``[out, in]``.
        curvature: of its inputs, for groups as long as those of ``scheme``.
        scheme: ``group_size`` divides ``in``.
    """
    order, factor = curvature.order, curvature.factor
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    groups = back[:: scheme.group_size] // scheme.group_size
    made = []
    for start in range(0, len(weight), _ROWS):  # each row is rounded for itself
        rows = weight.detach()[start : start + _ROWS].float()
        columns = rows[:, order]
        if curvature.shift is not None:
            columns = columns + PULL * ((rows @ curvature.shift @ factor.T) @ factor)
        codes, scale, zero = _round_columns(
            columns.T.contiguous(), factor, curvature.importance, scheme
        )
        scale, zero = scale[:, groups], zero[:, groups]
        signed = codes.T[:, back].view(*scale.shape, -1) + zero.unsqueeze(-1)
        made.append((signed.flatten(1).to(torch.int8), scale, zero.to(torch.int8)))
    codes, scale, zero = (torch.cat(each) for each in zip(*made, strict=True))
    return Coded(codes, short(scale), None if scheme.symmetric else zero)


def output_error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """``E|x (W - V)^T| / E|x W^T|``, roots of mean squares; 0 where the outputs are 0."""
    lost = whole = 0.0
    for start in range(0, len(weight), _ROWS):
        rows = weight.detach()[start : start + _ROWS].float()
        difference = rows - rounded[start : start + _ROWS]
        lost += float(((difference @ gram) * difference).sum())
        whole += float(((rows @ gram) * rows).sum())
    return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def _order(diagonal: Tensor, size: int) -> Tensor:
    """Columns in the order they are rounded in: groups by their inputs' energy, each in order."""
    groups = diagonal.view(-1, size).sum(-1).argsort(descending=True, stable=True)
    return (groups.unsqueeze(1) * size + torch.arange(size)).flatten()


def _round_columns(
    columns: Tensor, factor: Tensor, importance: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor]:
    """``q - z`` like ``columns`` ``[in, out]``, steps and zero points ``[out, groups]``.

    Errors reach the rest of a block of columns after each group, and what is behind
    the block once, as one product.
    """
    width, size = len(columns), scheme.group_size
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    ranges = []
    block = max(_BLOCK // size, 1) * size
    for start in range(0, width, block):
        stop = min(start + block, width)
        for first in range(start, stop, size):
            here = slice(first, first + size)
            ranges.append(search_range(columns[here].T, importance[here], scheme))
            zero = ranges[-1][1]
            limits = (-scheme.half - zero, scheme.half - 1 - zero)
            _round_group(columns[here], factor[here, here], ranges[-1][0], limits,
                         codes[here], errors[here])  # fmt: skip
            behind = slice(first + size, stop)
            columns[behind].addmm_(factor[here, behind].T, errors[here], alpha=-1)
        done, behind = slice(start, stop), slice(stop, width)
        columns[behind].addmm_(factor[done, behind].T, errors[done], alpha=-1)
    scale, zero = (torch.stack(each, 1) for each in zip(*ranges, strict=True))
    return codes, scale, zero


def _round_group(
    columns: Tensor, factor: Tensor, scale: Tensor, limits: tuple[Tensor, Tensor],
    codes: Tensor, errors: Tensor,
) -> None:  # fmt: skip
    """Rounds the columns ``[size, out]`` of one group in place; fills ``codes`` and ``errors``."""
    for j in range(len(columns)):
        torch.clamp(torch.round(columns[j] / scale), *limits, out=codes[j])
        torch.div(columns[j] - codes[j] * scale, factor[j, j], out=errors[j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
