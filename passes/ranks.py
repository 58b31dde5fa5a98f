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
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.graph.errors import PreconditionError

_STEPS = 100


@dataclass(frozen=True)
class Size:
    """What a weight costs at each rank.

    Attributes:
        shape: ``(out, in)``.
        unit: cost of one element.
        most: the largest rank that is allowed; None: any.
    """

    shape: tuple[int, int]
    unit: float = 1.0
    most: int | None = None

    @property
    def dense(self) -> float:
        """Cost as it is."""
        return self.unit * self.shape[0] * self.shape[1]

    @property
    def least(self) -> float:
        """Cost at rank 1, or as it is where that is less or not allowed."""
        return self.cost(1) if self.largest else self.dense

    @property
    def largest(self) -> int:
        """The largest rank that is allowed and costs less than the weight as it is; 0: none."""
        out, width = self.shape
        thinner = (out * width - 1) // (out + width)
        return thinner if self.most is None else min(self.most, thinner)

    def cost(self, rank: int | None) -> float:
        """Cost at a rank; None: as it is."""
        return self.dense if rank is None else self.unit * rank * sum(self.shape)


@dataclass(frozen=True)
class Curve:
    """What a weight may cost and lose.

    Attributes:
        size: what it costs.
        tails: loss at each rank from 0 to full, float64 ``[min(out, in) + 1]``.
    """

    size: Size
    tails: Tensor

    def best(self, price: float) -> int | None:
        """The rank of least loss and price; None where that is to leave the weight as it is."""
        most = self.size.most
        tails = self.tails[1:] if most is None else self.tails[1 : most + 1]
        if not len(tails):
            return None
        ranks = torch.arange(1, len(tails) + 1, dtype=torch.float64)
        total = tails + price * self.size.cost(1) * ranks
        lowest = int(total.argmin())
        return None if price * self.size.dense <= float(total[lowest]) else lowest + 1


def check_budget(sizes: Collection[Size], share: float) -> None:
    """Refuses a budget that no ranks keep; sizes are all that it takes to tell.

    Args:
        sizes: of every weight that may be factored; one at least.
        share: of the sum of their costs as they are, in (0, 1].

    Raises:
        PreconditionError: when rank 1 everywhere still costs more; with the least that can
            be kept.
    """
    whole, least = (sum(costs) for costs in zip(*((s.dense, s.least) for s in sizes), strict=True))
    if least <= share * whole:
        return
    slow = any(size.most == 0 for size in sizes)
    bound = math.ceil(least / whole * 1000) / 1000
    fixes = [f"budget={bound:g} or more"] * (bound < 1) + ["of=bytes, whatever the time"] * slow
    raise PreconditionError(
        f"a budget of {share:g} cannot be met: rank 1 "
        + ("wherever factors are no slower" if slow else "everywhere")
        + f" keeps {least / whole:.3g}",
        fix=", or ".join(fixes) or "select other weights",
    )


def share_out(curves: Mapping[str, Curve], share: float) -> dict[str, int]:
    """The rank of each weight that is to be factored, so that ``share`` of the cost is kept.

    Args:
        curves: of every weight that may be factored, by name; one at least.
        share: of the sum of their costs as they are, in (0, 1].

    Raises:
        PreconditionError: as :func:`check_budget`.
    """
    check_budget([curve.size for curve in curves.values()], share)
    most = share * sum(curve.size.dense for curve in curves.values())
    low, high = 0.0, 1.0
    while _cost(curves, _ranks(curves, high)) > most:
        high *= 4
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _cost(curves, _ranks(curves, middle)) > most:
            low = middle
        else:
            high = middle
    return {name: rank for name, rank in _ranks(curves, high).items() if rank is not None}


def _ranks(curves: Mapping[str, Curve], price: float) -> dict[str, int | None]:
    return {name: curve.best(price) for name, curve in curves.items()}


def _cost(curves: Mapping[str, Curve], ranks: Mapping[str, int | None]) -> float:
    return sum(curve.size.cost(ranks[name]) for name, curve in curves.items())
