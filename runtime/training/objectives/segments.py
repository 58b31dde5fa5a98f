"""Pairs of segments for next sentence prediction.

A document is cut at the ends of its sentences into segments that fill half a
row. An example is a segment that another one follows; when it is drawn, its
partner is that follower or, every second time, a segment of another document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ftc.graph.errors import UsageError
from ftc.runtime.training.data.rows import Row
from ftc.runtime.training.data.table import Column, Table, Values

from .base import Scene

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_SPECIAL = 3


class Pair(NamedTuple):
    """Two segments as one row: tokens, word numbers (-1: special), types, and if they follow."""

    ids: Tensor
    words: Tensor
    types: Tensor
    follows: bool


def segments(
    rows: Sequence[Row], scene: Scene, *, whole_word: bool = False
) -> Iterator[Mapping[str, Values]]:
    """The segments of each document; ``more`` says that another one of it follows."""
    half = (scene.encoder.length - _SPECIAL) // 2
    sentences = [_SENTENCE.split(row.text("text").strip()) for row in rows]
    flat = [sentence for each in sentences for sentence in each]
    found = scene.encoder.tokens(flat, truncation=False, max_length=None, add_special_tokens=False)
    at = 0
    for each in sentences:
        filled: list[tuple[list[int], list[int]]] = []
        for index in range(at, at + len(each)):
            ids = found["input_ids"][index][:half]
            words = found.word_ids(index)[:half] if whole_word else range(len(ids))
            if filled and len(filled[-1][0]) + len(ids) <= half:
                base = max(filled[-1][1], default=-1) + 1
                filled[-1][0].extend(ids)
                filled[-1][1].extend(base + int(word) for word in words)
            elif ids:
                filled.append((list(ids), [int(word) for word in words]))
        at += len(each)
        for place, (ids, words) in enumerate(filled, 1):
            yield {"ids": ids, "words": words, "more": [int(place < len(filled))]}


def with_followers(table: Table) -> Table:
    """The table whose examples are the segments that another one follows.

    Raises:
        UsageError: when no document has two segments.
    """
    more = table.columns["more"].values.bool()
    firsts = more.nonzero().flatten()
    document = torch.cat([more.new_zeros(1), ~more[:-1]]).cumsum(0)
    if not len(firsts) or document[-1] == 0:
        what = "no document is longer than half a row" if not len(firsts) else "one document only"
        raise UsageError(f"{what}: there are no pairs to tell apart",
                         fix="give several longer documents, or a smaller --length")  # fmt: skip
    columns = {"first": _single(firsts), "document": _single(document), **table.columns}
    return Table(columns, table.facts)


def draw_pair(table: Table, index: int, scene: Scene, made: torch.Generator) -> Pair:
    """The pair of one example: its follower, or another document's segment."""
    first = int(table.columns["first"].values[index])
    follows = bool(torch.rand((), generator=made) < 0.5)
    second = first + 1 if follows else _stranger(table.columns["document"].values, first, made)
    ids, words = table.columns["ids"], table.columns["words"]
    return _joined(scene, (ids[first], ids[second]), (words[first], words[second]), follows)


def _single(values: Tensor) -> Column:
    return Column(values, torch.arange(1, len(values) + 1))


def _stranger(document: Tensor, first: int, made: torch.Generator) -> int:
    """A segment of another document, each as likely as any."""
    others = (document != document[first]).nonzero().flatten()
    return int(others[torch.randint(len(others), (), generator=made)])


def _joined(scene: Scene, ids: tuple[Tensor, Tensor], words: tuple[Tensor, Tensor],
            follows: bool) -> Pair:  # fmt: skip
    """``[CLS] first [SEP] second [SEP]``."""
    start, end = scene.encoder.special("cls"), scene.encoder.special("sep")
    special = torch.tensor([-1])
    second = words[1].long() + words[0].max() + 1
    parts = [torch.tensor([start]), ids[0].long(), torch.tensor([end]), ids[1].long(),
             torch.tensor([end])]  # fmt: skip
    numbers = torch.cat([special, words[0].long(), special, second, special])
    types = torch.zeros_like(numbers)
    types[len(ids[0]) + 2 :] = 1
    return Pair(torch.cat(parts), numbers, types, follows)
