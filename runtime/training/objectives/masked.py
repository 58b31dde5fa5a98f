"""Masked language modelling, next sentence prediction, and both: how BERT was pretrained.

Of the tokens, ``share`` are chosen as targets; of these 80 % become the mask
token, 10 % a random token, 10 % stay (Devlin et al., arXiv 1810.04805, A.1). The
choice depends on seed, epoch and example alone, so it is another one each epoch
and the same one after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.runtime.training.data.encoder import IGNORED, stack
from ftc.runtime.training.data.rows import Row
from ftc.runtime.training.data.table import Table, Values

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

_MASKED, _RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class Masked(Objective):
    """Predict tokens that were masked.

    Options:
        share: of the tokens are targets.
        whole_word: choose words, and with them all of their tokens.
    """

    name: ClassVar[str] = "mlm"

    share: float = 0.15
    whole_word: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"{self.name}: share={self.share:g} is no share", fix="share=0.15")

    def check(self, program: Program) -> None:
        """Needs scores of the vocabulary for each token."""
        if program.signature.task == "causal-lm":
            raise refused(self, program, "a model whose tokens see those after them",
                          "--objective clm")  # fmt: skip
        if token_output(program.signature) is None:
            raise refused(self, program, "scores of the vocabulary for each token",
                          recapture(program, "masked-lm"))  # fmt: skip

    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """Rows of at most ``length`` tokens; a longer text makes several."""
        found = _pieces([row.text("text") for row in rows], scene, self.whole_word)
        for index, ids in enumerate(found["input_ids"]):
            words = found.word_ids(index) if self.whole_word else range(len(ids))
            yield {"ids": ids, "words": _words(ids, words, scene)}

    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """Masks each example."""
        masked = [mask_tokens(ids, words, self.share, scene, draw(index)) for index, ids, words in
                  zip(indices, table.rows("ids", indices), table.rows("words", indices),
                      strict=True)]  # fmt: skip
        inputs = scene.encoder.inputs([ids for ids, _ in masked])
        targets = stack([target for _, target in masked], IGNORED)
        return Batch(inputs, {"tokens": targets}, {"loss": _terms(targets)}, len(masked),
                     sum(len(ids) for ids, _ in masked))  # fmt: skip

    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """Cross entropy of the targets."""
        logits = outputs[str(token_output(scene.program.signature))]
        return {"loss": cross_entropy(logits, batch.targets["tokens"])}

    def metrics(self, losses: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, float]:
        """Perplexity of the masked tokens."""
        return {"perplexity": math.exp(min(losses["loss"], 700.0))}


@dataclass(frozen=True)
class NextSentence(Objective):
    """Tell whether the second text follows the first (half do) or is another document's.

    A document is a row, or a paragraph of a text file. It is cut at the ends of
    sentences into segments of half a row.
    """

    name: ClassVar[str] = "nsp"

    def check(self, program: Program) -> None:
        """Needs two scores for each text."""
        if pair_output(program) is None:
            raise refused(self, program, "two scores for each pair of texts",
                          recapture(program, "pretraining"))  # fmt: skip

    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """Segments, the words of each token, and whether the next segment goes on."""
        from .segments import segments

        yield from segments(rows, scene)

    def arrange(self, table: Table, scene: Scene) -> Table:
        """Examples are the segments that another one follows."""
        from .segments import with_followers

        return with_followers(table)

    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """Pairs, without masks."""
        return self._batch(table, indices, scene, draw, share=0.0)

    def _batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw,
               share: float) -> Batch:  # fmt: skip
        from .segments import draw_pair

        rows, types, tokens, follows = [], [], [], []
        for index in indices:
            made = draw(index)
            pair = draw_pair(table, index, scene, made)
            ids, target = mask_tokens(pair.ids, pair.words, share, scene, made)
            rows.append(ids)
            types.append(pair.types)
            tokens.append(target)
            follows.append(pair.follows)
        targets = {"tokens": stack(tokens, IGNORED),
                   "follows": torch.tensor([0 if each else 1 for each in follows])}  # fmt: skip
        counts = {"nsp": float(len(rows))}
        if share:
            counts["mlm"] = _terms(targets["tokens"])
        return Batch(scene.encoder.inputs(rows, types), targets, counts, len(rows),
                     sum(map(len, rows)))  # fmt: skip

    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """Cross entropy of IsNext (0) and NotNext (1)."""
        logits = outputs[str(pair_output(scene.program))]
        return {"nsp": cross_entropy(logits, batch.targets["follows"])}

    def measure(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, float]:
        """Pairs that were told right."""
        logits = outputs[str(pair_output(scene.program))]
        right = logits.argmax(-1) == batch.targets["follows"]
        return {"right": float(right.sum()), "pairs": float(len(right))}

    def metrics(self, losses: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, float]:
        """Share of pairs told right."""
        return {"nsp_accuracy": sums["right"] / max(sums["pairs"], 1)}


@dataclass(frozen=True)
class Pretraining(NextSentence):
    """Masked tokens and next sentences together; the losses are added.

    Options:
        share: of the tokens are targets.
        whole_word: choose words, and with them all of their tokens.
    """

    name: ClassVar[str] = "pretraining"

    share: float = 0.15
    whole_word: bool = False

    __post_init__ = Masked.__post_init__

    def check(self, program: Program) -> None:
        """Needs both heads."""
        if token_output(program.signature) is None or pair_output(program) is None:
            raise refused(self, program, "scores of the vocabulary and two for each pair",
                          recapture(program, "pretraining"))  # fmt: skip

    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """Segments, with whole words where asked for."""
        from .segments import segments

        yield from segments(rows, scene, whole_word=self.whole_word)

    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """Pairs with masks."""
        return self._batch(table, indices, scene, draw, self.share)

    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """Both cross entropies."""
        logits = outputs[str(token_output(scene.program.signature))]
        tokens = cross_entropy(logits, batch.targets["tokens"])
        return {"mlm": tokens, **super().losses(outputs, batch, scene)}

    def metrics(self, losses: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, float]:
        """Perplexity of the masked tokens, and accuracy of the pairs."""
        perplexity = math.exp(min(losses["mlm"], 700.0))
        return {"perplexity": perplexity, **super().metrics(losses, sums)}


def pair_output(program: Program) -> str | None:
    """The output ``[batch, 2]``."""
    for spec in program.signature.outputs:
        if len(spec.shape) == 2 and spec.shape[1] == 2:
            return spec.name
    return None


def mask_tokens(
    ids: Tensor, words: Tensor, share: float, scene: Scene, made: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One row with masks, and its targets.

    Args:
        ids: ``[tokens]``.
        words: the number of each token's word, -1 for special tokens, which are kept.
        share: of the words are targets.
        scene: for the mask token and the vocabulary.
        made: the generator of the example.

    Returns:
        The ids that the program sees, and targets with -100 where there is none. A row with
        words has a target, however short it is.
    """
    ids = ids.long()
    if not share:
        return ids, torch.full_like(ids, IGNORED)
    dice = torch.rand(int(words.max()) + 2, generator=made)[words.long()]
    known = words >= 0
    chosen = (dice < share) & known
    if known.any() and not chosen.any():
        chosen = (dice == dice[known].min()) & known
    kind = torch.rand(len(ids), generator=made)
    random = torch.randint(scene.encoder.vocabulary, ids.shape, generator=made)
    masked = torch.where(chosen & (kind < _MASKED), scene.encoder.special("mask"), ids)
    swapped = chosen & (kind >= _MASKED) & (kind < _MASKED + _RANDOM)
    return torch.where(swapped, random, masked), ids.masked_fill(~chosen, IGNORED)


def _pieces(texts: Sequence[str], scene: Scene, words: bool) -> Any:
    """All tokens of texts, in rows of ``length``."""
    tokenizer = scene.encoder.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        if words:
            raise UsageError("whole words need a fast tokenizer", fix="whole_word=false")
        return scene.encoder.tokens(texts)
    return scene.encoder.tokens(texts, return_overflowing_tokens=True)


def _words(ids: Sequence[int], words: Any, scene: Scene) -> list[int]:
    special = set(scene.encoder.tokenizer.all_special_ids)
    return [-1 if token in special or word is None else int(word)
            for token, word in zip(ids, words, strict=True)]  # fmt: skip


def _terms(targets: Tensor) -> float:
    return float((targets != IGNORED).sum())
