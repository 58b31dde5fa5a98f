"""What it takes to spread a block: noted while the cut is followed, applied if it holds.

Nodes stay the ones they were, with other arguments, so that the edits of one
block leave those of another in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ftc.graph import parallel_ops  # noqa: F401  (registers torch.ops.ftc)
from ftc.graph.cost import argument, operator_name
from ftc.graph.rewriter import Rewriter
from ftc.graph.shapes import value
from ftc.graph.sharding import Shard, set_shard

from .split import Split, Whole

aten, ops = torch.ops.aten, torch.ops.ftc
_ROWS = {"aten.linear": (1, 2), "ftc.quantized_linear": (1, 2, 3, 4)}


@dataclass(frozen=True, slots=True)
class SizeOf:
    """The size of an axis of a node's first argument."""

    axis: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """As much of a number as the own part is of an axis ``length`` long of the first argument."""

    number: int
    axis: int
    length: int


@dataclass(frozen=True, slots=True)
class QueriesEach:
    """Own queries for each own key head, the heads along ``axis`` of the first argument.

    Attributes:
        product: of the queries, their heads of ``width`` one after another.
    """

    product: fx.Node
    width: int
    axis: int


class Applying:
    """Changes one program by the edits of its blocks.

    Args:
        rw: rewrites it.
        constant: nodes whose values depend on no parameter.
    """

    def __init__(self, rw: Rewriter, constant: frozenset[fx.Node]) -> None:
        self.rw, self._constant = rw, constant
        self._made: dict[tuple[Any, ...], fx.Node] = {}
        self._moved: dict[fx.Node, fx.Node] = {}

    def now(self, node: fx.Node) -> fx.Node:
        """What readers of ``node`` read by now."""
        return self._moved.get(node, node)

    def move(self, old: fx.Node, new: fx.Node, users: Iterable[fx.Node]) -> None:
        """Has ``users``, which are all that read it, read ``new`` instead of ``old``."""
        self.rw.redirect(old, new, users)
        self._moved[old] = new

    def copied(self, used: fx.Node) -> fx.Node:
        """``used`` with its gradient summed over the ranks; itself where nothing in it learns."""
        if used in self._constant:
            return used
        return self._once((used,), used, lambda: self.rw.call(ops.parallel_copy.default, used))

    def own(self, used: fx.Node, split: Split) -> fx.Node:
        """The own part of ``used``."""

        def part() -> fx.Node:
            call, axis = self.rw.call, split.axis
            how = [*split.segments], [*split.blocks]
            if split.outer == 1:
                return call(ops.parallel_part.default, used, axis, *how)
            apart = call(aten.unflatten.int, used, axis, [-1, split.length])
            mine = call(ops.parallel_part.default, apart, axis + 1, *how)
            return call(aten.flatten.using_ints, mine, axis, axis + 1)

        return self._once((used, split), used, part)

    def argument(self, node: fx.Node, wanted: Any) -> Any:
        """An argument of ``node`` in which sizes may have to be computed."""
        call, first = self.rw.call, node.args[0]
        if isinstance(wanted, (list, tuple)):
            return [self.argument(node, each) for each in wanted]
        if isinstance(wanted, SizeOf):
            return call(aten.sym_size.int, first, wanted.axis)
        if isinstance(wanted, Scaled) and wanted.number:
            own = call(aten.sym_size.int, first, wanted.axis)
            times = call(operator.mul, own, wanted.number)
            return call(operator.floordiv, times, wanted.length)
        if isinstance(wanted, Scaled):
            return 0
        if isinstance(wanted, QueriesEach):
            features = call(aten.sym_size.int, wanted.product, len(value(wanted.product).shape) - 1)
            heads = call(operator.floordiv, features, wanted.width)
            return call(operator.floordiv, heads, call(aten.sym_size.int, first, wanted.axis))
        return wanted

    def _once(self, key: tuple[Any, ...], used: fx.Node, make: Callable[[], fx.Node]) -> fx.Node:
        """What ``make`` inserts in front of the first reader of ``used``, once for one ``key``."""
        if key not in self._made:
            with self.rw.at(min(used.users)):
                self._made[key] = make()
        return self._made[key]


