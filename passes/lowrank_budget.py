"""The least budget of a low-rank program whose drift is still within a bound."""

from __future__ import annotations

from collections.abc import Mapping

from ftc.graph.drift import measure_drift
from ftc.graph.errors import BudgetError, PreconditionError
from ftc.graph.matrices import Matrix, matrices
from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter

from .context import Context
from .factors import factor
from .lowrank_metric import Measure
from .ranks import Curve, share_out

_SEARCHES = 7  # halvings


class LeastBudget:
    """Finds it on the probes, by bisection."""

    def __init__(self, program: Program, ctx: Context, measure: Measure) -> None:
        self._program, self._probes = program, ctx.probes_for(program)
        self._measure = measure

    def smallest(self, curves: Mapping[str, Curve], bound: float) -> tuple[dict[str, int], float]:
        """Ranks and the share of the cost that they keep.

        Raises:
            BudgetError: when even a small cut drifts further.
        """
        low, high, best = 0.0, 1.0, None
        for _ in range(_SEARCHES):
            share = (low + high) / 2
            if (ranks := self._within(curves, share, bound)) is None:
                low = share
            else:
                best, high = ranks, share
        if best is None:
            raise BudgetError(
                f"no cut of a hundredth drifts by {bound:g} or less",
                fix="raise max_drift, or select other products",
            )
        return best, high

    def _within(
        self, curves: Mapping[str, Curve], share: float, bound: float
    ) -> dict[str, int] | None:
        try:
            ranks = share_out(curves, share)
        except PreconditionError:  # below what rank 1 costs
            return None
        trial = Rewriter(self._program.clone(), "lowrank")
        for matrix in matrices(trial.program):
            if isinstance(matrix, Matrix) and matrix.weight in ranks:
                known = self._measure(matrix, matrix.of(trial.program))
                factor(trial, matrix, *known.factors(ranks[matrix.weight]))
        trial.finish()
        drift = measure_drift(self._program, trial.program, self._probes)
        return ranks if drift.relative <= bound else None
