"""Batches of a table, in order: what comes at a step is a function of the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .data.order import Micro, Order, generator
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
        microbatches: into which it is cut.
    """

    examples: Examples
    order: Order
    objective: Objective
    scene: Scene
    rank: int = 0
    size: int = 1
    microbatches: int = 1

    def steps(self, done: int) -> Iterator[list[Batch]]:
        """The batches of each step, from the step ``done`` on, epoch after epoch, for ever."""
        epoch, inside = divmod(done, self.order.steps_per_epoch)
        while True:
            for step in self.order.steps(epoch)[inside:]:
                yield [batch for indices in step for batch in self._parts(indices, epoch)]
            epoch, inside = epoch + 1, 0

    def evaluation(self) -> Iterator[Batch]:
        """Every example once; masks and pairs are the same each time."""
        for step in self.order.steps(0):
            for indices in step:
                yield from self._parts(indices, _EVALUATION)

    def _parts(self, indices: Micro, epoch: int) -> Iterator[Batch]:
        """This process's microbatches of a batch: as many in every process.

        One that has no rows left runs the first row of the batch, and counts nothing.
        """
        own = indices[self.rank :: self.size]
        for i in range(self.microbatches):
            part = own[i :: self.microbatches]
            yield self._batch(part, epoch) if part else hollow(self._batch(indices[:1], epoch))

    def _batch(self, places: tuple[int, ...], epoch: int) -> Batch:
        """The batch of some places of the order; what is random hangs on the example alone."""
        indices = self.examples.indices[list(places)].tolist()
        seed = self.order.seed
        return self.objective.batch(
            self.examples.table, indices, self.scene, lambda index: generator(seed, epoch, index)
        )


def hollow(batch: Batch) -> Batch:
    """A batch that is run and counts nothing: it keeps a process in step with the others."""
    return replace(batch, counts=dict.fromkeys(batch.counts, 0.0), examples=0, tokens=0)
