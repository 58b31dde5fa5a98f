"""Batches of a table, in order: what comes at a step is a function of the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .data.order import Order, generator, share
from .data.table import Examples
from .objectives.base import Batch, Objective, Scene

_EVALUATION = -1


@dataclass
class Loader:
    """Makes the batches of a run.

    Attributes:
        examples: what there is.
        order: over them.
        rank, size: this process's share of each batch.
    """

    examples: Examples
    order: Order
    objective: Objective
    scene: Scene
    rank: int = 0
    size: int = 1

    def steps(self, done: int) -> Iterator[list[Batch]]:
        """The batches of each step, from the step ``done`` on, epoch after epoch, for ever."""
        epoch, inside = divmod(done, self.order.steps_per_epoch)
        while True:
            for step in self.order.steps(epoch)[inside:]:
                yield [self._batch(indices, epoch) for indices in share(step, self.rank, self.size)]
            epoch, inside = epoch + 1, 0

    def evaluation(self) -> Iterator[Batch]:
        """Every example once; masks and pairs are the same each time."""
        for step in self.order.steps(0):
            for indices in share(step, self.rank, self.size):
                yield self._batch(indices, _EVALUATION)

    def _batch(self, places: tuple[int, ...], epoch: int) -> Batch:
        """The batch of some places of the order; what is random hangs on the example alone."""
        indices = self.examples.indices[list(places)].tolist()
        seed = self.order.seed
        return self.objective.batch(
            self.examples.table, indices, self.scene, lambda index: generator(seed, epoch, index)
        )
