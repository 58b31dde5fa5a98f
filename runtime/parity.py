"""Parity: whether onnxruntime computes what the graph computes.

For a program in floats that is agreement to rounding. A program that quantizes
its activations at run time amplifies rounding: a value that lies between two
codes falls to one side or the other, the step it makes moves other values over
their edges, and a few layers later two runs that are both right differ by the
noise of the quantization itself. How much that is, is measured and not guessed:
the graph is run again with the inputs of its quantized products changed in the
sixth digit (:func:`rounding_noise`), and onnxruntime may differ from the graph
as much as the graph then differs from itself, times :data:`SLACK`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ftc.graph import quantized_ops  # noqa: F401  (registers torch.ops.ftc)
from ftc.graph.drift import Difference, compare, summarize
from ftc.graph.errors import PromiseError
from ftc.graph.program import Drift, Program

Inputs = Mapping[str, Tensor]
Outputs = Mapping[str, Tensor]

#: Largest relative error between a float graph and onnxruntime.
TOLERANCE = 1e-4
#: How much more than its own rounding noise a quantized program may differ.
SLACK = 2.0
_SIXTH_DIGIT = 1e-5

_quantized_linear: Any = torch.ops.ftc.quantized_linear.default
_ROUNDING = (_quantized_linear, torch.ops.ftc.quantize_states.default)


def check_parity(
    program: Program,
    expected: Sequence[Outputs],
    outputs: Sequence[Outputs],
    probes: Sequence[Inputs],
    source: str = "random",
    tolerance: float = TOLERANCE,
) -> Drift:
    """The difference between two runs of one program, within its bound.

    Args:
        program: what both computed.
        expected: the graph's outputs, one set for each of ``probes``.
        outputs: onnxruntime's.
        probes: the inputs of each.
        source: what the inputs are, in words.
        tolerance: largest relative error, before the allowance for quantization.

    Raises:
        PromiseError: when they differ by more, with the output that differs most.
    """
    found: list[tuple[str, Difference]] = []
    for before, after, probe in zip(expected, outputs, probes, strict=True):
        found += compare(before, after, probe, program.signature).items()
    drift = summarize([difference for _, difference in found], source)
    if drift.relative <= tolerance:
        return drift
    bound = max(tolerance, SLACK * rounding_noise(program, expected, probes))
    if drift.relative <= bound:
        return drift
    name, worst = max(found, key=lambda pair: pair[1].relative)
    raise PromiseError(
        f"onnxruntime differs from the graph by {drift.relative:.1e} "
        f"(relative; {bound:.1e} is allowed) in output {name!r}, "
        f"at most {worst.max_abs:.1e} in an element",
        fix="the lowering of some operator is wrong for these inputs: run in torch "
        "(--engine torch) and report the model",
    )


def parity(
    program: Program,
    session: Callable[[Inputs], Outputs],
    inputs: Inputs | Sequence[Inputs],
    tolerance: float = TOLERANCE,
) -> Drift:
    """Runs the graph and a session of its lowered form on the same inputs, and compares.

    Raises:
        PromiseError: when they differ by more than ``tolerance`` and the rounding
            noise of quantized products allow.
    """
    probes = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    with torch.no_grad():
        expected = [program(probe) for probe in probes]
    outputs = [session(probe) for probe in probes]
    return check_parity(program, expected, outputs, probes, "given inputs", tolerance)


def three_way(
    eager: Callable[..., Any],
    program: Program,
    session: Callable[[Inputs], Outputs],
    inputs: Inputs,
) -> dict[str, float]:
    """Largest elementwise differences ``eager-graph``, ``graph-onnx`` and ``eager-onnx``.

    Args:
        eager: the module that was captured, called by input name; its outputs
            are a mapping, a tuple in the program's order, or one tensor.
    """
    with torch.no_grad():
        given, graph = eager(**inputs), program(inputs)
    if isinstance(given, Tensor):
        given = (given,)
    if isinstance(given, (tuple, list)):
        given = dict(zip(program.signature.output_names, given, strict=False))
    onnx = session(inputs)
    runs = {"eager": given, "graph": graph, "onnx": onnx}
    return {
        f"{a}-{b}": max(float((runs[a][n] - runs[b][n]).abs().max()) for n in graph)
        for a, b in (("eager", "graph"), ("graph", "onnx"), ("eager", "onnx"))
    }


def rounding_noise(
    program: Program, expected: Sequence[Outputs], probes: Sequence[Inputs]
) -> float:
    """Relative change of the outputs when what is rounded at run time is off in the sixth digit.

    0 for a program that quantizes no activations.
    """
    if not any(_quantizes(node) for node in program.graph.nodes):
        return 0.0
    worst = 0.0
    for number, (before, probe) in enumerate(zip(expected, probes, strict=True)):
        with torch.no_grad():
            flat = _Shaken(program.module, seed=number).run(*program.signature.bind(probe))
        after = dict(zip(program.signature.output_names, flat, strict=True))
        found = compare(before, after, probe, program.signature)
        worst = max([worst, *(difference.relative for difference in found.values())])
    return worst


def _quantizes(node: fx.Node) -> bool:
    return node.target in _ROUNDING and "none" not in (*node.args, *node.kwargs.values())


class _Shaken(fx.Interpreter):
    """Runs a graph with noise on what is rounded when it runs."""

    def __init__(self, module: fx.GraphModule, seed: int) -> None:
        super().__init__(module)
        self._noise = torch.Generator().manual_seed(seed)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _ROUNDING:
            x = args[0]
            noise = torch.randn(x.shape, generator=self._noise, dtype=x.dtype)
            args = (x * (1 + _SIXTH_DIGIT * noise), *args[1:])
        return super().call_function(target, args, kwargs)
