"""What reaches what: one forward pass that roles of weights are read from.

For every value, the *last stops* are the products and attention cores whose
result reaches it with no other of them between. Along a residual stream their
number grows; past :data:`MANY` of them it is not counted any further
(``None``), which keeps the pass linear in the graph.

An attention core is ``scaled_dot_product_attention``, or what that abbreviates:

    softmax(scale * Q K^T + mask) V

two products of activations with a softmax between.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ftc.graph.cost import argument, operator_name
from ftc.graph.program import Program

from .weights import PASSING, WeightProduct, Weights, weight_products

MANY = 8
Stops = frozenset[fx.Node] | None
Masking = Literal["added", "subtracted", "keeps", "blocks"]
"""What a mask does: it is added to the scores or taken from them, or is true at places that stay
or that go."""
_NONE: frozenset[fx.Node] = frozenset()
_SDPA = "aten.scaled_dot_product_attention"
_SOFTMAX = ("aten.softmax", "aten._softmax")
_PAIRS = {"aten.matmul": 0, "aten.bmm": 0, "aten.mm": 0, "aten.baddbmm": 1}
_PROBABILITIES = PASSING | {"aten.slice", "aten.select", "aten.nan_to_num", "aten.where",
                            "aten.masked_fill", "aten.mul"}  # fmt: skip
_MASKING = {"aten.add", "aten.sub", "aten.where", "aten.masked_fill"}
_REGION = 400


@dataclass(frozen=True, slots=True)
class RawCore:
    """An attention core as found: the operands, before they are traced to products.

    Attributes:
        node: yields the attended values.
        q, k, v: operands, each a value with its heads already apart.
        extra: operands of further score terms (relative positions).
        softmax: the softmax node, or None for the fused operator.
        scores: the products of queries and keys; empty for the fused operator.
        mask: what is added to or fills the scores, or None.
        masks: all of them, each with what it does.
        causal: a flag of the fused operator says that no query sees a later key.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    extra: tuple[fx.Node, ...] = ()
    softmax: fx.Node | None = None
    scores: frozenset[fx.Node] = _NONE
    mask: fx.Node | None = None
    masks: tuple[tuple[fx.Node, Masking], ...] = ()
    causal: bool = False


