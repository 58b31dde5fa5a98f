"""How a cut goes through operators that move elements: views, slices, copies, joins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from ftc.graph.cost import argument, operator_name
from ftc.graph.shapes import value

from .split import Split, Whole, pieces, viewed
from .spread import Run, rule
from .spread_edits import QueriesEach, Scaled, SizeOf


@rule("view", "reshape", "_unsafe_view")
def _view(run: Run, node: fx.Node) -> Split:
    out = viewed(run.one(node.args[0]), *_shapes(run, node), run.on.size)
    given: Any = node.args[1]
    sizes = [_told(run, node, i) if size == -1 and i != out.axis else size
             for i, size in enumerate(given)]  # fmt: skip
    sizes[out.axis] = -1
    if sizes != [*given]:
        run.edits.arguments(node, {1: sizes})
    return out


def _told(run: Run, node: fx.Node, axis: int) -> Any:
    """The size of an axis of a view without -1, which another axis needs."""
    size, source = value(node).shape[axis], node.args[0]
    if isinstance(size, int):
        return size
    assert isinstance(source, fx.Node)
    for i, known in enumerate(value(source).shape):
        if str(known) == str(size) and i != run.one(source).axis:
            return SizeOf(i)
    raise Whole(f"{operator_name(node)} has two sizes that it does not tell")


@rule("flatten")
def _flatten(run: Run, node: fx.Node) -> Split:
    return viewed(run.one(node.args[0]), *_shapes(run, node), run.on.size)


@rule("unflatten")
def _unflatten(run: Run, node: fx.Node) -> Split:
    before, after = _shapes(run, node)
    out = viewed(run.one(node.args[0]), before, after, run.on.size)
    axis, given = argument(node, "dim") % len(before), argument(node, "sizes")
    place = out.axis - axis
    if 0 <= place < len(given):
        if any(size == -1 for i, size in enumerate(given) if i != place):
            raise Whole(f"{operator_name(node)} has two sizes that it does not tell")
        run.edits.arguments(node, {2: [-1 if i == place else s for i, s in enumerate(given)]})
    return out


@rule("transpose", "swapaxes")
def _transpose(run: Run, node: fx.Node) -> Split:
    split, rank = run.one(node.args[0]), len(run.on.shape(node))
    a, b = (axis % rank for axis in node.args[1:3] if isinstance(axis, int))
    return split.at({a: b, b: a}.get(split.axis, split.axis))


@rule("permute")
def _permute(run: Run, node: fx.Node) -> Split:
    split, order = run.one(node.args[0]), argument(node, "dims")
    return split.at([axis % len(order) for axis in order].index(split.axis))


@rule("unsqueeze")
def _unsqueeze(run: Run, node: fx.Node) -> Split:
    split, axis = run.one(node.args[0]), argument(node, "dim") % len(run.on.shape(node))
    return split.at(split.axis + (axis <= split.axis))


@rule("squeeze", "select")
def _select(run: Run, node: fx.Node) -> Split:
    split, axis = run.one(node.args[0]), argument(node, "dim")
    if not isinstance(axis, int):
        raise Whole(f"{operator_name(node)} may take away the axis that is cut")
    axis %= len(run.on.shape(node.args[0]))
    if axis == split.axis:
        raise Whole(f"{operator_name(node)} takes one of what is cut")
    return split.at(split.axis - (axis < split.axis))


@rule("index")
def _index(run: Run, node: fx.Node) -> Split:
    split, given = run.one(node.args[0]), argument(node, "indices")
    places = [i for i, each in enumerate(given) if each is not None]
    if len(places) != 1 or places[0] == split.axis or given[places[0]] in run.cut:
        raise Whole("aten.index takes some of what is cut")
    grown = len(run.on.shape(given[places[0]])) - 1
    return split.at(split.axis + (grown if places[0] < split.axis else 0))


@rule("gather")
def _gather(run: Run, node: fx.Node) -> Split:
    split, places = run.one(node.args[0]), argument(node, "index")
    before, after = _shapes(run, node)
    axis = argument(node, "dim") % len(before)
    if axis == split.axis or before[split.axis] != after[split.axis]:
        raise Whole("aten.gather takes some of what is cut")
    if places not in run.cut:
        run.edits.own(node, places, split)
    elif run.one(places).axis != split.axis or not run.one(places).like(split, run.on.size):
        raise Whole("aten.gather joins values that are cut in different places")
    return split


@rule("unbind")
def _unbind(run: Run, node: fx.Node) -> list[Split]:
    one = _select(run, node)
    assert isinstance(one, Split)
    return [one] * len(value(node))


@rule("expand", "broadcast_to")
def _expand(run: Run, node: fx.Node) -> Split:
    before, after = _shapes(run, node)
    split, given = run.one(node.args[0]), argument(node, "size")
    shift = len(after) - len(before)
    out, sizes = split.at(split.axis + shift), [*given]
    grown = [i for i in range(shift, len(after)) if before[i - shift] != after[i]]
    few = not split.repeated and not run.even(split)
    sizes[out.axis] = -1
    if few and grown in ([out.axis], [out.axis + 1]):  # a few key heads, for all queries
        if grown == [out.axis] and split.length > 1:
            raise Whole(f"{operator_name(node)} repeats what is cut")
        sizes[grown[0]] = _queries_each(run, node, split.axis)
        heads = after[out.axis]
        single = Split(out.axis, (heads,), (heads,), split.outer)
        out = single if grown == [out.axis] else replace(out, repeated=True)
    elif out.axis in grown:
        raise Whole(f"{operator_name(node)} repeats what is cut")
    if sizes != [*given]:
        run.edits.arguments(node, {1: sizes})
    return out


@rule("repeat_interleave")
def _repeat(run: Run, node: fx.Node) -> Split:
    split, times = run.one(node.args[0]), argument(node, "repeats")
    axis = argument(node, "dim")
    if not isinstance(times, int) or not isinstance(axis, int) or len(split.segments) > 1:
        raise Whole(f"{operator_name(node)} repeats what is cut")
    if axis % len(run.on.shape(node)) != split.axis:
        return split
    heads = split.length * times
    if run.even(split):
        return replace(split, segments=(heads,))
    if split.repeated or split.outer != 1:
        raise Whole(f"{operator_name(node)} repeats what is cut")
    run.edits.arguments(node, {1: _queries_each(run, node, split.axis)})
    return Split(split.axis, (heads,), (heads,))


def _queries_each(run: Run, node: fx.Node, axis: int) -> QueriesEach:
    """How often an own key head is repeated: once for each own query, known before ``node``."""
    if run.queries is None or run.on.order[run.queries[0]] > run.on.order[node]:
        raise Whole("there are fewer key heads than ranks, in a form that is not known")
    return QueriesEach(*run.queries, axis)


@rule("slice")
def _slice(run: Run, node: fx.Node) -> Split:
    split, (before, after) = run.one(node.args[0]), _shapes(run, node)
    axis = argument(node, "dim") % len(before)
    if axis != split.axis or before == after:
        return split
    start, stop, step = (argument(node, name) for name in ("start", "end", "step"))
    if any(isinstance(n, fx.Node) for n in (start, stop)) or step != 1:
        raise Whole(f"{operator_name(node)} takes some of what is cut")
    first, last, _ = slice(start, stop).indices(before[axis])
    bounds = sorted({0, first, last, before[axis]})
    out = pieces(split, bounds)[bounds.index(first)]
    _need_even(run, node, split)
    length = before[axis]
    scaled = {2: Scaled(first, axis, length), 3: Scaled(last, axis, length)}
    run.edits.arguments(node, scaled)
    return out


@rule("split", "split_with_sizes", "chunk")
def _split(run: Run, node: fx.Node) -> list[Split]:
    split, made = run.one(node.args[0]), value(node)
    shape = run.on.shape(node.args[0])
    axis = argument(node, "dim") % len(shape)
    if axis != split.axis:
        return [split] * len(made)
    bounds = [0]
    for piece in made:
        bounds.append(bounds[-1] + run.on.number(piece.shape[axis]))
    out = pieces(split, bounds)
    _need_even(run, node, split)
    if operator_name(node) == "aten.chunk":
        if len({piece.length for piece in out}) > 1:
            raise Whole(f"{operator_name(node)} takes pieces of unequal length")
        return out
    given: Any = node.args[1]
    if isinstance(given, (list, tuple)):
        run.edits.arguments(node, {1: [Scaled(n, axis, shape[axis]) for n in given]})
    else:
        run.edits.arguments(node, {1: Scaled(given, axis, shape[axis])})
    return out


def _need_even(run: Run, node: fx.Node, split: Split) -> None:
    if not run.even(split):
        raise Whole(f"{operator_name(node)} takes apart a product with fewer key heads than ranks")


@rule("cat")
def _cat(run: Run, node: fx.Node) -> Split:
    operands = node.all_input_nodes
    out = run.broadcast(node, operands)
    if argument(node, "dim") % len(run.on.shape(node)) == out.axis:
        raise Whole(f"{operator_name(node)} joins what is cut with more")
    run.meet(node, operands, out)
    return out


@rule("stack")
def _stack(run: Run, node: fx.Node) -> Split:
    cuts = [run.one(operand) for operand in node.all_input_nodes]
    first = cuts[0]
    if any(c.axis != first.axis or not c.like(first, run.on.size) for c in cuts):
        raise Whole(f"{operator_name(node)} joins values that are cut in different places")
    axis = argument(node, "dim") % len(run.on.shape(node))
    return first.at(first.axis + (axis <= first.axis))


def _shapes(run: Run, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the first argument, and of the result."""
    return run.on.shape(node.args[0]), run.on.shape(node)
