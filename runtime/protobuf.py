"""The form of protobuf's messages, as far as a model's file is made or read without a copy.

A message is its fields one after the other: ``number << 3 | kind`` and, for kind 2 (bytes,
text, messages), a length and the contents (https://protobuf.dev, Encoding).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class Field(NamedTuple):
    """A field in ``[start, end)`` of a message, its contents from ``inner``."""

    number: int
    start: int
    inner: int
    end: int


def fields(data: Any, at: int, end: int) -> Iterator[Field]:
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
        yield Field(key >> 3, start, inner, at)


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


def message(number: int, contents: bytes | bytearray) -> bytes:
    """A field that has contents."""
    return varint(number << 3 | 2) + varint(len(contents)) + bytes(contents)


def varint(number: int) -> bytes:
    """Protobuf's integers: seven bits a byte, the lowest first, a high bit for "more"."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
