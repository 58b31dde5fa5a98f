"""Whether two thin products are faster than the one they replace, by the target's cost.

A product takes ``fixed + slope * in * out`` (:mod:`ftc.graph.target`), two factors of
rank ``r`` take ``2 fixed + slope * r (in + out)``: for few rows and small weights the
second ``fixed`` can cost more than thinness saves.
"""

from __future__ import annotations

import math

from torch import Tensor

from ftc.graph.matrices import Matrix
from ftc.graph.program import Program
from ftc.graph.symbols import SizesAt

from .context import Context


class Pace:
    """Compares factors with products at the shapes that the user named.

    Args:
        program: with fake values.
        ctx: its target and shapes. Without either's figures nothing is known.
    """

    def __init__(self, program: Program, ctx: Context) -> None:
        self._table = ctx.target.table
        self._sizes = [SizesAt(program, shape) for shape in ctx.shapes]
        if self._table is None or "float" not in self._table.points:
            self._sizes = []

    @property
    def known(self) -> bool:
        """Whether there are costs and shapes to compare at."""
        return bool(self._sizes)

    def limit(self, matrix: Matrix, weight: Tensor) -> int | None:
        """The largest rank that is no slower than the product ``[out, in]``; 0: none is.

        None where nothing is known.
        """
        if not self.known:
            return None
        low, high = 0, min(weight.shape)
        while low < high:
            middle = (low + high + 1) // 2
            if self.ratio(matrix, weight, middle) <= 1:
                low = middle
            else:
                high = middle - 1
        return low

    def ratio(self, matrix: Matrix, weight: Tensor, rank: int) -> float:
        """Time of factors of ``rank`` over the product's, geometric mean over the shapes."""
        assert self._table is not None
        out, width = weight.shape
        logs = []
        for at in self._sizes:
            rows = max(at.numel(matrix.node) // out, 1)
            one, *two = (self._table.seconds("float", rows, *size)
                         for size in ((width, out), (width, rank), (rank, out)))  # fmt: skip
            logs.append(math.log(max(sum(two), 1e-12) / max(one, 1e-12)))
        return math.exp(sum(logs) / len(logs))
