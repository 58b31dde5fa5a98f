"""The store in which processes find each other, with nothing in it from before a restart.

When torchrun starts the processes of a run again it may hand them the store of those
that died, with their addresses, and gloo then waits for one that is gone. How often a
machine was restarted is no common name: another machine may have counted otherwise. So
the first process draws a name for this start, and every other asks it for that name
under a number of its own:

    r  asks     ask/r = n           0  draws   name
    0  answers  answer/n = name     r  takes the name, and is counted

What a dead process asked is answered too, and nobody listens.
"""

from __future__ import annotations

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

_POLL = 0.02  # seconds


def meet(timeout: float) -> tuple[dist.Store, int, int]:
    """A store for this start of the run, this process's rank, and how many there are.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        DistStoreError: when they do not come in time.
    """
    wait = timedelta(seconds=timeout)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=wait)))
    store.set_timeout(wait)
    return dist.PrefixStore(name_of_start(store, rank, size, timeout), store), rank, size


def name_of_start(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name that the ``size`` processes of this start share, and no earlier start had.

    Raises:
        DistStoreError: when not all of them come within ``timeout`` seconds.
    """
    own = uuid4().hex
    if rank:
        store.set(f"ask/{rank}", own)
        name: str = store.get(f"answer/{own}").decode()
        store.add(f"here/{name}", 1)
        return name
    answered: set[str] = set()
    end = time.monotonic() + timeout
    while store.add(f"here/{own}", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"ask/{other}"]):
                number = store.get(f"ask/{other}").decode()
                if number not in answered:
                    store.set(f"answer/{number}", own)
                    answered.add(number)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"waited {timeout:g} seconds for {size - 1} processes")
        time.sleep(_POLL)
    return own
