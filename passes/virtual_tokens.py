"""What passes that put tokens in front share: a text's ids, keys and values, and their places.

A *prefix* is learned keys and values, a *folded prompt* constant ones. Both go in front
of what each attention core computes (:mod:`ftc.graph.prepend`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from ftc.graph.adapters import adapter_kind
from ftc.graph.body import classifier_head
from ftc.graph.cache_inputs import POSITIONS
from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.observe import values
from ftc.graph.prepend import Prepending
from ftc.graph.program import Program
from ftc.graph.provenance import describe, provenance
from ftc.graph.rewriter import Rewriter
from ftc.graph.sequence import Sequence as TokenSequence
from ftc.graph.sequence import find_sequence, token_inputs
from ftc.graph.shapes import value
from ftc.graph.sources.tokenizer import tokenizer
from ftc.graph.states import States, find_states
from ftc.graph.structure.flow import Flow, RawCore
from ftc.graph.unfold import unfold_heads
from ftc.graph.widen import Widened, reserve, widen_inputs

if TYPE_CHECKING:
    from .prefix import Prefix
    from .prompt import Prompt


@dataclass(frozen=True, slots=True)
class Place:
    """One attention core of a program, and the keys and values it computes.

    Attributes:
        name: path of the module it is in, with a number where a module has several.
        raw: the core.
        keys, values: where they are whole.
    """

    name: str
    raw: RawCore
    keys: States
    values: States


class Attentions:
    """All attention cores of the program that ``rw`` rewrites, and its sequence.

    Raises:
        PreconditionError: for a program without attention, or with one that cannot be
            given more keys.
    """

    def __init__(self, rw: Rewriter) -> None:
        self._rw = rw
        unfold_heads(rw)
        self.sequence = find_sequence(rw)
        self._flow = Flow(rw.program)
        if not self._flow.cores:
            raise PreconditionError(
                f"{rw.made_by}: this program has no attention",
                fix="choose lora or freeze to train it",
            )
        self.places = tuple(_places(self._flow))
        for place in self.places:
            self._check(place)

    def _check(self, place: Place) -> None:
        """Refuses an attention to another sequence, whose keys are not in step with its queries."""
        lengths = [value(node).shape[-2] for node in (place.raw.q, place.keys.node)]
        if self.sequence is not None and not all(map(self.sequence.is_length, lengths)):
            raise PreconditionError(
                f"{self._rw.made_by}: the model reads two sequences (an encoder and a decoder)",
                where=describe(place.raw.node),
                fix="use prompt, which goes before the encoder's, or lora",
            )

    def states_of(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``[kv_heads, length, dim]`` of each core for a text ``[length]``."""
        assert self.sequence is not None
        nodes = [node for p in self.places for node in (p.keys.node, p.values.node)]
        given = token_inputs(self._rw.program, self.sequence, ids)
        found = values(self._rw.program, given, nodes)
        return [
            (_whole(found[p.keys.node], p.keys), _whole(found[p.values.node], p.values))
            for p in self.places
        ]

    def put_in_front(
        self,
        states: Sequence[tuple[Tensor, Tensor]],
        add: Callable[[str, Tensor], fx.Node],
        suffixes: tuple[str, str],
        *,
        visible: bool,
        ids: fx.Node | None = None,
    ) -> None:
        """Puts keys and values in front at every core.

        Args:
            states: of each core, ``[kv_heads, length, dim]``.
            add: registers a tensor under a name (``rw.add_parameter``).
            suffixes: of the names of keys and of values; the rest is the core's.
            visible: as in :class:`~ftc.graph.prepend.Prepending`.
            ids: of the text they are of, ``[length]``; None where it may be any.
        """
        by = states[0][0].shape[1]
        widened = None
        if (sequence := self.sequence) is not None:
            reserve(self._rw, sequence.dim, by)
            wide = widen_inputs(
                self._rw, sequence, by, sequence.neutral_id() if ids is None else ids
            )
            widened = Widened(self._rw, sequence, by, wide)
        front = Prepending(self._rw, self._flow, by, widened, visible=visible)
        for place, pair in zip(self.places, states, strict=True):
            nodes = [add(place.name + s, t) for s, t in zip(suffixes, pair, strict=True)]
            front.core(place.raw, *nodes)
        front.finish()


