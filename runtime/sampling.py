"""Which token comes next: the likeliest, or one drawn from a shaped distribution.

    p = softmax(z / temperature),    z_t of a token seen before: z_t / penalty, or z_t * penalty
                                     where z_t < 0 (Keskar et al., arXiv 1909.05858)

Of ``p`` the ``top_k`` likeliest tokens are kept, then of these the fewest that together
have ``top_p`` (Holtzman et al., arXiv 1904.09751). A temperature of 0 takes the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftc.graph.cache_inputs import Array
from ftc.graph.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 for the likeliest token, 1 for the model's own distribution.
        top_k: how many tokens are kept; 0 for all.
        top_p: how much probability is kept.
        penalty: above 1 what was said already is less likely.
        seed: the same seed draws the same tokens.

    Raises:
        UsageError: for a number that makes no sense.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        legal = {
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top-k": (self.top_k >= 0, "0 (all) or more"),
            "top-p": (0 < self.top_p <= 1, "above 0, and 1 at most"),
            "repetition-penalty": (0 < self.penalty < math.inf, "above 0"),
            "seed": (0 <= self.seed < 2**63, "0 or more, below 2^63"),
        }
        for name, (fits, what) in legal.items():
            if not fits:
                raise UsageError(f"--{name} is out of range", fix=f"give a number: {what}")
        given = "top-k" if self.top_k else "top-p" if self.top_p < 1 else None
        if given and self.temperature == 0:
            raise UsageError(
                f"--{given} says what is drawn from, and at temperature 0 nothing is drawn",
                fix="--temperature 1, or leave it out",
            )


class Sampler:
    """Chooses tokens by a :class:`Sampling`, one generator for a whole text."""

    def __init__(self, how: Sampling) -> None:
        self._how = how
        self._generator = np.random.default_rng(how.seed)

    def __call__(self, logits: Array, seen: Sequence[Sequence[int]]) -> Array:
        """The next token of each row, int64 ``[batch]``.

        Args:
            logits: ``[batch, vocabulary]``.
            seen: the tokens of each row so far.
        """
        how = self._how
        if how.penalty != 1:
            logits = logits.copy()
            for row, tokens in zip(logits, seen, strict=True):
                said = np.unique(np.asarray(tokens, np.int64))
                old = row[said]
                row[said] = np.where(old < 0, old * how.penalty, old / how.penalty)
        if how.temperature == 0:
            return logits.argmax(-1)
        scores = logits.astype(np.float64) / how.temperature
        if 0 < how.top_k < scores.shape[-1]:
            least = np.partition(scores, -how.top_k, -1)[:, -how.top_k, None]
            scores[scores < least] = -np.inf
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        if how.top_p < 1:
            _keep_nucleus(chances, how.top_p)
        return np.array([self._draw(row) for row in chances])

    def _draw(self, chances: Array) -> int:
        """A place, as likely as its part of the sum of ``chances``."""
        upto = chances.cumsum()
        place = np.searchsorted(upto, self._generator.random() * upto[-1], side="right")
        return int(min(place, np.flatnonzero(chances)[-1]))  # not beyond, by rounding


def _keep_nucleus(chances: Array, least: float) -> None:
    """Leaves in each row the fewest that together have ``least``; the others become 0."""
    for row in chances:
        places = np.argsort(-row, kind="stable")
        before = row[places].cumsum() - row[places]
        row[places[before >= least]] = 0  # those before have enough already
