"""Attention cores with the products around them: which feed q, k and v, which takes the result.

Heads are read off shapes. A query ``[..., heads, length, head_dim]`` says both;
with the heads folded into the batch, ``heads = width(q product) / head_dim``.
Grouped keys have ``kv_heads = width(k product) / head_dim``, and one fused
product is ``(heads + 2 kv_heads) * head_dim`` wide.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from ftc.graph.cost import operator_name
from ftc.graph.shapes import VAL

from .causal import Masks
from .flow import Flow, Masking, RawCore
from .operands import before_repetition, score_factors, untransposed
from .rotary import Rotary, find_rotary
from .weights import WeightProduct


@dataclass(frozen=True, slots=True)
class AttentionCore:
    """One attention: where values meet, and the products on its sides.

    Attributes:
        node: yields the attended values.
        q, k, v: nodes of the products that feed each operand; a fused product is
            in all three, a factored or adapted one has several.
        mask: the value added to the scores, or None (no mask, or causal by flag).
        out: nodes of the products that take the result; empty where none does
            before it is added to the residual stream.
        heads, kv_heads, head_dim: 0 where shapes do not tell.
        softmax: its softmax when it is written out, else None.
        names: logical names of all weights that belong to it: those of its
            products, and norms, biases and tables on the way.
        query, key, value: the operands, heads apart: ``[batch, heads, length,
            head_dim]``, or as a written-out attention has them (heads folded into
            the batch, keys with other axes than by a transposition).
        grouped_key, grouped_value: the same with ``kv_heads`` heads, before they
            are repeated for several queries: what a cache keeps. The operands
            themselves where none is repeated, or only before it is turned.
        masks: every value that is added to the scores or excludes places (biases
            by distance are apart from the mask in some models), with what it does.
        scale: what the product of ``query`` and ``key`` is multiplied by; None
            where that is no constant.
        cap: the bound ``c`` of ``c tanh(scores / c)``, None without one.
        causal: no query sees a later key, by flag or by its masks' values at a
            small size; False too where the masks cannot be computed from the inputs.
        rotary: where queries and where keys are turned by their position, or None.
    """

    node: fx.Node
    q: tuple[fx.Node, ...]
    k: tuple[fx.Node, ...]
    v: tuple[fx.Node, ...]
    mask: fx.Node | None
    out: tuple[fx.Node, ...]
    heads: int
    kv_heads: int
    head_dim: int
    softmax: fx.Node | None
    names: frozenset[str]
    query: fx.Node
    key: fx.Node
    value: fx.Node
    grouped_key: fx.Node
    grouped_value: fx.Node
    masks: tuple[tuple[fx.Node, Masking], ...]
    scale: float | None
    cap: float | None
    causal: bool
    rotary: tuple[Rotary, Rotary] | None


def find_attention(flow: Flow, masks: Masks) -> tuple[AttentionCore, ...]:
    """The attention cores, in graph order."""
    takers: dict[fx.Node, list[tuple[WeightProduct, set[fx.Node]]]] = {n: [] for n in flow.cores}
    for unit in flow.units:
        for stop in flow.last(unit.source) or ():
            if stop in takers:
                path = flow.behind([unit.source])
                if not any(_adds_streams(flow, node) for node in path):
                    takers[stop].append((unit, path))
    return tuple(_core(flow, raw, takers[raw.node], masks) for raw in flow.cores.values())


def _core(
    flow: Flow, raw: RawCore, takers: list[tuple[WeightProduct, set[fx.Node]]], masks: Masks
) -> AttentionCore:
    q, k, v = (_feeding(flow, side) for side in (raw.q, raw.k, raw.v))
    extra = [p for side in raw.extra for p in _feeding(flow, side)]
    region = flow.behind([raw.q, raw.k, raw.v, *raw.extra])
    if raw.softmax is not None:
        region |= flow.behind([raw.softmax], until=raw.scores)
        region |= flow.behind(raw.node.all_input_nodes, until=[raw.softmax, raw.v])
    for _, path in takers:
        region |= path
    products = [*q, *k, *v, *extra, *(unit.node for unit, _ in takers)]
    names = flow.read_in(region).union(*(flow.products[p].names for p in products))
    heads, kv_heads, head_dim = _heads(flow, raw, q, k)
    out = tuple(unit.node for unit, _ in takers)
    key = untransposed(raw.k) if raw.softmax is not None else raw.k
    scale, cap = score_factors(flow, raw, head_dim)
    turns = [find_rotary(flow, flow.behind([side])) for side in (raw.q, raw.k)]
    return AttentionCore(
        raw.node, q, k, v, raw.mask, out, heads, kv_heads, head_dim, raw.softmax, names,
        query=raw.q, key=key, value=raw.v,
        grouped_key=before_repetition(key, heads, kv_heads),
        grouped_value=before_repetition(raw.v, heads, kv_heads),
        masks=raw.masks, scale=scale, cap=cap,
        causal=raw.causal or masks.is_causal(raw.masks),
        rotary=(turns[0], turns[1]) if turns[0] and turns[1] else None,
    )  # fmt: skip


def _feeding(flow: Flow, side: fx.Node) -> tuple[fx.Node, ...]:
    """Products among the last stops of an operand, in graph order."""
    if side in flow.products:
        return (side,)
    stops = [s for s in flow.last(side) or () if s in flow.products]
    return tuple(sorted(stops, key=flow.order.__getitem__))


def _adds_streams(flow: Flow, node: fx.Node) -> bool:
    """Whether ``node`` adds two values of one shape that are both computed: a residual addition."""
    if operator_name(node) != "aten.add" or len(node.all_input_nodes) != 2:
        return False
    left, right = node.all_input_nodes
    shapes = [n.meta[VAL].shape for n in (left, right) if isinstance(n.meta.get(VAL), Tensor)]
    tables = any(flow.weights.name(n) for n in (left, right))
    return not tables and len(shapes) == 2 and len(shapes[0]) == len(shapes[1])


def _heads(
    flow: Flow, raw: RawCore, q: tuple[fx.Node, ...], k: tuple[fx.Node, ...]
) -> tuple[int, int, int]:
    """``(heads, kv_heads, head_dim)``, zeros where shapes do not tell."""
    head_dim = _fixed(raw.q, -1)
    if not head_dim:
        return 0, 0, 0
    fused = q == k
    width = flow.products[q[0]].width if q else 0
    heads = _fixed(raw.q, -3) if _dim(raw.q) == 4 and not _is_einsum(raw) else 0
    if not heads and not fused and width % head_dim == 0:
        heads = width // head_dim
    if fused:
        total = width // head_dim
        heads = heads or total // 3
        kv_heads = (total - heads) // 2
    else:
        kv_heads = flow.products[k[0]].width // head_dim if k else 0
    if not 0 < kv_heads <= heads or heads % kv_heads:
        kv_heads = heads
    return heads, kv_heads, head_dim


def _is_einsum(raw: RawCore) -> bool:
    return any(operator_name(score) == "aten.einsum" for score in raw.scores)


def _dim(node: fx.Node) -> int:
    fake = node.meta.get(VAL)
    return fake.dim() if isinstance(fake, Tensor) else 0


def _fixed(node: fx.Node, axis: int) -> int:
    """A size of a node's value; 0 when it is unknown or dynamic."""
    fake = node.meta.get(VAL)
    if not isinstance(fake, Tensor) or fake.dim() < -axis:
        return 0
    size = fake.shape[axis]
    return size if isinstance(size, int) else 0
