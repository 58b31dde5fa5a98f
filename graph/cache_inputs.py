"""Inputs of a program with a cache by their names: see :mod:`ftc.graph.cached`.

Apart from it, since what runs a file in onnxruntime has to know them and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

Kind = tuple[str, Sequence[int]]
"""Element type (``float32``) and sizes of a tensor."""

#: Key and value of the metadata of an ONNX file in which past and present may be one buffer.
IN_PLACE = ("cache", "in place")


POSITIONS = "position_ids"
"""The name under which models take positions; other inputs of integers describe tokens."""


class Names:
    """Names of the inputs and outputs of a cache."""

    PAST: ClassVar[str] = "past"
    MASK: ClassVar[str] = "past_mask"

    @staticmethod
    def past(number: int) -> tuple[str, str]:
        """Keys and values that come in at an attention."""
        return f"past_key_{number}", f"past_value_{number}"

    @staticmethod
    def present(number: int) -> tuple[str, str]:
        """Keys and values that go out at an attention."""
        return f"present_key_{number}", f"present_value_{number}"

    @staticmethod
    def total(sequence: str) -> str:
        """The dimension of all tokens, of which there may be a limit."""
        return f"{Names.PAST}+{sequence}"


def is_state(name: str) -> bool:
    """Whether an input of that name takes keys or values."""
    return name.startswith(("past_key_", "past_value_"))


def present_of(past: str) -> str:
    """The output that the next run takes as the input ``past``."""
    return past.replace("past_", "present_", 1)


def misfit(signature: Mapping[str, Any], tensors: Mapping[str, Kind]) -> str | None:
    """An input whose tensor is not what a run could begin behind: see ``signature.start``.

    Args:
        signature: as a bundle's head has it.
        tensors: those that ``start`` names, and perhaps others.
    """
    first, *others = signature["inputs"]
    kept = (first, *(spec for spec in others if is_state(spec["name"])))
    specs = {spec["name"]: spec for spec in kept}
    start, lengths = signature.get("start", {}), set[int]()
    for name, held in start.items():
        spec, (kind, sizes) = specs.get(name), tensors.get(held, ("", ()))
        if spec is None or kind != spec["dtype"]:
            return str(name)
        fixed = [1, *(size for size in spec["shape"][1:] if isinstance(size, int))]
        free = 1 if spec is first else 2
        left = [*sizes[:free], *sizes[free + 1 :]]
        if len(sizes) != len(spec["shape"]) or left != fixed:
            return str(name)
        lengths.add(sizes[free])
    return None if not start or (start.keys() == specs.keys() and len(lengths) == 1) else "start"


class TokenInput(NamedTuple):
    """An input that follows from the tokens: its name, element type (``int64``), role and least."""

    name: str
    kind: str
    role: str
    low: int


def step_arrays(inputs: Sequence[TokenInput], ids: Array, mask: Array) -> dict[str, Array]:
    """Inputs of one step, but for keys and values.

    Args:
        inputs: those to make, the ids first.
        ids: of the new tokens, int64 ``[batch, new]``.
        mask: of past and new tokens, int64 ``[batch, past + new]``.
    """
    count = mask.shape[1] - ids.shape[1]
    made: dict[str, Array] = {}
    for spec in inputs:
        if spec is inputs[0]:
            given = ids
        elif spec.name == Names.MASK:
            given = mask[:, :count]
        elif spec.role == "mask":
            given = mask[:, count:]
        elif spec.name == POSITIONS:
            given = np.maximum(mask.cumsum(1) - 1, 0)[:, count:]
        else:
            given = np.full(ids.shape, spec.low)
        made[spec.name] = given.astype(spec.kind, copy=False)
    return made


def pad_left(rows: Sequence[Sequence[int] | Array]) -> tuple[Array, Array]:
    """Texts of different length as one batch: ids and mask, int64 ``[batch, longest]``."""
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = row
        mask[number, longest - len(row) :] = 1
    return ids, mask
