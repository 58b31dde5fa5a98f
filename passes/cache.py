"""Cache: keys and values of earlier tokens come in as inputs and go out as outputs.

In a causal model nothing that a token computes depends on what comes after it, so its
keys and values can be kept and its row never computed again:

    y = softmax(scale * q [K_past; K]^T + mask) [V_past; V],    present = [K_past; K], [V_past; V]

From the graph of a whole sequence this makes the one that reads the next few tokens: a
prompt with nothing before it (``past`` is 0), the next token, or any piece between. It is
the rewrite of a folded prompt (:mod:`ftc.graph.prepend`) with the length of the past in
place of a number: positions go on after it, and the mask has the rows of the new tokens
and the columns of all.

Rows of different lengths are padded on the left. A rotary position or a bias by distance
says how far two tokens are apart, so a row may start anywhere; a position that is looked
up in a table is counted from the row's own first token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from ftc.graph.cache_inputs import Names
from ftc.graph.cached import run_in_pieces
from ftc.graph.causal import sees_ahead
from ftc.graph.cost import operator_name
from ftc.graph.drift import Difference
from ftc.graph.errors import PreconditionError, PromiseError
from ftc.graph.mode import unrounded
from ftc.graph.prepend import Prepending
from ftc.graph.program import Program
from ftc.graph.provenance import describe
from ftc.graph.restrict import END, is_elementwise, rank
from ftc.graph.rewriter import Rewriter
from ftc.graph.sequence import Sequence, inputs, lookup_index, size_only, token_inputs
from ftc.graph.shapes import value
from ftc.graph.signature import InputSpec, OutputSpec
from ftc.graph.states import States
from ftc.graph.structure.flow import Flow
from ftc.graph.widen import Widened, head, widen_inputs
from ftc.graph.words import plural

from .base import Context, Effect, Pass
from .virtual_tokens import Attentions, Place

aten = torch.ops.aten
_SAME = 1e-4
_LENGTH, _SHORTER = 9, 3  # of the rows that are run whole and in pieces


@dataclass(frozen=True)
class Cache(Pass):
    """Keep keys and values of earlier tokens: one graph reads a prompt, and then token by token.

    New inputs are ``past_mask [batch, past]`` and, for each attention, ``past_key_N`` and
    ``past_value_N`` ``[batch, heads, past, dim]``; new outputs ``present_key_N`` and
    ``present_value_N``, the past with the new tokens behind it.

    The pass promises an interface. Each time, two texts of different length are run piece
    by piece in one batch and compared with each alone in the program before.

    Options:
        logits: scores of every new token (``all``), or of the ``last`` one only, which
            spares the product with the vocabulary for the rest of a prompt.
    """

    name: ClassVar[str] = "cache"
    effect: ClassVar[Effect] = Effect.INTERFACE
    provides: ClassVar[frozenset[str]] = frozenset({"cached"})
    forbids: ClassVar[frozenset[str]] = frozenset({"cached", "prompted", "prefixed"})

    logits: Literal["last", "all"] = "last"

    @property
    def otherwise(self) -> str | None:
        """What costs time works."""
        return ("leave it out: a language model, captured with --task causal-lm, computes its "
                "whole text for each token then")  # fmt: skip

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Adds the inputs, joins them with the keys and values, and returns those."""
        attentions = Attentions(rw)
        sequence = self._causal(rw, attentions)
        self._check_outputs(rw.program)
        count = len(attentions.places)
        mask = _add_inputs(rw, sequence, attentions.places)
        placed = {spec.name: node for node, spec in inputs(rw.program)}
        with rw.at(head(rw.graph)):
            first = placed[Names.past(0)[0]]
            past = placed[mask] if mask else first
            by = rw.call(aten.sym_size.int, past, 1 if mask else 2)
        wide = widen_inputs(
            rw, sequence, by, sequence.neutral_id(), mask=placed[mask] if mask else None
        )
        front = Prepending(rw, Flow(rw.program), by, Widened(rw, sequence, by, wide), visible=False)
        present = []
        for number, place in enumerate(attentions.places):
            pair = (placed[name] for name in Names.past(number))
            present += _joined(rw, front, place, *pair)
        front.finish()
        if mask:
            shown = next(n for n, spec in inputs(rw.program) if spec.role == "mask")
            _count_from_first(rw, sequence, wide[shown].whole, by)
        _set_outputs(rw, sequence, present, last=self.logits == "last")
        rw.note(f"keys and values of {plural(count, 'attention')} come in and go out")

    def ensures(self, before: Program, after: Program) -> None:
        """Two rows in pieces are each of them alone and whole, to 1e-4."""
        before, after = unrounded(before), unrounded(after)
        dim = str(before.signature.inputs[0].shape[1])
        length = min(_LENGTH, before.signature.limits.get(dim, _LENGTH))
        rows = _rows(before, length)
        with torch.no_grad():
            got = run_in_pieces(after, rows, (length // 2, 1, length - length // 2 - 1))
            for number, ids in enumerate(rows):
                wanted = _alone(before, ids)
                for name, expected in wanted.items():
                    found = got[name][number : number + 1]
                    kept = min(found.shape[1], expected.shape[1])
                    gap = Difference()
                    gap.add(expected[:, -kept:], found[:, -kept:])
                    if not gap.relative <= _SAME:
                        raise PromiseError(
                            f"{self.spec}: {name} of {len(ids)} tokens in pieces differs by "
                            f"{gap.relative:.1e} from all of them at once",
                            fix="the pass is wrong for this model: please report it",
                        )

    def _causal(self, rw: Rewriter, attentions: Attentions) -> Sequence:
        sequence = attentions.sequence
        if sequence is None:
            raise PreconditionError(
                f"{self.spec}: this program reads no tokens", fix="a cache is for a causal-lm"
            )
        ahead = sees_ahead(rw.program, sequence, [place.raw for place in attentions.places])
        if ahead is not None:
            raise PreconditionError(
                f"{self.spec}: {ahead.why}, so what is computed for one may not be kept",
                where=describe(ahead.core),
            )
        return sequence

    def _check_outputs(self, program: Program) -> None:
        leading = program.signature.inputs[0].shape[:2]
        for spec in program.signature.outputs:
            if len(spec.shape) != 3 or spec.shape[:2] != leading:
                raise PreconditionError(
                    f"{self.spec}: the output {spec.name} is no row for each token",
                    fix="capture the model with --task causal-lm",
                )


def _add_inputs(rw: Rewriter, sequence: Sequence, places: tuple[Place, ...]) -> str | None:
    """The inputs of the past, by number of the core; the name of the mask's, if there is one."""
    batch = _batch(rw.program)
    mask = next((spec for _, spec in inputs(rw.program) if spec.role == "mask"), None)
    if mask is not None:
        rw.add_input(InputSpec(Names.MASK, mask.dtype, (batch, Names.PAST), role="mask"))
    for number, place in enumerate(places):
        for name, states in zip(Names.past(number), (place.keys, place.values), strict=True):
            shape = (batch, states.heads, Names.PAST, states.dim)
            rw.add_input(InputSpec(name, value(states.node).dtype, shape))
    signature = rw.program.signature
    if (limit := signature.limits.get(sequence.dim)) is not None:
        limits = {**signature.limits, Names.total(sequence.dim): limit}
        rw.set_signature(replace(signature, limits=limits))
    return Names.MASK if mask else None


def _batch(program: Program) -> Any:
    return program.signature.inputs[0].shape[0]


def _joined(
    rw: Rewriter, front: Prepending, place: Place, key: fx.Node, values: fx.Node
) -> list[fx.Node]:
    """All keys and all values of a core, ``[batch, kv_heads, past + length, dim]``."""
    flat = [rank(states.node) == 3 for states in (place.keys, place.values)]
    if any(flat):
        _check_flat(rw, place.keys, key)
        with rw.at(place.keys.node):
            key, values = (rw.call(aten.squeeze.dim, node, 1) for node in (key, values))
    both = front.core(place.raw, key, values)
    made = []
    for joined, is_flat in zip(both, flat, strict=True):
        with rw.after(joined):
            made.append(rw.call(aten.unsqueeze.default, joined, 1) if is_flat else joined)
    return made


def _check_flat(rw: Rewriter, states: States, key: fx.Node) -> None:
    if str(value(states.node).shape[0]) != str(value(key).shape[0]):
        raise PreconditionError(
            f"{rw.made_by}: the heads of this attention are folded into its batch",
            where=describe(states.node),
            fix="capture the model with attn_implementation='sdpa'",
        )


def _count_from_first(rw: Rewriter, sequence: Sequence, mask: fx.Node, by: fx.Node) -> None:
    """Positions that are looked up in a table are lowered by the padding before them."""
    lookups = [n for n in rw.graph.nodes if n.users and _looks_up_places(n, sequence)]
    if not lookups:
        return
    with rw.after(mask):
        hidden = rw.call(aten.eq.Scalar, mask, 0)
        hidden = rw.call(aten.to.dtype, hidden, torch.int64)
        before = rw.call(aten.sub.Tensor, rw.call(aten.cumsum.default, hidden, 1), hidden)
        before = rw.call(aten.slice.Tensor, before, 1, by, END)
    for node in lookups:
        index = lookup_index(node)
        with rw.at(node):
            own = rw.call(aten.sub.Tensor, index, before)
        rw.redirect(index, own, [node])
    rw.refresh()


def _looks_up_places(node: fx.Node, sequence: Sequence) -> bool:
    """Whether ``node`` looks up positions ``[length]`` or ``[1, length]`` that no mask changes."""
    index = lookup_index(node)
    if not isinstance(index, fx.Node) or not _counts(index):
        return False
    shape = value(index).shape
    return sequence.is_length(shape[-1]) and all(size == 1 for size in shape[:-1])


def _counts(index: fx.Node) -> bool:
    """Whether a value depends on the sizes of inputs, and on no number in them."""
    seen, stack = set[fx.Node](), [index]
    while stack:
        node = stack.pop()
        if node in seen or size_only(node):
            continue
        if node.op == "placeholder":
            return False
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return True


def _set_outputs(rw: Rewriter, sequence: Sequence, present: list[fx.Node], *, last: bool) -> None:
    """Returns keys and values too, and of the model's outputs the last row where that is asked."""
    leaves: Any = list(rw.graph.output_node().args[0])  # type: ignore[arg-type]
    signature = rw.program.signature
    specs = list(signature.outputs)
    if last:
        leaves = [_last_row(rw, sequence, leaf) for leaf in leaves]
        specs = [replace(s, shape=(s.shape[0], 1, *s.shape[2:])) for s in specs]
    names = [n for number in range(len(present) // 2) for n in Names.present(number)]
    for name, node in zip(names, present, strict=True):
        fake = value(node)
        shape = (_batch(rw.program), int(fake.shape[1]), Names.total(sequence.dim))
        specs.append(OutputSpec(name, fake.dtype, (*shape, int(fake.shape[3]))))
    rw.set_outputs([*leaves, *present])
    rw.set_signature(replace(signature, outputs=tuple(specs)))
    rw.refresh()


def _last_row(rw: Rewriter, sequence: Sequence, leaf: fx.Node) -> fx.Node:
    """The last row of an output, cut before the product that makes it where rows stay apart."""
    source = leaf
    while is_elementwise(source) and len(source.users) == 1:
        computed = [n for n in source.all_input_nodes if n.op == "call_function" and rank(n) == 3]
        if len(computed) != 1:
            break
        source = computed[0]
    x = source.args[0] if operator_name(source) in _ROWWISE else None
    alone = isinstance(x, fx.Node) and len(source.users) == 1 and sequence.axes(x) == {1}
    cut = x if alone else leaf
    assert isinstance(cut, fx.Node)
    with rw.after(cut):
        row = rw.call(aten.slice.Tensor, cut, 1, -1, END)
    if not alone:
        return row
    rw.redirect(cut, row, [source])
    return leaf


_ROWWISE = frozenset({"aten.linear", "ftc.quantized_linear"})


def _rows(program: Program, length: int) -> list[Tensor]:
    """Two texts of different length."""
    spec = program.signature.inputs[0]
    generator = torch.Generator().manual_seed(1)
    lengths = (length, max(1, length - _SHORTER))
    return [torch.randint(spec.low, spec.high, (n,), generator=generator) for n in lengths]


def _alone(program: Program, ids: Tensor) -> dict[str, Tensor]:
    rw = Rewriter(program.clone(), "cache")
    found = Attentions(rw).sequence
    assert found is not None
    return rw.program(token_inputs(rw.program, found, ids))
