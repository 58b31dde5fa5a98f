"""Processes that start again in the store of those that died."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from ftc.runtime.training.engines.rendezvous import name_of_start


def start(store: dist.Store, size: int) -> set[str]:
    """The names that ``size`` processes of one start find; the first comes last."""
    with ThreadPoolExecutor(size) as pool:
        order = [*range(1, size), 0]
        return set(pool.map(lambda rank: name_of_start(store, rank, size, 20), order))


def test_every_start_has_one_name_and_another_than_before() -> None:
    store = dist.HashStore()
    store.set("ask/1", "nobody")  # it died before it was answered
    names = [start(store, 3) for _ in range(3)]
    assert all(len(each) == 1 for each in names)
    assert len(set.union(*names)) == 3


def test_who_does_not_come_is_not_awaited_for_ever() -> None:
    with pytest.raises(dist.DistStoreError, match="waited"):
        name_of_start(dist.HashStore(), 0, 2, 0.2)
