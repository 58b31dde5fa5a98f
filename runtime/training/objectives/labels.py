"""Learning from labels: of a text or a pair of texts, of each word, or a number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ftc.graph.errors import UsageError, nearest
from ftc.graph.program import Program
from ftc.graph.sources.tasks import FEATURES
from ftc.graph.words import plural
from ftc.runtime.training.data.encoder import IGNORED, Encoder, stack
from ftc.runtime.training.data.rows import Row
from ftc.runtime.training.data.table import Table, Values

from .base import (
    Batch,
    Draw,
    Objective,
    Scene,
    Tensors,
    class_output,
    cross_entropy,
    first_tokens,
    refused,
)

PAIR = "second"


@dataclass(frozen=True)
class Classification(Objective):
    """Tell the class of a text, or of a pair when rows have a column ``second``."""

    name: ClassVar[str] = "sequence-classification"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    optional: ClassVar[tuple[str, ...]] = (PAIR,)
    cuts: ClassVar[bool] = True

    def check(self, program: Program) -> None:
        """Needs a row of scores for each text."""
        found = class_output(program.signature)
        if found is None or found[1] < 2:
            number = " (or learn the number that it gives: --objective regression)" * bool(found)
            raise refused(self, program, "a row of scores for each text",
                          "add a head with as many labels as the data has, for two: --passes "
                          f"head{{labels=2}}{number}")  # fmt: skip

    def labels(self, rows: Sequence[Row], known: tuple[str, ...]) -> tuple[str, ...]:
        """The model's own names, or those in the data, in order."""
        return known or label_names({label_text(row) for row in rows})

    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """Tokens and the number of the label."""
        for row, ids, types in zip(rows, *encode_texts(rows, scene.encoder), strict=True):
            number = label_number(label_text(row), scene.labels, row.place)
            yield {"ids": ids, "types": types, "label": [number]}

    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """Padded rows, and their labels."""
        return text_batch(table, indices, scene, torch.int64)

    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """Cross entropy."""
        return {"loss": cross_entropy(_scores(outputs, scene), batch.targets["label"])}

    def measure(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, float]:
        """Texts that were told right."""
        right = _scores(outputs, scene).argmax(-1) == batch.targets["label"]
        return {"right": float(right.sum()), "texts": float(len(right))}

    def metrics(self, losses: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, float]:
        """Accuracy."""
        return {"accuracy": sums["right"] / max(sums["texts"], 1)}


@dataclass(frozen=True)
class Regression(Objective):
    """Tell a number of a text, or of a pair when rows have a column ``second``.

    loss = 1/N sum (prediction - label)^2
    """

    name: ClassVar[str] = "regression"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    optional: ClassVar[tuple[str, ...]] = (PAIR,)
    cuts: ClassVar[bool] = True

    def check(self, program: Program) -> None:
        """Needs one number for each text."""
        found = class_output(program.signature)
        if found is None or found[1] != 1:
            raise refused(self, program, "one number for each text",
                          "add a head with a pass: --passes head{labels=1}")  # fmt: skip

    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """Tokens and the number."""
        for row, ids, types in zip(rows, *encode_texts(rows, scene.encoder), strict=True):
            yield {"ids": ids, "types": types, "label": [_number(row)]}

    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """Padded rows, and their numbers."""
        return text_batch(table, indices, scene, torch.float32)

    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """Squared error."""
        found = _scores(outputs, scene).float().flatten()
        return {"loss": (found - batch.targets["label"]).square().sum()}

    def metrics(self, losses: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, float]:
        """Root of the mean squared error."""
        return {"rmse": math.sqrt(losses["loss"])}


@dataclass(frozen=True)
class TokenClassification(Objective):
    """Tell the class of each word: rows have ``words`` and as many ``labels``.

    The first token of a word carries its label, the others none.
    """

    name: ClassVar[str] = "token-classification"
    columns: ClassVar[tuple[str, ...]] = ("words", "labels")
    cuts: ClassVar[bool] = True

    def check(self, program: Program) -> None:
        """Needs a row of scores for each token."""
        if _word_output(program) is None:
            raise refused(self, program, "a row of scores for each token",
                          "add a head, for two labels: --passes "
                          "head{labels=2,task=token-classification}")  # fmt: skip

    def labels(self, rows: Sequence[Row], known: tuple[str, ...]) -> tuple[str, ...]:
        """The model's own names, or those in the data, in order."""
        return known or label_names({str(label) for row in rows for label in _pairs(row)[1]})

    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """Tokens, and a label or -100 for each."""
        pairs = [_pairs(row) for row in rows]
        found = scene.encoder.tokens([words for words, _ in pairs], is_split_into_words=True)
        for index, (row, (_, labels)) in enumerate(zip(rows, pairs, strict=True)):
            numbers = [label_number(str(label), scene.labels, row.place) for label in labels]
            words = found.word_ids(index)
            firsts = [w is not None and w != before
                      for w, before in zip(words, [None, *words], strict=False)]  # fmt: skip
            targets = [numbers[w] if first else IGNORED
                       for w, first in zip(words, firsts, strict=True)]  # fmt: skip
            yield {"ids": found["input_ids"][index], "labels": targets}

    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """Padded rows, and the labels of their tokens."""
        rows = table.rows("ids", indices)
        targets = stack(table.rows("labels", indices), IGNORED)
        count = float((targets != IGNORED).sum())
        return Batch(scene.encoder.inputs(rows), {"labels": targets}, {"loss": count}, len(rows),
                     sum(map(len, rows)))  # fmt: skip

    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """Cross entropy of the labelled tokens."""
        logits = outputs[str(_word_output(scene.program))]
        return {"loss": cross_entropy(logits, batch.targets["labels"])}

    def measure(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, float]:
        """Words that were told right."""
        targets = batch.targets["labels"]
        found = outputs[str(_word_output(scene.program))].argmax(-1)
        right = (found == targets) & (targets != IGNORED)
        return {"right": float(right.sum()), "words": float((targets != IGNORED).sum())}

    def metrics(self, losses: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, float]:
        """Accuracy of words."""
        return {"accuracy": sums["right"] / max(sums["words"], 1)}