@dataclass(eq=False)
class Edits:
    """The changes for one block.

    Attributes:
        size: ranks.
        shards: how each tensor is cut, by the node that reads it.
        uses: for each of these, the operators that the cut is right for.
    """

    size: int
    shards: dict[fx.Node, Shard] = field(default_factory=dict)
    uses: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    _steps: list[Callable[[Applying], None]] = field(default_factory=list)

    def apply(self, on: Applying) -> None:
        """Makes the changes."""
        for reader, shard in self.shards.items():
            set_shard(reader, shard)
        for step in self._steps:
            step(on)

    def step(self, change: Callable[[Applying], None]) -> None:
        """Notes a change."""
        self._steps.append(change)

    def cut(self, node: fx.Node, position: int, axis: int, segments: tuple[int, ...]) -> None:
        """Notes that ``node`` reads its own part of an argument that is a tensor; None has none.

        Raises:
            Whole: for a tensor that is computed, or cut in another way already.
        """
        reader = node.args[position] if position < len(node.args) else None
        if reader is None:
            return
        if not isinstance(reader, fx.Node) or reader.op != "get_attr":
            raise Whole(f"{operator_name(node)} reads a weight that is computed")
        shard = Shard(axis, segments, self.size)
        if self.shards.setdefault(reader, shard) != shard:
            raise Whole(f"{reader.target} would be cut in two ways")
        self.uses.setdefault(reader, set()).add(node)

    def rows(self, node: fx.Node, split: Split, *, even: bool = True) -> None:
        """A product whose input is whole and whose features are cut.

        Args:
            even: every rank holds rows of its own; otherwise all hold the whole weight.
        """
        positions = _ROWS[operator_name(node)]
        if even:
            for position in positions:
                self.cut(node, position, 0, split.segments)
        elif any(isinstance(n, fx.Node) and n.op != "get_attr" for n in node.args[1:]):
            raise Whole(f"{operator_name(node)} reads a weight that is computed")

        def change(on: Applying) -> None:
            args = [*node.args]
            assert isinstance(args[0], fx.Node)
            args[0] = on.copied(args[0])
            for position in positions if not even else ():
                if position < len(args) and isinstance(used := args[position], fx.Node):
                    args[position] = on.own(used, split.at(0))
            on.rw.set_args(node, *args, **node.kwargs)

        self.step(change)

    def columns(self, node: fx.Node, split: Split) -> None:
        """A product whose input is cut along its features: partial sums, added up behind it.

        Raises:
            Whole: for codes that cannot be cut there.
        """
        quantized = operator_name(node) == "ftc.quantized_linear"
        if quantized:
            self._codes(node, split)
        else:
            self.cut(node, 1, 1, split.segments)
        place = 4 if quantized else 2
        peaks = quantized and argument(node, "activation") == "row"

        def change(on: Applying) -> None:
            args, rw = [*node.args], on.rw
            bias = args[place] if place < len(args) else None
            product = node
            if peaks:
                with rw.after(node):
                    peak = rw.call(ops.parallel_peak.default, args[0])
                    product = rw.call(ops.quantized_linear_at.default, args[0], peak, *args[1:4],
                                      *args[5:7])  # fmt: skip
            elif bias is not None:
                args[place] = None
                rw.set_args(node, *args[: None if quantized else 2], **node.kwargs)
            users = list(node.users)
            with rw.after(product):
                total = rw.call(ops.parallel_reduce.default, product)
                if bias is not None:
                    total = rw.call(aten.add.Tensor, total, bias)
            on.move(node, total, users)

        self.step(change)

    def _codes(self, node: fx.Node, split: Split) -> None:
        activation, group, bits = (argument(node, n) for n in ("activation", "group_size", "bits"))
        if activation == "tensor" or (activation == "block" and not group):
            raise Whole("a product quantizes its input with one step for all features")
        each = 8 // bits  # codes a byte
        if any(n // self.size % each for n in split.segments):
            raise Whole("a product has an odd number of codes on a rank, two a byte")
        self.cut(node, 1, 1, tuple(n // each for n in split.segments))
        if group:
            if any(n // self.size % group for n in split.segments):
                raise Whole(f"a product has groups of {group} that would be cut apart")
            for position in (2, 3):
                self.cut(node, position, 1, tuple(n // group for n in split.segments))

    def same(self, node: fx.Node, used: fx.Node) -> None:
        """``used`` is the same for every part of ``node``."""

        def change(on: Applying) -> None:
            before = on.now(used)
            if (copy := on.copied(before)) is not before:
                on.rw.redirect(before, copy, [node])

        self.step(change)

    def own(self, node: fx.Node, used: fx.Node, split: Split) -> None:
        """``used`` has as many rows as what is cut at ``node``: each part meets its own."""
        alone = used.op == "get_attr" and len(used.users) == 1
        if alone and split.even(self.size) and split.outer == 1:
            self.shards[used] = Shard(split.axis, split.segments, self.size)
            self.uses[used] = {node}
            return

        def change(on: Applying) -> None:
            before = on.now(used)
            on.rw.redirect(before, on.own(before, split), [node])

        self.step(change)

    def arguments(self, node: fx.Node, given: Mapping[int, Any]) -> None:
        """Other sizes as arguments of ``node``, by position."""
        assert isinstance(node.target, OpOverload)
        names = [declared.name for declared in node.target._schema.arguments]

        def change(on: Applying) -> None:
            args = [argument(node, name) for name in names[: max(len(node.args), max(given) + 1)]]
            with on.rw.at(node):
                for position, wanted in given.items():
                    args[position] = on.argument(node, wanted)
            kwargs = {k: v for k, v in node.kwargs.items() if k not in names[: len(args)]}
            on.rw.set_args(node, *args, **kwargs)

        self.step(change)
