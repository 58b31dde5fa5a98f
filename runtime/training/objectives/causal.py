"""Causal language modelling: predict each token from those before it.

    loss = - 1/N sum over t of  log p(x_t | x_1 … x_{t-1})

Documents are joined into one stream, an end-of-text token after each, and cut
into rows of ``length``: no padding. A token that begins a document is no target,
since what stands before it belongs to another. Attention is over the whole row, as
usual where documents are packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.runtime.training.data.encoder import IGNORED
from ftc.runtime.training.data.rows import DOCUMENT, Row
from ftc.runtime.training.data.table import Column, Table, Values

from .base import (
    Batch,
    Draw,
    Objective,
    Scene,
    Tensors,
    cross_entropy,
    recapture,
    refused,
    token_output,
)


@dataclass(frozen=True)
class Causal(Objective):
    """Predict the next token."""

    name: ClassVar[str] = "clm"
    optional: ClassVar[tuple[str, ...]] = (DOCUMENT,)

    def check(self, program: Program) -> None:
        """Needs scores of the vocabulary, of a model that sees nothing to the right."""
        if program.signature.task != "causal-lm" or token_output(program.signature) is None:
            raise refused(self, program, "a causal language model",
                          recapture(program, "causal-lm"))  # fmt: skip

    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """The tokens of each row; the paragraphs of one document stay together."""
        end = getattr(scene.encoder.tokenizer, "eos_token_id", None)
        goes_on = [_goes_on(a, b) for a, b in pairwise([*rows, None])]
        texts = [row.text("text") + ("\n\n" if more else "")
                 for row, more in zip(rows, goes_on, strict=True)]  # fmt: skip
        found = scene.encoder.tokens(texts, truncation=False, max_length=None,
                                     add_special_tokens=False)  # fmt: skip
        starts = True
        for row, tokens, more in zip(rows, found["input_ids"], goes_on, strict=True):
            if not tokens:
                raise UsageError("the text has no tokens", where=row.place, fix="write a word")
            ids = [*tokens] if more or end is None else [*tokens, end]
            yield {"ids": ids, "starts": [int(starts), *[0] * (len(ids) - 1)]}
            starts = not more

    def arrange(self, table: Table, scene: Scene) -> Table:
        """Rows of ``length`` tokens of the stream.

        Raises:
            UsageError: when the data does not fill one row.
        """
        length = scene.encoder.length
        total = len(table.columns["ids"].values)
        ends = torch.tensor([*range(length, total + 1, length)], dtype=torch.int64)
        rest = total - (int(ends[-1]) if len(ends) else 0)
        if rest > 1 and scene.encoder.masked:
            ends = torch.cat([ends, ends.new_tensor([total])])
        if not len(ends):
            raise UsageError(f"the data has {total} tokens, less than one row of {length}",
                             fix=f"give more text, or --length {max(2, total)}")  # fmt: skip
        columns = {name: Column(column.values, ends) for name, column in table.columns.items()}
        return Table(columns, table.facts)

    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """Targets are the inputs, one place to the left."""
        rows = table.rows("ids", indices)
        inputs = scene.encoder.inputs(rows)
        targets = torch.full((len(rows), max(map(len, rows))), IGNORED, dtype=torch.int64)
        for i, (row, starts) in enumerate(zip(rows, table.rows("starts", indices), strict=True)):
            targets[i, : len(row) - 1] = row[1:].masked_fill(starts[1:].bool(), IGNORED)
        count = int((targets != IGNORED).sum())
        return Batch(inputs, {"tokens": targets}, {"loss": count}, len(rows),
                     sum(map(len, rows)))  # fmt: skip

    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """Cross entropy of the next token."""
        logits = outputs[str(token_output(scene.program.signature))]
        return {"loss": cross_entropy(logits, batch.targets["tokens"])}

    def metrics(self, losses: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, float]:
        """Perplexity."""
        return {"perplexity": math.exp(min(losses["loss"], 700.0))}


def _goes_on(row: Row, after: Row | None) -> bool:
    """Whether ``after`` is of the same document as ``row``."""
    number = row.fields.get(DOCUMENT)
    return number is not None and after is not None and after.fields.get(DOCUMENT) == number
