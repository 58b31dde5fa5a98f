"""Rows of a file, each with the place it came from, so that a bad one can be named.

=====================  ======================================================
``.jsonl`` ``.ndjson``  one JSON object a line
``.csv`` ``.tsv``       a header with names, then a row a line
``.parquet``            through ``datasets``
a folder                a dataset saved by ``datasets``, one of its splits
anything else           text: paragraphs, apart by empty lines, of one document
=====================  ======================================================
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ftc.graph.errors import UsageError, nearest
from ftc.runtime.examples import JSON_FIX, parse_json

DOCUMENT = "document"
_UTF8_FIX = "save the file as UTF-8"


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        fields: values by column.
        place: ``file:line``, or ``file row 7`` where lines say nothing.
        form: the format it was read as, as :func:`format_of` says.
    """

    fields: Mapping[str, Any]
    place: str
    form: str = ""

    def text(self, column: str) -> str:
        """The text in ``column``.

        Raises:
            UsageError: naming the place, where there is none.
        """
        found = self.fields.get(column)
        if isinstance(found, str) and found.strip():
            return found
        if column not in self.fields:
            raise self.missing(column)
        what = "is empty" if found is None or found == "" or isinstance(found, str) else (
            f"is {found!r}, which is no text")  # fmt: skip
        raise UsageError(f"{column!r} {what}", where=self.place, fix="fill it, or drop the row")

    def missing(self, column: str) -> UsageError:
        """The error for a row without ``column``."""
        where = f"{self.place}, read as {self.form}" if self.form else self.place
        if self.form == "text":
            fix = f"text has no columns: give JSONL or CSV with {column!r}, and call the file so"
        else:
            near = nearest(column, map(str, self.fields))
            fix = f"{near}; name the column: --columns {column}=NAME"
        return UsageError(f"the row has no {column!r}", where=where, fix=fix)


def read_rows(
    path: Path, columns: Mapping[str, str] | None = None, limit: int | None = None
) -> list[Row]:
    """The rows of a file or of a dataset's folder, in their order.

    Args:
        path: see the table above.
        columns: ``{the name wanted: the name in the file}`` of columns to rename.
        limit: rows to read at most.

    Raises:
        UsageError: naming file and line of what cannot be read; for an empty file.
    """
    rows = list(islice(_READERS[format_of(path)](path), limit))
    if not rows:
        raise UsageError(f"{path} is empty", fix="write a row, or a text")
    return [_renamed(row, columns) for row in rows] if columns else rows


def format_of(path: Path) -> str:
    """How a file is read: as ``jsonl``, ``csv``, ``tsv``, ``parquet``, ``folder`` or ``text``.

    Raises:
        UsageError: when it is not there.
    """
    if path.is_dir():
        return "folder"
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"there is no file {path}", fix=nearest(path.name, siblings))
    suffix = path.suffix.lower().removeprefix(".")
    known = "jsonl" if suffix == "ndjson" else suffix
    return known if known in _READERS else "text"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends.

    Raises:
        UsageError: naming the first line that is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        place = f"{path}:{number} byte {error.start + 1}"
        raise UsageError(f"not UTF-8: {error.reason}", where=place, fix=_UTF8_FIX) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", fix="name a file") from None


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        fields = parse_json(line, place)
        if not isinstance(fields, dict):
            what = f"a JSON object is wanted, not {type(fields).__name__}"
            raise UsageError(what, where=place, fix=JSON_FIX)
        yield Row(fields, place, "jsonl")


def _csv(path: Path) -> Iterator[Row]:
    lines = (f"{line}\n" for _, line in _lines(path))
    form = format_of(path)
    reader = csv.reader(lines, delimiter="\t" if form == "tsv" else ",", strict=True)
    header: list[str] | None = None
    last = 0
    try:
        for values in reader:
            place, last = f"{path}:{last + 1}", reader.line_num
            if not values:
                continue
            if header is None:
                header = [name.strip() for name in values]
                if twice := next((name for name in header if header.count(name) > 1), None):
                    raise UsageError(f"two columns are called {twice!r}", where=place,
                                     fix="give each a name of its own")  # fmt: skip
            elif len(values) != len(header):
                what = f"the row has {len(values)} fields, the header {len(header)}"
                raise UsageError(what, where=place, fix="complete it, or quote fields with commas")
            else:
                yield Row(dict(zip(header, values, strict=True)), place, form)
    except csv.Error as error:
        place = f"{path}:{last + 1}"
        raise UsageError(f"not CSV: {error}", where=place, fix="close the quote") from None


def _paragraphs(path: Path) -> Iterator[Row]:
    """Paragraphs of one document, so that the borders between them are none of documents."""
    block: list[str] = []
    start = 0
    for number, line in [*_lines(path), (0, "")]:
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield Row({"text": "\n".join(block), DOCUMENT: 0}, f"{path}:{start}", "text")
            block = []


def _parquet(path: Path) -> Iterator[Row]:
    _datasets()
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            yield from _numbered((row for batch in batches for row in batch), path)
    except (ArrowException, OSError) as error:
        what = f"{path} is no Parquet file: {str(error).splitlines()[0]}"
        raise UsageError(what, fix="write it again") from None


def _folder(path: Path) -> Iterator[Row]:
    """The rows of a dataset; the numbers of a ``ClassLabel`` become its names."""
    found = _dataset(path)
    names = {column: each for column in found.column_names if (each := class_names(path, column))}
    rows = iter(found)
    if names:
        rows = ({c: _named(v, names[c]) if c in names else v for c, v in row.items()}
                for row in rows)  # fmt: skip
    return _numbered(rows, path)


def class_names(path: Path, column: str) -> tuple[str, ...]:
    """The names of a column's classes in the order of their numbers, where a dataset keeps them."""
    if format_of(path) != "folder":
        return ()
    feature = _dataset(path).features.get(column)
    feature = getattr(feature, "feature", feature)  # of a list
    return tuple(getattr(feature, "names", ()))


def _named(value: Any, names: tuple[str, ...]) -> Any:
    """Numbers as the names that they stand for; others, as the -1 of no label, as they are."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _dataset(path: Path) -> Any:
    """A dataset that ``save_to_disk`` wrote, or one split of several."""
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        what = f"{path} is no dataset: {str(error).splitlines()[0]}"
        raise UsageError(what, fix="name a folder that save_to_disk wrote, or a file") from None
    if isinstance(found, datasets.DatasetDict):
        splits = ", ".join(str(path / name) for name in found)
        raise UsageError(f"{path} has several splits", fix=f"name one: {splits}")
    return found


def _numbered(rows: Iterator[Mapping[str, Any]], path: Path) -> Iterator[Row]:
    form = format_of(path)
    return (Row(fields, f"{path} row {number}", form) for number, fields in enumerate(rows, 1))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "Parquet and dataset folders need the package datasets",
            fix="pip install 'ftc[train]'",
        ) from None
    return datasets


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    fields = dict(row.fields)
    for wanted, given in columns.items():
        if given not in fields:
            raise UsageError(f"the row has no {given!r}", where=row.place,
                             fix=nearest(given, map(str, fields)))  # fmt: skip
        fields[wanted] = fields[given]
    return replace(row, fields=fields)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "jsonl": _json_lines,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "folder": _folder,
    "text": _paragraphs,
}
