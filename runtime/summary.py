"""What a program is, in numbers: its interface, its weights by role and layer, its history.

A weight is counted once, under the first role it has in the order embedding,
attention, feed-forward, head, normalization, convolution, other products; a tied
head is the embedding's. Bytes include scales and zero points.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import fx

from ftc.graph.bundle import is_bundle
from ftc.graph.cached import start_of
from ftc.graph.cost import Cost, NodeCost, cost
from ftc.graph.printer import fingerprint
from ftc.graph.program import PassRecord, Program
from ftc.graph.provenance import provenance
from ftc.graph.select import select
from ftc.graph.signature import format_spec
from ftc.graph.structure import Structure, find_structure
from ftc.graph.words import plural

_ORDER = ("adapter", "embedding", "attention", "ffn", "head", "norm", "conv", "product")
_PARTS = ("", ".quantized", ".scale", ".zero_point")
_LAYER = re.compile(r"(.*?(?:^|\.)\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: weights, their storage, and multiply-adds where they are known."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    operations: int | None = None


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight by its logical name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything ``ftc inspect`` says of a program."""

    source: str
    task: str
    fingerprint: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    limits: dict[str, int]
    parameters: int
    bytes: int
    operations: int
    nodes: int
    sizes: dict[str, int]
    roles: tuple[Row, ...]
    layers: tuple[Row, ...]
    history: tuple[PassRecord, ...]
    notes: tuple[str, ...]
    files: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def summarize(program: Program, source: str, sizes: dict[str, int] | None = None) -> Summary:
    """A summary of ``program``.

    Args:
        source: where it came from, to show.
        sizes: of dynamic dimensions for the operations; the signature's defaults otherwise.

    Raises:
        UsageError: for a dimension that the program has not.
    """
    total, structure = cost(program, **(sizes or {})), find_structure(program)
    signature = program.signature
    return Summary(
        source=source,
        task=signature.task,
        fingerprint=fingerprint(program),
        inputs={spec.name: format_spec(spec) for spec in signature.inputs},
        outputs={spec.name: format_spec(spec) for spec in signature.outputs},
        limits=dict(signature.limits),
        parameters=total.parameters,
        bytes=total.bytes,
        operations=total.operations,
        nodes=len(program.graph.nodes),
        sizes=dict(total.sizes),
        roles=by_role(program, structure),
        layers=by_layer(program, total),
        history=program.history,
        notes=(*program.notes, *_start(program)),
        files=_files(Path(source)),
    )


def _start(program: Program) -> tuple[str, ...]:
    """What every text begins behind, in words."""
    ids = start_of(program).ids
    return (f"every text begins behind a prompt of {plural(len(ids), 'token')}",) if ids else ()


def selected(program: Program, selector: str) -> tuple[Weight, ...]:
    """The weights that ``selector`` means, in the program's order.

    Raises:
        UsageError: when it matches nothing, or is wrong.
    """
    structure = find_structure(program)
    names = select(selector, program)
    held = dict(program.tensors())
    order = {name: place for place, name in enumerate(held)}
    found = [_weight(held, name, structure) for name in names]
    return tuple(
        sorted(found, key=lambda w: order.get(w.name, order.get(f"{w.name}.quantized", 0)))
    )


def by_role(program: Program, structure: Structure) -> tuple[Row, ...]:
    """Weights by the first of their roles; what has none is under ``other``."""
    held, rows = dict(program.tensors()), []
    left = set(structure.parameters)
    for role in (*_ORDER, "other"):
        names = left if role == "other" else structure.roles[role] & left
        left = left - names
        if names:
            weights = [_weight(held, name, structure) for name in names]
            rows.append(Row(role, len(weights), sum(_numel(w.shape) for w in weights),
                            sum(w.bytes for w in weights)))  # fmt: skip
    return tuple(rows)


def by_layer(program: Program, total: Cost) -> tuple[Row, ...]:
    """Cost by module path, cut after its first number; nodes of no module are under ``(root)``."""
    table: dict[str, list[NodeCost]] = {}
    for node, each in total.nodes.items():
        table.setdefault(_layer(node), []).append(each)
    return tuple(
        Row(name, sum(c.bytes > 0 for c in costs), sum(c.parameters for c in costs),
            sum(c.bytes for c in costs), sum(c.operations for c in costs))
        for name, costs in table.items()
        if any(c.bytes or c.operations for c in costs)
    )  # fmt: skip


def _layer(node: fx.Node) -> str:
    path = provenance(node).module
    if node.op == "get_attr" and not path:
        path = str(node.target).rpartition(".")[0]
    match = _LAYER.match(path)
    return match[1] if match else ".".join(path.split(".")[:2]) or "(root)"


def _weight(held: dict[str, Any], name: str, structure: Structure) -> Weight:
    parts = [held[name + part] for part in _PARTS if name + part in held]
    main = parts[0]
    size = sum(part.numel() * part.element_size() for part in parts)
    kind, shape = _short(main.dtype), tuple(main.shape)
    if len(parts) > 1 and kind == "uint8":  # two codes of 4 bits a byte
        kind, shape = "int4", (*shape[:-1], 2 * shape[-1])
    return Weight(name, kind, shape, size, structure.of(name))


def _numel(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _files(path: Path) -> dict[str, int]:
    if not is_bundle(path):
        return {}
    return {p.relative_to(path).as_posix(): p.stat().st_size
            for p in sorted(path.rglob("*")) if p.is_file()}  # fmt: skip
