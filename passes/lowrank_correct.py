"""What a factored product's bias corrects of the error that those before it made.

By the time a product comes, the program with factors gives it ``x'`` and not ``x``.
Its mean output is put back to what it was:

    b = c + W E x - B A E x'

Both programs run once, side by side (:mod:`ftc.graph.side_by_side`), on some of the
calibration inputs and on random ones, and each product is corrected after those before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftc.graph.matrices import Matrix
from ftc.graph.pieces import Inputs, pieces, positions, random_like, sampled, windows
from ftc.graph.program import Program
from ftc.graph.side_by_side import side_by_side

from .lowrank_metric import RANDOM_SHARE

Factors = tuple[Tensor, Tensor]
_AT_ONCE, _TOKENS = 48, 2048  # of a run, of all


def corrected_biases(
    program: Program, data: Sequence[Inputs], factors: Mapping[Matrix, Factors], seed: int
) -> dict[str, Tensor]:
    """The bias ``[out]`` of each product among ``factors``, by its weight.

    Convolutions and tables keep what they have, and products correct what these do.

    Args:
        program: with every weight as it was; not changed.
        data: calibration inputs.
        factors: ``A`` and ``B`` of each weight that is to be factored.
        seed: of random inputs.
    """
    products = {m.node: (m.weight, *pair) for m, pair in factors.items() if m.is_product}
    changed = {m.weight: (b @ a).view_as(program.tensor(m.weight))
               for m, (a, b) in factors.items() if not m.is_product}  # fmt: skip
    runs = _runs(program, data, seed)
    visit = _Visit(program, products, [share for _, share in runs])
    side_by_side(program, [given for given, _ in runs], list(products), visit, changed)
    return visit.made


def _runs(program: Program, data: Sequence[Inputs], seed: int) -> list[tuple[Inputs, float]]:
    """Inputs and how much they weigh: some of the calibration's, and random ones like them."""
    signature = program.signature
    cut = [window for given in pieces(signature, data, _AT_ONCE)
           for window in windows(signature, given, _AT_ONCE)]  # fmt: skip
    given = sampled(signature, cut, _TOKENS)
    random = [random_like(signature, each, seed + run) for run, each in enumerate(given[::3])]
    made: list[tuple[Inputs, float]] = []
    for share, own in ((1 - RANDOM_SHARE, given), (RANDOM_SHARE, random)):
        size = sum(positions(signature, each) for each in own)
        made += [(each, share * positions(signature, each) / size) for each in own]
    return made


class _Visit:
    def __init__(
        self, program: Program, products: Mapping[fx.Node, tuple[str, Tensor, Tensor]],
        shares: Sequence[float],
    ) -> None:  # fmt: skip
        self._program, self._products, self._shares = program, products, shares
        self.made: dict[str, Tensor] = {}

    def __call__(
        self, node: fx.Node, x: list[Tensor], other: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        name, a, b = self._products[node]
        weight = self._program.tensor(name).detach()
        bias = weight @ self._mean(x) - b @ (a @ self._mean(other))
        own: Any = node.args[2] if len(node.args) > 2 else None
        if own is not None:
            bias += self._program.tensor(str(own.target)).detach()
        self.made[name] = bias
        return b @ a, bias

    def _mean(self, values: Sequence[Tensor]) -> Tensor:
        """Of the rows of all runs, as they weigh, ``[in]``."""
        means = (share * value.flatten(0, -2).mean(0)
                 for share, value in zip(self._shares, values, strict=True))  # fmt: skip
        return torch.stack(list(means)).sum(0)
