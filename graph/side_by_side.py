"""Running a program and its changing copy side by side, node by node.

Whoever rounds one weight after another wants to know what each product gets from
the weights that are rounded already. Running the program again for each would
take as many runs as there are products; here both are run once, all calibration
inputs abreast, and stop at each product to be told its new weight. What a node
makes is dropped after its last reader, so memory is that of a few activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import linear

from .program import Program

Visit = Callable[[fx.Node, list[Tensor], list[Tensor]], tuple[Tensor, Tensor]]


def side_by_side(
    program: Program,
    inputs: Sequence[Mapping[str, Tensor]],
    nodes: Collection[fx.Node],
    visit: Visit,
    changed: Mapping[str, Tensor],
) -> None:
    """Runs both and stops before each of ``nodes``, in the order of the graph.

    Args:
        program: the float one; not changed.
        inputs: tensors by input name, one mapping a run.
        nodes: of ``program.graph``, each a product ``linear(x, weight, bias)``.
        visit: gets the node, its ``x`` in the float program and its ``x`` in the
            copy, one tensor a run; returns weight and bias of the copy's product.
        changed: tensors that the copy has instead of the program's, by name.
    """
    left = set(nodes)
    if not left or not inputs:
        return
    with torch.no_grad():
        streams = _Streams(program, inputs, changed)
        for node in program.graph.nodes:
            if node in left:
                left.remove(node)
                streams.run(node, visit(node, *streams.values(node.args[0])))
            else:
                streams.run(node)
            if not left:
                return


class _Streams:
    """Values of both programs: lists, one entry an input; the same list where nothing differs."""

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Mapping[str, Tensor]],
        changed: Mapping[str, Tensor],
    ) -> None:
        self._program, self._changed = program, changed
        self._given = iter(zip(*(program.signature.bind(each) for each in inputs), strict=True))
        self._runs = range(len(inputs))
        self._plain: dict[fx.Node, list[Any]] = {}
        self._other: dict[fx.Node, list[Any]] = {}
        self._last = {used: node for node in program.graph.nodes for used in node.all_input_nodes}

    def values(self, node: Any) -> tuple[list[Tensor], list[Tensor]]:
        """What ``node`` made in the program and in its copy."""
        return self._plain[node], self._other[node]

    def run(self, node: fx.Node, own: tuple[Tensor, Tensor] | None = None) -> None:
        """Computes ``node`` in both, the copy's as a product with ``own`` weight and bias.

        What it was the last to read is dropped.
        """
        if node.op == "placeholder":
            self._plain[node] = self._other[node] = list(next(self._given))
        elif node.op == "get_attr":
            name = str(node.target)
            tensor = self._program.tensor(name)
            self._plain[node] = [tensor for _ in self._runs]
            self._other[node] = self._plain[node]
            if name in self._changed:
                self._other[node] = [self._changed[name] for _ in self._runs]
        elif node.op == "call_function":
            self._plain[node] = self._other[node] = self._call(node, self._plain)
            if own is not None:
                _, inputs = self.values(node.args[0])
                self._other[node] = [linear(x, *own) for x in inputs]
            elif any(self._plain[u] is not self._other[u] for u in node.all_input_nodes):
                self._other[node] = self._call(node, self._other)
        for used in node.all_input_nodes:
            if self._last[used] is node:
                del self._plain[used], self._other[used]

    def _call(self, node: fx.Node, values: Mapping[fx.Node, list[Any]]) -> list[Any]:
        target: Any = node.target
        made = []
        for run in self._runs:
            given = {used: values[used][run] for used in node.all_input_nodes}
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
            made.append(target(*args, **kwargs))
        return made
