"""Narrow: rows that nobody reads are not computed.

A classifier reads one token's state of the last layer, ``select(y, 1, 0)``, and what
follows the last attention treats each token alone:

    f(x)[:, i] = f(x[:, i])        for products, norms, activations, sums, dropout

so the read moves towards the inputs, and the last feed-forward block runs over one
token a text. Of a model of six layers that is an eighth of all products, forward and
backward. A read stops where other rows are needed as well: at attention, or at a value
that something else reads whole.

Dropout draws its noise for all rows, as before, and its kept rows are read:
``dropout(x) = x * dropout(1)``. So a run draws the same numbers as plain torch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .cost import argument, operator_name
from .program import Program
from .restrict import END
from .rewriter import Rewriter
from .shapes import VAL, same_size, shape, value

aten = torch.ops.aten
_AXIS = 1
_READS = (aten.select.int, aten.slice.Tensor, aten.index.Tensor)
_COPIES = frozenset({"aten.to", "aten._to_copy", "aten.clone", "aten.contiguous"})
_PRODUCTS = frozenset({"aten.linear", "ftc.quantized_linear"})


def narrow(program: Program) -> Program:
    """Moves every read of rows ``[batch, sequence, width]`` as far to the front as it goes.

    Args:
        program: a clone that nobody else holds; its graph is changed.

    Returns:
        The program; each output is what it was, to rounding.
    """
    waiting = [n for n in program.graph.nodes if _is_read(n) and _rule(_source(n)) is not None]
    if not waiting:
        return program  # which spares the fake values
    rw = Rewriter(program, "narrow")
    while waiting:
        read = waiting.pop()
        if not read._erased:
            waiting += _moved(rw, read)
    return program


def _is_read(node: fx.Node) -> bool:
    """Whether it picks rows along the sequence, and the same of each width."""
    if node.op != "call_function" or node.target not in _READS or node.kwargs:
        return False
    if node.target is aten.index.Tensor:
        places: Any = node.args[1]
        return len(places) == _AXIS + 1 and None not in places
    return bool(len(node.args) > 1 and node.args[1] == _AXIS and len(node.args) < 5)


def _source(read: fx.Node) -> fx.Node:
    source = read.args[0]
    assert isinstance(source, fx.Node)
    return source


def _moved(rw: Rewriter, read: fx.Node) -> list[fx.Node]:
    """Moves the read before its source, where it can; returns the reads of the source's inputs."""
    source = _source(read)
    rule = _rule(source)
    reads = [user for user in source.users if _same(user, read)]
    if rule is None or len(reads) < len(source.users) or not _by_rows(source):
        return []
    if source.target is aten.dropout.default and source.args[2] and not _known(rw, source):
        return []
    made: dict[fx.Node, fx.Node] = {}

    def take(x: fx.Node) -> fx.Node:
        if x not in made and len(shape(x)) == 3:
            made[x] = rw.call(read.target, x, *read.args[1:])  # type: ignore[arg-type]
        return made.get(x, x)

    first = min(reads)
    with rw.at(first, like=source):
        new = rule(rw, source, take)
    for each in reads:
        rw.replace(each, new)
    rw.erase(source)
    return list(made.values())


def _same(node: fx.Node, read: fx.Node) -> bool:
    return node.target is read.target and node.args == read.args


def _by_rows(node: fx.Node) -> bool:
    """Whether each row of the value hangs on the same row of the inputs, and on nothing else.

    An input has the rows of the value, or none: a number, or one number a column.
    """
    fake = node.meta.get(VAL)
    if not isinstance(fake, Tensor) or fake.dim() != 3:
        return False
    product = operator_name(node) in _PRODUCTS
    inputs = (each.meta.get(VAL) for each in node.all_input_nodes[: 1 if product else None])
    return all(
        given.dim() < 2
        or (given.dim() == 3 and all(map(same_size, given.shape[:2], fake.shape[:2])))
        for given in inputs
        if isinstance(given, Tensor)
    )


Take = Callable[[fx.Node], fx.Node]
Rule = Callable[[Rewriter, fx.Node, Take], fx.Node]


def _rule(node: fx.Node) -> Rule | None:
    """How to compute some rows of ``node``; None where that takes more than their inputs' rows."""
    name = operator_name(node) if node.op == "call_function" else ""
    target: Any = node.target
    if name == "aten.slice":
        return _source_rows if node.args[1:] == (0, 0, END) else None
    if name == "aten.dropout":
        return _dropout if node.args[2] else _again
    if name in _PRODUCTS:
        return _product if name == "aten.linear" or _rowwise(node) else None
    if name == "aten.layer_norm":
        sizes: Any = node.args[1]
        return _again if len(sizes) == 1 else None
    if name == "aten.mean":
        return _again if node.args[1:] in (([-1], True), ([2], True)) else None
    changes = getattr(getattr(target, "_schema", None), "is_mutable", True)
    by_element = name in _COPIES or torch.Tag.pointwise in getattr(target, "tags", ())
    return _again if by_element and not changes else None


def _rowwise(node: fx.Node) -> bool:
    return bool(argument(node, "activation") != "tensor")


def _again(rw: Rewriter, node: fx.Node, take: Take) -> fx.Node:
    """The operator on the rows of each input."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), take)
    if node.target is aten.mean.dim:
        args = (args[0], [-1], True)
    return rw.call(node.target, *args, **kwargs)  # type: ignore[arg-type]


def _source_rows(rw: Rewriter, node: fx.Node, take: Take) -> fx.Node:
    """``x[:][:, i]``, which tracing makes of ``x[:, i]``, is ``x[:, i]``."""
    return take(_source(node))


def _product(rw: Rewriter, node: fx.Node, take: Take) -> fx.Node:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return rw.call(node.target, take(x), *node.args[1:], **node.kwargs)  # type: ignore[arg-type]


def _dropout(rw: Rewriter, node: fx.Node, take: Take) -> fx.Node:
    """``x * noise``, where the noise is drawn when and as often as before."""
    x, p, _ = node.args
    assert isinstance(x, fx.Node)
    rows = take(x)
    with rw.at(node):
        like = next(n for n in rw.graph.nodes if n.op == "placeholder")
        sizes = [_size(rw, node, size) for size in shape(node)]
        ones = rw.call(aten.new_ones.default, like, sizes, dtype=value(node).dtype)
        noise = rw.call(aten.dropout.default, ones, p, True)
    read = next(user for user in node.users)
    kept = rw.call(read.target, noise, *read.args[1:])  # type: ignore[arg-type]
    return rw.call(aten.mul.Tensor, rows, kept)


def _known(rw: Rewriter, node: fx.Node) -> bool:
    """Whether every size of the value is a number, or that of something before it."""
    return all(_place(rw, node, size) is not None for size in shape(node))


def _size(rw: Rewriter, node: fx.Node, size: Any) -> Any:
    """A size of ``node`` as an argument."""
    place = _place(rw, node, size)
    assert place is not None
    return rw.call(aten.sym_size.int, *place) if isinstance(place, tuple) else place


def _place(rw: Rewriter, node: fx.Node, size: Any) -> tuple[fx.Node, int] | int | None:
    """The number that a size of ``node`` is, or the first value and axis that have it.

    That is an input, or where a prompt was put before it what the two were joined to.
    """
    if isinstance(size, int):
        return size
    for earlier in rw.graph.nodes:
        if earlier is node:
            break
        fake = earlier.meta.get(VAL)
        for axis, own in enumerate(fake.shape if isinstance(fake, Tensor) else ()):
            if same_size(own, size):
                return earlier, axis
    return None
