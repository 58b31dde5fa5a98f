"""Which outputs a captured program has, what they are called, and how their axes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ftc.graph.errors import CaptureError
from ftc.graph.program import Program, detach
from ftc.graph.shapes import value
from ftc.graph.signature import OutputSpec, Signature


def drop_outputs(program: Program, untrained: frozenset[str]) -> Program:
    """Without the outputs that are computed from parameters in ``untrained``, unless all are.

    Returns:
        The program itself where nothing can be dropped, else one with a note.
    """
    tainted: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            spoilt = str(node.target) in untrained
        else:
            spoilt = node.op != "output" and not tainted.isdisjoint(node.all_input_nodes)
        if spoilt:
            tainted.add(node)
    output = program.graph.output_node()
    pairs = list(zip(program.signature.outputs, output.args[0], strict=True))  # type: ignore[arg-type]
    kept = [(spec, leaf) for spec, leaf in pairs if leaf not in tainted]
    if not kept or len(kept) == len(pairs):
        return program
    output.args = (tuple(leaf for _, leaf in kept),)
    program.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for name, _ in list(program.tensors()):
        if name not in read:
            detach(program.module, name)
    program.module.recompile()
    dropped = ", ".join(spec.name for spec, leaf in pairs if leaf in tainted)
    signature = replace(program.signature, outputs=tuple(spec for spec, _ in kept))
    note = f"dropped the output {dropped}: the weights for it were never trained"
    return replace(program, signature=signature, notes=(*program.notes, note))


def keep_named_outputs(graph: fx.Graph, exported: ExportedProgram) -> list[OutputSpec]:
    """Keeps the top-level tensors of the model's output, in order, and names them.

    A cache or a tuple of hidden states is nested and dropped: a program returns
    what it was captured for.
    """
    node = graph.output_node()
    leaves = node.args[0]
    assert isinstance(leaves, tuple)
    spec = exported.call_spec.out_spec
    tree = torch.utils._pytree.tree_unflatten(list(range(len(leaves))), spec)
    if isinstance(tree, int):
        named: dict[str, Any] = {"output": tree}
    elif isinstance(tree, Mapping):
        named = dict(tree)
    elif isinstance(tree, (tuple, list)):
        named = {f"output_{i}": leaf for i, leaf in enumerate(tree)}
    else:
        raise CaptureError(
            f"the model returns a {type(tree).__name__}",
            fix="return a tensor, a tuple of tensors or a dict of tensors",
        )
    found = {name: leaves[i] for name, i in named.items() if isinstance(i, int)}
    kept = {
        name: leaf
        for name, leaf in found.items()
        if isinstance(leaf, fx.Node) and isinstance(value(leaf), Tensor)
    }
    if not kept:
        raise CaptureError("the model returns no tensor", fix="return a tensor or a dict")
    node.args = (tuple(kept.values()),)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return [OutputSpec(name, value(leaf).dtype, ()) for name, leaf in kept.items()]


def name_output_dims(graph: fx.Graph, signature: Signature) -> Signature:
    """Fills the outputs' shapes; a symbol that is an input's dimension gets its name."""
    names: dict[str, str] = {}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, signature.inputs, strict=True):
        for size, dim in zip(value(node).shape, spec.shape, strict=True):
            if isinstance(dim, str):
                names.setdefault(str(size), dim)
    leaves = graph.output_node().args[0]
    outputs = tuple(
        OutputSpec(
            o.name,
            o.dtype,
            tuple(
                s if isinstance(s, int) else names.get(str(s), str(s)) for s in value(leaf).shape
            ),
        )
        for o, leaf in zip(signature.outputs, leaves, strict=True)  # type: ignore[arg-type]
    )
    return Signature(signature.task, signature.inputs, outputs, signature.limits)
