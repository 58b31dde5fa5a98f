"""The header of a GGUF file.

``GGUF``, version u32, tensor count u64, field count u64, the fields (key, type
u32, value), the tensors (name, rank u32, sizes u64 fastest first, type u32,
offset u64), padding to ``general.alignment``, the data. Strings are u64 length
and bytes; arrays are element type u32, count u64, elements; all little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftc.graph.errors import SourceError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
VOCABULARY = "tokenizer.ggml.tokens"


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says before its data.

    Attributes:
        path: the file.
        data: the whole file, mapped.
        version: of the format.
        fields: key -> (value, or the length of an array; first byte; one past the last byte).
        tensors: name -> (sizes, slowest first; type; first byte in the file).
        table: first and one past the last byte of the list of tensors.
    """

    path: Path
    data: np.memmap[Any, Any]
    version: int
    fields: dict[str, tuple[Any, int, int]]
    tensors: dict[str, tuple[tuple[int, ...], int, int]]
    table: tuple[int, int]

    @property
    def architecture(self) -> str:
        """``llama``, ``qwen2``, … as llama.cpp calls it."""
        return str(self.fields["general.architecture"][0])


def read_header(path: Path) -> Header:
    """Parses the header of a GGUF file, values of arrays aside.

    Raises:
        SourceError: when it is no GGUF file, or is truncated.
    """
    if path.stat().st_size < 24:
        raise SourceError(
            f"{path} is truncated: it has {path.stat().st_size} bytes",
            fix="download or copy it again",
        )
    data = np.memmap(path, mode="r")
    try:
        return _parse(path, data)
    except (struct.error, UnicodeDecodeError, KeyError, IndexError, OverflowError) as error:
        raise SourceError(
            f"{path} is truncated or damaged in its header: {error}",
            fix="download or copy it again",
        ) from None


def _parse(path: Path, data: np.memmap[Any, Any]) -> Header:
    reader = _Reader(data.data)
    if bytes(data[:4]) != b"GGUF":
        raise SourceError(
            f"{path} is not a GGUF file: it does not start with GGUF",
            fix="download or copy it again",
        )
    reader.at = 4
    version = reader.scalar("I")
    if version not in (2, 3):
        raise SourceError(
            f"{path} is of GGUF version {version}, not 2 or 3",
            fix="convert it with a current llama.cpp",
        )
    tensor_count, field_count = reader.scalar("Q"), reader.scalar("Q")
    fields = {}
    for _ in range(field_count):
        start = reader.at
        key = reader.string()
        fields[key] = (reader.value(reader.scalar("I")), start, reader.at)
    start, table = reader.at, []
    for _ in range(tensor_count):
        name = reader.string()
        sizes = tuple(reader.scalar("Q") for _ in range(reader.scalar("I")))
        table.append((name, sizes[::-1], reader.scalar("I"), reader.scalar("Q")))
    end = reader.at
    alignment = int(fields.get("general.alignment", (32,))[0])
    base = -(-end // alignment) * alignment
    tensors = {name: (sizes, kind, base + offset) for name, sizes, kind, offset in table}
    fields["general.architecture"]  # a KeyError here is a damaged header
    return Header(path, data, version, fields, tensors, (start, end))


class _Reader:
    """A cursor over little-endian bytes."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.data):
            raise IndexError("a string ends after the file")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A scalar or a string; for an array its length, past which the cursor moves."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        element, count = self.scalar("I"), self.scalar("Q")
        if element in _SCALARS:
            self.at += count * struct.calcsize(_SCALARS[element])
        else:
            for _ in range(count):
                if element == _STRING:
                    self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
                else:
                    self.value(element)
        if self.at > len(self.data):
            raise IndexError("an array ends after the file")
        return count
