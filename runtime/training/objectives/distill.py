"""Distillation: a changed program learns what the original one says.

    scores:    T^2 KL( softmax(teacher / T) || softmax(student / T) )    (arXiv 1503.02531)
    features:  |teacher - student|^2 / |teacher|^2
    hidden:    the same, of what corresponding layers hand on            (arXiv 1909.10351)

No labels are needed: any text of the kind that the program will see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ftc.graph.errors import UsageError
from ftc.graph.fold import layer_outputs
from ftc.graph.program import Program
from ftc.graph.shapes import value
from ftc.graph.signature import Dim, format_shape
from ftc.runtime.training.data.rows import Row
from ftc.runtime.training.data.table import Table, Values

from .base import Batch, Draw, Objective, Scene, Tensors, hidden_name
from .labels import PAIR, encode_texts

_SCORES = ("masked-lm", "pretraining", "causal-lm", "sequence-classification",
           "token-classification")  # fmt: skip


@dataclass(frozen=True)
class Distillation(Objective):
    """Learn the outputs of the original program, and what its layers hand on.

    Options:
        temperature: of the scores.
        hidden: weight of the layers' part of the loss; 0 leaves it out.
    """

    name: ClassVar[str] = "distillation"
    optional: ClassVar[tuple[str, ...]] = (PAIR,)
    cuts: ClassVar[bool] = True

    temperature: float = 2.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.hidden < 0:
            raise UsageError(f"{self.spec} makes no sense", fix="temperature > 0, hidden >= 0")

    def check(self, program: Program) -> None:
        """Needs layers where their values are to be compared."""
        if self.hidden and not layer_outputs(program):
            raise UsageError("no layers were found to compare", fix="hidden=0")

    def check_teacher(self, program: Program, teacher: Program) -> None:
        """Needs outputs that both have, and layers that can be compared.

        Raises:
            UsageError: where there are none, or their shapes differ.
        """
        own, theirs = _shapes(program), _shapes(teacher)
        common = [name for name in own if name in theirs]
        if not common:
            raise UsageError(
                "the teacher and the program have no output in common",
                where=f"{', '.join(own)} and {', '.join(theirs)}",
                fix="take a teacher with the same head, or --task to capture both for one",
            )
        for name in common:
            if own[name] != theirs[name]:
                raise UsageError(
                    f"the output {name} has the shape {format_shape(own[name])}, "
                    f"and the teacher's {format_shape(theirs[name])}",
                    fix="take a teacher with outputs of the same shape",
                )
        if not self.hidden:
            return
        found, wanted = _widths(self.observed(program)), _widths(self.observed(teacher))
        if not wanted:
            raise UsageError("no layers were found in the teacher to compare", fix="hidden=0")
        if found != wanted:
            widths = [" and ".join(sorted(map(str, each))) for each in (found, wanted)]
            raise UsageError(f"layers have width {widths[0]}, the teacher's {widths[1]}: "
                             "they cannot be compared", fix="hidden=0")  # fmt: skip

    def observed(self, program: Program) -> tuple[fx.Node, ...]:
        """What each layer hands on."""
        return layer_outputs(program) if self.hidden else ()

    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """Tokens of the texts."""
        for ids, types in zip(*encode_texts(rows, scene.encoder), strict=True):
            yield {"ids": ids, "types": types}

    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """Padded rows; the teacher reads the same."""
        rows = table.rows("ids", indices)
        inputs = scene.encoder.inputs(rows, table.rows("types", indices))
        tokens = sum(map(len, rows))
        counts = {"outputs": float(tokens), **({"hidden": float(tokens)} if self.hidden else {})}
        keep = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
        for index, row in enumerate(rows):
            keep[index, : len(row)] = True
        return Batch(inputs, {"keep": keep}, counts, len(rows), tokens)

    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """Distances from the teacher, summed over tokens."""
        assert scene.teacher is not None
        expected = scene.teacher(batch.inputs)
        keep, scored = batch.targets["keep"], scene.program.signature.task in _SCORES
        names = [name for name in scene.program.signature.output_names if name in expected]
        parts = {
            "outputs": sum(self._distance(outputs[n], expected[n], keep, scored) for n in names)
        }
        if self.hidden:
            parts["hidden"] = self.hidden * self._hidden(outputs, expected, keep)
        return parts  # type: ignore[return-value]

    def _hidden(self, outputs: Tensors, expected: Tensors, keep: Tensor) -> Tensor:
        """The mean over the student's layers; each compares with the teacher's at its depth."""
        own = sum(name.startswith("hidden_") for name in outputs)
        theirs = sum(name.startswith("hidden_") for name in expected)
        distances = []
        for layer in range(own):
            found = outputs[hidden_name(layer)]
            wanted = expected[hidden_name(max((layer + 1) * theirs // own, 1) - 1)]
            distances.append(_relative(found, wanted, keep))
        return torch.stack(distances).mean()

    def _distance(self, found: Tensor, wanted: Tensor, keep: Tensor, scored: bool) -> Tensor:
        """The distance of one output, summed over tokens."""
        if not scored or found.shape[-1] == 1:  # one number is no distribution
            return _relative(found, wanted, keep)
        student = (found.float() / self.temperature).log_softmax(-1)
        teacher = (wanted.float() / self.temperature).log_softmax(-1)
        terms = (teacher.exp() * (teacher - student)).sum(-1) * self.temperature**2
        if terms.shape == keep.shape:
            return (terms * keep).sum()
        return terms.mean() * keep.sum()


def _shapes(program: Program) -> dict[str, tuple[Dim, ...]]:
    """The shape of each output; ``…`` for a size that differs from call to call."""
    return {spec.name: tuple(size if isinstance(size, int) else "…" for size in spec.shape)
            for spec in program.signature.outputs}  # fmt: skip


def _widths(layers: Sequence[fx.Node]) -> set[int]:
    return {int(value(node).shape[-1]) for node in layers}


def _relative(found: Tensor, wanted: Tensor, keep: Tensor) -> Tensor:
    """The squared relative error, times the tokens it stands for."""
    found, wanted = found.float(), wanted.float()
    if found.shape[:2] == keep.shape:
        found, wanted = found[keep], wanted[keep]
    error = (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
    return error * keep.sum()