def label_text(row: Row) -> str:
    """The label of a row as text.

    Raises:
        UsageError: naming the place of a row without one.
    """
    if "label" not in row.fields:
        raise row.missing("label")
    found = row.fields["label"]
    if found is None or isinstance(found, (bool, float, list, dict)) or str(found).strip() == "":
        shown = "no label" if found is None else f"the label {found!r}"
        raise UsageError(f"the row has {shown}", where=row.place, fix="a name or a whole number")
    return str(found)


def label_names(found: set[str]) -> tuple[str, ...]:
    """Names in order: numbers as numbers, else by the alphabet."""
    numbers = all(name.lstrip("-").isdigit() for name in found)
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def label_number(name: str, labels: tuple[str, ...], place: str) -> int:
    """The number of a label, given as its name or as the number.

    Raises:
        UsageError: naming the place of an unknown one.
    """
    if name in labels:
        return labels.index(name)
    if name.isdigit() and int(name) < len(labels):
        return int(name)
    raise UsageError(f"unknown label {name!r}", where=place, fix=nearest(name, labels))


def encode_texts(rows: Sequence[Row], encoder: Encoder) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens and token types of texts or pairs of texts."""
    pairs = [row.text(PAIR) for row in rows] if PAIR in rows[0].fields else None
    found = encoder.tokens([row.text("text") for row in rows], pairs)
    ids = first_tokens(found)
    types = found.get("token_type_ids") or [[0] * len(row) for row in ids]
    return ids, [list(row) for row in types]


def text_batch(table: Table, indices: Sequence[int], scene: Scene, dtype: torch.dtype) -> Batch:
    """Texts with one target each."""
    rows, types = table.rows("ids", indices), table.rows("types", indices)
    label = torch.cat(table.rows("label", indices)).to(dtype)
    return Batch(scene.encoder.inputs(rows, types), {"label": label}, {"loss": float(len(rows))},
                 len(rows), sum(map(len, rows)))  # fmt: skip


def _scores(outputs: Tensors, scene: Scene) -> Tensor:
    found = class_output(scene.program.signature)
    assert found is not None
    return outputs[found[0]]


def _word_output(program: Program) -> str | None:
    if program.signature.task == FEATURES:
        return None
    for spec in program.signature.outputs:
        if len(spec.shape) == 3 and isinstance(spec.shape[2], int):
            return spec.name
    return None


def _pairs(row: Row) -> tuple[list[str], list[Any]]:
    """The words of a row and their labels."""
    for column in TokenClassification.columns:
        if column not in row.fields:
            raise row.missing(column)
    words, labels = row.fields["words"], row.fields["labels"]
    if not isinstance(words, list) or not isinstance(labels, list):
        raise UsageError("words and labels are lists", where=row.place,
                         fix='{"words": ["Ada", "lives"], "labels": ["PER", "O"]}')  # fmt: skip
    if not words:
        raise UsageError("the row has no words", where=row.place, fix="fill it, or drop the row")
    if blank := next((i for i, word in enumerate(words, 1) if not _is_word(word)), None):
        raise UsageError(f"word {blank} is {words[blank - 1]!r}", where=row.place,
                         fix="drop it, and its label")  # fmt: skip
    if len(words) != len(labels):
        counts = f"{plural(len(words), 'word')} and {plural(len(labels), 'label')}"
        raise UsageError(counts, where=row.place, fix="one label a word")
    return [str(word) for word in words], labels


def _is_word(word: Any) -> bool:
    return word is not None and bool(str(word).strip())


def _number(row: Row) -> float:
    if "label" not in row.fields:
        raise row.missing("label")
    try:
        found = float(row.fields["label"])
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UsageError(
            f"the label {row.fields['label']!r} is no number", where=row.place, fix='"label": 0.5'
        )
    return found
