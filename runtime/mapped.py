"""An ONNX file for onnxruntime without its weights, which stay in the file and are mapped.

A file that onnxruntime opens by its name is read whole, parsed, and every weight copied out of
what was parsed, so that for a moment memory holds each twice. Weights that are *external* are
mapped instead. A place in a file is all that is asked of external data, so it may be in the
file itself: this makes the model's bytes anew, with each large weight's place in place of its
contents. Nothing is written, and nothing large is read.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from .protobuf import Field, fields, message, varint

# Fields of onnx.proto.
_GRAPH, _INITIALIZER = 7, 5  # of a model, of a graph
_RAW, _EXTERNAL, _LOCATION = 9, 13, 14  # of a tensor; the last is a number, 1 for external
_LEAST = 1 << 15  # bytes: shapes, which onnxruntime has to see, are smaller


def without_weights(path: Path) -> bytes | None:
    """The model of the file ``path`` with its large weights as places in that file.

    Returns:
        What ``onnxruntime.InferenceSession`` takes, together with the folder of ``path`` as
        ``session.model_external_initializers_file_folder_path``; None for a file that is no
        protobuf message, or an empty one.
    """
    if not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _model(data, path.name)
        except (IndexError, ValueError):
            return None


def _model(data: Any, name: str) -> bytes:
    made = bytearray()
    for field in fields(data, 0, len(data)):
        if field.number != _GRAPH:
            made += data[field.start : field.end]
            continue
        graph = bytearray()
        for part in fields(data, field.inner, field.end):
            large = part.number == _INITIALIZER and part.end - part.inner > _LEAST
            graph += _placed(data, part, name) if large else data[part.start : part.end]
        made += message(_GRAPH, graph)
    return bytes(made)


def _placed(data: Any, tensor: Field, name: str) -> bytes:
    """An initializer with the place of its contents, where it has contents in one piece."""
    kept = bytearray()
    raw = None
    for field in fields(data, tensor.inner, tensor.end):
        if field.number == _RAW:
            raw = field
        else:
            kept += data[field.start : field.end]
    if raw is None:
        return bytes(data[tensor.start : tensor.end])
    place = {"location": name, "offset": str(raw.inner), "length": str(raw.end - raw.inner)}
    for key, value in place.items():
        kept += message(_EXTERNAL, message(1, key.encode()) + message(2, value.encode()))
    return message(_INITIALIZER, kept + varint(_LOCATION << 3) + varint(1))
