"""English prose that every Python carries: long docstrings of the standard library.

None of it is in ``pydoc_data.topics``, which passes are calibrated on.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_MODULES = (
    "statistics.py", "turtle.py", "argparse.py", "difflib.py", "inspect.py", "random.py",
    "textwrap.py", "ast.py", "threading.py", "asyncio/tasks.py", "unittest/mock.py",
    "urllib/request.py", "email/message.py", "fractions.py", "optparse.py", "typing.py",
)  # fmt: skip
_PLAIN = re.compile(r"[A-Z][\w ,.;:'()/-]+[.!?]")


@cache
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of sentences, each of 100 characters or more, in the order of the files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = (p for name in _MODULES for p in _of_file(library / name))
    return tuple(dict.fromkeys(found))


@cache
def sentences() -> tuple[str, ...]:
    """Single sentences of 40 to 160 characters."""
    found = (s for p in paragraphs() for s in re.split(r"(?<=[.!?]) ", p))
    return tuple(dict.fromkeys(s for s in found if 40 <= len(s) <= 160))


def _of_file(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            continue
        for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            text = " ".join(block.split())
            if len(text) >= 100 and _PLAIN.fullmatch(text):
                yield text
