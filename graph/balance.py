"""Balance: where a line of work is cut so that the largest part is smallest, and little crosses.

The nodes of a graph stand in a line; a cut between two of them makes every value
cross that is made before it and read after it. With ``time(i, j)`` of the work
between two cuts, and ``send(i)`` for what crosses at one::

    largest(k, j) = min over i of max(largest(k - 1, i), time(i, j) + send(i) + send(j))

(the linear partition problem). The least that crosses is that of the narrowest cut
whose largest part is within :data:`SLACK` of the best, by the same recursion with a
sum; of all cuts at which no more crosses the one with the least largest part is taken,
which is found by bisection. Not every place is tried: of
places that lie within a sixty-fourth of a part of each other, only the narrowest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .errors import PreconditionError

SLACK = 0.05
_HALVES = 8  # of the slack: to a five-thousandth of a part
_PLACES = 64  # a part


@dataclass(frozen=True, slots=True)
class Line:
    """Work in order.

    Attributes:
        seconds: of each piece, forward and backward.
        crossing: bytes that cross after each piece; nothing after the last.
        saved: bytes that each piece keeps for backward, for each microbatch in flight.
        weights: names and bytes of the tensors that each piece reads; a part holds each once.
    """

    seconds: Sequence[float]
    crossing: Sequence[int]
    saved: Sequence[int]
    weights: Sequence[Sequence[tuple[str, int]]]


def balance(
    line: Line,
    parts: int,
    *,
    link: float,
    memory: float | None = None,
    in_flight: int | None = None,
) -> tuple[int, ...]:
    """The place after which each part ends: ``parts`` ascending positions, the last ``len(line)``.

    Args:
        line: at least ``parts`` pieces.
        parts: how many.
        link: bytes a second from one part to the next.
        memory: bytes that a part may hold.
        in_flight: microbatches whose values a part keeps; by default what 1F1B
            keeps, ``parts`` in the first, one in the last.

    Raises:
        PreconditionError: when there are too few pieces, or no cut fits in ``memory``.
    """
    if len(line.seconds) < parts:
        raise PreconditionError(f"{parts} stages of {len(line.seconds)} operations",
                                fix=f"ask for {max(len(line.seconds), 1)} or fewer")  # fmt: skip
    places = _places(line, parts)
    time, send = _times(line, places, link)
    held, saved = _bytes(line, places)
    wanted = time + send[:, None] + send[None, :]
    most = torch.inf if memory is None else memory
    refused: list[Tensor] = []
    for part in range(parts):
        alive = parts - part if in_flight is None else in_flight
        refused.append((held + alive * saved > most) | (time < 0))
    largest = _recursion([wanted.masked_fill(r, torch.inf) for r in refused], torch.maximum)
    best = float(largest[0][-1, -1])
    if best == torch.inf:
        raise PreconditionError(
            f"no cut into {parts} stages fits in {memory:,.0f} bytes a stage",
            fix="take more stages, a smaller batch or sequence, or freeze more",
        )
    crossing = torch.tensor([0, *line.crossing], dtype=torch.float64)[places]
    least, choices = _narrowest(crossing, wanted, refused, best * (1 + SLACK))
    low, high = 0.0, SLACK
    for _ in range(_HALVES):  # the same traffic may be had with better balance
        middle = (low + high) / 2
        traffic, found = _narrowest(crossing, wanted, refused, best * (1 + middle))
        if traffic <= least:
            high, choices = middle, found
        else:
            low = middle
    ends, at = [], len(places) - 1
    for part in reversed(range(parts)):
        ends.append(int(places[at]))
        at = int(choices[part, at])
    return tuple(reversed(ends))


def _narrowest(
    crossing: Tensor, wanted: Tensor, refused: Sequence[Tensor], most: float
) -> tuple[float, Tensor]:
    """The least traffic of parts that take at most ``most``, and where each starts."""
    bytes_at = crossing[None, :].expand_as(wanted)
    costs = [bytes_at.masked_fill(each | (wanted > most), torch.inf) for each in refused]
    best, choices = _recursion(costs, torch.add)
    return float(best[-1, -1]), choices


def _recursion(
    costs: Sequence[Tensor], join: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """``best[k, j]`` of ``k + 1`` parts that end at ``j``, and where each last one starts.

    Args:
        costs: of each part, ``[from, to]``.
        join: of what comes before and the cost of a part.
    """
    count = costs[0].shape[0]
    best = torch.full((len(costs), count), torch.inf, dtype=torch.float64)
    choice = torch.zeros((len(costs), count), dtype=torch.int64)
    before = torch.full((count,), torch.inf, dtype=torch.float64)
    before[0] = 0.0
    for part, cost in enumerate(costs):
        best[part], choice[part] = join(before[:, None].expand_as(cost), cost).min(0)
        before = best[part]
    return best, choice


def _places(line: Line, parts: int) -> Tensor:
    """Positions where a cut is tried: 0, the end, and the narrowest of every stretch between."""
    total = sum(line.seconds) or 1.0
    step = total / (parts * _PLACES)
    narrowest: dict[int, int] = {}
    done = 0.0
    for position, seconds in enumerate(line.seconds[:-1], start=1):
        done += seconds
        stretch = int(done / step)
        known = narrowest.get(stretch)
        if known is None or line.crossing[position - 1] < line.crossing[known - 1]:
            narrowest[stretch] = position
    found = sorted({0, *narrowest.values(), len(line.seconds)})
    if len(found) <= parts:  # few pieces, some of which take no time
        found = list(range(len(line.seconds) + 1))
    return torch.tensor(found)


def _times(line: Line, places: Tensor, link: float) -> tuple[Tensor, Tensor]:
    """Seconds between two places, negative where they are in the wrong order; and to send."""
    seconds = torch.tensor([0.0, *line.seconds], dtype=torch.float64).cumsum(0)[places]
    time = seconds[None, :] - seconds[:, None]
    wrong = places[None, :] <= places[:, None]
    crossing = torch.tensor([0, *line.crossing], dtype=torch.float64)[places]
    return time.masked_fill(wrong, -1.0), 2 * crossing / link


def _bytes(line: Line, places: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of weights, each once, and of saved values between two places."""
    saved = torch.tensor([0, *line.saved], dtype=torch.float64).cumsum(0)[places]
    readers: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, int] = {}
    alone = [0.0] * (len(line.seconds) + 1)
    for position, weights in enumerate(line.weights):
        for name, size in weights:
            readers[name].append(position)
            sizes[name] = size
            alone[position + 1] += size
    held = torch.tensor(alone, dtype=torch.float64).cumsum(0)[places]
    twice = torch.zeros((len(places), len(places)), dtype=torch.float64)
    for name, positions in readers.items():
        for first, second in pairwise(positions):
            row = int(torch.searchsorted(places, first, right=True)) - 1  # starts at or before
            column = int(torch.searchsorted(places, second, right=True))  # ends behind
            twice[: row + 1, column:] += sizes[name]
    return held[None, :] - held[:, None] - twice, saved[None, :] - saved[:, None]
