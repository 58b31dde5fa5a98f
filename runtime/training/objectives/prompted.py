"""Prompt learning: a template turns a text into a gap, and words stand for the labels.

    score(label | text) = log p(its word | template with the text)

(Schick and Schütze, arXiv 2001.07676; for causal models the word is what comes
next.) With ``--steps 0`` nothing is learned: the scores of the model as it is
are measured. Trained, the loss is the cross entropy of the scores, which is what
learned prompts and prefixes are for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

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
    first_tokens,
    recapture,
    refused,
    token_output,
)
from .labels import label_names, label_number, label_text

_HOLE = re.compile(r"\{(\w+)\}")
_MASK = "mask"


@dataclass(frozen=True)
class Prompt(Objective):
    """Score label words after a template, ``template="{text} Sentiment:"``.

    Options:
        template: ``{column}`` is replaced by the row's value; a masked model needs ``{mask}``.
        words: ``label=word`` for each label, apart by ``|``; empty: the labels themselves.
    """

    name: ClassVar[str] = "prompt"
    columns: ClassVar[tuple[str, ...]] = ("text", "label")

    template: str = "{text} Sentiment:"
    words: str = ""

    def __post_init__(self) -> None:
        if "text" not in _HOLE.findall(self.template):
            raise UsageError("the template has no {text}", where=self.template,
                             fix='template="{text} Sentiment:"')  # fmt: skip
        holes = tuple(hole for hole in _HOLE.findall(self.template) if hole != _MASK)
        object.__setattr__(self, "optional", holes)
        for part in filter(None, self.words.split("|")):
            if "=" not in part:
                raise UsageError(f"{part!r} gives no word", where=self.words,
                                 fix='words="0=bad|1=good"')  # fmt: skip

    def check(self, program: Program) -> None:
        """Needs scores of the vocabulary, and a mask in the template where the model fills gaps."""
        if token_output(program.signature) is None:
            raise refused(self, program, "scores of the vocabulary for each token",
                          recapture(program, "causal-lm", "masked-lm"))  # fmt: skip
        if self._masked(program) != (_MASK in _HOLE.findall(self.template)):
            fix = 'template="{text} It was {mask}."' if self._masked(program) else "leave it out"
            raise UsageError("{mask} is for models that fill gaps, and needed there",
                             where=self.template, fix=fix)  # fmt: skip

    def labels(self, rows: Sequence[Row], known: tuple[str, ...]) -> tuple[str, ...]:
        """The labels that have words, or those in the data."""
        return tuple(self._given()) or label_names({label_text(row) for row in rows})

    def encode(self, rows: Sequence[Row], scene: Scene) -> Iterable[Mapping[str, Values]]:
        """A row for each label that needs one: ``ids`` of the whole, ``answers`` where words are.

        When each word is one token, one row gives the scores of all.
        """
        words = self._word_tokens(scene)
        for row in rows:
            number = label_number(label_text(row), scene.labels, row.place)
            prompt = self._prompt(row, scene, room=max(map(len, words)))
            single = all(len(word) == 1 for word in words)
            for word in words[:1] if single else words:
                ids, answers = self._place(prompt, word, scene)
                yield {"ids": ids, "answers": answers, "label": [number]}

    def arrange(self, table: Table, scene: Scene) -> Table:
        """Examples are the labelled texts; each has one row, or one a label."""
        words = self._word_tokens(scene)
        each = 1 if all(len(word) == 1 for word in words) else len(words)
        label = table.columns["label"].values[::each]
        single = type(table.columns["label"])(label, torch.arange(1, len(label) + 1))
        return Table({"example": single, **table.columns}, {**table.facts, "rows": each})

    def batch(self, table: Table, indices: Sequence[int], scene: Scene, draw: Draw) -> Batch:
        """The rows of each example, one after another."""
        each = int(table.facts["rows"])
        places = [index * each + i for index in indices for i in range(each)]
        rows = table.rows("ids", places)
        answers = stack(table.rows("answers", places), IGNORED)
        label = torch.cat(table.rows("example", indices)).long()
        targets = {"answers": answers, "label": label}
        if each == 1:
            targets["words"] = torch.tensor([word[0] for word in self._word_tokens(scene)])
        return Batch(scene.encoder.inputs(rows), targets, {"loss": float(len(label))}, len(label),
                     sum(map(len, rows)))  # fmt: skip

    def losses(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, Tensor]:
        """Cross entropy of the scores."""
        return {"loss": cross_entropy(self.scores(outputs, batch, scene), batch.targets["label"])}

    def scores(self, outputs: Tensors, batch: Batch, scene: Scene) -> Tensor:
        """``[examples, labels]``: log probabilities of the labels' words."""
        logits = outputs[str(token_output(scene.program.signature))]
        answers = batch.targets["answers"]
        chosen = answers != IGNORED
        logs = logits[chosen].float().log_softmax(-1)  # one row for each token of a word
        if "words" in batch.targets:
            return logs[:, batch.targets["words"]]
        own = logs.gather(1, answers[chosen][:, None]).flatten()
        rows = chosen.nonzero()[:, 0]
        sums = own.new_zeros(len(answers)).index_add(0, rows, own)
        return sums.view(len(batch.targets["label"]), -1)

    def measure(self, outputs: Tensors, batch: Batch, scene: Scene) -> dict[str, float]:
        """Texts that were told right."""
        right = self.scores(outputs, batch, scene).argmax(-1) == batch.targets["label"]
        return {"right": float(right.sum()), "texts": float(len(right))}

    def metrics(self, losses: Mapping[str, float], sums: Mapping[str, float]) -> dict[str, float]:
        """Accuracy."""
        return {"accuracy": sums["right"] / max(sums["texts"], 1)}

    def _given(self) -> dict[str, str]:
        parts = (part.partition("=") for part in self.words.split("|") if part)
        return {label.strip(): word.strip() for label, _, word in parts}

    def _masked(self, program: Program) -> bool:
        return program.signature.task != "causal-lm"

    def _word_tokens(self, scene: Scene) -> list[list[int]]:
        """Tokens of each label's word, as it stands in a sentence."""
        given = self._given()
        texts = [f" {given.get(label, label)}" for label in scene.labels]
        found = first_tokens(scene.encoder.tokens(texts, add_special_tokens=False))
        if len({tuple(word) for word in found}) < len(found):
            raise UsageError("two labels have the same word", where=self.words, fix="choose others")
        if self._masked(scene.program) and any(len(word) != 1 for word in found):
            long = next(t for t, word in zip(texts, found, strict=True) if len(word) != 1)
            raise UsageError(f"the word {long.strip()!r} is several tokens, and the gap one",
                             fix="choose a commoner word")  # fmt: skip
        return found

    def _prompt(self, row: Row, scene: Scene, room: int) -> list[int]:
        """Tokens of the template with the row's values; its text is cut until it fits."""
        masked = self._masked(scene.program)
        text, most = row.text("text").strip(), scene.encoder.length - (0 if masked else room)
        while True:
            ids = self._filled(row, text, scene)
            if not masked and _ends(ids, scene):
                ids = ids[:-1]  # the end-of-text token that some tokenizers add
            if len(ids) <= most:
                return ids
            if not text:
                raise UsageError("the template is longer than a row", where=self.template,
                                 fix="a larger --length")  # fmt: skip
            text = text[: min(len(text) - 1, len(text) * most // len(ids))]

    def _filled(self, row: Row, text: str, scene: Scene) -> list[int]:
        mask = str(getattr(scene.encoder.tokenizer, "mask_token", "") or "")
        values = {**row.fields, "text": text, _MASK: mask}
        whole = _HOLE.sub(lambda hole: _value(hole[1], values, row), self.template)
        return first_tokens(scene.encoder.tokens([whole], truncation=False, max_length=None))[0]

    def _place(
        self, prompt: list[int], word: list[int], scene: Scene
    ) -> tuple[list[int], list[int]]:
        """The row's ids, and for each place the token that is scored there, or -100."""
        if self._masked(scene.program):
            mask = scene.encoder.special("mask")
            return prompt, [word[0] if token == mask else IGNORED for token in prompt]
        ids = [*prompt, *word[:-1]]
        return ids, [*[IGNORED] * (len(prompt) - 1), *word]


def _ends(ids: list[int], scene: Scene) -> bool:
    end = getattr(scene.encoder.tokenizer, "eos_token_id", None)
    return len(ids) > 1 and ids[-1] == end


def _value(name: str, values: Mapping[str, object], row: Row) -> str:
    if name not in values:
        raise row.missing(name)
    return str(values[name])