class Flow:
    """Products, attention cores and last stops of a program.

    Attributes:
        products: products with a weight, by node.
        units: the products that are whole: not the first factor of another.
        cores: attention cores by node, in graph order.
        order: position of every node.
    """

    def __init__(self, program: Program) -> None:
        self.weights = Weights(program)
        self.products = weight_products(program)
        factors = {p.first.node for p in self.products.values() if p.first}
        self.units: list[WeightProduct] = [p for n, p in self.products.items() if n not in factors]
        self.cores: dict[fx.Node, RawCore] = {}
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}
        self._last: dict[fx.Node, Stops] = {}
        self._scores: dict[fx.Node, frozenset[fx.Node]] = {}
        self._softmax: dict[fx.Node, fx.Node] = {}
        for node in self.order:
            self._visit(node)

    def last(self, node: Any) -> Stops:
        """Last stops of a value; None when they are too many to name."""
        return self._last.get(node, _NONE)

    def computed(self, node: Any) -> bool:
        """Whether any product comes before ``node``."""
        return self.last(node) != _NONE

    def is_stop(self, node: fx.Node) -> bool:
        """Whether ``node`` is a product with a weight or an attention core."""
        return node in self.products or node in self.cores

    def behind(self, starts: Iterable[Any], *, until: Iterable[Any] = ()) -> set[fx.Node]:
        """Nodes between the last stops and ``starts``, the starts included, the stops not.

        Only values that some product comes before are entered, and at most a
        few hundred, so that shared tables of positions and masks cost nothing.
        """
        closed = set(until)
        seen: set[fx.Node] = set()
        stack = [s for s in starts if isinstance(s, fx.Node)]
        while stack and len(seen) < _REGION:
            node = stack.pop()
            if node in seen or node in closed or self.is_stop(node) or not self.computed(node):
                continue
            seen.add(node)
            stack.extend(node.all_input_nodes)
        return seen

    def read_in(self, nodes: Iterable[fx.Node]) -> frozenset[str]:
        """Logical names of the weights that ``nodes`` read themselves."""
        names = (self.weights.name(a) for node in nodes for a in node.all_input_nodes)
        return frozenset(name for name in names if name)

    def _visit(self, node: fx.Node) -> None:
        if node in self.products:
            self._last[node] = frozenset({node})
            return
        if node.op != "call_function":
            return
        name = operator_name(node)
        if (core := self._core(node, name)) is not None:
            self.cores[node] = core
            self._last[node] = frozenset({node})
            return
        self._last[node] = self._union(node)
        self._follow_scores(node, name)

    def _union(self, node: fx.Node) -> Stops:
        stops: frozenset[fx.Node] = _NONE
        for used in node.all_input_nodes:
            last = self._last.get(used, _NONE)
            if last is None:
                return None
            stops = stops | last if stops else last
        return stops if len(stops) <= MANY else None

    def _follow_scores(self, node: fx.Node, name: str) -> None:
        """Carries along which products of activations a value holds, and which softmax it is."""
        inputs = node.all_input_nodes
        pair = _operands(node, name)
        if pair and any(self.computed(p) for p in pair) and not any(map(self.weights.name, pair)):
            self._scores[node] = frozenset({node})
            return
        scores = _NONE.union(*(self._scores.get(n, _NONE) for n in inputs))
        if name in _SOFTMAX and scores:
            self._softmax[node] = node
        elif scores and len(scores) <= MANY:
            self._scores[node] = scores
        if name in _PROBABILITIES:
            for used in inputs:
                if used in self._softmax:
                    self._softmax[node] = self._softmax[used]

    def _core(self, node: fx.Node, name: str) -> RawCore | None:
        args: Any = node.args
        if name == _SDPA:
            mask = args[3] if len(args) > 3 else node.kwargs.get("attn_mask")
            if not isinstance(mask, fx.Node):
                causal = bool(argument(node, "is_causal"))
                return RawCore(node, args[0], args[1], args[2], causal=causal)
            how: Masking = "keeps" if _is_boolean(mask) else "added"
            return RawCore(node, args[0], args[1], args[2], mask=mask, masks=((mask, how),))
        pair = _operands(node, name)
        if pair is None:
            return None
        softmax = self._softmax.get(pair[0]) or self._softmax.get(pair[1])
        if softmax is None:
            return None
        value = pair[1] if pair[0] in self._softmax else pair[0]
        return self._decomposed(node, softmax, value)

    def _decomposed(self, node: fx.Node, softmax: fx.Node, value: fx.Node) -> RawCore:
        above: Any = softmax.args[0]
        scores = self._scores.get(above, _NONE)
        ordered = sorted(scores, key=self.order.__getitem__)
        sides = [_query_key(score, softmax) for score in ordered]
        extra = tuple(side for pair in sides[1:] for side in pair)
        masks = (*self._masks(self.behind([above], until=scores)), *_added(ordered))
        mask = masks[0][0] if masks else None
        return RawCore(node, *sides[0], value, extra, softmax, scores, mask, masks)

    def _masks(self, region: set[fx.Node]) -> Iterator[tuple[fx.Node, Masking]]:
        """Values without a product before them that are added to or fill the scores, in order."""
        for node in sorted(region, key=self.order.__getitem__):
            if operator_name(node) in _MASKING:
                for used in node.all_input_nodes:
                    fake = used.meta.get("val")
                    wide = isinstance(fake, Tensor) and fake.dim() >= 2
                    if wide and not self.computed(used) and used.op != "get_attr":
                        yield used, _masking(node, used, self.computed(node.args[1]))


def _added(scores: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, Masking]]:
    """What products of queries and keys add by themselves."""
    for score in scores:
        if operator_name(score) == "aten.baddbmm" and argument(score, "beta") == 1:
            yield score.all_input_nodes[0], "added"


def _masking(node: fx.Node, mask: fx.Node, first_kept: bool) -> Masking:
    """What ``mask`` does in ``node``; ``first_kept``: a ``where`` keeps scores where it is true."""
    name = operator_name(node)
    if name == "aten.where" and node.args[0] is mask:
        return "keeps" if first_kept else "blocks"
    if name == "aten.masked_fill":
        return "blocks"
    return "subtracted" if name == "aten.sub" else "added"


def _is_boolean(node: fx.Node) -> bool:
    fake = node.meta.get("val")
    return isinstance(fake, Tensor) and fake.dtype == torch.bool


def _operands(node: fx.Node, name: str) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product of two computed values."""
    args: Any = node.args
    if name == "aten.einsum":
        pair = args[1]
    elif name in _PAIRS:
        pair = args[_PAIRS[name] : _PAIRS[name] + 2]
    else:
        return None
    return (pair[0], pair[1]) if len(pair) == 2 else None


def _query_key(score: fx.Node, softmax: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Which factor of the scores holds the queries: the one without the axis softmax runs over."""
    name = operator_name(score)
    pair = _operands(score, name)
    assert pair is not None
    if name != "aten.einsum":
        return pair  # rows are queries: softmax runs over the columns
    terms, _, result = str(score.args[0]).replace(" ", "").partition("->")
    left, right = terms.split(",")
    axis: Any = softmax.args[1]
    letter = result[axis]
    return (pair[1], pair[0]) if letter in left and letter not in right else pair
