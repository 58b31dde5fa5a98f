"""Head: a classifier on the states of a model's body, in place of the head it has.

    logits = dropout(pool(h)) W^T + b,    h [batch, sequence, width],  W [labels, width]

``pool`` makes one row of each text: the state of its first token, the mean over the
tokens that its mask shows, or the state of the last of these. For tokens there is
nothing to pool. One label is a regression. Where the body ends is found in the graph
(:mod:`ftc.graph.body`); what only the old head needed is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from ftc.graph.body import token_states
from ftc.graph.causal import sees_ahead
from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.provenance import describe
from ftc.graph.rewriter import Rewriter
from ftc.graph.sequence import find_sequence
from ftc.graph.shapes import value
from ftc.graph.signature import OutputSpec
from ftc.graph.structure import find_structure
from ftc.graph.structure.flow import Flow

from .base import Context, Effect, Pass
from .cleanup import drop_dead
from .options import check_share

aten = torch.ops.aten
_NAME = "classifier"
_DEVIATION = 0.02  # of new weights: what BERT, GPT-2 and Llama start from


@dataclass(frozen=True)
class Head(Pass):
    """Put a new classifier on the body of a model, in place of its head.

    Options:
        labels: how many classes; 1 is a number to predict.
        task: whether each text or each token is classified.
        pool: what stands for a text: the ``first`` token, the ``mean`` of all, the
            ``last`` one; ``auto`` is last where no token sees those after it, else mean.
        dropout: before the product, in training.
    """

    name: ClassVar[str] = "head"
    effect: ClassVar[Effect] = Effect.INTERFACE

    labels: int = 2
    task: Literal["sequence-classification", "token-classification"] = "sequence-classification"
    pool: Literal["auto", "first", "mean", "last"] = "auto"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.labels < 1:
            raise UsageError(f"head{{labels={self.labels}}}: 1 or more", fix="head{labels=3}")
        if self.labels == 1 and self.task == "token-classification":
            raise UsageError(
                f"{self.spec}: one class of tokens tells nothing apart",
                fix=f"head{{labels=2,task={self.task}}}",
            )
        check_share(self, "dropout", 0.1, "[0, 1)")
        if self.task == "token-classification" and self.pool != "auto":
            raise UsageError(
                f"head{{task={self.task},pool={self.pool}}}: tokens are not pooled",
                fix="leave pool out",
            )

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Replaces all outputs by the logits."""
        states = token_states(rw.program, find_structure(rw.program))
        if states is None:
            raise PreconditionError(
                f"{self.spec}: no block of this program ends in states [batch, sequence, width]",
                where=describe(rw.graph.output_node().all_input_nodes[0]),
                fix="give it a model of text, or train the head that it has: freeze{train=head}",
            )
        pooled = self._pooled(rw, states)
        rw.set_outputs([pooled])
        drop_dead(rw)
        rw.drop_unread()  # the old head's names are free for the new one's
        logits = self._classified(rw, pooled, ctx.seed)
        rw.set_outputs([logits])
        signature = rw.program.signature
        leading = signature.inputs[0].shape[: value(logits).dim() - 1]
        spec = OutputSpec("logits", value(logits).dtype, (*leading, self.labels))
        rw.set_signature(replace(signature, task=self.task, outputs=(spec,)))

    def _pooled(self, rw: Rewriter, states: fx.Node) -> fx.Node:
        """``[batch, width]``, or for tokens the states themselves."""
        if self.task == "token-classification":
            return states
        pool = ("last" if _is_causal(rw) else "mean") if self.pool == "auto" else self.pool
        rw.note(f"pooled: {pool}" + (" (found in the attention)" if self.pool == "auto" else ""))
        mask = next(
            (n for n, spec in zip(rw.graph.nodes, rw.program.signature.inputs, strict=False)
             if spec.role == "mask"), None,
        )  # fmt: skip
        with rw.after(states):
            if pool == "first":
                return rw.call(aten.select.int, states, 1, 0)
            return (_mean if pool == "mean" else _last)(rw, states, mask)

    def _classified(self, rw: Rewriter, pooled: fx.Node, seed: int) -> fx.Node:
        fake = value(pooled)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.labels, fake.shape[-1], generator=generator) * _DEVIATION
        with rw.after(pooled):
            x = pooled
            if self.dropout:
                x = rw.call(aten.dropout.default, pooled, self.dropout, False)
            w = rw.add_parameter(f"{_NAME}.weight", weight.to(fake.dtype))
            b = rw.add_parameter(f"{_NAME}.bias", torch.zeros(self.labels, dtype=fake.dtype))
            return rw.call(aten.linear.default, x, w, b)


def _mean(rw: Rewriter, states: fx.Node, mask: fx.Node | None) -> fx.Node:
    """Mean over the tokens that the mask shows, as a product with it: no second ``[b, s, w]``."""
    if mask is None:
        return rw.call(aten.mean.dim, states, [1])
    weights = rw.call(aten.to.dtype, mask, value(states).dtype)
    row = rw.call(aten.unsqueeze.default, weights, 1)
    total = rw.call(aten.squeeze.dim, rw.call(aten.matmul.default, row, states), 1)
    count = rw.call(aten.sum.dim_IntList, weights, [1], True)
    return rw.call(aten.div.Tensor, total, rw.call(aten.clamp_min.default, count, 1))


def _last(rw: Rewriter, states: fx.Node, mask: fx.Node | None) -> fx.Node:
    """The state of the last token that the mask shows, wherever the padding is."""
    if mask is None:
        return rw.call(aten.select.int, states, 1, -1)
    shown = rw.call(aten.to.dtype, mask, torch.int64)
    places = rw.call(aten.arange.default, rw.call(aten.sym_size.int, mask, 1))
    last = rw.call(aten.amax.default, rw.call(aten.mul.Tensor, shown, places), [1])
    index: Any = last
    for _ in range(2):
        index = rw.call(aten.unsqueeze.default, index, -1)
    index = rw.call(aten.expand.default, index, [-1, 1, value(states).shape[2]])
    return rw.call(aten.squeeze.dim, rw.call(aten.gather.default, states, 1, index), 1)


def _is_causal(rw: Rewriter) -> bool:
    """Whether no token sees what comes after it."""
    sequence = find_sequence(rw)
    cores = Flow(rw.program).cores.values()
    return sequence is not None and sees_ahead(rw.program, sequence, cores) is None
