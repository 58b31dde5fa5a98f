"""Texts of a file, with their labels where it has some: a text, or JSONL."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftc.graph.errors import UsageError

from .text import read_file

JSON_FIX = '{"text": "...", "label": "..."} on every line'


@dataclass(frozen=True, slots=True)
class Example:
    """One text, its label where the file has one, and where it stands."""

    text: str
    label: str | int | None
    place: str


def read_examples(path: Path) -> list[Example]:
    """Texts of a file: one JSON object a line in ``.jsonl``, else paragraphs.

    Raises:
        UsageError: naming the file and line of a row that cannot be used.
    """
    body = read_file(path)
    if path.suffix in (".jsonl", ".ndjson"):
        lines = enumerate(body.splitlines(), 1)
        found = [_row(line, f"{path}:{n}") for n, line in lines if line.strip()]
    else:
        found, start = [], 1
        for block in body.split("\n\n"):
            if block.strip():
                found.append(Example(" ".join(block.split()), None, f"{path}:{start}"))
            start += block.count("\n") + 2
    if not found:
        raise UsageError(f"{path} is empty", fix="write a text, or JSON objects one a line")
    return found


def parse_json(line: str, place: str) -> dict[str, Any]:
    """The object on a line of JSONL.

    Raises:
        UsageError: with the place of what is no object, has a name twice, or has a text with
            half a character (a surrogate without its other half), which no tokenizer takes.
    """
    try:
        found = json.loads(line, object_pairs_hook=_once)
    except ValueError as error:
        raise UsageError(f"not a JSON object: {error}", where=place, fix=JSON_FIX) from None
    if not isinstance(found, dict):
        what = f"a JSON object is wanted, not {type(found).__name__}"
        raise UsageError(what, where=place, fix=JSON_FIX)
    if "\\u" in line:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UsageError(f"{half!r} is half a character", where=place,
                             fix="write both halves, or leave it out") from None  # fmt: skip
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return found


def _row(line: str, place: str) -> Example:
    row = parse_json(line, place)
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f'"text" is {json.dumps(text)}, not a string', where=place, fix=f'"text": "{text}"'
        )
    if not text or not text.strip():
        found = f"the row has {', '.join(map(repr, row)) or 'no field'}"
        raise UsageError(
            'the field "text" is missing or empty', where=f"{place} | {found}", fix=JSON_FIX
        )
    label = row.get("label")
    if not (label is None or isinstance(label, (str, int))) or isinstance(label, bool):
        raise UsageError(f'"label" is {label!r}', where=place, fix="a name or a number")
    return Example(text, label, place)
