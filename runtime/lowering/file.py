"""Writing a model to disk: whole or not at all, and without a second copy of its weights.

A protobuf message is its fields one after the other, each with its length, in
any order. So the file is the model's own fields, then the graph as a field whose
length is known beforehand: the graph without its weights, then one weight after
the other, written from the memory it is in. Protobuf's readers stop at 2 GB:
beyond 1.8 GB of weights they go to a second file ``NAME.data``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

import onnx_ir as ir

from ftc.runtime.protobuf import varint

if TYPE_CHECKING:
    import onnx

EXTERNAL_BEYOND = 1_800_000_000

# Tags of length-delimited fields in onnx.proto: field number << 3 | 2.
_MODEL_GRAPH = bytes([7 << 3 | 2])
_GRAPH_INITIALIZER = bytes([5 << 3 | 2])
_TENSOR_RAW_DATA = bytes([9 << 3 | 2])


def save_onnx(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Writes ``model`` to ``path`` under a temporary name and renames it.

    A reader sees the old file or the new one, never a part.

    Raises:
        OSError: when the disk is full or the folder is missing; the old file stays.
    """
    target = Path(path)
    size = sum(tensor.nbytes for tensor in _weights(model))
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        draft = Path(folder) / target.name
        if size > EXTERNAL_BEYOND:
            data = f"{target.name}.data"
            ir.save(model, draft, external_data=data)
            os.replace(draft.with_name(data), target.with_name(data))
        else:
            with draft.open("wb") as file:
                _write(model, file)
        os.replace(draft, target)


def _weights(model: ir.Model) -> list[ir.TensorProtocol]:
    held = [value.const_value for value in model.graph.initializers.values()]
    return [tensor for tensor in held if tensor is not None]


def _write(model: ir.Model, file: IO[bytes]) -> None:
    """Streams ``model`` to ``file`` in one pass."""
    graph = _graph_without_weights(model.graph)
    weights = [(_header(tensor), tensor) for tensor in _weights(model)]
    total = len(graph) + sum(_field_size(_tensor_size(h, t.nbytes)) for h, t in weights)
    file.write(_model_without_graph(model))
    file.write(_MODEL_GRAPH + varint(total) + graph)
    for header, tensor in weights:
        file.write(_GRAPH_INITIALIZER + varint(_tensor_size(header, tensor.nbytes)) + header)
        file.write(_TENSOR_RAW_DATA + varint(tensor.nbytes))
        tensor.tofile(file)  # type: ignore[attr-defined]


def _model_without_graph(model: ir.Model) -> bytes:
    import onnx

    opsets = [onnx.OperatorSetIdProto(domain=d, version=v) for d, v in model.opset_imports.items()]
    properties = [
        onnx.StringStringEntryProto(key=k, value=v) for k, v in model.metadata_props.items()
    ]
    return onnx.ModelProto(
        ir_version=model.ir_version,
        producer_name=model.producer_name or "",
        opset_import=opsets,
        metadata_props=properties,
    ).SerializeToString()


def _graph_without_weights(graph: ir.Graph) -> bytes:
    view = ir.GraphView(graph.inputs, graph.outputs, nodes=list(graph), name=graph.name)
    proto: onnx.GraphProto = ir.serde.serialize_graph(view)
    return proto.SerializeToString()


def _header(tensor: ir.TensorProtocol) -> bytes:
    """A tensor's name, type and shape."""
    import onnx

    return onnx.TensorProto(
        name=tensor.name or "", data_type=tensor.dtype.value, dims=tensor.shape.numpy()
    ).SerializeToString()


def _tensor_size(header: bytes, nbytes: int) -> int:
    return len(header) + _field_size(nbytes)


def _field_size(length: int) -> int:
    """A one-byte tag, the length, the contents."""
    return 1 + len(varint(length)) + length
