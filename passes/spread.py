"""From products that are cut by rows to those that it ends in, which are cut by columns.

A block is *spread* over ranks by cutting the rows of its first products, so that
each rank computes some of the features (some heads), and by following the cut
from value to value. An operator works on each part as on the whole, or does so
with other sizes, or ends the attempt (:class:`~ftc.passes.split.Whole`), and the
block stays whole. A product whose input is cut along its features takes the
matching columns of its weight and yields a partial sum:

    x W^T = sum over ranks r of x[:, r] W[:, r]^T

Every rule holds for a cut of any kind, so nothing has to be known about what a
block is: a cut in the wrong place (through a head) reaches an operator that
cannot work on it. The rules are in :mod:`~ftc.passes.spread_views` and
:mod:`~ftc.passes.spread_values`.

What meets a cut value and is not cut is cut here too (a bias by heads), or is the
same for all parts; then, if it learns, its gradient is summed over the ranks.
Sizes that depend on the number of ranks are written as -1 or computed from the
value's own, so the graph is right for any number of ranks, and for one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ftc.graph.cost import operator_name
from ftc.graph.program import Program
from ftc.graph.shapes import VAL
from ftc.graph.symbols import SizesAt

from .split import Split, Whole
from .spread_edits import Edits

_SIZES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)


@dataclass(frozen=True, slots=True)
class Seed:
    """How the rows of a first product are cut: as in :class:`~ftc.passes.split.Split`."""

    segments: tuple[int, ...]
    blocks: tuple[int, ...]


class Spreader:
    """Spreads blocks of one program over a number of ranks.

    Args:
        program: canonical, with fake values; nothing is changed.
        size: ranks.
    """

    def __init__(self, program: Program, size: int) -> None:
        self.size = size
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}
        sizes = dict(zip(program.signature.dims, _SIZES, strict=False))
        self._at = SizesAt(program, sizes)

    def spread(
        self, seeds: Mapping[fx.Node, Seed], queries: tuple[fx.Node, int] | None = None
    ) -> Edits:
        """Follows the cut of ``seeds``.

        Args:
            seeds: the block's first products.
            queries: the product of the queries and the width of a head, where there
                are fewer key heads than ranks.

        Raises:
            Whole: why the block has to stay whole.
        """
        run = Run(self, dict(seeds), queries, Edits(self.size))
        for node in self.order:
            run.visit(node)
        if not run.ends:
            raise Whole("no product takes its features")
        return run.edits

    def shape(self, node: Any) -> tuple[int, ...]:
        """Sizes of a value when every dynamic dimension has a large size of its own."""
        return self._at.shape(node)

    def number(self, size: Any) -> int:
        """The number that a size of a fake value is then."""
        return self._at.size(size)


@dataclass
class Run:
    """One attempt to spread a block.

    Attributes:
        cut: which values are cut, and where; a list for one that is a list of tensors.
        ends: the products that take what is cut.
    """

    on: Spreader
    seeds: dict[fx.Node, Seed]
    queries: tuple[fx.Node, int] | None
    edits: Edits
    cut: dict[fx.Node, Split | list[Split]] = field(default_factory=dict)
    ends: list[fx.Node] = field(default_factory=list)

    def visit(self, node: fx.Node) -> None:
        """Carries the cut over one node."""
        met = any(used in self.cut for used in node.all_input_nodes)
        if node in self.seeds:
            if met:
                raise Whole(f"{operator_name(node)} takes what is cut already")
            self._begin(node, self.seeds[node])
        elif met:
            if node.op != "call_function":
                raise Whole("it reaches an output of the program")
            self._carry(node)

    def one(self, node: Any) -> Split:
        """The cut of a tensor that is cut."""
        split = self.cut.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(split, Split):
            raise Whole(f"{node} is not cut")
        return split

    def even(self, split: Split) -> bool:
        """Whether the ranks have equal shares that no two have."""
        return split.even(self.on.size)

    def broadcast(self, node: fx.Node, operands: Sequence[fx.Node]) -> Split:
        """The cut of ``node``, whose ``operands`` are broadcast to its shape.

        Raises:
            Whole: where they are cut in different places.
        """
        rank = len(self.on.shape(node))
        cuts = [self.one(n) for n in operands if n in self.cut]
        ranks = [len(self.on.shape(n)) for n in operands if n in self.cut]
        moved = [c.at(c.axis + rank - r) for c, r in zip(cuts, ranks, strict=True)]
        if any(c.axis != moved[0].axis or not c.like(moved[0], self.on.size) for c in moved):
            raise Whole(f"{operator_name(node)} joins values that are cut in different places")
        return moved[0]

    def meet(self, node: fx.Node, operands: Sequence[fx.Node], split: Split) -> None:
        """Has those of ``operands`` that are not cut meet the parts of ``node``, cut as ``split``.

        Raises:
            Whole: for one that is neither the same for all parts nor can be cut like them.
        """
        rank = len(self.on.shape(node))
        for used in operands:
            if used in self.cut or not isinstance(used.meta.get(VAL), Tensor):
                continue
            shape = self.on.shape(used)
            axis = split.axis - (rank - len(shape))
            if axis < 0 or shape[axis] == 1:
                self.edits.same(node, used)
            elif shape[axis] == split.length * split.outer and not split.repeated:
                self.edits.own(node, used, split.at(axis))
            else:
                raise Whole(f"{operator_name(node)} joins a part with what cannot be cut")

    def _begin(self, node: fx.Node, seed: Seed) -> None:
        split = Split(len(self.on.shape(node)) - 1, seed.segments, seed.blocks)
        size = self.on.size
        for length, blocks in zip(seed.segments, seed.blocks, strict=True):
            if length % min(blocks, size) or max(blocks, size) % min(blocks, size):
                raise Whole(f"{blocks} heads or columns are no multiple of {size}")
        self.edits.rows(node, split, even=self.even(split))
        self.cut[node] = split

    def _carry(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            split = self.cut[node.all_input_nodes[0]]
            assert isinstance(split, list) and isinstance(node.args[1], int)
            self.cut[node] = split[node.args[1]]
            return
        follow = _RULES.get(operator_name(node))
        if follow is None:
            raise Whole(f"{operator_name(node)} cannot work on a part")
        made = follow(self, node)
        if made is not None:
            self.cut[node] = made


Rule = Callable[[Run, fx.Node], Split | list[Split] | None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function for operators of ``aten`` (or, with a dot, of others).

    It gets a node that reads something cut, notes edits, and returns how the result is cut:
    None where it is not, since the node ends the block.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name if "." in name else f"aten.{name}"] = function
        return function

    return register
