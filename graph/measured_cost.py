"""Training costs as this machine shows them: each kind of node is timed, forward and backward.

The roofline of :mod:`ftc.graph.training_cost` knows an operator by its work and its
bytes; what a kernel makes of them depends on shapes, caches and the library. Here the
graph runs once, and every node runs by itself with the values it gets there:

    forward   = seconds of the operator
    backward  = seconds of its gradients, added up where weights already have some,
                as from the second microbatch on

Nodes of one operator, the same shapes and the same gradients are timed once, so a
model of many layers takes little more than one of few.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .errors import PreconditionError
from .program import Program

_ROUNDS, _MOST = 7, 0.15  # repetitions of a node, and seconds for them

Seconds = tuple[float, float, float]
"""Of the forward pass, of the backward pass, and of weights' gradients in it."""


def measured_seconds(program: Program, sizes: Mapping[str, int]) -> dict[fx.Node, Seconds]:
    """Seconds of every ``call_function`` node on this machine, with the threads that torch has.

    Args:
        program: its tensors and the state of the generators stay as they are;
            ``requires_grad`` says what trains.
        sizes: one for each dynamic dimension.

    Raises:
        PreconditionError: for sizes at which it does not run.
    """
    timing = _Timing(program.module)
    probe = program.signature.probe(seed=0, **sizes)
    with torch.random.fork_rng(), torch.no_grad():
        try:
            timing.run(*program.signature.bind(probe))
        except RuntimeError as error:
            said = str(error).strip().partition("\n")[0]
            raise PreconditionError(f"the program does not run at {dict(sizes)}: {said}",
                                    fix="give sizes that it takes") from error  # fmt: skip
    return timing.found


class _Timing(fx.Interpreter):
    """Runs a graph, and times what it has not timed yet."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Seconds] = {}
        self._known: dict[Hashable, Seconds] = {}
        self._trained: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """The value of ``n``; its seconds are kept."""
        if n.op == "get_attr":
            value = super().run_node(n)
            if isinstance(value, nn.Parameter):
                if value.requires_grad:
                    self._trained.add(n)
                return value
            return value.clone() if value.is_floating_point() else value  # statistics are written
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        flat, spec = tree_flatten((n.args, n.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
        values = [self.env[x] if isinstance(x, fx.Node) else x for x in flat]
        through = [isinstance(x, fx.Node) and x in self._trained for x in flat]
        weights = [isinstance(x, fx.Node) and x.op == "get_attr" for x in flat]
        made = n.target(*args, **kwargs)  # type: ignore[operator]
        if any(through) and any(_is_float(t) for t in tree_flatten(made)[0]):
            self._trained.add(n)
        key = (n.target, *map(_form, values), *through, *weights)
        if key not in self._known:
            self._known[key] = _time(n.target, values, spec, through, weights)
        self.found[n] = self._known[key]
        return made


def _time(
    target: Any, values: list[Any], spec: Any, through: list[bool], weights: list[bool]
) -> Seconds:
    """The shortest of some repetitions: whatever else the machine does makes it longer."""
    every = _repeat(target, values, spec, through, through)
    inputs = [t and not w for t, w in zip(through, weights, strict=True)]
    if inputs == through:
        return (*every, 0.0)
    alone = _repeat(target, values, spec, inputs, inputs)[1] if any(inputs) else 0.0
    return (*every, max(every[1] - alone, 0.0))


def _repeat(
    target: Any, values: list[Any], spec: Any, through: list[bool], kept: list[bool]
) -> tuple[float, float]:
    """Seconds of the operator, and of the gradients of some of its inputs."""
    leaves = [
        value.detach().requires_grad_(learns and value.is_floating_point())
        if isinstance(value, Tensor) else value
        for value, learns in zip(values, through, strict=True)
    ]  # fmt: skip
    learning = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    args, kwargs = tree_unflatten(leaves, spec)
    forward = backward = torch.inf
    end = time.perf_counter() + _MOST
    for _ in range(_ROUNDS):
        with torch.enable_grad():
            begin = time.perf_counter()
            made = target(*args, **kwargs)
            forward = min(forward, time.perf_counter() - begin)
        outputs = [t for t in tree_flatten(made)[0] if _is_float(t) and t.requires_grad]
        if outputs:
            gradients = [torch.ones_like(t) for t in outputs]
            begin = time.perf_counter()
            torch.autograd.backward(outputs, gradients, inputs=learning)
            backward = min(backward, time.perf_counter() - begin)
        if time.perf_counter() > end:
            break
    return forward, backward if backward < torch.inf else 0.0


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _form(value: Any) -> Hashable:
    """What a node's time depends on, of one argument."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return repr(value)