def check_tokens(given: Prefix | Prompt, tokens: int | None, text: str | None) -> None:
    """Refuses a length that is none, or that a text says already.

    Raises:
        UsageError: with the pass as it could be.
    """
    if tokens is not None and text is not None:
        raise UsageError(
            f"{given.spec}: a text says its length itself",
            fix=f"leave tokens out: {replace(given, tokens=None).spec}",
        )
    if tokens is not None and tokens < 1:
        fixed = replace(given, tokens=16)
        raise UsageError(f"{given.spec}: tokens is 1 or more", fix=fixed.spec)


def text_ids(program: Program, text: str, spec: str) -> Tensor:
    """Ids of a text's tokens ``[length]``, without the special tokens of a whole input.

    Raises:
        PreconditionError: for a program without a tokenizer, or one that does not fit it.
    """
    found = tokenizer(program)
    if found is None:
        raise PreconditionError(
            f"{spec}: the model has no tokenizer",
            fix="put its tokenizer.json beside it, or leave text out and give tokens",
        )
    ids = torch.tensor(found(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    if not len(ids):
        raise PreconditionError(f"{spec}: the text has no tokens", fix='text="some words"')
    return ids


def check_ids(rw: Rewriter, sequence: TokenSequence, ids: Tensor) -> None:
    """Refuses ids that the program's table has not.

    Raises:
        PreconditionError: when the tokenizer does not fit the model.
    """
    rows = value(sequence.lookups[0].all_input_nodes[0]).shape[0]
    if int(ids.max()) >= rows:
        raise PreconditionError(
            f"{rw.made_by}: the tokenizer gives the id {int(ids.max())}, and the model's table "
            f"has {rows} rows",
            fix="put the model's own tokenizer beside it",
        )


def with_text_in_front(
    program: Program, sequence: TokenSequence, ids: Tensor, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs of ``program`` for the caller's tokens, with a text before them in every row."""
    front = token_inputs(program, sequence, ids)
    joined = dict(given)
    for each in program.signature.inputs:
        if sequence.dim in each.shape:
            rows = given[each.name] + (len(ids) if each.name == POSITIONS else 0)
            joined[each.name] = torch.cat([front[each.name].expand(len(rows), -1), rows], 1)
    outputs = program(joined)
    for spec in program.signature.outputs:
        for axis, dim in enumerate(spec.shape):
            if dim == sequence.dim:
                outputs[spec.name] = outputs[spec.name].narrow(
                    axis, len(ids), outputs[spec.name].shape[axis] - len(ids)
                )
    return outputs


def train_adapters(rw: Rewriter) -> int:
    """Freezes all but adapters and the head of a classifier; returns how many elements train."""
    count, head = 0, classifier_head(rw.program)
    for name, parameter in list(rw.module.named_parameters()):
        added = adapter_kind(name) is not None or name in head
        rw.set_trainable(name, added)
        count += parameter.numel() if added else 0
    return count


def _places(flow: Flow) -> list[Place]:
    counts: dict[str, int] = {}
    found = []
    for raw in flow.cores.values():
        path = provenance(raw.node).module or "attention"
        number = counts[path] = counts.get(path, 0) + 1
        name = path if number == 1 else f"{path}.again_{number}"
        found.append(Place(name, raw, *find_states(raw)))
    return found


def _whole(state: Tensor, states: States) -> Tensor:
    """One text's ``[1, kv_heads, length, dim]`` or ``[1, length, dim]`` as ``[kv_heads, …]``."""
    return state.view(states.heads, *state.shape[-2:])
