"""Inputs in pieces: as much of a batch at once as memory should hold.

What is added up over rows (moments, Gram matrices) or drawn from them (steps of a
training) is the same however rows are grouped, and its memory is that of one piece.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from .signature import Signature

Inputs = Mapping[str, Tensor]


def dynamic_sizes(signature: Signature, given: Inputs) -> dict[str, int]:
    """The size of every dynamic dimension, by name."""
    return {
        name: size
        for spec in signature.inputs
        for name, size in zip(spec.shape, given[spec.name].shape, strict=True)
        if isinstance(name, str)
    }


def positions(signature: Signature, given: Inputs) -> int:
    """Tokens of text, or rows of other inputs: the product of all dynamic sizes."""
    return math.prod(dynamic_sizes(signature, given).values())


def pieces(signature: Signature, inputs: Sequence[Inputs], most: int) -> list[Inputs]:
    """``inputs`` in pieces of at most ``most`` positions, one row at least.

    Inputs whose first axes are not one dynamic dimension cannot be split, and stay whole.
    """
    first = {spec.shape[0] if spec.shape else None for spec in signature.inputs}
    if len(first) != 1 or not isinstance(next(iter(first)), str):
        return list(inputs)
    made: list[Inputs] = []
    for given in inputs:
        count = len(next(iter(given.values())))
        step = max(1, most * count // max(positions(signature, given), 1))
        made += [{name: tensor[at : at + step] for name, tensor in given.items()}
                 for at in range(0, count, step)]  # fmt: skip
    return made


def windows(signature: Signature, given: Inputs, longest: int) -> list[Inputs]:
    """``given`` cut along its sequence into windows of at most ``longest`` tokens.

    It is the only one where it is short enough. A later window that shows nothing of
    some row, by its mask, is left out.
    """
    length = dynamic_sizes(signature, given).get("sequence", 0)
    if length <= longest:
        return [given]
    made = [_window(signature, given, at, longest) for at in range(0, length, longest)]
    return made[:1] + [each for each in made[1:] if _shows(signature, each)]


def sampled(signature: Signature, cut: Sequence[Inputs], most: int) -> list[Inputs]:
    """Those of ``cut``, evenly spread, that have about ``most`` positions together, or all."""
    return list(cut[:: math.ceil(sum(positions(signature, each) for each in cut) / most)])


def random_like(signature: Signature, given: Inputs, seed: int) -> dict[str, Tensor]:
    """Random inputs of the sizes of ``given``."""
    return signature.probe(seed=seed, **dynamic_sizes(signature, given))


def _window(signature: Signature, given: Inputs, start: int, longest: int) -> Inputs:
    made = dict(given)
    for spec in signature.inputs:
        for axis, dim in enumerate(spec.shape):
            if dim == "sequence":
                size = made[spec.name].shape[axis]
                made[spec.name] = made[spec.name].narrow(axis, start, min(longest, size - start))
    return made


def _shows(signature: Signature, given: Inputs) -> bool:
    masks = (given[spec.name] for spec in signature.inputs if spec.role == "mask")
    return all(bool(mask.flatten(1).any(1).all()) for mask in masks)
