"""Ranks under one budget: each is worth what it saves of the loss.

A product of ``out x in`` at rank ``r`` costs ``c r (out + in)`` and loses ``tail(r)``;
dense it costs ``c out in`` and loses nothing. The ranks of least total loss within a
budget are those that minimise ``sum tail + price * cost`` for one price (a Lagrange
multiplier), which is found by bisection; each product's own minimum is then a look
along its curve. Only points on a curve's convex hull are ever chosen, so a little of
the budget may be left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.graph.errors import PreconditionError

_STEPS = 100


@dataclass(frozen=True)
class Curve:
    """What a product may cost and lose.

    Attributes:
        shape: ``(out, in)``.
        tails: loss at each rank from 0 to full, float64 ``[min(out, in) + 1]``.
        unit: cost of one weight.
        most: the largest rank that is allowed; None: any.
    """

    shape: tuple[int, int]
    tails: Tensor
    unit: float = 1.0
    most: int | None = None

    @property
    def dense(self) -> float:
        """Cost as it is."""
        return self.unit * self.shape[0] * self.shape[1]

    @property
    def least(self) -> float:
        """Cost at rank 1, or as it is where that is less or not allowed."""
        if self.most == 0:
            return self.dense
        return min(self.unit * sum(self.shape), self.dense)

    def cost(self, rank: int | None) -> float:
        """Cost at a rank; None: as it is."""
        return self.dense if rank is None else self.unit * rank * sum(self.shape)

    def best(self, price: float) -> int | None:
        """The rank of least loss and price; None where that is to leave the product as it is."""
        tails = self.tails[1:] if self.most is None else self.tails[1 : self.most + 1]
        if not len(tails):
            return None
        ranks = torch.arange(1, len(tails) + 1, dtype=torch.float64)
        total = tails + price * self.unit * sum(self.shape) * ranks
        lowest = int(total.argmin())
        return None if price * self.dense <= float(total[lowest]) else lowest + 1


def share_out(curves: Mapping[str, Curve], share: float) -> dict[str, int]:
    """The rank of each product that is to be factored, so that ``share`` of the cost is kept.

    Args:
        curves: of every product that may be factored, by name.
        share: of the sum of their costs as they are, in (0, 1].

    Raises:
        PreconditionError: when rank 1 everywhere still costs more.
    """
    whole = sum(curve.dense for curve in curves.values())
    least = sum(curve.least for curve in curves.values())
    if not curves or least > share * whole:
        bound = least / whole if curves else 1.0
        raise PreconditionError(
            f"a budget of {share:g} cannot be met: rank 1 everywhere keeps {bound:.3g}",
            fix=f"lowrank{{budget={min(math.ceil(bound * 1000) / 1000, 1.0):g}}} at least",
        )
    low, high = 0.0, 1.0
    while _cost(curves, _ranks(curves, high)) > share * whole:
        high *= 4
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _cost(curves, _ranks(curves, middle)) > share * whole:
            low = middle
        else:
            high = middle
    return {name: rank for name, rank in _ranks(curves, high).items() if rank is not None}


def _ranks(curves: Mapping[str, Curve], price: float) -> dict[str, int | None]:
    return {name: curve.best(price) for name, curve in curves.items()}


def _cost(curves: Mapping[str, Curve], ranks: Mapping[str, int | None]) -> float:
    return sum(curve.cost(ranks[name]) for name, curve in curves.items())
