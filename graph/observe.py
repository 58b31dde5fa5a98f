"""Watching values while a program runs: statistics of activations, without keeping activations.

Each watched node's value is handed to a callback as soon as it is computed and
dropped after its last use, so memory stays that of one forward pass. Nothing is
computed behind the last watched node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program

Watch = Callable[[Tensor], None]


def observe(
    program: Program, inputs: Iterable[Mapping[str, Tensor]], watch: Mapping[fx.Node, Watch]
) -> None:
    """Runs ``program`` on each of ``inputs`` and hands the values of watched nodes over.

    Args:
        program: not changed.
        inputs: tensors by input name, one mapping a run.
        watch: a callback for each node of ``program.graph`` of interest. It must
            not keep the tensor it is given, only what it computes from it.
    """
    last = next((node for node in reversed(program.graph.nodes) if node in watch), None)
    if last is None:
        return
    with torch.no_grad():
        for given in inputs:
            with suppress(_Enough):
                _Observer(program.module, watch, last).run(*program.signature.bind(given))


def values(
    program: Program, inputs: Mapping[str, Tensor], nodes: Iterable[fx.Node]
) -> dict[fx.Node, Tensor]:
    """The values of a few nodes in one run of ``program``."""
    found: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node) -> Watch:
        return lambda value: found.__setitem__(node, value.clone())

    observe(program, [inputs], {node: keep(node) for node in nodes})
    return found


class _Enough(Exception):
    """The last watched node has its value."""


class _Observer(fx.Interpreter):
    extra_traceback = False  # what its callbacks raise is theirs

    def __init__(
        self, module: fx.GraphModule, watch: Mapping[fx.Node, Watch], last: fx.Node
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._watch, self._last = watch, last

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if (callback := self._watch.get(n)) is not None:
            callback(result)
        if n is self._last:
            raise _Enough
        return result
