"""What is done with the emitted nodes as a whole: the dead dropped, views folded, skips fused.

A weight that is read through one view only (a transpose, a reshape) is stored as
that view. The view shares the program's memory; it is written in its own order
when the model is serialized, one tensor at a time.

An addition and the RMS norm of its result are one operator of onnxruntime, which for one
row takes three quarters of their time, and for many rows twice as long: a tenth of what a
token of a small model spends outside its products, and one hundredth of a prompt's time.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnx_ir import Value
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from .emitter import Emitter
from .table import Unsupported


def alive(nodes: Sequence[ir.Node], outputs: Sequence[Value]) -> list[ir.Node]:
    """The nodes that some output depends on, in order; the others let go of their inputs."""
    wanted = set(outputs)
    kept: list[ir.Node] = []
    for node in reversed(nodes):
        if wanted.isdisjoint(node.outputs):
            for position in range(len(node.inputs)):
                node.replace_input_with(position, None)
            continue
        wanted.update(v for v in node.inputs if v is not None)
        kept.append(node)
    return kept[::-1]


def fold_views(nodes: Sequence[ir.Node], initializers: Sequence[Value]) -> list[ir.Node]:
    """Replaces a weight whose only reader is a view by the view; returns the nodes that stay."""
    folded: set[ir.Node] = set()
    for weight in initializers:
        readers = weight.uses()
        if len(readers) != 1 or not isinstance(weight.const_value, TorchTensor):
            continue
        node = readers[0].node
        if readers[0].idx != 0 or (view := _view(node, weight.const_value.raw)) is None:
            continue
        result = node.outputs[0]
        if result.is_graph_output():
            continue
        weight.const_value = TorchTensor(view, name=weight.name)
        weight.shape = ir.Shape(tuple(view.shape))
        result.replace_all_uses_with(weight)
        node.replace_input_with(0, None)
        folded.add(node)
    return [node for node in nodes if node not in folded]


def fuse_skips(e: Emitter, nodes: Sequence[ir.Node], outputs: Sequence[Value]) -> list[ir.Node]:
    """Additions with the RMS norms that read them as one operator, which gives both results."""
    made: dict[ir.Node, ir.Node] = {}
    gone: set[ir.Node] = set()
    for norm in nodes:
        if norm.op_type != "RMSNormalization" or norm.attributes["axis"].as_int() != -1:
            continue
        total, scale = norm.inputs
        addition = total.producer() if total is not None else None
        if addition is None or addition.op_type != "Add" or addition in made:
            continue
        if total in outputs or norm.outputs[0] in outputs or scale.const_value is None:
            continue
        if _are_alike(e, [*addition.inputs, total]):
            made[addition] = _skip(e, addition, norm)
            gone.add(norm)
    return [made.get(node, node) for node in nodes if node not in gone]


def _are_alike(e: Emitter, values: Sequence[Value]) -> bool:
    """Whether all are float32 of one shape."""
    try:
        shapes = {e.dims(value) for value in values}
    except Unsupported:  # one was made inside a translation
        return False
    return len(shapes) == 1 and all(e.dtype(value) == torch.float32 for value in values)


def _skip(e: Emitter, addition: ir.Node, norm: ir.Node) -> ir.Node:
    """The operator, with the names, types and places of both, which let go of their inputs."""
    operands = [*addition.inputs, norm.inputs[1]]
    old = (norm.outputs[0], addition.outputs[0])
    fused = ir.Node(
        "com.microsoft", "SkipSimplifiedLayerNormalization", operands,
        [norm.attributes["epsilon"]], num_outputs=4, name=f"{norm.name}_skip",
        metadata_props=dict(norm.metadata_props),
    )  # fmt: skip
    new = (fused.outputs[0], fused.outputs[3])
    for value, by in zip(old, new, strict=True):
        by.name, by.type, by.shape = value.name, value.type, value.shape
        e.describe(by, e.dtype(value), e.dims(value))
        value.replace_all_uses_with(by)
    for unused in fused.outputs[1:3]:
        unused.name = ""
    for node in (addition, norm):
        for position in range(len(node.inputs)):
            node.replace_input_with(position, None)
    return fused


def _view(node: ir.Node, held: Tensor) -> Tensor | None:
    """What ``node`` makes of the weight ``held``, without a copy; None for what is not a view."""
    if node.op_type == "Transpose":
        return held.permute(*node.attributes["perm"].as_ints())
    if node.op_type == "Reshape" and (shape := node.inputs[1].const_value) is not None:
        sizes = [held.shape[i] if s == 0 else s for i, s in enumerate(shape.numpy().tolist())]
        return held.reshape(sizes) if held.is_contiguous() else None
    return None
