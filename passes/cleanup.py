"""Cleanup: dead code, operators that do nothing, and values that are computed twice.

One pass from front to back reaches the fixed point: when a node is looked at,
its arguments are in their final form, so an identity (a slice that takes all, a
cast to the same dtype) hands its argument on, and a node whose operator and
arguments were seen before (hash consing) is the earlier node. Then one pass
from back to front drops what nobody reads. Time is linear in the graph.

What stays: dropout that is switched off (training needs it), everything random,
``detach``, and ``contiguous`` wherever a ``view`` behind it may need the strides.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from ftc.graph import shapes
from ftc.graph.rewriter import Rewriter
from ftc.graph.words import plural

from .base import Context, Effect, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Cleanup(Pass):
    """Remove dead code, operators that do nothing, and repeated computation."""

    name: ClassVar[str] = "cleanup"
    effect: ClassVar[Effect] = Effect.EXACT

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Forward: identities and repeats; backward: dead code."""
        dead = drop_dead(rw)
        known: dict[Hashable, fx.Node] = {}
        identities = repeats = 0
        for node in list(rw.graph.nodes):
            if node.op != "call_function":
                continue
            if (same := _identity(node)) is not None:
                rw.replace(node, same)
                identities += 1
            elif (first := _first(known, node)) is not node:
                rw.replace(node, first)
                repeats += 1
        dead += drop_dead(rw)
        for count, what, many in (
            (identities, "operator that did nothing", "operators that did nothing"),
            (repeats, "repeated computation", None),
            (dead, "dead node", None),
        ):
            if count:
                rw.note(f"removed {plural(count, what, many)}")


def drop_dead(rw: Rewriter) -> int:
    """Erases what nobody reads; returns how many nodes."""
    count = 0
    for node in reversed(rw.graph.nodes):
        if not node.users and node.op in ("call_function", "get_attr") and not node.is_impure():
            rw.erase(node)
            count += 1
    return count


# Identities where the value has the same type as the argument: they move no element.
_SAME_SHAPE = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default,
    aten.slice.Tensor, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default,
    aten.squeeze.dim, aten.narrow.default, aten.expand_as.default, aten.view_as.default,
})  # fmt: skip
_CASTS = frozenset({
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default,
    aten._to_copy.default,
})  # fmt: skip
_COPIES = frozenset({aten.contiguous.default, aten.clone.default})
_NEUTRAL = {  # operator -> the right operand that changes nothing
    aten.add.Tensor: 0,
    aten.add.Scalar: 0,
    aten.sub.Tensor: 0,
    aten.sub.Scalar: 0,
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.pow.Tensor_Scalar: 1,
}


def _identity(node: fx.Node) -> fx.Node | None:
    """The argument that ``node`` hands on unchanged, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not _same(source, node):
        return None
    target: Any = node.target
    if target in _SAME_SHAPE or (target in _CASTS and _keeps_memory(node)):
        return source
    if target in _COPIES and not _needs_strides(node):
        return source
    if target in _NEUTRAL and len(node.args) > 1:
        other = node.args[1]
        number = isinstance(other, (int, float)) and not isinstance(other, bool)
        return source if number and other == _NEUTRAL[target] else None
    if target is aten.permute.default:
        order: Any = node.args[1]
        return source if [d % len(order) for d in order] == list(range(len(order))) else None
    if target is aten.transpose.int:
        rank = len(shapes.shape(node))
        one, two = node.args[1:3]
        return source if one % rank == two % rank else None  # type: ignore[operator]
    if target is aten.dropout.default and node.args[1] == 0.0:
        return source
    return None


def _same(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are tensors of the same type on the same device."""
    x, y = a.meta.get(shapes.VAL), b.meta.get(shapes.VAL)
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.device == y.device
        and shapes.same_type(x, y)
    )


def _keeps_memory(node: fx.Node) -> bool:
    """Whether a cast asks for no particular memory format."""
    formats = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.memory_format)]
    return all(f is torch.preserve_format for f in formats)


def _needs_strides(node: fx.Node) -> bool:
    """Whether a ``view`` or the caller may see the strides of ``node``, through other views."""
    for user in node.users:
        target = user.target
        if user.op == "output" or target in (aten.view.default, aten.as_strided.default):
            return True
        aliases = isinstance(target, OpOverload) and any(
            r.alias_info is not None for r in target._schema.returns
        )
        if aliases and _needs_strides(user):
            return True
    return False


def _first(known: dict[Hashable, fx.Node], node: fx.Node) -> fx.Node:
    """The first node that computes what ``node`` does: ``node`` itself, if none did."""
    key = _key(node)
    return node if key is None else known.setdefault(key, node)


def _key(node: fx.Node) -> Hashable | None:
    """Equal for nodes that compute the same value; None for one that must stay its own."""
    target = node.target
    if isinstance(target, OpOverload):
        random = torch.Tag.nondeterministic_seeded in target.tags
        if random or target._schema.is_mutable or "empty" in target._schema.name:
            return None
        if "dropout" in target._schema.name:
            return None
    stage = repr(sorted(node.meta.get("custom", {}).items()))
    if target is aten.sym_size.int and isinstance(size := shapes.value(node), torch.SymInt):
        # one symbol is one size, whichever input it is read from
        return (target, str(size.node.expr), stage)
    return (target, _frozen(node.args), _frozen(node.kwargs), stage)


def _frozen(value: Any) -> Hashable:
    """A hashable stand-in: nodes by identity, constants by type and text (``1`` is not ``1.0``)."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(value[key])) for key in sorted(value))
    if isinstance(value, slice):
        return ("slice", _frozen((value.start, value.stop, value.step)))
    return (type(value), repr(value))
