"""Prompt: tokens in front of every input, learned or given.

*Soft*: learned embeddings take the place of tokens (Lester et al., arXiv 2104.08691).
*Hard*: a text is part of the graph, as if every caller wrote it first. Both run over the
longer sequence, and callers get the outputs of their own tokens.

*Folded*: in a causal model no token of a prompt sees what comes after it, so its keys
and values are the same for every input. They are computed once, here, and put in front
at every attention as constants; only the caller's tokens are computed, at the positions
after the prompt. The outputs are those of the hard prompt, which is checked each time,
and a long instruction costs no more than the attention to it. Behind the pass ``cache``
they are the cache's first entries: the graph stays as it is, and what texts begin behind
(``signature.start``) is what it returns for the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ftc.graph.adapters import SOFT_PROMPT
from ftc.graph.cache_inputs import present_of
from ftc.graph.cached import Start, is_cached, start_of, states, step_inputs, token_limit
from ftc.graph.causal import sees_ahead
from ftc.graph.drift import Difference, compare
from ftc.graph.errors import PreconditionError, PromiseError, UsageError
from ftc.graph.lengthen import lengthen
from ftc.graph.observe import values
from ftc.graph.program import Program
from ftc.graph.provenance import describe, provenance
from ftc.graph.rewriter import Rewriter
from ftc.graph.sequence import Sequence, find_sequence, inputs, token_inputs
from ftc.graph.unfold import unfold_heads
from ftc.graph.words import plural

from .base import Context, Effect, Pass
from .virtual_tokens import (
    Attentions,
    check_ids,
    check_tokens,
    text_ids,
    train_adapters,
    with_text_in_front,
)

_TOKENS = 16
_START = "start."  # of the names of what texts begin behind
_SAME = 1e-4
_NOISE = 0.05  # where activations are quantized in groups that hold the prompt's rows or not


@dataclass(frozen=True)
class Prompt(Pass):
    """Put tokens in front of every input: learned ones, or those of a text.

    What is learned trains alone, beside the head of a program that classifies.

    The function changes on purpose, so the pass promises an interface and no numbers:
    the report has the drift, and no budget is held against it. With a text the result is
    compared with what the program before gives with that text in front.

    Options:
        tokens: length of a learned prompt; 16, or that of the text it starts as.
        init: a learned prompt starts as the embeddings of ``random`` tokens, or of ``text``.
        text: the prompt itself (nothing is learned), or with init=text what it starts as.
        fold: compute the keys and values of the text now, and its tokens never again.
    """

    name: ClassVar[str] = "prompt"
    effect: ClassVar[Effect] = Effect.INTERFACE
    provides: ClassVar[frozenset[str]] = frozenset({"prompted"})
    forbids: ClassVar[frozenset[str]] = frozenset({"prompted", "cached"})

    tokens: int | None = None
    init: Literal["random", "text"] | None = None
    text: str | None = None
    fold: bool = False

    def __post_init__(self) -> None:
        if self.text is None and (self.fold or self.init == "text"):
            fixed = replace(self, tokens=None, text="some words")
            raise UsageError(f"{self.spec}: there is no text", fix=fixed.spec)
        if self.fold and self.init:
            raise UsageError(
                f"{self.spec}: what is learned cannot be folded", fix=replace(self, init=None).spec
            )
        if self.text is not None and self.init == "random":
            raise UsageError(
                f"{self.spec}: a random prompt has no text", fix=replace(self, init="text").spec
            )
        check_tokens(self, self.tokens, self.text)
        if self.fold:
            object.__setattr__(self, "forbids", frozenset({"prompted"}))

    def freer(self) -> Prompt | None:
        """A text that is folded goes behind a cache too."""
        return None if self.text is None or self.init or self.fold else replace(self, fold=True)

    def requires(self, program: Program) -> None:
        """Refuses to fold a prompt behind a prefix, which stands before it."""
        if self.fold and "prefixed" in program.facts:
            raise PreconditionError(
                f"{self.spec}: the program has a prefix already", fix="leave fold out"
            )

    @property
    def otherwise(self) -> str | None:
        """Only what is folded changes something inside attention."""
        return "leave fold out: the prompt is read with every text then" if self.fold else None

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Puts the prompt in front of the inputs, or its keys and values at every core."""
        sequence = _sequence(rw)
        ids = None if self.text is None else text_ids(rw.program, self.text, self.spec)
        if ids is not None:
            check_ids(rw, sequence, ids)
        if ids is None or self.init == "text":
            self._soft(rw, sequence, ids, ctx.seed)
        elif is_cached(rw.program.signature):
            self._first_entries(rw, ids)
        elif self.fold:
            self._folded(rw, ids)
        else:
            reader = rw.add_buffer(f"{_table(sequence)}.prompt_ids", ids)
            lengthen(rw, sequence, len(ids), reader)
            rw.note(f"{plural(len(ids), 'token')} before every input")

    def ensures(self, before: Program, after: Program) -> None:
        """With a text: the outputs are those of the program before with the text in front."""
        if self.text is None:
            return
        if is_cached(before.signature):
            worst = _drift_behind_entries(before, start_of(after))
        else:
            rw = Rewriter(before.clone(), self.spec)
            sequence = _sequence(rw)
            ids = text_ids(before, self.text, self.spec)
            probe = after.signature.probe(batch=2)
            with torch.no_grad():
                wanted = with_text_in_front(rw.program, sequence, ids, probe)
                got = after(probe)
            worst = max(d.relative for d in compare(wanted, got, probe, before.signature).values())
        if not worst <= (_NOISE if "quantized" in before.facts else _SAME):
            raise PromiseError(
                f"{self.spec}: outputs differ by {worst:.1e} from those with the text in front",
                fix="leave fold out: some output looks at the prompt's own tokens"
                if self.fold else "the pass is wrong: please report it",
            )  # fmt: skip

    def _soft(self, rw: Rewriter, sequence: Sequence, ids: Tensor | None, seed: int) -> None:
        if ids is None:
            spec = next(spec for node, spec in inputs(rw.program) if node is sequence.tokens)
            generator = torch.Generator().manual_seed(seed)
            count = self.tokens or _TOKENS
            ids = torch.randint(spec.low, spec.high, (count,), generator=generator)
        given = token_inputs(rw.program, sequence, ids)
        lookup = sequence.lookups[0]
        start = values(rw.program, given, [lookup])[lookup]
        soft = rw.add_parameter(f"{_table(sequence)}{SOFT_PROMPT}", start.reshape(len(ids), -1))
        lengthen(rw, sequence, len(ids), sequence.neutral_id(), soft)
        count = train_adapters(rw)
        rw.note(
            f"{plural(len(ids), 'learned token')} before every input, "
            f"{plural(count, 'trained parameter')}"
        )

    def _folded(self, rw: Rewriter, ids: Tensor) -> None:
        attentions = Attentions(rw)
        assert attentions.sequence is not None
        cores = [place.raw for place in attentions.places]
        ahead = sees_ahead(rw.program, attentions.sequence, cores)
        if ahead is not None:
            raise PreconditionError(
                f"{self.spec}: {ahead.why}, so what a prompt computes may depend on the input "
                "and is no constant",
                where=describe(ahead.core),
            )
        made = attentions.states_of(ids)
        reader = rw.add_buffer(f"{_table(attentions.sequence)}.prompt_ids", ids)
        attentions.put_in_front(
            made, rw.add_buffer, (".prompt_key", ".prompt_value"), visible=False, ids=reader
        )
        rw.note(
            f"keys and values of {plural(len(ids), 'token')} at {plural(len(made), 'attention')}"
        )

    def _first_entries(self, rw: Rewriter, ids: Tensor) -> None:
        """What the cached program returns for the prompt is what its texts begin behind."""
        signature = rw.program.signature
        limit = token_limit(signature)
        if limit is not None and len(ids) >= limit:
            raise PreconditionError(
                f"{self.spec}: {len(ids):,} tokens, and the model reads {limit:,}",
                fix="a shorter text",
            )
        held = {signature.inputs[0].name: ids[None]}
        with torch.no_grad():
            found = rw.program(step_inputs(signature, ids[None], torch.ones_like(ids)[None], {}))
        held |= {spec.name: found[present_of(spec.name)] for spec in states(signature)}
        for name, tensor in held.items():
            rw.add_buffer(_START + name, tensor.clone(memory_format=torch.contiguous_format))
        rw.set_signature(replace(signature, start={name: _START + name for name in held}))
        rw.note(f"keys and values of {plural(len(ids), 'token')} are the first in the cache")


def _drift_behind_entries(program: Program, start: Start) -> float:
    """Of the scores behind a prompt's entries, to those of prompt and text in one piece."""
    signature = program.signature
    spec = signature.inputs[0]
    row = torch.randint(spec.low, spec.high, (1, 5), generator=torch.Generator().manual_seed(0))
    whole = torch.cat([torch.tensor([start.ids]), row], 1)
    mask, scores = torch.ones_like(whole), signature.output_names[0]
    with torch.no_grad():
        wanted = program(step_inputs(signature, whole, mask, {}))[scores]
        got = program(step_inputs(signature, row, mask, start.past(1)))[scores]
    gap = Difference()
    gap.add(wanted[:, -got.shape[1] :], got)
    return gap.relative


def _sequence(rw: Rewriter) -> Sequence:
    unfold_heads(rw)
    found = find_sequence(rw)
    if found is None:
        raise PreconditionError(
            f"{rw.made_by}: this program reads no tokens",
            fix="a prompt is for models whose input is token ids",
        )
    return found


def _table(sequence: Sequence) -> str:
    """Path of the module that looks tokens up."""
    return provenance(sequence.lookups[0]).module or "tokens"
