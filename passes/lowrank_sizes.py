"""What low-rank weights cost: in what the budget counts, and at ranks that are not slower."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from torch import Tensor

from ftc.graph.matrices import Matrix, is_gather
from ftc.graph.program import Program
from ftc.graph.symbols import SizesAt
from ftc.graph.words import plural

from .context import Context
from .pace import Pace
from .ranks import Size

Chosen = tuple[Matrix, Tensor]
"""A weight that can be factored: how it is read, and its values ``[out, in]``."""
Counted = Literal["params", "bytes", "operations"]


def sizes_of(
    program: Program, ctx: Context, able: Sequence[Chosen], of: Counted
) -> dict[str, Size]:
    """The size of each weight by name, from shapes alone.

    Ranks are limited to those that are no slower than the product on the target, at the
    shapes that were named; where bytes are counted, time is not.
    """
    pace, units = Pace(program, ctx), _units(program, able, of)
    timed = pace.known and of != "bytes"
    return {m.weight: Size((w.shape[0], w.shape[1]), units[m.weight],
                           pace.limit(m, w) if timed and m.is_product else None)
            for m, w in able}  # fmt: skip


def _units(program: Program, able: Sequence[Chosen], of: Counted) -> dict[str, float]:
    """What one element costs; of operations: how many rows are multiplied by it."""
    if of == "params":
        return {m.weight: 1.0 for m, _ in able}
    if of == "bytes":
        return {m.weight: float(w.element_size()) for m, w in able}
    at = SizesAt(program, program.signature.sizes())
    return {m.weight: sum(at.numel(node) / len(w) for node in m.nodes if not is_gather(node))
            for m, w in able}  # fmt: skip


def slower_note(sizes: Collection[Size], target: str) -> str | None:
    """What to say of weights whose factors are slower at any rank."""
    slower = sum(size.most == 0 for size in sizes)
    return None if not slower else (
        f"left {plural(slower, 'product')} alone: factors of any rank are slower on {target} "
        "at the shapes that were named")  # fmt: skip


def no_smaller_note(left: Collection[Size], asked: str) -> str:
    """What to say of weights that factors of the rank asked for would not make smaller.

    Args:
        left: their sizes.
        asked: the option, ``rank=384``.
    """
    most = max(size.largest for size in left)
    slow = " or no faster" if any(size.most is not None for size in left) else ""
    if not most:
        would = "no rank would be"
    elif asked.startswith("rank="):
        would = f"rank={most} is the largest that makes one of them smaller"
    else:
        would = f"a lower {asked.partition('=')[0]} would make them smaller"
    return (f"left {plural(len(left), 'weight')} alone: at {asked} two factors are no "
            f"smaller{slow}, and {would}")  # fmt: skip
