"""The text form of passes: ``lowrank{ratio=0.6,select=ffn|attention},int8``.

Grammar::

    pipeline := pass ("," pass)*
    pass     := name [ "{" [ option (sep option)* ] "}" ]      sep: a comma or spaces
    option   := key "=" value | key                            a bare key means true
    value    := 'quoted' | "quoted" | bare                     \\ escapes a quote or itself
    bare     := anything without spaces, commas, braces and quotes

A value's type is its field's annotation: ``int``, ``float``, ``bool``, ``str``,
``Literal[...]`` or one of these ``| None`` (written ``none``); numbers are finite.
:func:`format_pass` prints what differs from the defaults, in the order of the fields, and
``parse_pass(format_pass(p)) == p`` for every pass ``p``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal

from ftc.graph.errors import UsageError, nearest
from ftc.graph.select import check_selector

if TYPE_CHECKING:
    from .base import Pass

Lookup = Callable[[str], "type[Pass]"]

SELECTORS = ("select", "train", "target")
"""Options of these names are selectors (:mod:`ftc.graph.select`): their syntax is checked here."""

_NAME = re.compile(r"[A-Za-z][\w.-]*")
_KEY = re.compile(r"[^\s,{}\"'=]+")
_BARE = re.compile(r"[^\s,{}\"']+")
_QUOTED = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'", re.DOTALL)
_QUOTE_FIX = 'write name=value, and quotes around a value with spaces: name="a | b"'
_WORDS = {"true": True, "false": False}
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def parse_passes(text: str, lookup: Lookup | None = None) -> tuple[Pass, ...]:
    """The passes of a pipeline's text.

    Args:
        text: passes joined by commas.
        lookup: finds a class by name; the registry's ``get`` by default.

    Raises:
        UsageError: with the text and a caret under the first mistake.
    """
    return _Parser(text, lookup or _registered()).pipeline()


def parse_pass(text: str, lookup: Lookup | None = None) -> Pass:
    """The one pass that ``text`` names.

    Raises:
        UsageError: with the text and a caret under the first mistake, or when
            there is more than one pass.
    """
    parser = _Parser(text, lookup or _registered())
    passes = parser.pipeline()
    if len(passes) != 1:
        raise UsageError(f"one pass is wanted here, not {len(passes)}", where=text)
    return passes[0]


def format_pass(given: Pass) -> str:
    """The text form of ``given``: options that differ from their defaults, in field order."""
    hints = option_types(type(given))
    options = []
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if not _is_default(field, value):
            options.append(f"{field.name}={format_value(value, hints[field.name])}")
    return f"{given.name}{{{','.join(options)}}}" if options else given.name


def format_value(value: Any, hint: Any) -> str:
    """The text of one option's value, quoted where its bare form would read differently."""
    if value is None:
        return "none"
    if not isinstance(value, str):
        return repr(value).lower() if isinstance(value, bool) else repr(value)
    if _BARE.fullmatch(value) and _same(_convert(value, hint, quoted=False), value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def option_types(cls: type[Pass]) -> dict[str, Any]:
    """The annotation of each option of a pass, strings resolved."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def type_text(hint: Any) -> str:
    """An annotation in words: ``a number or none``, ``row, tensor or none``."""
    words: list[str] = []
    for member in sorted(_members(hint), key=lambda m: m is NoneType):
        if typing.get_origin(member) is Literal:
            words += [str(choice) for choice in typing.get_args(member)]
        else:
            words.append("none" if member is NoneType else _TYPE_NAMES[member])
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


class _Parser:
    """Recursive descent over one text; ``at`` is the position that is read next."""

    def __init__(self, text: str, lookup: Lookup) -> None:
        self.text = text
        self.lookup = lookup
        self.at = 0

    def pipeline(self) -> tuple[Pass, ...]:
        passes = [self._pass()]
        while self.at < len(self.text):
            if self.text[self.at] != ",":
                raise self._error("passes are joined by commas", self.at, "put a comma here")
            self.at += 1
            passes.append(self._pass())
        return tuple(passes)

    def _pass(self) -> Pass:
        self._skip()
        start = self.at
        if not (name := self._take(_NAME)):
            found = repr(self.text[start]) if start < len(self.text) else "nothing"
            raise self._error(f"a pass is wanted here, not {found}", start, "name a pass")
        try:
            cls = self.lookup(name)
        except UsageError as error:
            raise self._error(error.what, start, error.fix) from None
        self._skip()
        options = self._options(cls) if self._peek() == "{" else {}
        self._skip()
        try:
            return cls(**options)
        except UsageError as error:
            if error.where:
                raise
            raise self._error(error.what, start, error.fix) from None

    def _options(self, cls: type[Pass]) -> dict[str, Any]:
        opened = self.at
        self.at += 1
        hints = option_types(cls)
        options: dict[str, Any] = {}
        while True:
            self._skip(",")
            if self._peek() == "}":
                self.at += 1
                return options
            if self.at == len(self.text):
                raise self._error("this brace is never closed", opened, "add a closing brace")
            start = self.at
            key = self._take(_KEY)
            if not key:
                found = self.text[start]
                raise self._error(f"an option is wanted here, not {found!r}", start, _QUOTE_FIX)
            if not key.isidentifier():
                raise self._error(f"an option is wanted here, not {key!r}", start, _QUOTE_FIX)
            if key not in hints:
                raise self._error(f"{cls.name} has no option {key!r}", start, nearest(key, hints))
            if key in options:
                raise self._error(f"option {key!r} is given twice", start, "keep one of them")
            options[key] = self._value(cls, key, hints[key], start)

    def _value(self, cls: type[Pass], key: str, hint: Any, start: int) -> Any:
        if self._peek() != "=":
            if bool in _members(hint):
                return True
            raise self._error(
                f"option {key!r} has no value",
                start,
                f"{cls.name}{{{key}=...}} takes {type_text(hint)}",
            )
        self.at += 1
        start = self.at
        if self._peek() in ('"', "'") and self._peek():
            match = _QUOTED.match(self.text, self.at)
            if match is None:
                raise self._error("this quote is never closed", start, "add a closing quote")
            self.at = match.end()
            body = match[1] if match[1] is not None else match[2]
            raw, quoted = re.sub(r"\\(.)", r"\1", body, flags=re.DOTALL), True
        else:
            raw, quoted = self._take(_BARE), False
        value = _convert(raw, hint, quoted=quoted) if raw or quoted else _NOTHING
        if value is _NOTHING:
            raise self._error(
                f"{key} takes {type_text(hint)}, not {raw!r}", start, _value_fix(raw, hint)
            )
        if key in SELECTORS and isinstance(value, str):
            self._check_selector(key, value, start)
        return value

    def _check_selector(self, key: str, value: str, start: int) -> None:
        try:
            check_selector(value)
        except UsageError as error:
            raise self._error(f"{key}={value!r}: {error.what}", start, error.fix) from None

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[0]

    def _skip(self, also: str = "") -> None:
        while self.at < len(self.text) and (
            self._peek().isspace() or self._peek() in (also or " ")
        ):
            self.at += 1

    def _error(self, what: str, position: int, fix: str | None) -> UsageError:
        line = re.sub(r"\s", " ", self.text)
        return UsageError(what, where=f"{line}\n  {' ' * position}^", fix=fix)


_NOTHING = object()


def _convert(raw: str, hint: Any, *, quoted: bool) -> Any:
    """``raw`` as the first type of ``hint`` that can read it, else ``_NOTHING``."""
    members = _members(hint)
    if not quoted and NoneType in members and raw == "none":
        return None
    for member in members:
        if typing.get_origin(member) is Literal:
            for choice in typing.get_args(member):
                if raw == str(choice):
                    return choice
        elif member is str:
            return raw
        elif not quoted and member is bool and raw in _WORDS:
            return _WORDS[raw]
        elif not quoted and member in (int, float) and _reads(member, raw):
            return member(raw)
    return _NOTHING


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that an option may have, narrower ones first (``str`` reads everything)."""
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    members = typing.get_args(hint) if union else (hint,)
    known = (bool, int, float, NoneType, str)
    for member in members:
        if member not in known and typing.get_origin(member) is not Literal:
            raise TypeError(f"an option cannot be of type {member}")
    return tuple(sorted(members, key=lambda m: known.index(m) if m in known else -1))


def _reads(kind: Any, raw: str) -> bool:
    """Whether ``raw`` is a number of that kind; nothing is measured in infinities or NaN."""
    try:
        return math.isfinite(kind(raw))
    except (ValueError, OverflowError):
        return False


def _value_fix(raw: str, hint: Any) -> str | None:
    choices = [str(c) for m in _members(hint) if typing.get_origin(m) is Literal
               for c in typing.get_args(m)]  # fmt: skip
    return nearest(raw, choices) if choices else f"write {type_text(hint)}"


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return _same(field.default_factory(), value)
    return field.default is not dataclasses.MISSING and _same(field.default, value)


def _registered() -> Lookup:
    from . import registry

    return registry.get
