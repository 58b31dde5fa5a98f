"""Whether adapters meet the weights that they were trained on.

Of every tensor that stays in the base two numbers are kept: its norm ``|t|`` and its
product with one fixed vector. Another model has others; the same model, computed
again on another machine, has them to rounding, which a hash of the bytes would not
forgive.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ftc.graph.program import Program

Sketch = tuple[float, float]
TOLERANCE = 1e-4
"""Of a norm: what two runs of one compilation may differ by."""
_CHUNK = 1 << 20


def sketch_base(program: Program, without: Collection[str]) -> dict[str, Sketch]:
    """A sketch of every tensor of ``program`` but those named."""
    return {name: _sketch(t) for name, t in program.tensors() if name not in without}


def differing(
    program: Program, without: Collection[str], known: Mapping[str, Sequence[float]]
) -> list[str]:
    """Names of the tensors that are missing, new, or not those that ``known`` describes."""
    found = sketch_base(program, without)
    odd = set(found) ^ set(known)
    for name in found.keys() & known.keys():
        bound = TOLERANCE * max(found[name][0], known[name][0])
        # `not <=`: a NaN must differ
        if not all(abs(a - b) <= bound for a, b in zip(found[name], known[name], strict=True)):
            odd.add(name)
    return sorted(odd)


def _sketch(tensor: Tensor) -> Sketch:
    flat = tensor.detach().reshape(-1)
    fixed = torch.arange(min(_CHUNK, len(flat)), dtype=torch.float64).mul_(12.9898).cos_()
    squares = product = 0.0
    for start in range(0, len(flat), _CHUNK):
        values = flat[start : start + _CHUNK].double()
        finite = torch.nan_to_num(values, posinf=1e6, neginf=-1e6)
        squares += float(finite @ finite)
        product += float(finite @ fixed[: len(finite)])
    return squares**0.5, product
