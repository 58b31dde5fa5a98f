"""Scores of the next token, behind texts of which most was read before.

A cached program reads what is new of a text, and finds the keys and values of the rest
where its run before left them (:mod:`ftc.runtime.past`). So a conversation costs its new
words only, however long it is.

A program with a folded prompt begins behind it: the prompt's tokens are those of every text,
and its keys and values the cache's first entries. Texts of different length are padded on the
left, which is before the prompt, so such a batch reads the prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ftc.graph.cache_inputs import Array, pad_left
from ftc.graph.errors import UsageError

from .engine import Engine
from .past import past_of


@dataclass(frozen=True, slots=True)
class _Read:
    """Rows of tokens that were read, their mask, and where their keys and values are.

    The mask has columns of 1 behind those that were read, for the tokens to come.
    """

    rows: tuple[list[int], ...] = ()
    mask: Array = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    past: Any = None


class Decoder:
    """Gives the scores of the next token of texts that grow.

    Args:
        engine: runs a program whose first output is scores ``[batch, sequence, vocabulary]``.

    Attributes:
        engine: the same.
        limit: how many tokens of a text, old and new, its program reads at most; None where no
            limit is.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._spoken = engine.spoken
        self._scores = self._spoken.scores
        self._run = past_of(engine) if self._spoken.cached else None
        self.limit = self._spoken.limit
        self._read = _Read()
        self._seen = self._last = np.empty(0)  # scores of the run before, and their last row

    def __call__(self, rows: Sequence[Sequence[int]]) -> Array:
        """Scores ``[batch, vocabulary]`` of the token after each row, until the next call.

        Args:
            rows: ids of each text. Where they go on from those of the call before, all by as
                many tokens, only these are computed.

        Raises:
            UsageError: for rows of different length where there is no cache.
        """
        if self._run is None:
            return self._whole(rows)
        rows = [[*self._spoken.prompt, *row] for row in rows]
        length = max(map(len, rows))
        before = self._read
        if not _go_on(rows, before):
            start = self._begin(len(rows))
            before = start if _go_on(rows, start) else _Read()
            self._read = before  # what is kept of another text is let go before the run
        if before.rows:
            ids = np.array([row[len(old) :] for row, old in zip(rows, before.rows, strict=True)])
            mask = before.mask
        else:
            ids, mask = pad_left(rows)
        if mask.shape[1] < length:
            mask = np.pad(mask, ((0, 0), (0, length)), constant_values=1)
        scores, past = self._run(ids, mask[:, :length], before.past)
        self._read = _Read(tuple(rows), mask, past)
        if scores is not self._seen:
            self._seen, self._last = scores, scores[:, -1]
        return self._last

    def _begin(self, batch: int) -> _Read:
        """The prompt, read in every row; nothing where there is none."""
        ids = list(self._spoken.prompt)
        if not ids:
            return _Read()
        mask = np.ones((batch, len(ids)), np.int64)
        return _Read((ids,) * batch, mask, self._spoken.past(batch))

    def _whole(self, rows: Sequence[Sequence[int]]) -> Array:
        from .text import pad

        if len({len(row) for row in rows}) > 1:
            raise UsageError(
                "texts of different length need a cache", fix="compile with --task generate"
            )
        scores = self.engine(pad(rows, self.engine.program.signature, None))
        return scores[self._scores][:, -1].float().numpy()


def _go_on(rows: Sequence[list[int]], read: _Read) -> bool:
    """Whether each text is what was read of it, and as many tokens more as the others."""
    old = read.rows
    if len(old) != len(rows) or len({len(r) - len(o) for r, o in zip(rows, old)}) != 1:  # noqa: B905
        return False
    pairs = zip(rows, old, strict=True)
    return len(rows[0]) > len(old[0]) and all(r[: len(o)] == o for r, o in pairs)
