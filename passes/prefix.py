"""Prefix: learned keys and values in front at every attention.

    y = softmax(scale * q [P_k; K]^T + [0, M]) [P_v; V],    P_k, P_v [kv_heads, tokens, head_dim]

(Li & Liang, arXiv 2101.00190, equation 3, without the network that computes ``P`` while
training.) Nothing else changes and nothing else trains. Every query sees the whole
prefix, and the caller's tokens stand at the positions after it, as they would after a
text of as many tokens; PEFT does the same. What a text computes in this model can be
where training starts (``init=text``): in a causal model the outputs are then those with
the text in front, and in any model it starts nearer than random numbers do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ftc.graph.adapters import PREFIX_KEY, PREFIX_VALUE
from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.rewriter import Rewriter
from ftc.graph.shapes import value
from ftc.graph.states import States
from ftc.graph.words import plural

from .base import Context, Effect, Pass
from .virtual_tokens import Attentions, check_ids, check_tokens, text_ids, train_adapters

_TOKENS = 16
_SCALE = 0.02


@dataclass(frozen=True)
class Prefix(Pass):
    """Put learned keys and values in front at every attention, and train nothing else.

    Of a program that classifies the head trains too.

    The function changes on purpose, so the pass promises an interface and no numbers:
    the report has the drift, and no budget is held against it.

    Options:
        tokens: length of the prefix; 16, or that of the text.
        init: ``random`` (small numbers) or ``text`` (the keys and values of ``text``).
        text: what a prefix starts as.
    """

    name: ClassVar[str] = "prefix"
    effect: ClassVar[Effect] = Effect.INTERFACE
    provides: ClassVar[frozenset[str]] = frozenset({"prefixed"})
    forbids: ClassVar[frozenset[str]] = frozenset({"prefixed", "prompted", "cached"})

    tokens: int | None = None
    init: Literal["random", "text"] = "random"
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.init == "text") != (self.text is not None):
            fixed = replace(self, tokens=None, init="text", text=self.text or "some words")
            raise UsageError(f"{self.spec}: init=text and text=... go together", fix=fixed.spec)
        check_tokens(self, self.tokens, self.text)

    @property
    def otherwise(self) -> str | None:
        """Learned tokens change nothing inside attention."""
        return "use prompt{tokens=16}, which needs no change inside attention"

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Adds a pair of parameters at every core, then freezes the rest."""
        attentions = Attentions(rw)
        ids = None if self.text is None else self._ids(rw, attentions, self.text)
        states = self._random(attentions, ctx.seed) if ids is None else attentions.states_of(ids)
        attentions.put_in_front(states, rw.add_parameter, (PREFIX_KEY, PREFIX_VALUE), visible=True)
        count = train_adapters(rw)
        rw.note(
            f"{states[0][0].shape[1]} keys and values in front "
            f"at {plural(len(states), 'attention')}: {plural(count, 'trained parameter')}"
        )

    def _ids(self, rw: Rewriter, attentions: Attentions, text: str) -> Tensor:
        if attentions.sequence is None:
            raise PreconditionError(
                f"{self.spec}: this program reads no tokens", fix="leave init and text out"
            )
        ids = text_ids(rw.program, text, self.spec)
        check_ids(rw, attentions.sequence, ids)
        return ids

    def _random(self, attentions: Attentions, seed: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        tokens = self.tokens or _TOKENS

        def draw(states: States) -> Tensor:
            drawn = torch.randn(states.heads, tokens, states.dim, generator=generator)
            return (drawn * _SCALE).to(value(states.node).dtype)

        return [(draw(place.keys), draw(place.values)) for place in attentions.places]
