"""Whether an attention looks ahead, told by computing its masks.

A mask is made of positions, of the inputs' own masks and of learned biases, by
operators that differ from model to model; what it does is in its values. At a
length of a few tokens, none of them padding, they cost microseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ftc.graph.program import Program

from .flow import Masking

_LENGTH, _BLOCKED = 5, -1e4


class Masks:
    """The values of a program's masks on one small input without padding.

    Attributes:
        sizes: of its dynamic dimensions.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        signature = program.signature
        self.sizes = {d: min(_LENGTH, signature.limits.get(d, _LENGTH)) for d in signature.dims}
        inputs = signature.probe(seed=0, **self.sizes)
        whole = {s.name: torch.ones_like(inputs[s.name]) for s in signature.inputs
                 if s.role == "mask"}  # fmt: skip
        values = {**inputs, **whole}
        holders = (n for n in program.graph.nodes if n.op == "placeholder")
        self._known: dict[fx.Node, Any] = {
            node: values[spec.name] for node, spec in zip(holders, signature.inputs, strict=True)
        }

    def is_causal(self, masks: tuple[tuple[fx.Node, Masking], ...]) -> bool:
        """Whether the masks together let no query see a later key, and every one itself."""
        allowed: Tensor | None = None
        for mask, how in masks:
            try:
                seen = self._allowed(self.value(mask), how)
            except (RuntimeError, IndexError, ValueError):
                return False  # a model that runs at some sizes only
            if seen is not None:
                allowed = seen if allowed is None else allowed & seen
        if allowed is None or allowed.dim() < 2 or allowed.shape[-1] != allowed.shape[-2]:
            return False
        later = torch.ones(allowed.shape[-2:], dtype=torch.bool).triu(1)
        own = allowed.diagonal(dim1=-2, dim2=-1)
        return bool(later.any()) and not bool((allowed & later).any()) and bool(own.all())

    def value(self, node: fx.Node) -> Any:
        """The value of a node that no product comes before."""
        stack = [node]
        while stack:
            top = stack[-1]
            if missing := [n for n in top.all_input_nodes if n not in self._known]:
                stack += missing
                continue
            stack.pop()
            if top not in self._known:
                self._known[top] = self._compute(top)
        return self._known[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._program.tensor(str(node.target)).detach()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._known.__getitem__)
        assert callable(node.target)
        with torch.no_grad():
            return node.target(*args, **kwargs)

    def _allowed(self, value: Any, how: Masking) -> Tensor | None:
        """Where a mask lets a query see a key; None for what is no mask over both."""
        if not isinstance(value, Tensor) or value.dim() < 2:
            return None
        if how in ("keeps", "blocks"):
            return value.bool() if how == "keeps" else ~value.bool()
        return (value if how == "added" else -value).float() > _BLOCKED
