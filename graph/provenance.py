"""Where a node came from: the module and source line it was traced at, the pass that made it.

torch.export leaves a module stack and a Python traceback on each node, about a
kilobyte of text apiece. :func:`stamp_captured` reduces both, once, to a
:class:`Provenance` of a few words, which lives in ``node.meta["provenance"]``
and is what errors, the printer and per-layer tables read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import cast

from torch import fx

KEY = "provenance"
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ([^\n]+)')


@dataclass(frozen=True, slots=True)
class Provenance:
    """Origin of one node.

    Attributes:
        module: qualified name of the module that was running, ``""`` for the root.
        source: ``file.py:line`` of the innermost frame, ``""`` when unknown.
        made_by: ``"capture"`` or the text form of the pass that made the node.
    """

    module: str = ""
    source: str = ""
    made_by: str = "capture"

    def by(self, made_by: str) -> Provenance:
        """The same place, made by another pass."""
        return replace(self, made_by=made_by)


def provenance(node: fx.Node) -> Provenance:
    """The provenance of ``node``; empty when nothing is known."""
    return cast(Provenance, node.meta.get(KEY, Provenance()))


def stamp_captured(node: fx.Node) -> None:
    """Replaces the exporter's module stack and traceback on ``node`` by a Provenance, once."""
    if KEY in node.meta:
        return
    stack = node.meta.pop("nn_module_stack", None) or {}
    path = ""
    for name, _ in stack.values():
        path = "" if name.startswith("_empty_nn_module_stack") else name
    trace = node.meta.pop("stack_trace", None) or ""
    frames = _FRAME.findall(trace)
    source = f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""
    node.meta[KEY] = Provenance(_tidy(path), source)


def _tidy(path: str) -> str:
    """A module path without the exporter's decoration (``L['self'].a.b`` -> ``a.b``)."""
    return re.sub(r"@\d+$", "", path.replace("L['self'].", "").replace("L['self']", ""))


def describe(node: fx.Node) -> str:
    """One line that tells a reader which node is meant."""
    origin = provenance(node)
    parts = [f"node {node.name}"]
    if origin.module:
        parts.append(f"module {origin.module}")
    if origin.source:
        parts.append(origin.source)
    if origin.made_by != "capture":
        parts.append(f"made by {origin.made_by}")
    return " | ".join(parts)
