"""Files that hold one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import FtcError


def read_object(
    file: Path, kind: type[FtcError], fix: str, broken: str = "is not valid JSON"
) -> dict[str, Any]:
    """The object in ``file``.

    Raises:
        FtcError: of ``kind``, naming the file and what is wrong with it: ``broken`` where it
            cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise kind(f"{file} {broken}: {error}", fix=fix) from None
    if not isinstance(content, dict):
        raise kind(f"{file} is not a JSON object", fix=fix)
    return content
