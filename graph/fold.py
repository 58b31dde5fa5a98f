"""Fold: the nodes of each layer become one submodule with a ``forward``; every name stays.

What works on whole blocks (recomputing activations, sharding parameters,
compiling) needs modules, and a program is flat. Each node gets a *stage*::

    own(n)   = the layer whose scope n was traced in, or of whose blocks it is a part
    stage(n) = max(own(n), stage(inputs of n))

Edges never lead to an earlier stage, so the nodes of one stage can be drawn
together without a cycle, whatever the topology: skips become further inputs and
outputs of the blocks between which they run. A node of no layer (a mask, a norm
between layers) goes into the block of its stage only if that block reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from . import shapes
from .program import LazyModule, Program, attach, build_module
from .provenance import provenance
from .stages import settle
from .structure import Layer, find_structure


@dataclass(frozen=True, slots=True)
class Folded:
    """A program's graph with a submodule for each layer.

    Attributes:
        module: takes and returns what the program's module does, and holds the
            very same Parameters under the same names.
        blocks: paths of the submodules, in order. A layer's scope
            (``encoder.layer.0``) where it has one of its own, else ``block_0``. A block owns
            the tensors that only it reads and whose names lie under its path;
            others are passed to it.
    """

    module: fx.GraphModule
    blocks: tuple[str, ...]


def fold(program: Program) -> Folded:
    """Folds each layer of ``program``, which is not changed.

    Returns:
        The whole graph without a block where the program has no layers.
    """
    layers = find_structure(program).layers
    scopes = _own_scopes(layers)
    stages = stage_nodes(program, layers)
    groups = [[n for n in program.graph.nodes if stages.inside.get(n) == i]
              for i in range(len(layers))]  # fmt: skip
    blocks = [
        _Block(program, layer.scope if layer.scope in scopes else f"block_{i}", nodes)
        for i, (layer, nodes) in enumerate(zip(layers, groups, strict=True))
        if nodes
    ]
    return Folded(_assemble(program, blocks, stages), tuple(block.path for block in blocks))


def layer_outputs(program: Program) -> tuple[fx.Node, ...]:
    """The value each layer hands to what follows it: ``[batch, sequence, width]``, in order."""
    layers = find_structure(program).layers
    inside = stage_nodes(program, layers).inside
    found: dict[int, fx.Node] = {}
    for node in program.graph.nodes:
        layer = inside.get(node)
        leaves = layer is not None and any(inside.get(user) != layer for user in node.users)
        if layer is not None and leaves and _is_sequence(node):
            found[layer] = node
    return tuple(found[layer] for layer in sorted(found))


@dataclass(frozen=True, slots=True)
class Stages:
    """Where each node goes.

    Attributes:
        stage: of every node; -1 before the first layer.
        inside: the layer of each node that lies in one.
    """

    stage: Mapping[fx.Node, int]
    inside: Mapping[fx.Node, int]


def stage_nodes(program: Program, layers: Sequence[Layer]) -> Stages:
    """The stage of every node, and which nodes lie in a layer."""
    own = _own_layers(program, layers)
    stage = settle(program.graph.nodes, own, -1)
    inside = {node: layer for node, layer in own.items() if stage[node] == layer}
    for node in reversed(program.graph.nodes):
        here = stage[node]
        if node.op != "call_function" or here < 0 or node in inside:
            continue
        if any(inside.get(user) == here for user in node.users):
            inside[node] = here
    return Stages(stage, inside)


def _own_layers(program: Program, layers: Sequence[Layer]) -> dict[fx.Node, int]:
    """The layer of each node: by its scope, or as part of attention and feed-forward blocks.

    A scope that several layers share (one module that runs twice) tells nothing.
    """
    scopes = _own_scopes(layers)
    depths = {scope.count(".") + 1 for scope in scopes}
    own: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        path = provenance(node).module.split(".") if node.op == "call_function" else []
        for depth in depths:
            if len(path) >= depth and (scope := ".".join(path[:depth])) in scopes:
                own[node] = scopes[scope]
    for i, layer in enumerate(layers):
        if layer.scope not in scopes:
            own.update(dict.fromkeys(_parts(layer), i))
    return own


def _own_scopes(layers: Sequence[Layer]) -> dict[str, int]:
    """Scopes that one layer alone has, and its place."""
    counts = Counter(layer.scope for layer in layers)
    return {layer.scope: i for i, layer in enumerate(layers)
            if layer.scope and counts[layer.scope] == 1}  # fmt: skip


def _parts(layer: Layer) -> list[fx.Node]:
    found: list[fx.Node] = []
    for core in layer.cores:
        found += [core.node, *core.q, *core.k, *core.v, *core.out]
    for block in layer.feed_forwards:
        found += [*block.up, *block.gate, *block.down, block.activation, block.residual]
    return found


class _Block:
    """One layer: its nodes, what it reads, what it owns and what others read of it."""

    def __init__(self, program: Program, path: str, nodes: Sequence[fx.Node]) -> None:
        self.path, self.nodes = path, nodes
        members = set(nodes)
        read = dict.fromkeys(each for node in nodes for each in node.all_input_nodes)
        outside = [each for each in read if each not in members]
        self.owned = {
            each: str(each.target).removeprefix(f"{path}.")
            for each in outside
            if each.op == "get_attr"
            and str(each.target).startswith(f"{path}.")
            and members.issuperset(each.users)
        }
        self.inputs = [each for each in outside if each not in self.owned]
        self.outputs = [node for node in nodes if not members.issuperset(node.users)]
        self._program = program

    def module(self) -> fx.GraphModule:
        """The block as a module: ``inputs`` in, ``outputs`` out."""
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for each in self.inputs:
            new[each] = graph.placeholder(each.name)
            new[each].meta = dict(each.meta)
        for each, name in self.owned.items():
            new[each] = graph.get_attr(name)
            new[each].meta = dict(each.meta)
        for node in self.nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
        results = tuple(new[node] for node in self.outputs)
        graph.output(results[0] if len(results) == 1 else results)
        tensors = {name: self._program.tensor(str(n.target)) for n, name in self.owned.items()}
        return build_module(tensors, graph)

    def call(self, graph: fx.Graph, new: dict[fx.Node, Any]) -> None:
        """Adds the call to the outer graph, and says where each output comes from."""
        made = graph.call_module(self.path, tuple(new[each] for each in self.inputs))
        if len(self.outputs) == 1:
            new[self.outputs[0]] = made
            made.meta = dict(self.outputs[0].meta)
            return
        for i, node in enumerate(self.outputs):
            new[node] = graph.call_function(_item, (made, i))
            new[node].meta = dict(node.meta)


def _item(values: Any, index: int) -> Any:
    return values[index]


def _assemble(program: Program, blocks: Sequence[_Block], stages: Stages) -> fx.GraphModule:
    """The outer graph: what is in no block, in order of stage, and the calls."""
    graph, new = fx.Graph(), dict[fx.Node, Any]()
    owned = {node for block in blocks for node in block.owned}
    by_stage: dict[int, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node not in owned and node not in stages.inside and node.op != "output":
            by_stage.setdefault(stages.stage[node], []).append(node)
    calls = {stages.inside[block.nodes[0]]: block for block in blocks}
    for stage in sorted({*by_stage, *calls}):
        if stage in calls:
            calls[stage].call(graph, new)
        for node in by_stage.get(stage, ()):
            new[node] = graph.node_copy(node, new.__getitem__)
    output = program.graph.output_node()
    graph.output(fx.node.map_arg(output.args[0], new.__getitem__))
    root = nn.Module()
    for block in blocks:
        _attach_module(root, block.path, block.module())
    for node in program.graph.nodes:
        if node.op == "get_attr" and node not in owned:
            attach(root, str(node.target), program.tensor(str(node.target)))
    return LazyModule(root, graph, class_name="Program")


def _attach_module(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    owner = root
    for part in parents:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    owner.add_module(leaf, module)


def _is_sequence(node: fx.Node) -> bool:
    fake = node.meta.get(shapes.VAL)
    return isinstance(fake, Tensor) and fake.dim() == 3 and fake.dtype.is_floating_point
