"""Steps in float16, made float32 all at once.

A weight's steps are stored in float16, and onnxruntime's products read them in float32. It
casts constants once, when it loads a file. One cast of all, split into the products' own, is
a node for a hundred: the file of a small model has a fifth fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from .emitter import Emitter

_FEWEST = 3  # a cast and a split are two nodes


def join_casts(e: Emitter, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Casts of constants in one dimension from float16 to float32 as one cast and a split."""
    casts = [node for node in nodes if _half(e, node) is not None]
    if len(casts) < _FEWEST:
        return list(nodes)
    halves = [half for node in casts if (half := _half(e, node)) is not None]
    sizes = [len(half) for half in halves]
    joined = e.weight("steps", torch.cat(halves))
    before = len(e.nodes)
    parts = e.op("Split", e.cast(joined, torch.float32), sizes, outputs=len(sizes), axis=0)
    for node, part, size in zip(casts, parts, sizes, strict=True):
        e.describe(part, torch.float32, (size,))
        node.outputs[0].replace_all_uses_with(part)
        node.replace_input_with(0, None)
    return [*e.nodes[before:], *(node for node in nodes if node not in set(casts))]


def _half(e: Emitter, node: ir.Node) -> Tensor | None:
    """The constant ``[n]`` in float16 that ``node`` casts to float32."""
    if node.op_type != "Cast" or node.inputs[0] is None:
        return None
    held = node.inputs[0].const_value
    raw = getattr(held, "raw", None)
    if not isinstance(raw, Tensor) or raw.dim() != 1 or raw.dtype != torch.float16:
        return None
    return raw if e.dtype(node.outputs[0]) == torch.float32 else None
