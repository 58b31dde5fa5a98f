"""Repeated blocks in order: which attention cores and feed-forward blocks make one layer.

Blocks are items of two kinds, attention (A) and feed-forward (F), in graph
order. Module scopes are a hint: the shallowest numbered scope that splits the
items into contiguous groups, none of them a repetition of a smaller one, names
the layers. Without such scopes a layer ends where an A follows an F.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import fx

from ftc.graph.provenance import provenance

from .attention import AttentionCore
from .feedforward import FeedForward
from .flow import Flow
from .norms import Norm

_NUMBERED = re.compile(r"(?:^|\.)\d+(?=\.|$)")
Item = AttentionCore | FeedForward


@dataclass(frozen=True, slots=True)
class Layer:
    """One repeated block.

    Attributes:
        scope: module path that holds it, ``""`` where scopes do not tell.
        cores, feed_forwards: in graph order.
        names: logical names of all its weights, norms included.
    """

    scope: str
    cores: tuple[AttentionCore, ...]
    feed_forwards: tuple[FeedForward, ...]
    names: frozenset[str]


def find_layers(
    flow: Flow,
    cores: Sequence[AttentionCore],
    feed_forwards: Sequence[FeedForward],
    norms: Sequence[Norm],
) -> tuple[Layer, ...]:
    """The layers, in order of their first item."""
    items: list[Item] = sorted([*cores, *feed_forwards], key=lambda i: flow.order[_node(i)])
    scoped = _by_scope(items)
    if scoped is not None:
        members = _members(flow, {scope for scope, _ in scoped})
        return tuple(_layer(s, group, members[s]) for s, group in scoped)
    return tuple(_unscoped(flow, group, norms) for group in _by_order(items))


def _unscoped(flow: Flow, items: list[Item], norms: Sequence[Norm]) -> Layer:
    """A layer that no scope of its own holds: several may run one shared module."""
    own = frozenset(name for item in items for name in item.names)
    scope = _common_scope(items)
    shared = _members(flow, {scope})[scope]
    if scope and {p.weight for p in flow.products.values()} & shared <= own:
        return _layer(scope, items, shared)
    return _layer("", items, _fed(flow, items, norms))


def _common_scope(items: list[Item]) -> str:
    """The deepest numbered scope that holds all of the items, or ``""``."""
    paths = [provenance(_node(i)).module for i in items]
    levels = ({_scope(path, level) for path in paths} for level in range(4))
    common = [scopes.pop() for scopes in levels if len(scopes) == 1]
    return next((scope for scope in reversed(common) if scope), "")


def _layer(scope: str, items: Iterable[Item], names: frozenset[str]) -> Layer:
    items = tuple(items)
    return Layer(
        scope,
        tuple(i for i in items if isinstance(i, AttentionCore)),
        tuple(i for i in items if isinstance(i, FeedForward)),
        names.union(*(i.names for i in items)),
    )


def _node(item: Item) -> fx.Node:
    return item.node if isinstance(item, AttentionCore) else item.down[0]


def _kind(item: Item) -> str:
    return "A" if isinstance(item, AttentionCore) else "F"


def _by_scope(items: list[Item]) -> list[tuple[str, list[Item]]] | None:
    """``(scope, items)`` at the shallowest level of numbered scopes that makes layers; or None."""
    paths = [provenance(_node(i)).module for i in items]
    for level in range(4):
        scopes = [_scope(path, level) for path in paths]
        if not items or any(s is None for s in scopes):
            return None
        runs = [(str(s), [i for _, i in g]) for s, g in
                groupby(zip(scopes, items, strict=True), key=lambda pair: pair[0])]  # fmt: skip
        contiguous = len({s for s, _ in runs}) == len(runs)
        if contiguous and not any(_repeats(group) for _, group in runs):
            return runs
    return None


def _scope(path: str, level: int) -> str | None:
    """``path`` up to its numbered part at ``level``: ``a.0.b.3.c`` at 1 is ``a.0.b.3``."""
    ends = [m.end() for m in _NUMBERED.finditer(path)]
    return path[: ends[level]] if level < len(ends) else None


def _repeats(items: list[Item]) -> bool:
    """Whether the kinds are one sequence two or more times over."""
    kinds = "".join(map(_kind, items))
    return kinds in (kinds + kinds)[1:-1]


def _by_order(items: list[Item]) -> list[list[Item]]:
    """Groups of attention followed by feed-forward; of single items where one kind is missing."""
    mixed = len({_kind(i) for i in items}) == 2
    groups: list[list[Item]] = []
    for item in items:
        starts = _kind(item) == "A" and groups and _kind(groups[-1][-1]) == "F"
        if not groups or starts or not mixed:
            groups.append([])
        groups[-1].append(item)
    return groups


def _members(flow: Flow, scopes: set[str]) -> dict[str, frozenset[str]]:
    """Weights read by the nodes of each scope."""
    found: dict[str, set[str]] = {scope: set() for scope in scopes}
    depths = {scope.count(".") + 1 for scope in scopes}
    for node in flow.order:
        names = flow.read_in([node]) if node.op == "call_function" else ()
        if not names:
            continue
        parts = provenance(node).module.split(".")
        for depth in depths:
            if (scope := ".".join(parts[:depth])) in found and len(parts) >= depth:
                found[scope].update(names)
    return {scope: frozenset(names) for scope, names in found.items()}


def _fed(flow: Flow, items: list[Item], norms: Sequence[Norm]) -> frozenset[str]:
    """Weights of the norms that the items' first products read."""
    firsts = {n for i in items for n in (i.q + i.k + i.v if isinstance(i, AttentionCore)
                                         else i.up + i.gate)}  # fmt: skip
    sources = {flow.products[n].source for n in firsts}
    return frozenset(name for norm in norms if norm.node in sources for name in norm.names)
