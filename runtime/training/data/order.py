"""The order of the data: a function of seed and epoch, so that a run can go on anywhere.

    permutation(epoch) = randperm(n), seeded with (seed, epoch)

Nothing is remembered between steps: where a run stands is the number of its
step, and everything random about a batch is drawn from a generator of its own,
seeded with (seed, epoch, step).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_POOL = 50
Micro = tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """Batches of the indices ``0 … count - 1``.

    Attributes:
        count: of examples.
        batch: examples of a batch; the last one of an epoch may have fewer.
        accumulate: batches of a step; the last step of an epoch may have fewer.
        seed: of the permutations.
        shuffle: False keeps the order of the data.
        lengths: of each example ``[count]``; given, batches hold examples of similar
            length: the permutation is cut into pools of 50 batches, which are
            sorted by length, cut into batches, and shuffled.
    """

    count: int
    batch: int
    accumulate: int = 1
    seed: int = 0
    shuffle: bool = True
    lengths: Tensor | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches that see every example once."""
        return -(-self.count // self.batch)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every example once."""
        return -(-self.batches_per_epoch // self.accumulate)

    def steps(self, epoch: int) -> list[tuple[Micro, ...]]:
        """The steps of an epoch, each its batches, each its indices."""
        batches = self._batches(epoch)
        return [tuple(batches[i : i + self.accumulate])
                for i in range(0, len(batches), self.accumulate)]  # fmt: skip

    def _batches(self, epoch: int) -> list[Micro]:
        made = generator(self.seed, epoch)
        if not self.shuffle:
            order = torch.arange(self.count)
        else:
            order = torch.randperm(self.count, generator=made)
        if self.lengths is None:
            return self._cut(order)
        pools = order.split(self.batch * _POOL) if self.shuffle else (order,)
        order = torch.cat([p[self.lengths[p].argsort(descending=True, stable=True)] for p in pools])
        batches = self._cut(order)
        if not self.shuffle:
            return batches
        return [batches[i] for i in torch.randperm(len(batches), generator=made).tolist()]

    def _cut(self, order: Tensor) -> list[Micro]:
        return [tuple(part.tolist()) for part in order.split(self.batch)]


def generator(seed: int, *place: int) -> torch.Generator:
    """A generator for one place in a run, the same whenever the run comes there."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
