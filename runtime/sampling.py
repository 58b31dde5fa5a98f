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

import torch
from torch import Tensor

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
        self._generator = torch.Generator().manual_seed(how.seed)

    def __call__(self, logits: Tensor, seen: Sequence[Sequence[int]]) -> Tensor:
        """The next token of each row, ``[batch]``.

        Args:
            logits: ``[batch, vocabulary]``.
            seen: the tokens of each row so far.
        """
        how = self._how
        if how.penalty != 1:
            logits = logits.clone()
            for row, tokens in zip(logits, seen, strict=True):
                said = torch.tensor(sorted(set(tokens)))
                row[said] = torch.where(
                    row[said] < 0, row[said] * how.penalty, row[said] / how.penalty
                )
        if how.temperature == 0:
            return _likeliest(logits)
        logits = logits.float() / how.temperature
        if 0 < how.top_k < logits.shape[-1]:
            least = logits.topk(how.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        probabilities = logits.softmax(-1)
        if how.top_p < 1:
            probabilities = _nucleus(probabilities, how.top_p)
        return torch.multinomial(probabilities, 1, generator=self._generator)[:, 0]


def _likeliest(logits: Tensor) -> Tensor:
    """Where each row is largest. NumPy looks at several numbers at a time: 8 µs for torch's 90."""
    if logits.dtype != torch.float32 or logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))


def _nucleus(probabilities: Tensor, least: float) -> Tensor:
    """Only the fewest tokens that together have ``least``; the others are 0."""
    ordered, places = probabilities.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= least] = 0  # those before have enough already
    return torch.zeros_like(probabilities).scatter(-1, places, ordered)
