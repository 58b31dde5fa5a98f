"""TOML: the configuration of a run as a file, read and written."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from ftc.graph.errors import UsageError


def read_config(path: Path) -> dict[str, Any]:
    """The values in a TOML file.

    Raises:
        UsageError: for a file that is not there, or not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", fix="name a file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"not TOML: {error}", where=str(path), fix="key = value") from None


def toml_value(value: Any) -> str:
    """A text, a number or a boolean as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    return repr(value)
