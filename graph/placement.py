"""Who this process is among the ranks that share a program, and how their tensors come together.

A process says it once (:func:`place`, :func:`placed`); by default it is alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .sharding import Shard, share, whole


@dataclass(frozen=True, slots=True)
class Placement:
    """Which of the ranks that share a program this process is.

    Attributes:
        rank, size: in ``group``.
        group: the process group that sums and joins run in; None with more than one
            rank for shapes alone.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


_here = Placement()


def here() -> Placement:
    """The placement of this process."""
    return _here


def place(placement: Placement) -> None:
    """Says which rank this process is, from here on; one program at a time is shared."""
    global _here
    _here = placement


@contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Within it this process is ``placement``."""
    before = here()
    place(placement)
    try:
        yield
    finally:
        place(before)


def own_part(x: Tensor, axis: int, segments: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """This rank's part of a whole value, a view or a copy (see :func:`parallel_part`)."""
    if _here.size == 1:
        return x
    parts, at = [], 0
    for length, count in zip(segments, blocks, strict=True):
        start, stop = share(length, _here.rank, _here.size, count)
        parts.append(x.narrow(axis, at + start, stop - start))
        at += length
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def put_part(x: Tensor, axis: int, segments: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """Zeros of the whole size with ``x`` where this rank's part is."""
    if _here.size == 1:
        return x
    shape = list(x.shape)
    shape[axis] = sum(segments)
    made = x.new_zeros(shape)
    at = begin = 0
    for length, count in zip(segments, blocks, strict=True):
        start, stop = share(length, _here.rank, _here.size, count)
        own = x.narrow(axis, begin, stop - start)
        made.narrow(axis, at + start, stop - start).copy_(own)
        at, begin = at + length, begin + stop - start
    return made


def summed(x: Tensor) -> Tensor:
    """The sum over the ranks, in new memory."""
    made = x.clone(memory_format=torch.contiguous_format)
    if _here.size > 1:
        dist.all_reduce(made, group=group())
    return made


def joined(x: Tensor, axis: int, lengths: Sequence[int]) -> list[Tensor]:
    """The ranks' tensors, in order, which are ``lengths`` long along ``axis``."""
    if _here.size == 1:
        return [x]
    shape = list(x.shape)
    shape[axis] = max(lengths) - x.shape[axis]
    padded = torch.cat([x, x.new_zeros(shape)], axis) if shape[axis] else x.contiguous()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group())
    return [part.narrow(axis, 0, length) for part, length in zip(parts, lengths, strict=True)]


def gather_whole(own: Tensor, shard: Shard) -> Tensor:
    """The whole of a tensor that is cut, on every rank; called by every rank.

    Args:
        own: this rank's part (:func:`ftc.graph.sharding.part`), of any dtype.
    """
    spans = [[share(n, rank, _here.size) for n in shard.segments] for rank in range(_here.size)]
    lengths = [sum(stop - start for start, stop in each) for each in spans]
    return whole(joined(own, shard.axis, lengths), shard)


def norm_of(own: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> Tensor:
    """The Euclidean norm of whole tensors together; called by every rank.

    Args:
        own: this rank's part of each, by name: gradients to be clipped.
        shards: of those that are cut; the others are equal on all ranks and count once.
    """
    squares = [t.float().square().sum() for name, t in own.items() if name in shards]
    cut = summed(torch.stack(squares).sum()) if squares else torch.zeros(())
    rest = [t.float().square().sum() for name, t in own.items() if name not in shards]
    return (torch.stack(rest).sum() + cut).sqrt() if rest else cut.sqrt()


def group() -> Any:
    """The process group of several ranks."""
    assert _here.group is not None, "several ranks without a process group"
    return _here.group
