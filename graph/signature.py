"""What a program takes and gives: names, dtypes, dimensions, and probes that fit them.

A dimension is an ``int`` (fixed) or a name (dynamic); one name is one size
everywhere. The signature can make inputs of any size for itself
(:meth:`Signature.probe`), which is how parity is measured at shapes other than
the example's without the user having to supply data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor

from .errors import UsageError, nearest

Dim = int | str
Role = Literal["value", "mask"]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One tensor input.

    Attributes:
        name: the model's own name for it (``input_ids``).
        dtype: the element type.
        shape: fixed sizes and names of dynamic dimensions, outermost first.
        low, high: integer values lie in ``[low, high)``; unused for floats.
        role: ``"mask"`` for an attention mask (1 = attend), else ``"value"``.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    low: int = 0
    high: int = 2
    role: Role = "value"


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """One tensor output: its name, element type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """The interface of a program.

    Attributes:
        task: the task the program was captured for (``"causal-lm"``, ``"module"``, …).
        inputs: in calling order.
        outputs: in returning order.
        limits: largest legal size of a dynamic dimension, where one is known
            (``{"sequence": 512}`` for learned positions), or of the sum of two
            (``{"past+sequence": 512}``).
        start: tensors of the program, by input: what a run begins behind, a folded prompt's
            ids, keys and values (:mod:`ftc.graph.cached`).
    """

    task: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    limits: Mapping[str, int]
    start: Mapping[str, str] = field(default_factory=dict)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in calling order."""
        return tuple(i.name for i in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in returning order."""
        return tuple(o.name for o in self.outputs)

    @property
    def input_types(self) -> dict[str, torch.dtype]:
        """Element types by the names of the inputs."""
        return {spec.name: spec.dtype for spec in self.inputs}

    def with_outputs_of(self, other: Signature) -> Signature:
        """This signature with those outputs that ``other`` has as well, of the same type."""
        kept = tuple(spec for spec in self.outputs if spec in other.outputs)
        return replace(self, outputs=kept)

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dynamic dimensions, in order of first appearance."""
        names = (d for i in self.inputs for d in i.shape if isinstance(d, str))
        return tuple(dict.fromkeys(names))

    def sizes(self, **sizes: int) -> dict[str, int]:
        """A size for every dynamic dimension: those given, the others 2, 11, 13, …, within limits.

        Raises:
            UsageError: for a dimension this signature has not, or a size beyond its limit.
        """
        for name, size in sizes.items():
            if name not in self.dims:
                raise UsageError(f"no dynamic dimension {name!r}", fix=nearest(name, self.dims))
            if size < 1 or size > self.limits.get(name, size):
                limit = self.limits.get(name)
                bound = f"1 to {limit}" if limit else "1 or more"
                raise UsageError(f"{name}={size} is out of range", fix=f"use {bound}")
        defaults = dict(zip(self.dims, cycle((2, 11, 13, 17, 19, 23, 29, 31)), strict=False))
        chosen = {n: sizes.get(n, min(d, self.limits.get(n, d))) for n, d in defaults.items()}
        for name, limit in self.limits.items():
            first, plus, second = name.partition("+")
            if plus and chosen[first] + chosen[second] > limit:
                chosen[first] = max(0, limit - chosen[second])
        return chosen

    def parse_sizes(self, text: str) -> dict[str, int]:
        """``batch=8,sequence=128`` as sizes.

        Raises:
            UsageError: for another form, an unknown dimension, or a size out of range.
        """
        example = ",".join(f"{d}=8" for d in self.dims) or "no dynamic dimension"
        sizes: dict[str, int] = {}
        for part in text.split(","):
            name, equals, number = part.strip().partition("=")
            if not equals or not number.strip().isdigit():
                raise UsageError(f"{text!r} is no shape", fix=f"write {example}")
            sizes[name.strip()] = int(number)
        self.sizes(**sizes)
        return sizes

    def probe(self, *, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
        """Inputs that are legal for this program, the same for the same seed.

        Integers are uniform in ``[low, high)``, floats standard normal; a mask
        keeps a random prefix of each row (right padding), the first row whole.
        """
        chosen = self.sizes(**sizes)
        generator = torch.Generator().manual_seed(seed)
        return {spec.name: _sample(spec, chosen, generator) for spec in self.inputs}

    def bind(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """``inputs`` in calling order.

        Raises:
            UsageError: for a missing or unknown name, or a wrong rank or dtype.
        """
        for name in inputs:
            if name not in self.input_names:
                raise UsageError(f"unknown input {name!r}", fix=nearest(name, self.input_names))
        for spec in self.inputs:
            if spec.name not in inputs:
                raise UsageError(
                    f"missing input {spec.name!r}", fix=f"inputs: {', '.join(self.input_names)}"
                )
            given = inputs[spec.name]
            if given.dim() != len(spec.shape) or given.dtype != spec.dtype:
                raise UsageError(
                    f"input {spec.name!r} is {given.dtype} of shape {tuple(given.shape)}",
                    fix=f"pass {spec.dtype} of shape {format_shape(spec.shape)}",
                )
        return tuple(inputs[spec.name] for spec in self.inputs)


def format_shape(shape: tuple[Dim, ...]) -> str:
    """``[batch, sequence, 384]``"""
    return f"[{', '.join(map(str, shape))}]"


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``"""
    return str(dtype).removeprefix("torch.")


def format_spec(spec: InputSpec | OutputSpec) -> str:
    """``float32 [batch, sequence, 384]``"""
    return f"{dtype_name(spec.dtype)} {format_shape(spec.shape)}"


def _sample(spec: InputSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = [d if isinstance(d, int) else sizes[d] for d in spec.shape]
    if spec.role == "mask":
        length = shape[-1]
        keep = torch.randint((length + 1) // 2, length + 1, (*shape[:-1], 1), generator=generator)
        keep.view(-1)[0] = length
        return (torch.arange(length) < keep).to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if not spec.dtype.is_floating_point:
        return torch.randint(spec.low, spec.high, shape, generator=generator).to(spec.dtype)
    return torch.randn(shape, generator=generator).to(spec.dtype)
