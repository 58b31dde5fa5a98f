"""What is done with the emitted nodes as a whole: the dead dropped, views of weights folded.

A weight that is read through one view only (a transpose, a reshape) is stored as
that view. The view shares the program's memory; it is written in its own order
when the model is serialized, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import Value
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor


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


def _view(node: ir.Node, held: Tensor) -> Tensor | None:
    """What ``node`` makes of the weight ``held``, without a copy; None for what is not a view."""
    if node.op_type == "Transpose":
        return held.permute(*node.attributes["perm"].as_ints())
    if node.op_type == "Reshape" and (shape := node.inputs[1].const_value) is not None:
        sizes = [held.shape[i] if s == 0 else s for i, s in enumerate(shape.numpy().tolist())]
        return held.reshape(sizes) if held.is_contiguous() else None
    return None
