"""Tables of tokens: ragged columns in flat tensors, kept on disk so that a text is read once.

A column holds ``values [total]`` and ``ends [rows]``: row ``i`` is
``values[ends[i - 1] : ends[i]]``. Files are safetensors, mapped when they are
read again, so that a table larger than memory costs what is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_KEPT = 32
Values = Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True)
class Column:
    """Rows of different length, one after another."""

    values: Tensor
    ends: Tensor

    def __getitem__(self, row: int) -> Tensor:
        start = int(self.ends[row - 1]) if row else 0
        return self.values[start : int(self.ends[row])]

    @property
    def lengths(self) -> Tensor:
        """Values of each row."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))


@dataclass(frozen=True)
class Table:
    """Columns by name, the first of which has a row for each example.

    Attributes:
        columns: by name; further ones may have other numbers of rows.
        facts: what holds for the table as a whole (the names of its labels); JSON values.
    """

    columns: Mapping[str, Column]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return next((len(column.ends) for column in self.columns.values()), 0)

    def rows(self, column: str, indices: Iterable[int]) -> list[Tensor]:
        """Some rows of a column."""
        found = self.columns[column]
        return [found[index] for index in indices]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Values]], facts: Mapping[str, Any]) -> Table:
        """The table of rows that have the same columns; integers as int32, others as float32."""
        flat: dict[str, list[Any]] = {}
        ends: dict[str, list[int]] = {}
        for row in rows:
            for name, values in row.items():
                flat.setdefault(name, []).extend(values)
                ends.setdefault(name, []).append(len(flat[name]))
        columns = {name: Column(_tensor(values), torch.tensor(ends[name], dtype=torch.int64))
                   for name, values in flat.items()}  # fmt: skip
        return cls(columns, facts)

    def save(self, path: Path) -> None:
        """Writes the table; it appears whole or not at all."""
        from safetensors.torch import save_file

        tensors = {}
        for name, column in self.columns.items():
            tensors[f"{name}.values"], tensors[f"{name}.ends"] = column.values, column.ends
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tensors, temporary, metadata={"facts": json.dumps(self.facts)})
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Table:
        """Reads a table."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            names = dict.fromkeys(key.rsplit(".", 1)[0] for key in file.keys())  # noqa: SIM118
            columns = {name: Column(file.get_tensor(f"{name}.values"),
                                    file.get_tensor(f"{name}.ends")) for name in names}  # fmt: skip
            return cls(columns, json.loads((file.metadata() or {}).get("facts", "{}")))


@dataclass(frozen=True)
class Examples:
    """Some examples of a table.

    Attributes:
        table: holds them.
        indices: which they are, int64.
    """

    table: Table
    indices: Tensor

    @classmethod
    def all(cls, table: Table) -> Examples:
        """Every example."""
        return cls(table, torch.arange(len(table)))

    def __len__(self) -> int:
        return len(self.indices)

    def lengths(self) -> Tensor | None:
        """Tokens of each, where a row of ``ids`` is an example; else None."""
        found = self.table.columns.get("ids")
        if found is None or len(found.ends) != len(self.table):
            return None
        return found.lengths[self.indices]


def cached(key: Sequence[Any], make: Callable[[], Table]) -> tuple[Table, bool]:
    """The table that ``make`` makes, from the cache where it was made before.

    Args:
        key: everything the table depends on, as plain values.
        make: called when the cache has no such table.

    Returns:
        The table, and whether it came from the cache.
    """
    digest = hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:24]
    path = cache_folder() / f"{digest}.safetensors"
    if path.is_file():
        path.touch()
        return Table.load(path), True
    table = make()
    table.save(path)
    _prune(path.parent)
    return table, False


def cache_folder() -> Path:
    """Where tables are kept: ``~/.cache/ftc/tokens``, the newest 32 of them."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "ftc" / "tokens"


def _prune(folder: Path) -> None:
    tables = sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    for old in tables[_KEPT:]:
        old.unlink(missing_ok=True)


def _tensor(values: list[Any]) -> Tensor:
    whole = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int32 if whole else torch.float32)
