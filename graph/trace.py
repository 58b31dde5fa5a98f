"""Where two programs part: both run in step, node by node, on the same inputs.

:func:`trace` compares the values of the nodes that both have (same name,
operator and origin), and of every output; :func:`locate` gives the first that
differs, :func:`worst_jump` the one at which the difference grows most. Each
comes with the new nodes that feed it: the rewrite that is to blame.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .drift import Difference, Inputs
from .program import Program
from .provenance import describe, provenance


@dataclass(frozen=True, slots=True)
class Step:
    """Two programs' values of one node, compared.

    Attributes:
        node: the node in the later program.
        difference: of its value in both.
        jump: its relative error less the largest of those that its inputs carry.
        made: the new nodes that feed it directly, or through each other.
    """

    node: fx.Node
    difference: Difference
    jump: float
    made: tuple[fx.Node, ...]

    def __str__(self) -> str:
        text = f"{describe(self.node)} | relative error {self.difference.relative:.1e}"
        if self.made:
            text += f", fed by {', '.join(describe(n) for n in self.made[-3:])}"
        return text


def locate(before: Program, after: Program, inputs: Inputs) -> Step | None:
    """The first node whose value differs by more than rounding, in the later program's order."""
    return next((s for s in trace(before, after, inputs) if not s.difference.is_rounding), None)


def worst_jump(before: Program, after: Program, inputs: Inputs) -> Step | None:
    """The node at which the relative error grows most."""
    return max(trace(before, after, inputs), key=lambda step: step.jump, default=None)


def trace(before: Program, after: Program, inputs: Inputs) -> Iterator[Step]:
    """Compares every node that both programs have, and every output, on the same inputs.

    Both run in step, and a value is dropped after its last use.
    """
    pairs = _pairs(before, after)
    old = {pair for pair in pairs.values() if pair is not None}
    values: dict[str, Any] = {}
    left = ((n.name, v) for n, v in _run(before, inputs) if n.name in old)
    carried: dict[fx.Node, float] = {}
    made: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node, value in _run(after, inputs):
        feeds = [n for n in node.all_input_nodes if n.op == "call_function"]
        error = max((carried[n] for n in feeds), default=0.0)
        fresh = tuple(dict.fromkeys(m for n in feeds for m in (*made[n], *_self(n, pairs))))
        partner = pairs.get(node)
        carried[node], made[node] = error, () if partner else fresh
        if partner is None or node.op != "call_function":
            continue
        while partner not in values:
            name, found = next(left)
            values[name] = found
        difference = _difference(values.pop(partner), value)
        carried[node] = difference.relative
        yield Step(node, difference, difference.relative - error, fresh)


def _self(node: fx.Node, pairs: Mapping[fx.Node, str]) -> tuple[fx.Node, ...]:
    return () if node in pairs else (node,)


def _pairs(before: Program, after: Program) -> dict[fx.Node, str]:
    """For each node of ``after``, the name of the same node in ``before``."""
    known = {n.name: n for n in before.graph.nodes}
    pairs = {}
    for node in after.graph.nodes:
        other = known.get(node.name)
        if (
            other is not None
            and other.target == node.target
            and provenance(other) == provenance(node)
        ):
            pairs[node] = node.name
    taken = set(pairs.values())
    leaves: Any = (before.graph.output_node().args[0], after.graph.output_node().args[0])
    outputs = [dict(zip(p.signature.output_names, leaf, strict=True))
               for p, leaf in zip((before, after), leaves, strict=True)]  # fmt: skip
    for name, leaf in outputs[1].items():
        old = outputs[0].get(name)
        if old is not None and leaf not in pairs and old.name not in taken:
            pairs[leaf] = old.name
            taken.add(old.name)
    return pairs


def _run(program: Program, inputs: Inputs) -> Iterator[tuple[fx.Node, Any]]:
    """Values in graph order, each freed after its last use."""
    feed = iter(program.signature.bind(inputs))
    last = {used: node for node in program.graph.nodes for used in node.all_input_nodes}
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            return
        if node.op == "placeholder":
            env[node] = next(feed)
        elif node.op == "get_attr":
            env[node] = program.tensor(str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                env[node] = node.target(*args, **kwargs)
        yield node, env[node]
        for used in [n for n in (*node.all_input_nodes, node) if last.get(n, node) is node]:
            env.pop(used, None)


def _difference(a: Any, b: Any) -> Difference:
    """Of two values of a node: tensors, tuples of them, or numbers (which are exact)."""
    difference = Difference()
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        difference.add(a, b)
    elif isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
                difference.add(x, y)
    elif isinstance(a, Tensor) or a != b:
        difference.error = difference.max_abs = float("inf")
    return difference
