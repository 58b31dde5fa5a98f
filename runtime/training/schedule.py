"""Learning-rate schedules: a factor that is a function of the step alone.

warmup:    step / warmup                                    before step ``warmup``
linear:    (total - step) / (total - warmup)                from there to 0
cosine:    (1 + cos(pi (step - warmup) / (total - warmup))) / 2
constant:  1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule.

    Attributes:
        name: one of :data:`SCHEDULES`.
        total: steps of the run.
        warmup: steps of them that the rate rises in.
    """

    name: str
    total: int
    warmup: int = 0

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied with at ``step``, counted from 0."""
        if step < self.warmup:
            return step / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.name == "linear":
            return max(0.0, 1 - done)
        if self.name == "cosine":
            return max(0.0, (1 + math.cos(math.pi * min(1.0, done))) / 2)
        return 1.0
