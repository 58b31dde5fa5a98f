"""Layers that are alike are traced once: the first of each kind, the others copied from it.

Most of a capture is torch.export tracing the same layer again, with other weights.
While a model is traced with :class:`Repeats`, the first call of each kind of layer is
traced as it is, between two notes; a further call of a layer that is alike, with
arguments of the same form, leaves one node, ``ftc::repeat``. :meth:`Repeats.expand`
then puts a copy of the traced nodes in place of each of those, with the weights of its
own layer, so the graph is the one that a whole trace gives.

Layers are alike when they stand in one list of modules and agree in everything that is
not a tensor's content: class, attributes, shapes, dtypes, hooks (none), and what lists
with an entry for each layer (in a configuration) say of them. A layer may hold its own
number; what it does with it shows in the outputs, so whoever captures with repeats
compares them with the model's (:mod:`ftc.graph.capture.module`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import SymInt, Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ftc.graph.provenance import KEY, provenance, stamp_captured

from .alike import alike_layers

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_results: dict[int, tuple[int, ...]] = {}  # of a kind that is being traced: like which operands


class CannotRepeat(Exception):
    """The traced nodes of a layer cannot be copied for another."""


@torch.library.custom_op("ftc::repeat", mutates_args=())
def repeat(kind: int, layer: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a layer of ``kind`` returns; each result is like one of ``tensors``."""
    raise NotImplementedError("ftc::repeat stands for a layer while a model is traced")


