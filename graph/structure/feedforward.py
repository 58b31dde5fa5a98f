"""Feed-forward blocks: products joined by a nonlinearity, back onto their own residual stream.

    y = x + W_down f(W_up n(x))                      plain
    y = x + W_down (f(W_gate n(x)) * W_up n(x))      gated

``n`` is a norm or nothing. The return to the residual stream is what tells a
feed-forward block from a classifier's or language model's head, which joins two
products by a nonlinearity too but adds nothing back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import fx

from ftc.graph.cost import operator_name

from .flow import Flow
from .weights import WeightProduct

NONLINEAR = frozenset(
    f"aten.{name}"
    for name in ("relu", "gelu", "silu", "sigmoid", "tanh", "elu", "selu", "celu", "leaky_relu",
                 "hardtanh", "relu6", "softplus", "mish", "hardswish", "hardsigmoid", "prelu",
                 "erf", "rrelu", "glu", "log_sigmoid", "softsign", "clamp_min", "square")
)  # fmt: skip
_NEAR = 48


@dataclass(frozen=True, slots=True)
class FeedForward:
    """One feed-forward block.

    Attributes:
        up: nodes of the products that are not activated (gated), or of all first
            products (plain, or gate and up fused into one).
        gate: nodes of the products whose result the nonlinearity is applied to,
            when others are not; empty for a plain block.
        down: nodes of the products that take the result.
        activation: the first node of the nonlinearity.
        residual: the addition that returns to the stream.
        names: logical names of all weights that belong to it.
    """

    up: tuple[fx.Node, ...]
    gate: tuple[fx.Node, ...]
    down: tuple[fx.Node, ...]
    activation: fx.Node
    residual: fx.Node
    names: frozenset[str]


def find_feed_forwards(flow: Flow) -> tuple[FeedForward, ...]:
    """The feed-forward blocks, in graph order."""
    by_input: dict[fx.Node, list[WeightProduct]] = {}
    for unit in flow.units:
        if not unit.is_convolution:
            by_input.setdefault(unit.source, []).append(unit)
    found = (_block(flow, source, units) for source, units in by_input.items())
    return tuple(block for block in found if block is not None)


def _block(flow: Flow, source: fx.Node, downs: list[WeightProduct]) -> FeedForward | None:
    stops = flow.last(source)
    if not stops or any(s not in flow.products or flow.products[s].is_convolution for s in stops):
        return None
    inside = flow.behind([source])
    bends = [n for n in inside if operator_name(n) in NONLINEAR]
    if not bends:
        return None
    ups = sorted(stops, key=flow.order.__getitem__)
    residual = _residual(flow, [d.node for d in downs], [flow.products[u].source for u in ups])
    if residual is None:
        return None
    activation = min(bends, key=flow.order.__getitem__)
    gated = flow.last(activation) or frozenset()
    gate = tuple(u for u in ups if u in gated) if set(ups) - gated else ()
    nodes = [*ups, *(d.node for d in downs)]
    names = flow.read_in(inside).union(*(flow.products[n].names for n in nodes))
    return FeedForward(
        tuple(u for u in ups if u not in gate), gate, tuple(d.node for d in downs),
        activation, residual, names,
    )  # fmt: skip


def _residual(flow: Flow, downs: list[fx.Node], sources: list[fx.Node]) -> fx.Node | None:
    """The addition in front of which ``downs`` meet a value that ``sources`` were computed from."""
    stream = _upstream(flow, sources)
    reached: set[fx.Node] = set(downs)
    queue = deque(downs)
    while queue and len(reached) < _NEAR:
        node = queue.popleft()
        for user in sorted(node.users, key=flow.order.__getitem__):
            if user in reached or flow.is_stop(user) or user.op != "call_function":
                continue
            others = [n for n in user.all_input_nodes if n not in reached]
            if operator_name(user) == "aten.add" and any(_is_stream(n, stream) for n in others):
                return user
            reached.add(user)
            queue.append(user)
    return None


def _is_stream(node: fx.Node, stream: set[fx.Node]) -> bool:
    """Whether ``node`` is of the stream, or the stream plus what a parallel branch returned."""
    if node in stream:
        return True
    return operator_name(node) == "aten.add" and any(n in stream for n in node.all_input_nodes)


def _upstream(flow: Flow, sources: list[fx.Node]) -> set[fx.Node]:
    """Values that ``sources`` are computed from, back to the last stops or a fixed distance."""
    seen: set[fx.Node] = set()
    queue = deque(sources)
    while queue and len(seen) < _NEAR:
        node = queue.popleft()
        if node in seen or node.op == "get_attr":
            continue
        seen.add(node)
        if not flow.is_stop(node):
            queue.extend(node.all_input_nodes)
    return seen
