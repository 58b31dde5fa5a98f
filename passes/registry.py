"""Where passes are found by name: in this package, in other packages, in scripts.

- A pass of this package is found by its line ``name: ClassVar[str] = "..."`` in
  a file of ``passes/``; the file is imported when the pass is asked for. There
  is no list to keep.
- Another package names its class under the entry-point group ``ftc.passes``::

      [project.entry-points."ftc.passes"]
      fold-scales = "my_package.fold_scales:FoldScales"

- A script or a test decorates its class with :func:`register`.

One name is one pass: a second class of the same name is refused.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from ftc.graph.errors import UsageError, nearest

from .base import Pass
from .text import format_value, option_types, type_text

GROUP = "ftc.passes"
_log = logging.getLogger(__name__)
P = TypeVar("P", bound=type[Pass])
_registered: dict[str, type[Pass]] = {}
_NAMED = re.compile(r'^    name: ClassVar\[str\] = "([^"]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a pass: its type and default in words, and what it is for."""

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True, slots=True)
class Description:
    """What a pass is, for people: first sentence, whole docstring, options."""

    name: str
    effect: str
    summary: str
    doc: str
    options: tuple[Option, ...]


def names() -> tuple[str, ...]:
    """Every known pass, sorted; imports none of them."""
    return tuple(sorted({*_built_in(), *_entry_points(), *_registered}))


def get(name: str) -> type[Pass]:
    """The pass class called ``name``.

    Raises:
        UsageError: for an unknown name, with the nearest known ones, or for a
            package whose pass cannot be loaded.
    """
    if name in _registered:
        return _registered[name]
    if name in (modules := _built_in()):
        return _class_in(importlib.import_module(f"{__package__}.{modules[name]}"), name)
    if name in (points := _entry_points()):
        return _load(points[name])
    raise UsageError(f"no pass is called {name!r}", fix=nearest(name, names()))


def register(cls: P) -> P:
    """Class decorator: makes a pass known by its name in this process.

    Raises:
        UsageError: when another class has that name.
    """
    _checked(cls, cls.__qualname__)
    known = _registered.get(cls.name)
    again = known is not None and known.__qualname__ == cls.__qualname__
    if cls.name in names() and not again:
        raise UsageError(
            f"two passes are called {cls.name!r}",
            where=cls.__qualname__,
            fix="give one of them another name",
        )
    _registered[cls.name] = cls
    return cls


def describe(cls: type[Pass]) -> Description:
    """Summary and options of a pass, read off its docstring and fields.

    An option's help is its line under ``Options`` in the docstring, or the
    field's ``metadata["help"]``.
    """
    doc = inspect.cleandoc(cls.__doc__ or "")
    lines = dict(_option_lines(doc))
    hints = option_types(cls)
    options = []
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            default = format_value(field.default_factory(), hints[field.name])
        elif field.default is not dataclasses.MISSING:
            default = format_value(field.default, hints[field.name])
        else:
            default = "required"
        help_text = field.metadata.get("help") or lines.get(field.name, "")
        options.append(Option(field.name, type_text(hints[field.name]), default, help_text))
    summary = " ".join(doc.split("\n\n")[0].split())
    return Description(cls.name, cls.effect.value, summary, doc, tuple(options))


def providers(fact: str) -> tuple[type[Pass], ...]:
    """Every known pass that provides ``fact``."""
    return tuple(cls for cls in loadable() if fact in cls.provides)


def loadable() -> Iterator[type[Pass]]:
    """Every known pass, sorted by name; a package's pass that cannot be loaded is warned of.

    A broken package stops those who name its pass, and nobody else.
    """
    for name in names():
        try:
            yield get(name)
        except UsageError as error:
            _log.warning("%s", error)


@cache
def _built_in() -> dict[str, str]:
    """``{pass name: module}`` of this package, from the sources."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        for name in _NAMED.findall(file.read_text(encoding="utf-8")):
            assert name not in found, f"two passes are called {name}"
            found[name] = file.stem
    return found


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


def _load(point: metadata.EntryPoint) -> type[Pass]:
    try:
        loaded = point.load()
    except Exception as error:
        raise UsageError(
            f"the pass {point.name!r} cannot be loaded: {error}",
            where=point.value,
            fix="repair or uninstall the package that ships it",
        ) from error
    cls = _checked(loaded, point.value)
    if cls.name != point.name:
        raise UsageError(
            f"the entry point {point.name!r} names the pass {cls.name!r}",
            where=point.value,
            fix="give both the same name",
        )
    return cls


def _checked(cls: object, where: str) -> type[Pass]:
    """``cls``, if it is a pass: a dataclass with a name and an effect."""
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        raise UsageError(
            "that is not a pass", where=where, fix="derive it from ftc.passes.base.Pass"
        )
    if not dataclasses.is_dataclass(cls) or "__dataclass_fields__" not in vars(cls):
        raise UsageError(
            "a pass is a frozen dataclass",
            where=where,
            fix="decorate it with @dataclass(frozen=True)",
        )
    if missing := [a for a in ("name", "effect") if not hasattr(cls, a)]:
        raise UsageError(
            f"the pass has no {' and no '.join(missing)}",
            where=where,
            fix="set them as class variables",
        )
    option_types(cls)
    return cls


def _class_in(module: object, name: str) -> type[Pass]:
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Pass) and vars(value).get("name") == name:
            return value
    raise AssertionError(f"{module} holds no pass called {name}")


def _option_lines(doc: str) -> Iterator[tuple[str, str]]:
    """``(option, help)`` for each entry of the section that starts with ``Options``."""
    section = re.search(r"^Options.*:\n((?:[ ]+.*(?:\n|\Z)|\n)*)", doc, re.MULTILINE)
    if section is None:
        return
    body = inspect.cleandoc("\n" + section[1])
    for entry in re.split(r"\n(?=\S)", body):
        names_text, _, text = entry.partition(":")
        for name in names_text.split(","):
            yield name.strip(), " ".join(text.split())
