"""What an objective is: from rows to examples, from examples to batches, from outputs to a loss.

The loss of a step is a sum of parts, each a mean over all of its terms in the
step, however many batches the step has and however they are spread over devices:

    loss = sum over parts p of  (sum of the terms of p in the step) / (their number)

so an objective returns sums, and counts its terms when it makes the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.signature import Signature
from ftc.graph.sources.tasks import FEATURES, endings, tasks_of
from ftc.passes.text import format_pass
from ftc.runtime.spoken import asset
from ftc.runtime.tokens import IDS
from ftc.runtime.training.data.encoder import Encoder
from ftc.runtime.training.data.rows import Row
from ftc.runtime.training.data.table import Table, Values

Tensors = Mapping[str, Tensor]
Draw = Callable[[int], torch.Generator]
"""The generator of an example, by its index: the same whatever batch the example is in."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass needs.

    Attributes:
        inputs: of the program, by name.
        targets: what the loss compares with.
        counts: terms of each part of the loss.
        examples, tokens: for throughput; padding is no token.
    """

    inputs: Tensors
    targets: Tensors
    counts: Mapping[str, float]
    examples: int
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""

        def moved(given: Tensors) -> Tensors:
            return {name: tensor.to(device, non_blocking=True) for name, tensor in given.items()}

        return Batch(moved(self.inputs), moved(self.targets), self.counts, self.examples,
                     self.tokens)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What an objective may know of a run.

    Attributes:
        program: that is trained.
        encoder: its tokenizer and inputs.
        labels: names of the classes, in the order of their numbers; empty for none.
        teacher: outputs of the original program for the same inputs, or None.
    """

    program: Program
    encoder: Encoder
    labels: tuple[str, ...] = ()
    teacher: Callable[[Tensors], dict[str, Tensor]] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Objective(ABC):
    """Base of every objective: a frozen dataclass whose fields are its options.

    Attributes:
        name: in text, as of a pass: ``mlm{share=0.2}``.
        columns: what a row must have.
        optional: what is read of a row that has it.
        cuts: whether of a text longer than a row only the beginning is used.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ("text",)
    optional: ClassVar[tuple[str, ...]] = ()
    cuts: ClassVar[bool] = False

    @property
    def spec(self) -> str:
        """The text form."""
        return format_pass(self)  # type: ignore[arg-type]

    @abstractmethod
    def check(self, program: Program) -> None:
        """Refuses a program that this objective cannot train.

        Raises:
            UsageError: with the fix.
        """

    @abstractmethod
    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """Examples of some consecutive rows: lists of numbers by column of the table.

        Raises:
            UsageError: naming the row that cannot be used.
        """

    def labels(self, rows: Sequence[Row], known: tuple[str, ...]) -> tuple[str, ...]:
        """Names of the classes; ``known`` are those of the model, ``()`` where it has none."""
        return known

    def arrange(self, table: Table, scene: Scene) -> Table:
        """The table of examples, from that of encoded rows."""
        return table

    @abstractmethod
    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """The batch of some examples."""

    @abstractmethod
    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """The sum of the terms of each part of the loss, in float32."""

    def observed(self, program: Program) -> tuple[fx.Node, ...]:
        """Nodes whose values the loss needs beside the outputs, as ``hidden_0``, ``hidden_1``, …"""
        return ()

    def measure(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, float]:
        """Sums for :meth:`metrics`, of one batch."""
        return {}

    def metrics(self, losses: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics from the mean of each part of the loss and the sums of all batches."""
        return {}


def hidden_name(index: int) -> str:
    """The name under which the value of an observed node is found among the outputs."""
    return f"hidden_{index}"


def token_output(signature: Signature) -> str | None:
    """The output with scores of the vocabulary for each token, ``[batch, sequence, tokens]``.

    States of a wide model have that shape too, so a program captured for features has none.
    """
    if signature.task == FEATURES:
        return None
    tokens = next((spec for spec in signature.inputs if spec.name == IDS), None)
    for spec in signature.outputs:
        if tokens is None or len(spec.shape) != 3 or spec.shape[:2] != tokens.shape:
            continue
        if isinstance(spec.shape[2], int) and spec.shape[2] >= tokens.high:
            return spec.name
    return None


def class_output(signature: Signature) -> tuple[str, int] | None:
    """The output with one row of scores for each text, and how many classes it has.

    Pooled features have that shape too, so a program captured for features has none.
    """
    if signature.task == FEATURES:
        return None
    for spec in signature.outputs:
        if len(spec.shape) == 2 and isinstance(spec.shape[1], int):
            return spec.name, spec.shape[1]
    return None


def refused(objective: Objective, program: Program, needs: str, fix: str) -> UsageError:
    """The error for a program without the output that an objective needs."""
    outputs = ", ".join(f"{s.name} {list(s.shape)}" for s in program.signature.outputs)
    return UsageError(f"{objective.name} needs {needs}", where=f"outputs: {outputs}", fix=fix)


def recapture(program: Program, *tasks: str) -> str:
    """The fix for a program without a head for any of ``tasks``: the one that its model has.

    A head that the model was not trained with cannot be captured.
    """
    config = asset(program.assets, "config.json")
    trained = tasks_of(config.get("architectures")) if isinstance(config, dict) else frozenset()
    if program.assets is not None and program.assets.is_file():  # a GGUF file has no other
        trained = frozenset({"causal-lm"})
    if found := [task for task in tasks if task in trained and task != program.signature.task]:
        return f"capture the model with --task {found[0]}"
    return f"take a model that was trained with one: {' or '.join(map(endings, tasks))}"


def cross_entropy(logits: Tensor, targets: Tensor, *, ignored: int = -100) -> Tensor:
    """The summed cross entropy, in float32.

    Args:
        logits: ``[..., classes]``.
        targets: int64 ``[...]``; ``ignored`` counts nothing.
    """
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return torch.nn.functional.cross_entropy(
        flat, targets.reshape(-1), ignore_index=ignored, reduction="sum"
    )


def first_tokens(rows: Any) -> list[list[int]]:
    """The ids that a tokenizer returned."""
    return [list(row) for row in rows[IDS]]
