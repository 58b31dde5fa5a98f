"""The table of translations: which function lowers which operator.

``@lowers(operator, ...)`` registers; a later registration of the same operator
wins, so that a plug-in can replace a translation. A translation that cannot
express a case (an option that ONNX has not) raises :class:`Unsupported`; the
operator is then decomposed, and only if that fails as well does the user see it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

Translation = Callable[..., Any]

#: Arguments that say where and how a tensor is stored, which ONNX has no word for.
STORAGE_ARGUMENTS = frozenset(
    {"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"}
)

_TABLE: dict[Any, tuple[Translation, frozenset[str]]] = {}


class Unsupported(Exception):
    """A translation has no form for these arguments; the text says which one."""


def lowers(*operators: Any) -> Callable[[Translation], Translation]:
    """Registers the decorated function as the translation of ``operators``.

    Args:
        operators: ``OpOverload`` objects, or Python functions that a graph calls.
    """

    def register(function: Translation) -> Translation:
        names = frozenset(list(inspect.signature(function).parameters)[1:])
        for operator in operators:
            _TABLE[operator] = (function, names)
        return function

    return register


def translation(operator: Any) -> tuple[Translation, frozenset[str]] | None:
    """The function that lowers ``operator`` and the names of its arguments; None without one."""
    return _TABLE.get(operator)


def lowered_operators() -> frozenset[Any]:
    """Every operator that has a translation."""
    return frozenset(_TABLE)
