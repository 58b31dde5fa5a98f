"""What each weight of a program is for, found in the graph alone.

No name is looked at and no architecture is known: a weight belongs to
*attention* because its product's values meet in an attention core, to a
feed-forward block (*ffn*) because its product and another are joined by a
nonlinearity and return to the residual stream, to the *head* because no product
comes after it. One weight may have several roles: a tied head is an embedding
too, and a bias inside attention is both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from ftc.graph import shapes
from ftc.graph.adapters import adapter_kind
from ftc.graph.cost import operator_name
from ftc.graph.program import Program

from .attention import AttentionCore, find_attention
from .causal import Masks
from .feedforward import FeedForward, find_feed_forwards
from .flow import Flow
from .layers import Layer, find_layers
from .norms import Norm, find_norms
from .weights import WeightProduct, logical_parameters, read_by, through

ROLES = ("attention", "ffn", "embedding", "norm", "head", "bias", "conv", "product", "adapter")
"""Every role, in the order they are listed to a reader."""

_TABLES = frozenset({"aten.embedding", "ftc.quantized_embedding", "aten.embedding_bag"})


@dataclass(frozen=True, slots=True)
class Structure:
    """Roles, blocks and layers of a program.

    Attributes:
        roles: every role with the logical names that have it (see :data:`ROLES`).
            ``product`` are the weights, without biases, of all products of the model
            itself; an adapter's are in ``adapter``, and in the block they adapt.
        parameters: all logical names.
        products: every product with a weight, by node, in graph order.
        cores: attention cores, in graph order.
        feed_forwards: feed-forward blocks, in graph order.
        norms: normalizations with weights, in graph order.
        layers: repeated blocks, in order.
    """

    roles: Mapping[str, frozenset[str]]
    parameters: frozenset[str]
    products: Mapping[fx.Node, WeightProduct]
    cores: tuple[AttentionCore, ...]
    feed_forwards: tuple[FeedForward, ...]
    norms: tuple[Norm, ...]
    layers: tuple[Layer, ...]

    def of(self, name: str) -> tuple[str, ...]:
        """The roles of one weight, in the order of :data:`ROLES`."""
        return tuple(role for role in ROLES if name in self.roles[role])


def find_structure(program: Program) -> Structure:
    """The structure of ``program``, canonical or not, in time linear in its nodes.

    Gives the program fake values where it has none; changes nothing else.
    """
    if shapes.fake_mode(program.graph) is None:
        shapes.propagate(program.module, program.signature)
    flow = Flow(program)
    cores = find_attention(flow, Masks(program))
    blocks = find_feed_forwards(flow)
    norms = tuple(find_norms(program))
    attention = _names(cores)
    ffn = _names(blocks)
    names = logical_parameters(program)
    adapters = frozenset(name for name in names if adapter_kind(name))
    roles = {
        "attention": attention,
        "ffn": ffn,
        "embedding": frozenset(name for _, name in read_by(program, _TABLES)),
        "norm": _names(norms),
        "head": _head(flow, attention | ffn),
        "bias": _biases(flow),
        "conv": _names(p for p in flow.products.values() if p.is_convolution) - adapters,
        "product": frozenset(p.weight for p in flow.products.values()) - adapters,
        "adapter": adapters,
    }
    layers = find_layers(flow, cores, blocks, norms)
    return Structure(roles, names, flow.products, cores, blocks, norms, layers)


def _names(
    things: Iterable[AttentionCore] | Iterable[FeedForward] | Iterable[Norm]
    | Iterable[WeightProduct],
) -> frozenset[str]:  # fmt: skip
    return frozenset(name for thing in things for name in thing.names)


def _head(flow: Flow, inner: frozenset[str]) -> frozenset[str]:
    """Weights of products that no product comes after, unless they belong to a block.

    An encoder without a head ends in its last block: that is not its head.
    """
    followed: set[fx.Node] = set()
    for node in reversed(flow.order):
        if any(user in flow.products or user in followed for user in node.users):
            followed.add(node)
    last = [u for u in flow.units if u.node not in followed and u.weight not in inner]
    nodes = {u.node for u in last}
    added = (name for node, name in _additions(flow) if node in nodes)
    return frozenset(name for unit in last for name in unit.names).union(added)


def _biases(flow: Flow) -> frozenset[str]:
    """Everything that a product adds: its operator's bias, and weights added to its result."""
    own = frozenset(p.bias for p in flow.products.values() if p.bias)
    return own | frozenset(name for _, name in _additions(flow))


def _additions(flow: Flow) -> Iterable[tuple[fx.Node, str]]:
    """``(product, weight)`` where the graph adds a weight to a product's result in a node apart."""
    for node in flow.order:
        if node.op != "call_function" or operator_name(node) != "aten.add":
            continue
        for value in node.all_input_nodes:
            product = through(value)
            if product in flow.products:
                yield from ((product, n) for n in flow.read_in([node]))
