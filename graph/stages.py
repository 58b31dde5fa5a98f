"""Stages: which part of a cut graph each node belongs to, and what may be computed twice.

A stage is an annotation, ``node.meta["custom"]["stage"]``, which survives clones,
rewrites, bundles and re-export. Wherever annotations come from, what counts is

    stage(n) = max(own(n), stage(inputs of n))

so no edge leads back, whatever the topology.

Not every node needs a stage. A node that no result of a weight reaches (a mask,
a table of rotary angles), one that weights alone reach (a transposed weight, a
bias of relative positions) and what merely joins two of these is *free*: each
stage that reads it computes it again, and nothing of it is sent. What is left is
*carried*: products of weights with data, and all that follows from them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from . import shapes
from .errors import PreconditionError
from .program import Program
from .provenance import describe

KEY = "stage"
_JOINS = frozenset(
    f"aten.{name}" for name in (
        "add", "sub", "rsub", "mul", "div", "where", "masked_fill", "neg", "to", "_to_copy",
        "maximum", "minimum", "clone", "contiguous",
    )
)  # fmt: skip
_WRITES = frozenset({"aten.batch_norm", "aten.instance_norm"})


def annotated(program: Program) -> dict[fx.Node, int]:
    """The stage that each node is annotated with, where it is.

    Raises:
        PreconditionError: for an annotation that is no number of a stage.
    """
    found: dict[fx.Node, int] = {}
    most = len(program.graph.nodes)
    for node in program.graph.nodes:
        stage = node.meta.get("custom", {}).get(KEY)
        if stage is None:
            continue
        if type(stage) is not int or not 0 <= stage < most:
            raise PreconditionError(f"{str(stage)[:40]!r} is no number of a stage",
                                    where=describe(node), fix="run partition again")  # fmt: skip
        found[node] = stage
    return found


def settle(nodes: Iterable[fx.Node], own: Mapping[fx.Node, int], first: int) -> dict[fx.Node, int]:
    """``stage(n) = max(own(n), stage(inputs of n))``, and ``first`` where neither is known.

    Args:
        nodes: all nodes of a graph, in order.
        own: stages given to some of them.
        first: the stage of what depends on nothing.
    """
    stage: dict[fx.Node, int] = {}
    for node in nodes:
        before = max((stage[each] for each in node.all_input_nodes), default=first)
        stage[node] = before if is_item(node) else max(own.get(node, first), before)
    return stage


def carried(program: Program) -> frozenset[fx.Node]:
    """Nodes that are computed once: see the module's description.

    Args:
        program: with fake values.
    """
    weights, data, found = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            data.add(node)
        elif node.op == "get_attr":
            if isinstance(program.tensor(str(node.target)), nn.Parameter):
                weights.add(node)
        elif node.op == "call_function" and is_tensor(node):
            inputs = node.all_input_nodes
            if not data.isdisjoint(inputs):
                data.add(node)
            if _is_ours(node) or not weights.isdisjoint(inputs):
                weights.add(node)
            meets = node in weights and node in data and not _joins(node)
            if meets or not found.isdisjoint(inputs) or _once(node):
                found.add(node)
    return frozenset(found)


def is_tensor(node: fx.Node) -> bool:
    """Whether the value of ``node`` is a tensor, or a tuple that holds one; else it is a size."""
    val: Any = node.meta.get(shapes.VAL)
    if isinstance(val, (tuple, list)):
        return any(isinstance(each, Tensor) for each in val)
    return isinstance(val, Tensor)


def is_item(node: fx.Node) -> bool:
    """Whether ``node`` takes one value of several that an operator returns."""
    return node.target is operator.getitem


def _joins(node: fx.Node) -> bool:
    """Whether a node costs no more than reading its inputs: elementwise, or a view."""
    target = node.target
    if not isinstance(target, OpOverload):
        return is_item(node)
    view = any(result.alias_info is not None for result in target._schema.returns)
    return view or str(target.overloadpacket) in _JOINS


def _once(node: fx.Node) -> bool:
    """Whether a second run would do something else: draw other numbers, or write again."""
    target = node.target
    return isinstance(target, OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags or str(target.overloadpacket) in _WRITES
    )


def _is_ours(node: fx.Node) -> bool:
    """Whether it is an operator of ftc's: those read quantized weights, which are buffers."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "ftc"
