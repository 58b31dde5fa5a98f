"""Devices that are processes on the same cores: the one that waits lends its core to others.

Processes of a machine with fewer cores than processes get equal shares: when n of them
compute on c cores, each is min(1, c / n) as fast as alone. So a piece of work has no
length of its own, and time goes from one event to the next: some work ends, or what a
process waits for arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Work = TypeVar("Work", bound=Hashable)
_DONE = 1e-12


def run_on_cores(
    orders: Sequence[Sequence[Work]],
    seconds: Callable[[Work], float],
    ready: Callable[[Work, Mapping[Work, float]], float | None],
    cores: int,
) -> list[tuple[int, Work, float, float]]:
    """When each piece of work starts and ends.

    Args:
        orders: what each process does, in order.
        seconds: of a piece of work, on a core of its own.
        ready: when what a piece of work needs has arrived, from the ends so far; None
            while that is not known.
        cores: that the processes share.

    Returns:
        Process, work, start and end, in order of the ends.
    """
    at = [0] * len(orders)
    left: list[float | None] = [None] * len(orders)
    starts, now = [0.0] * len(orders), 0.0
    ends: dict[Work, float] = {}
    found: list[tuple[int, Work, float, float]] = []
    while any(place < len(todo) for place, todo in zip(at, orders, strict=True)):
        events: list[float] = []
        for rank, todo in enumerate(orders):
            if left[rank] is None and at[rank] < len(todo):
                arrives = ready(todo[at[rank]], ends)
                if arrives is not None and arrives <= now:
                    left[rank], starts[rank] = seconds(todo[at[rank]]), now
                elif arrives is not None:
                    events.append(arrives)
        busy = {rank: rest for rank, rest in enumerate(left) if rest is not None}
        rate = min(1.0, cores / max(len(busy), 1))
        events += [now + rest / rate for rest in busy.values()]
        assert events, "a deadlock"
        later = min(events)
        for rank, rest in busy.items():
            rest -= (later - now) * rate
            left[rank] = rest if rest > _DONE else None
            if left[rank] is None:
                work = orders[rank][at[rank]]
                ends[work] = later
                found.append((rank, work, starts[rank], later))
                at[rank] += 1
        now = later
    return found
