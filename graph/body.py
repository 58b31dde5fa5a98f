"""The body of a model: what is left without its head, and the states that it ends in.

The head is whatever comes after the last block of attention or feed-forward: the
product to the vocabulary, a transformation before it, a pooler with a classifier.
It is undone from the output, product by product, as long as none of them belongs to
a block; where a head reads one token of each row, its states are those of all tokens.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor, fx

from .program import Program
from .shapes import VAL, same_size
from .structure import Structure, find_structure
from .structure.flow import Flow


def token_states(program: Program, structure: Structure) -> fx.Node | None:
    """The last states of the body, ``[batch, sequence, width]``, after the last norm.

    Args:
        program: whose first input is ``[batch, sequence]``.
        structure: of ``program``.

    Returns:
        The node, or None where nothing of that shape comes from a block.
    """
    flow = Flow(program)
    inner = {
        n for core in structure.cores for n in (core.node, *core.q, *core.k, *core.v, *core.out)
    }
    inner |= {n for block in structure.feed_forwards for n in (*block.up, *block.gate, *block.down)}
    leaves: Any = program.graph.output_node().args[0]
    first = next(iter(program.graph.nodes))
    for leaf in leaves if inner else ():
        found = _per_token(_before_head(leaf, flow, inner), first)
        if found is not None:
            return found
    return None


def classifier_head(program: Program, structure: Structure | None = None) -> frozenset[str]:
    """Parameters of the head of a program that classifies; none of any other program.

    Whoever trains adapters alone trains it too: often it is new, and always the task's own.
    """
    if not program.signature.task.endswith("classification"):
        return frozenset()
    roles = (structure or find_structure(program)).roles
    return program.with_ties(roles["head"] - roles["adapter"])


def _before_head(node: fx.Node, flow: Flow, inner: set[fx.Node]) -> fx.Node:
    """The value that the head of an output reads."""
    while True:
        stops = flow.last(node)
        if not stops or stops & inner or not stops <= flow.products.keys():
            return node
        sources = {flow.products[stop].source for stop in stops}
        if len(sources) > 1:
            return node
        node = sources.pop()


def _per_token(node: fx.Node, first: fx.Node) -> fx.Node | None:
    """The nearest value behind ``node`` with a row for each token of the input ``first``."""
    seen: set[fx.Node] = set()
    queue = deque([node])
    while queue:
        node = queue.popleft()
        fake, tokens = node.meta.get(VAL), first.meta[VAL]
        if node in seen or not isinstance(fake, Tensor) or node.op != "call_function":
            continue
        seen.add(node)
        rows = fake.dim() == 3 and isinstance(fake.shape[2], int) and tokens.dim() == 2
        if rows and all(same_size(a, b) for a, b in zip(fake.shape[:2], tokens.shape, strict=True)):
            return node
        queue.extend(node.all_input_nodes)
    return None
