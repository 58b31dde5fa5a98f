"""A value cut over ranks along one of its axes, and how views move the cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise


class Whole(Exception):
    """Why something cannot be cut; the text says it of the operator or the weight."""


@dataclass(frozen=True, slots=True)
class Split:
    """Which axis of a value is cut, and where.

    Attributes:
        axis: counted from the front.
        segments: lengths that the axis is joined from; each is cut by itself.
        blocks: in each segment, equal blocks that are not cut apart. As many as there
            are ranks, or more: each rank has an equal share of them. Fewer: each block
            is whole on several ranks (key heads that several ranks have queries for).
        outer: elements in front of the cut within the axis (heads folded into the
            batch: the batch); 1 where the axis is cut as it is.
        repeated: an axis behind ``axis`` has, on each rank, only the copies of a block
            that its own queries need.
    """

    axis: int
    segments: tuple[int, ...]
    blocks: tuple[int, ...]
    outer: int = 1
    repeated: bool = False

    @property
    def length(self) -> int:
        """Of the axis, without ``outer``."""
        return sum(self.segments)

    def even(self, size: int) -> bool:
        """Whether each of ``size`` ranks has an equal share of every segment, and no other has."""
        pairs = zip(self.segments, self.blocks, strict=True)
        return not self.repeated and all(n % size == 0 and b >= size for n, b in pairs)

    def like(self, other: Split, size: int) -> bool:
        """Whether values cut these two ways fit together element by element."""
        same = self.segments == other.segments and self.outer == other.outer
        cuts = self.blocks == other.blocks or (self.even(size) and other.even(size))
        return same and cuts and self.repeated == other.repeated

    def at(self, axis: int) -> Split:
        """The same cut along another axis."""
        return replace(self, axis=axis)


def viewed(split: Split, before: Sequence[int], after: Sequence[int], size: int) -> Split:
    """The cut of a value after a view of shape ``after``.

    A cut of a value is a run of its elements for each index in front of it. The
    view has the same elements in the same order; it keeps the cut if one of its
    axes starts where the cut axis does.

    Raises:
        Whole: where none does, or it is not as long as it would have to be.
    """
    front = math.prod(before[: split.axis]) * split.outer
    inner = math.prod(before[split.axis + 1 :])
    axis, passed = 0, 1
    while axis < len(after) and front % (passed * after[axis]) == 0:
        passed *= after[axis]
        axis += 1
    if axis == len(after):
        raise Whole("a view joins what is cut with what is not")
    outer = front // passed
    length, rest = divmod(after[axis], outer)
    inside = math.prod(after[axis + 1 :])
    if rest or length * inside != split.length * inner:
        raise Whole("a view joins what is cut with what is not")
    if split.blocks == (1,) and axis and after[axis - 1] == 1:  # the only head there is
        return Split(axis - 1, (1,), (1,))
    if length == split.length:
        return replace(split, axis=axis, outer=outer)
    if len(split.segments) > 1:
        return _stacked(split, before, after, size)
    (block,) = split.blocks
    if split.repeated:  # as many copies as the own queries need: one head for each of them
        return Split(axis, (length,), (length,), outer)
    if split.even(size) and length % size:
        raise Whole(f"{length} heads or columns are no multiple of {size}")
    if not split.even(size) and length % block:
        raise Whole(f"{length} heads are not {block} equal blocks")
    return Split(axis, (length,), (length if split.even(size) else block,), outer)


def _stacked(split: Split, before: Sequence[int], after: Sequence[int], size: int) -> Split:
    """The cut of a view that has an axis for the segments, which are then cut alike behind it.

    Raises:
        Whole: where it has none.
    """
    count, length, axis = len(split.segments), split.segments[0], split.axis
    alike = len(set(split.segments)) == len(set(split.blocks)) == 1 and split.outer == 1
    if not alike or axis >= len(after) or after[axis] != count:
        raise Whole("a view takes a fused product apart in another order")
    one = Split(axis + 1, (length,), split.blocks[:1])
    return viewed(one, (*before[:axis], count, length, *before[axis + 1 :]), after, size)


def pieces(split: Split, bounds: Sequence[int]) -> list[Split]:
    """The cuts of the pieces of an axis between consecutive ``bounds``: each whole segments.

    Raises:
        Whole: where a bound lies within a segment.
    """
    edges = [0]
    for length in split.segments:
        edges.append(edges[-1] + length)
    if split.outer != 1 or any(bound not in edges for bound in bounds):
        raise Whole("what is cut is taken apart within a head or a part of a fused product")
    places = [edges.index(bound) for bound in bounds]
    return [replace(split, segments=split.segments[a:b], blocks=split.blocks[a:b])
            for a, b in pairwise(places)]  # fmt: skip
