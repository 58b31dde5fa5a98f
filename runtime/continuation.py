"""Text that goes on: pieces of it as tokens come, where it ends, and how fast it was.

A piece is shown when nothing can take it back: half of a character waits for the other
half, and what may be the beginning of a stop string waits until it is one, or is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ftc.graph.errors import UsageError

from .decoder import Decoder
from .engine import Engine
from .generate import next_tokens
from .sampling import Sampling

_HALF = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8  # tokens


@dataclass(frozen=True, slots=True)
class Asked:
    """How a text is to go on.

    Attributes:
        most: new tokens, at most.
        sampling: how they are chosen.
        stops: strings before which the text ends.

    Raises:
        UsageError: for an empty stop string.
    """

    most: int = 32
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(self.stops):
            raise UsageError("a stop string is empty", fix="leave --stop out")


class Pace:
    """How fast tokens came: those of all rows of a batch count.

    Attributes:
        full: how many tokens were read where there was no room for more, or None.
    """

    def __init__(self) -> None:
        self.full: int | None = None
        self._start = time.perf_counter()
        self._ticks: list[float] = []
        self._tokens = 0

    def tick(self, tokens: int) -> None:
        """So many came now."""
        self._ticks.append(time.perf_counter() - self._start)
        self._tokens += tokens if len(self._ticks) > 1 else 0

    @property
    def first(self) -> float | None:
        """Seconds until the first token."""
        return self._ticks[0] if self._ticks else None

    @property
    def rate(self) -> float | None:
        """Tokens per second, of those after the first."""
        return self._tokens / (self._ticks[-1] - self._ticks[0]) if self._tokens else None

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for JSON."""
        return {"first_token_seconds": self.first, "tokens_per_second": self.rate}


class Saying:
    """What is said of one text, token by token.

    Args:
        tokenizer: of transformers.
        ends: tokens that end a text.
        stops: strings before which it ends.
        before: the tokens that it goes on from. Some tokenizers begin a text without the space
            of its first word; behind other words the space is there.

    Attributes:
        text: what can be shown so far.
        done: whether it has ended.
    """

    def __init__(
        self, tokenizer: Any, ends: frozenset[int], stops: Sequence[str],
        before: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._tokenizer, self._ends, self._stops = tokenizer, ends, tuple(stops)
        self._before = list(before[-_CONTEXT:])
        self._front = self._decoded(self._before) if self._before else ""
        self._ids: list[int] = []
        self.text, self.done = "", False

    def add(self, token: int) -> str:
        """What can be shown with one token more, that could not before."""
        if token in self._ends:
            return self.end()
        self._ids.append(token)
        whole = self._whole()
        places = [place for stop in self._stops if (place := whole.find(stop)) >= 0]
        if places:
            self.done = True
            return self._show(whole[: min(places)])
        if whole.endswith(_HALF):
            return ""
        return self._show(whole[: len(whole) - self._waiting(whole)])

    def end(self) -> str:
        """What was waiting: nothing more comes."""
        self.done = True
        return self._show(self._whole().rstrip(_HALF)) if self._ids else ""

    def _whole(self) -> str:
        """The text of all tokens so far."""
        if self._front and not self._front.endswith(_HALF):
            joined = self._decoded([*self._before, *self._ids])
            if joined.startswith(self._front):
                return joined[len(self._front) :]
        return self._decoded(self._ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _show(self, text: str) -> str:
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def _waiting(self, whole: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        return max((n for stop in self._stops for n in range(1, len(stop))
                    if whole.endswith(stop[:n])), default=0)  # fmt: skip


def pieces(
    decoder: Decoder, prompts: Sequence[Sequence[int]], asked: Asked, pace: Pace | None = None,
    *, apart: bool = False,
) -> Iterator[list[str]]:  # fmt: skip
    """What is new of each text, again and again until all have ended.

    Args:
        decoder: of a program with a tokenizer.
        prompts: the tokens of each text.
        asked: how they go on.
        pace: is told when tokens come.
        apart: what is said is a text of its own, an answer, and does not go on in the prompt's.
    """
    spoken = decoder.engine.spoken
    ends = spoken.ends | spoken.special(asked.stops)
    said = [Saying(spoken.tokenizer, ends, asked.stops, () if apart else ids) for ids in prompts]
    longest = max(map(len, prompts))
    room = asked.most if spoken.made_for is None else spoken.made_for - longest + 1
    steps = 0
    for chosen in islice(next_tokens(decoder, prompts, asked.sampling), min(asked.most, room)):
        steps += 1
        if pace is not None:
            pace.tick(sum(not each.done for each in said))
        yield ["" if each.done else each.add(token)
               for each, token in zip(said, chosen, strict=True)]  # fmt: skip
        if all(each.done for each in said):
            return
    if pace is not None and steps < asked.most:
        pace.full = longest + steps - 1
    yield ["" if each.done else each.end() for each in said]


def generate(engine: Engine, text: str, asked: Asked = Asked()) -> Iterator[str]:
    """Pieces of the continuation of ``text`` as they come.

    Ends at an end-of-text token, before a stop string, or at the program's longest sequence.

    Raises:
        UsageError: before the first piece, for a text that leaves no room for one.
    """
    for (piece,) in pieces(Decoder(engine), engine.spoken.tokens_of([text]), asked):
        yield piece
