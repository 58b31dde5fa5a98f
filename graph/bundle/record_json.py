"""A record of a pass from JSON: every entry of the type it has to have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

from ftc.graph.errors import BundleError
from ftc.graph.program import Drift, PassRecord

T = TypeVar("T", PassRecord, Drift)


def decode_record(stored: Any, place: str) -> PassRecord:
    """The record of a pass.

    Args:
        stored: ``dataclasses.asdict`` of one, read from JSON.
        place: where it stands, for the error.

    Raises:
        BundleError: naming the entry that is missing or of another type.
    """
    return _decode(PassRecord, stored, place)


def decode_texts(stored: Any, place: str) -> tuple[str, ...]:
    """A list of texts.

    Raises:
        BundleError: when it is something else.
    """
    if not isinstance(stored, list) or not all(isinstance(text, str) for text in stored):
        raise _refused(place, stored, "a list of texts")
    return tuple(stored)


def _decode(kind: type[T], stored: Any, place: str) -> T:
    names = {field.name for field in fields(kind)}
    if not isinstance(stored, Mapping) or set(stored) != names:
        raise _refused(place, stored, f"an object with the entries {', '.join(sorted(names))}")
    hints = get_type_hints(kind)
    return kind(**{n: _value(hints[n], stored[n], f"{place}.{n}") for n in names})


def _value(hint: Any, value: Any, place: str) -> Any:
    if hint == tuple[str, ...]:
        return decode_texts(value, place)
    if hint == Drift | None:
        return None if value is None else _decode(Drift, value, place)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    sound = number if hint is float else isinstance(value, hint) and not isinstance(value, bool)
    if not sound:
        raise _refused(place, value, {int: "an integer", float: "a number", str: "a text"}[hint])
    return value


def _refused(place: str, value: Any, wanted: str) -> BundleError:
    return BundleError(f"{place} is {str(value)[:80]}, not {wanted}", fix="make the bundle again")
