"""Mixed precision under a budget: the most sensitive weights get more bits until the drift fits.

How sensitive a weight is, is measured: the drift ``e_n`` of the outputs on the probes
when it alone is quantized, one run of the program. Rounding errors of different
weights are independent, so their squares add up; how far they do not is seen in the
run with all of them, and taken as a factor:

    drift^2 ~ f sum_n e_n^2,    f = drift_all^2 / sum_n e_n^2

Weights are moved to the next level one after another, those first that take most off
the sum for each element, until it fits; then the whole is measured, and where it does
not fit yet, moving goes on with the factor that was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ftc.graph.drift import Difference, compare, summarize
from ftc.graph.errors import BudgetError
from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter

from .context import Context, run_probe

Levels = Mapping[str, int]
"""Of each weight: 0 for the fewest bits; the last is float."""


@dataclass
class Search:
    """Finds the levels that keep a budget.

    Attributes:
        sizes: elements of each weight, by name.
        top: the level at which a weight is in float.
        drift: measures the program with these levels.
        alone: drifts that were measured with one weight quantized, by name and level.
    """

    sizes: Mapping[str, int]
    top: int
    drift: Callable[[Levels], float]
    alone: dict[tuple[str, int], float] = field(default_factory=dict)

    def __call__(self, budget: float, spec: str) -> dict[str, int]:
        """Levels with a drift within ``budget``.

        Raises:
            BudgetError: where that would leave every weight in float; with the best reached.
        """
        levels = dict.fromkeys(self.sizes, 0)
        while (measured := self.drift(levels)) > budget:
            wanted = self._sum(levels) * (budget / measured) ** 2
            self._step(levels)  # one at least, whatever the estimate says
            while self._sum(levels) > wanted:
                self._step(levels)
            if all(level == self.top for level in levels.values()):
                best = min(self.alone, key=self.alone.__getitem__)
                raise BudgetError(
                    f"{spec} cannot keep a drift of {budget:g}: with {best[0]} alone quantized it "
                    f"is {self.alone[best]:.3g}, and with all of them {self._all:.3g}",
                    fix=f"allow more, or select less: {spec.partition('{')[0]}{{select=...}}",
                )
        return levels

    def _sum(self, levels: Levels) -> float:
        return sum(self._error(name, level) ** 2 for name, level in levels.items())

    def _step(self, levels: dict[str, int]) -> None:
        """Moves the weight with the largest error for its size on by a level."""
        left = [name for name, level in levels.items() if level < self.top]
        if left:
            worst = max(left, key=lambda n: self._error(n, levels[n]) ** 2 / self.sizes[n])
            levels[worst] += 1

    @property
    def _all(self) -> float:
        return self.drift(dict.fromkeys(self.sizes, 0))

    def _error(self, name: str, level: int) -> float:
        if level == self.top:
            return 0.0
        if (name, level) not in self.alone:
            levels = {other: level if other == name else self.top for other in self.sizes}
            self.alone[name, level] = self.drift(levels)
        return self.alone[name, level]


def milder_rounding(given: Any, bound: float) -> str:
    """The end of a fix: what a pass that rounds weights can do to drift by ``bound`` or less."""
    return (
        f"let {replace(given, max_drift=bound).spec} keep the most sensitive weights finer, or "
        "leave out those that `ftc inspect MODEL --sensitivity` names"
    )


def drift_of(
    before: Program, ctx: Context, spec: str, rewrite: Callable[[Rewriter], None]
) -> float:
    """Relative drift on the probes that ``rewrite`` makes, on a clone of ``before``."""
    trial = Rewriter(before.clone(), spec)
    rewrite(trial)
    trial.finish()
    differences: list[Difference] = []
    for probe, old in zip(ctx.probes_for(before), ctx.outputs(before), strict=True):
        new = run_probe(trial.program, probe)
        differences += compare(old, new, probe, before.signature).values()
    return summarize(differences, ctx.probe_source).relative
