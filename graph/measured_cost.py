"""Training costs as this machine shows them: a step of the program, timed node by node.

The roofline of :mod:`ftc.graph.training_cost` knows an operator by its work and its
bytes; what a kernel makes of them depends on shapes, caches and the library. Here
whole steps run, and every node is a piece of its own in them: what it makes is a leaf,
whose gradient is that of all its readers, as autograd adds them up::

    forward   = seconds of the operator, which finds its inputs where the step left them
    backward  = seconds of its gradients, added up where weights already have some,
                as from the second microbatch on

An operator repeated by itself would find its inputs in the cache and write to memory
that it just gave back: forwards came out a fifth too short so. Nodes of one operator,
the same shapes and the same gradients have one time, the median of all of them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import PreconditionError
from .program import Program

_STEPS, _MOST = 5, 8.0  # steps that count, but for two no more than fit in so many seconds
_LEAST = 1e-7

Seconds = tuple[float, float, float]
"""Of the forward pass, of the backward pass, and of weights' gradients in it."""


def measured_seconds(program: Program, sizes: Mapping[str, int]) -> dict[fx.Node, Seconds]:
    """Seconds of every ``call_function`` node on this machine, with the threads that torch has.

    Args:
        program: its tensors and the state of the generators stay as they are;
            ``requires_grad`` says what trains. A step of it has to fit in memory.
        sizes: one for each dynamic dimension.

    Raises:
        PreconditionError: for sizes at which it does not run.
    """
    step = _Step(program)
    probe = program.signature.bind(program.signature.probe(seed=0, **sizes))
    with torch.random.fork_rng():
        try:
            kinds = step.run(probe, apart=False)  # the first gradients, and memory for all
        except RuntimeError as error:
            said = str(error).strip().partition("\n")[0]
            raise PreconditionError(f"the program does not run at {dict(sizes)}: {said}",
                                    fix="give sizes that it takes") from error  # fmt: skip
        step.forget()
        step.run(probe, apart=True)
        begin, steps = time.perf_counter(), 0
        while steps < 1 or (steps < _STEPS and time.perf_counter() - begin < _MOST):
            step.run(probe, apart=False)
            steps += 1
    return {node: step.seconds(kind) for node, kind in kinds.items()}


class _Step:
    """Steps of a program, and the seconds of each kind of node in them."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._call = _seconds_of_a_call()
        self._weights = {
            node: value.detach().requires_grad_(value.requires_grad)
            for node, value in _held(program)
            if isinstance(value, nn.Parameter)
        }
        self.forget()

    def forget(self) -> None:
        """What was measured so far; gradients of weights stay."""
        self._forward: dict[Hashable, list[float]] = defaultdict(list)
        self._backward: dict[Hashable, list[float]] = defaultdict(list)
        self._parts: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)

    def seconds(self, kind: Hashable) -> Seconds:
        """Of a node of a kind."""
        forward = median(self._forward[kind])
        if kind not in self._backward:
            return forward, 0.0, 0.0
        backward = max(median(self._backward[kind]) - self._call, _LEAST)
        inputs, weights = (median(each) for each in zip(*self._parts[kind], strict=True))
        return forward, backward, backward * (weights / (inputs + weights))

    def run(self, inputs: Sequence[Tensor], *, apart: bool) -> dict[fx.Node, Hashable]:
        """One step; the kind of each node.

        Args:
            inputs: of the program.
            apart: gradients of weights are computed, and timed, after those of inputs.
        """
        values: dict[fx.Node, Any] = dict(self._weights)
        values.update((node, value.clone() if value.is_floating_point() else value)
                      for node, value in _held(self._program) if node not in values)  # fmt: skip
        given, made, kinds = iter(inputs), dict[fx.Node, Any](), dict[fx.Node, Hashable]()
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "call_function":
                kinds[node] = kind = self._kind(node, values)
                made[node], taken = _called(node, values)
                self._forward[kind].append(taken)
                values[node] = tree_map(_leaf, made[node])
            elif node.op == "output":
                for leaf in _learning([node], values):
                    leaf.grad = torch.ones_like(leaf)
        for node in reversed(kinds):
            self._back(node, kinds[node], made.pop(node), values, apart=apart)
            del values[node]
        return kinds

    def _back(
        self,
        node: fx.Node,
        kind: Hashable,
        made: Any,
        values: Mapping[fx.Node, Any],
        *,
        apart: bool,
    ) -> None:
        """Gradients of what a node read, from those of what it made."""
        pairs = [(t, leaf.grad) for t, leaf in zip(tree_leaves(made), tree_leaves(values[node]),
                 strict=True) if isinstance(leaf, Tensor) and leaf.grad is not None]  # fmt: skip
        sources = node.all_input_nodes
        weights = _learning((n for n in sources if n in self._weights), values, reads=False)
        inputs = _learning((n for n in sources if n not in self._weights), values, reads=False)
        if not pairs or not (weights or inputs):
            return
        outputs, gradients = zip(*pairs, strict=True)
        if not apart:
            self._backward[kind].append(_pulled(outputs, gradients, [*inputs, *weights]))
            return
        before = _pulled(outputs, gradients, inputs, keep=bool(weights)) if inputs else 0.0
        behind = _pulled(outputs, gradients, weights) if weights else 0.0
        self._parts[kind].append((before, behind))

    def _kind(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Hashable:
        """What a node's time depends on."""
        found: list[Hashable] = [node.target]

        def add(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                weight = argument in self._weights
                found.extend((weight, *map(_form, tree_leaves(values[argument]))))
            else:
                found.append(repr(argument))
            return argument

        fx.node.map_aggregate((node.args, node.kwargs), add)
        return tuple(found)


def _held(program: Program) -> Iterable[tuple[fx.Node, Tensor]]:
    """What each ``get_attr`` node reads."""
    return ((node, program.tensor(str(node.target)))
            for node in program.graph.nodes if node.op == "get_attr")  # fmt: skip


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, float]:
    """What an operator returns, and its seconds."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.enable_grad():
        begin = time.perf_counter()
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        return made, time.perf_counter() - begin


def _pulled(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor], *,
    keep: bool = False,
) -> float:  # fmt: skip
    """Seconds of the gradients of ``inputs``."""
    begin = time.perf_counter()
    torch.autograd.backward(outputs, gradients, retain_graph=keep, inputs=inputs)
    return time.perf_counter() - begin


def _seconds_of_a_call() -> float:
    """What each call of autograd takes by itself, which a whole backward pass takes once."""
    x, best = torch.ones(1, requires_grad=True), float("inf")
    for _ in range(50):
        best = min(best, _pulled([x.view(1)], [torch.ones(1)], [x]))
    return best


def _leaf(value: Any) -> Any:
    """A tensor with a gradient of its own."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _learning(
    nodes: Iterable[fx.Node], values: Mapping[fx.Node, Any], *, reads: bool = True
) -> list[Tensor]:
    """Tensors that get a gradient, each once: what nodes read, or what they are."""
    sources = (each for node in nodes for each in (node.all_input_nodes if reads else (node,)))
    found = {id(t): t for source in sources for t in tree_leaves(values[source])
             if isinstance(t, Tensor) and t.requires_grad}  # fmt: skip
    return list(found.values())


def _form(value: Any) -> Hashable:
    """What a node's time depends on, of one value."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    return repr(value)
