"""Names of a package that are imported when they are first used (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def importing(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package: quick to import, and costs what of it is used.

    Args:
        package: its ``__name__``.
        homes: the module within it that has a name, by name.
    """

    def find(name: str) -> Any:
        """The value of ``name``, which the package has from now on.

        Raises:
            AttributeError: for a name that it has not.
        """
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = import_module(package)
        value = getattr(import_module(f".{homes[name]}", package), name)
        setattr(module, name, value)
        return value

    return find
