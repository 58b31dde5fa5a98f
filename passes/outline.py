"""What the passes of this package are, read off their sources.

A list of them is wanted at once, and importing a pass imports torch, which takes
seconds. So name, effect and first sentence are read without importing anything;
:mod:`ftc.passes.registry` has the passes themselves, with their options.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GROUP = "ftc.passes"


@dataclass(frozen=True, slots=True)
class Outline:
    """A pass in one line: its name, its effect, and the first sentence of its docstring."""

    name: str
    effect: str
    summary: str


def outlines() -> tuple[Outline, ...]:
    """Every pass that can be named, sorted; other packages' are imported, if there are any."""
    found = list(_built_in())
    if metadata.entry_points(group=GROUP):
        from . import registry

        known = {each.name for each in found}
        others = (registry.describe(cls) for cls in registry.loadable() if cls.name not in known)
        found += [Outline(each.name, each.effect, each.summary) for each in others]
    return tuple(sorted(found, key=lambda each: each.name))


def _built_in() -> Iterator[Outline]:
    for file in Path(__file__).parent.glob("*.py"):
        classes = (n for n in ast.parse(file.read_bytes()).body if isinstance(n, ast.ClassDef))
        for node in classes:
            values = _class_variables(node)
            name, effect = values.get("name"), values.get("effect")
            if isinstance(name, ast.Constant) and isinstance(effect, ast.Attribute):
                first = (ast.get_docstring(node) or "").split("\n\n")[0]
                yield Outline(str(name.value), effect.attr.lower(), " ".join(first.split()))


def _class_variables(node: ast.ClassDef) -> dict[str, ast.expr]:
    return {
        line.target.id: line.value
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value
    }
