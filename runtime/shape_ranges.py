"""The shapes that a program will meet: ``batch=1:8,sequence=1:128``.

A range stands for its two ends: the program is as good as it is at the corners.
"""

from __future__ import annotations

import re
from itertools import product

from ftc.graph.errors import UsageError
from ftc.graph.signature import Signature

_RANGE = re.compile(r"\s*([^=\s]+)\s*=\s*(\d+)\s*(?::\s*(\d+)\s*)?")


def parse_ranges(text: str | None, signature: Signature) -> tuple[dict[str, int], ...]:
    """The corners of the named ranges: sizes of every dynamic dimension; none without text.

    Dimensions that are not named have their usual size.

    Raises:
        UsageError: for another form, an unknown dimension, or a size out of range.
    """
    if text is None:
        return ()
    example = ",".join(f"{d}=1:8" for d in signature.dims) or "nothing: every size is fixed"
    ends: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        found = _RANGE.fullmatch(part)
        if found is None:
            raise UsageError(f"{part.strip()!r} is no range of sizes", fix=f"write {example}")
        name, low, high = found[1], int(found[2]), int(found[3] or found[2])
        if name in ends or low > high:
            why = "is given twice" if name in ends else f"goes from {low} down to {high}"
            raise UsageError(f"the range of {name!r} {why}", fix=f"write {example}")
        ends[name] = (low, high) if low < high else (low,)
    corners = [dict(zip(ends, sizes, strict=True)) for sizes in product(*ends.values())]
    return tuple(dict(signature.sizes(**corner)) for corner in corners)
