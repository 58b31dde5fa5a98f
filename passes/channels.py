"""Channels that can be scaled: inputs of products whose scale can move into what is before them.

Where what comes before a product can be scaled channel by channel, ``x / s`` costs
nothing when the model runs, and neither does the weight that undoes it:

    y = (x / s) (s W)^T

What comes before is found in the graph:

- the gain (and bias) of a norm that nothing but products reads;
- the rows of another product, directly, through a ReLU, or through one factor
  of a gated activation;
- the rows of the product that makes an attention's values, for the product
  that reads the attention's result: attention is linear in its values.

Which ``s`` is best is for the passes to say (:mod:`ftc.passes.smooth`,
:mod:`ftc.passes.awq`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ftc.graph.products import Product, products
from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter
from ftc.graph.shapes import value
from ftc.graph.structure import find_structure

aten = torch.ops.aten

_TRANSPARENT: frozenset[object] = frozenset(
    {aten.dropout.default, aten.contiguous.default, aten.to.dtype}
)
_RESHAPING = _TRANSPARENT | {
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.clone.default,
}


@dataclass(frozen=True)
class Group:
    """Products with one input, and the weights before them that can be scaled instead.

    Attributes:
        x: the input of the products, ``[..., in]``.
        weights: names of the products' weights, each ``[out, in]``.
        sources: names of the tensors to divide by the scale, along axis 0.
        repeat: (heads, kv_heads, head_dim) where ``in`` is heads that share the
            sources' rows in groups (grouped-query attention); None elsewhere.
    """

    x: fx.Node
    weights: tuple[str, ...]
    sources: tuple[str, ...]
    repeat: tuple[int, int, int] | None = None


def find_groups(program: Program) -> Iterator[Group]:
    """The places of a canonical program that can be smoothed."""
    by_input: dict[fx.Node, list[Product]] = {}
    for product in products(program):
        by_input.setdefault(product.x, []).append(product)
    values = _values_of_cores(program)
    for x, readers in by_input.items():
        weights = tuple(product.weight for product in readers)
        if set(x.users) != {product.node for product in readers}:
            continue
        if not all(_is_private(product.node.args[1]) for product in readers):
            continue
        if sources := _sources(x):
            yield Group(x, weights, sources)
        elif (core := _past(x, _RESHAPING)) in values:
            sources, repeat = values[core]
            yield Group(x, weights, sources, repeat)


def _sources(x: fx.Node) -> tuple[str, ...]:
    """Tensors whose axis 0 scales the channels of ``x`` and nothing else; empty if none do."""
    node = _past(x, _TRANSPARENT)
    if node is not x and len(node.users) > 1:
        return ()
    if node.target is aten.layer_norm.default:
        return _private_tensors(node.args[2:4])
    if node.target is aten.linear.default:
        return _private_tensors(node.args[1:3])
    if node.target is aten.relu.default:
        inner = node.args[0]
        return _sources(inner) if isinstance(inner, fx.Node) and _only_reader(inner) else ()
    if node.target is not aten.mul.Tensor:
        return ()
    factors = [f for f in node.args if isinstance(f, fx.Node)]
    for factor in factors:
        if factor.op == "get_attr" and value(factor).dim() == 1:
            return _private_tensors([factor])
    for factor in factors:
        behind = _past(factor, _TRANSPARENT)
        if _only_reader(factor) and behind.target is aten.linear.default and _only_reader(behind):
            return _private_tensors(behind.args[1:3])
    return ()


def _values_of_cores(
    program: Program,
) -> dict[fx.Node, tuple[tuple[str, ...], tuple[int, int, int]]]:
    """For each attention core: the tensors that make its values alone, and its heads."""
    found = {}
    for core in find_structure(program).cores:
        if len(core.v) != 1 or core.v[0] in (*core.q, *core.k) or not core.head_dim:
            continue
        product = core.v[0]
        used = core.node.args[2] if len(core.node.args) > 2 else None
        if core.softmax is not None or product.target is not aten.linear.default:
            continue
        if not isinstance(used, fx.Node) or _past(used, _RESHAPING) is not product:
            continue
        if tensors := _private_tensors(product.args[1:3]):
            found[core.node] = (tensors, (core.heads, core.kv_heads, core.head_dim))
    return found


def _past(node: fx.Node, skipped: frozenset[object]) -> fx.Node:
    """The first node at or before ``node`` that is not one of ``skipped``, along single readers."""
    while node.target in skipped and len(node.args[0].users) == 1:  # type: ignore[union-attr]
        node = node.args[0]  # type: ignore[assignment]
    return node


def _only_reader(node: object) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _is_private(node: object) -> bool:
    """Whether ``node`` reads a tensor for one node alone."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and len(node.users) == 1


def _private_tensors(nodes: Iterable[object]) -> tuple[str, ...]:
    """Names of the tensors that ``nodes`` read; empty unless each is read there alone."""
    present = [node for node in nodes if node is not None]
    if not present or not all(map(_is_private, present)):
        return ()
    return tuple(str(node.target) for node in present if isinstance(node, fx.Node))


def scale_channels(rw: Rewriter, group: Group, scale: Tensor) -> None:
    """Divides the input of ``group`` by ``scale`` ``[in]``, and multiplies the weights by it.

    Args:
        scale: above 0; where heads share the sources' rows, the same for all of a
            group's heads, as :func:`shared` makes it.
    """
    program = rw.program
    narrow = scale if group.repeat is None else _one_of(scale, group.repeat)
    for name in group.sources:
        source = program.tensor(name).detach()
        rw.set_tensor(name, source / narrow.view(-1, *[1] * (source.dim() - 1)))
    for name in group.weights:
        rw.set_tensor(name, program.tensor(name).detach() * scale)


def shared(channels: Tensor, group: Group) -> Tensor:
    """The largest of ``channels`` ``[in]`` over heads that share a row of the sources, ``[in]``."""
    if group.repeat is None:
        return channels
    heads, kv_heads, dim = group.repeat
    most = channels.view(kv_heads, heads // kv_heads, dim).amax(1, keepdim=True)
    return most.expand(kv_heads, heads // kv_heads, dim).flatten()


def _one_of(wide: Tensor, repeat: tuple[int, int, int]) -> Tensor:
    """``[heads * dim]`` -> ``[kv_heads * dim]`` of what is equal in the heads of a group."""
    heads, kv_heads, dim = repeat
    return wide.view(kv_heads, heads // kv_heads, dim)[:, 0].flatten()
