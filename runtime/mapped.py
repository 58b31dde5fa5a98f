"""An ONNX file for onnxruntime without its weights, which stay in the file and are mapped.

A file that onnxruntime opens by its name is read whole, parsed, and every weight copied out of
what was parsed, so that for a moment memory holds each twice. Weights that are *external* are
mapped instead. A place in a file is all that is asked of external data, so it may be in the
file itself: this makes the model's bytes anew, with each large weight's place in place of its
contents. Nothing is written, and nothing large is read.

A protobuf message is its fields one after the other: ``number << 3 | kind`` and, for kind 2
(bytes, text, messages), a length and the contents (https://protobuf.dev, Encoding).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .lowering.file import varint

# Fields of onnx.proto.
_GRAPH, _INITIALIZER = 7, 5  # of a model, of a graph
_RAW, _EXTERNAL, _LOCATION = 9, 13, 14  # of a tensor; the last is a number, 1 for external
_LEAST = 1 << 15  # bytes: shapes, which onnxruntime has to see, are smaller


class _Field(NamedTuple):
    """A field in ``[start, end)`` of a message, its contents from ``inner``."""

    number: int
    start: int
    inner: int
    end: int


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
    for field in _fields(data, 0, len(data)):
        if field.number != _GRAPH:
            made += data[field.start : field.end]
            continue
        graph = bytearray()
        for part in _fields(data, field.inner, field.end):
            large = part.number == _INITIALIZER and part.end - part.inner > _LEAST
            graph += _placed(data, part, name) if large else data[part.start : part.end]
        made += _message(_GRAPH, graph)
    return bytes(made)


def _placed(data: Any, tensor: _Field, name: str) -> bytes:
    """An initializer with the place of its contents, where it has contents in one piece."""
    kept = bytearray()
    raw = None
    for field in _fields(data, tensor.inner, tensor.end):
        if field.number == _RAW:
            raw = field
        else:
            kept += data[field.start : field.end]
    if raw is None:
        return bytes(data[tensor.start : tensor.end])
    place = {"location": name, "offset": str(raw.inner), "length": str(raw.end - raw.inner)}
    for key, value in place.items():
        kept += _message(_EXTERNAL, _message(1, key.encode()) + _message(2, value.encode()))
    return _message(_INITIALIZER, kept + varint(_LOCATION << 3) + varint(1))


def _fields(data: Any, at: int, end: int) -> Iterator[_Field]:
    """The fields of the message in ``[at, end)``.

    Raises:
        IndexError, ValueError: where it is none.
    """
    while at < end:
        start = at
        key, at = _number(data, at)
        kind, inner = key & 7, at
        if kind == 0:
            _, at = _number(data, at)
        elif kind == 2:
            length, inner = _number(data, at)
            at = inner + length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"no field of kind {kind}")
        if at > end:
            raise ValueError("a field is longer than its message")
        yield _Field(key >> 3, start, inner, at)


def _number(data: Any, at: int) -> tuple[int, int]:
    """An integer of protobuf, seven bits a byte, and what is behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _message(number: int, contents: bytes | bytearray) -> bytes:
    return varint(number << 3 | 2) + varint(len(contents)) + bytes(contents)