@repeat.register_fake
def _(kind: int, layer: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    contiguous = torch.contiguous_format
    return [torch.empty_like(tensors[i], memory_format=contiguous) for i in _results[kind]]


@torch.library.custom_op("ftc::traced", mutates_args=())
def traced(kind: int, tensors: Sequence[Tensor]) -> None:
    """Notes the operands before, and the results behind, the nodes of a layer."""


@traced.register_fake
def _(kind: int, tensors: Sequence[Tensor]) -> None:
    return None


_REPEAT, _TRACED = torch.ops.ftc.repeat.default, torch.ops.ftc.traced.default
fx.node.has_side_effect(_TRACED)


@dataclass(frozen=True, slots=True)
class _Form:
    """Arguments or results without the tensors' values.

    Attributes:
        spec: how the leaves are nested.
        leaves: of each leaf: itself, or what a tensor is like and which it is.
    """

    spec: TreeSpec
    leaves: tuple[Hashable, ...]


@dataclass(slots=True)
class _Kind:
    """Layers that are alike, and the call of the one that was traced.

    Attributes:
        layers: by path, in order.
        first: the path of the one that was traced.
        given: its arguments, whose sizes may turn out to be equal only later.
        spec: how its results are nested.
        made: its results: ``(place,)`` among operands and then results, or what it is.
    """

    number: int
    layers: dict[str, nn.Module]
    first: str | None = None
    given: Any = None
    spec: TreeSpec | None = None
    made: tuple[Any, ...] = ()


class Repeats:
    """Traces each kind of layer of ``model`` once; a context, while the model is traced."""

    def __init__(self, model: nn.Module) -> None:
        self._kinds = [_Kind(n, layers) for n, layers in enumerate(alike_layers(model))]

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __enter__(self) -> Self:
        for kind in self._kinds:
            for number, (path, layer) in enumerate(kind.layers.items()):
                layer.forward = self._instead(kind, number, path, layer.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for kind in self._kinds:
            _results.pop(kind.number, None)
            for layer in kind.layers.values():
                del layer.forward

    def _instead(
        self, kind: _Kind, number: int, path: str, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, form = _form((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if form is None:
                return forward(*args, **kwargs)
            if kind.first in (None, path):
                kind.first, kind.given, kind.spec = path, (args, kwargs), None
                traced(kind.number, tensors)
                result = forward(*args, **kwargs)
                _note(kind, tensors, result)
                return result
            if kind.spec is None or form != _form(kind.given)[1]:
                return forward(*args, **kwargs)
            known = [*tensors, *repeat(kind.number, number, tensors)]
            made = [known[m[0]] if isinstance(m, tuple) else m for m in kind.made]
            return tree_unflatten(made, kind.spec)

        return call

    def expand(self, module: fx.GraphModule) -> None:
        """Puts the nodes of a kind's first layer in place of each node that stands for another.

        Args:
            module: what the trace gave, with all weights of the model.

        Raises:
            CannotRepeat: where those nodes read a value that is not given to the layer.
        """
        for kind in sorted(self._kinds, key=_depth, reverse=True):  # lists inside layers first
            mine = [n for n in module.graph.nodes if n.target in (_REPEAT, _TRACED)]
            mine = [n for n in mine if n.args[0] == kind.number]
            notes = [n for n in mine if n.target is _TRACED]
            paths = list(kind.layers)
            for call in (n for n in mine if n.target is _REPEAT):
                if len(notes) != 2 or kind.first is None:
                    raise CannotRepeat("a layer ran more than once")
                own = paths[call.args[1]]
                _copy(module.graph, (notes[0], notes[1]), call, kind, own)
            for note in notes:
                module.graph.erase_node(note)


def _depth(kind: _Kind) -> int:
    return next(iter(kind.layers)).count(".")


def _form(given: Any) -> tuple[list[Any], _Form | None]:
    """The leaves, and their form; None where a leaf is no plain value."""
    leaves, spec = tree_flatten(given)
    known: dict[int, int] = {}
    forms: list[Hashable] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            which = known.setdefault(id(leaf), len(known))
            forms.append((which, _sizes(leaf.shape), _sizes(leaf.stride()), leaf.dtype))
        elif isinstance(leaf, SymInt):
            forms.append(str(leaf))
        elif isinstance(leaf, _PLAIN):
            forms.append((type(leaf), leaf))
        else:
            return leaves, None
    return leaves, _Form(spec, tuple(forms))


def _sizes(sizes: Sequence[Any]) -> tuple[str, ...]:
    return tuple(map(str, sizes))


def _note(kind: _Kind, tensors: list[Tensor], result: Any) -> None:
    """Notes what a traced layer returned, where its results are like its operands."""
    leaves, spec = tree_flatten(result)
    like = {(_sizes(t.shape), t.dtype): i for i, t in reversed(list(enumerate(tensors)))}
    made: list[Any] = []
    fresh: list[Tensor] = []
    sources: list[int] = []
    for leaf in leaves:
        same = [i for i, t in enumerate(tensors) if t is leaf]
        source = like.get((_sizes(leaf.shape), leaf.dtype)) if isinstance(leaf, Tensor) else None
        if same:
            made.append((same[0],))
        elif source is not None and leaf.is_contiguous():
            made.append((len(tensors) + len(fresh),))
            fresh.append(leaf)
            sources.append(source)
        elif isinstance(leaf, _PLAIN):
            made.append(leaf)
        else:
            traced(kind.number, [])
            return
    traced(kind.number, fresh)
    kind.spec, kind.made = spec, tuple(made)
    _results[kind.number] = tuple(sources)


def _copy(
    graph: fx.Graph, notes: tuple[fx.Node, fx.Node], call: fx.Node, kind: _Kind, own: str
) -> None:
    """Copies the nodes between two notes to where ``call`` is, with the weights of ``own``."""
    begin, end = notes
    assert kind.first is not None
    first, layer = kind.first, kind.layers[kind.first]
    held = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
    new: dict[fx.Node, fx.Node] = dict(zip(begin.args[1], call.args[2], strict=True))  # type: ignore[arg-type]

    def read(node: fx.Node) -> fx.Node:
        if node in new:
            return new[node]
        name = str(node.target).removeprefix(f"{first}.") if node.op == "get_attr" else ""
        if name in held and str(node.target) != name:
            new[node] = graph.get_attr(f"{own}.{name}")
            new[node].meta = dict(node.meta)
            return new[node]
        if node.op != "get_attr" and isinstance(node.meta.get("val"), Tensor):
            raise CannotRepeat(f"{node.name} is read in {first} and not given to it")
        return node

    with graph.inserting_before(call):
        node = begin.next
        while node is not end:
            following = node.next
            if node.op == "call_function":
                if isinstance(node.target, torch._ops.HigherOrderOperator):
                    raise CannotRepeat(f"{first} runs {node.target}")
                if KEY not in node.meta:
                    stamp_captured(node)
                new[node] = graph.node_copy(node, read)
                place = provenance(node)
                if place.module == first or place.module.startswith(f"{first}."):
                    place = replace(place, module=own + place.module.removeprefix(first))
                new[node].meta[KEY] = place
            node = following
    results: Any = fx.node.map_arg(end.args[1], read)
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise CannotRepeat(f"{user.name} reads all results of {own}")
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(call)
