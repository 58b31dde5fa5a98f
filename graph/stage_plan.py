"""Which stage each node of a program gets, and what each stage of a cut program costs.

The line that is cut (:mod:`ftc.graph.balance`) is the order of the graph; only
carried nodes stand in it, since free ones are computed wherever they are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from . import shapes
from .balance import Line, balance
from .cut import Stage
from .errors import UsageError
from .program import Program
from .stages import carried
from .symbols import SizesAt
from .timeline import StageTime
from .training_cost import Device, NodeTraining, training_costs, weight_bytes

_LOSS_PASSES = 4  # over the outputs: cross-entropy reads and writes them forward and backward
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage costs at given sizes, for one microbatch.

    Attributes:
        forward, backward: seconds; backward is all of it.
        weight_gradients: the part of backward that computes gradients of weights.
        weights: bytes of weights, gradients and optimizer state.
        saved: bytes of values kept between forward and backward.
        sent: bytes that cross to the next stage, forward; as many come back.
        parameters: elements of float parameters held.
    """

    forward: float
    backward: float
    weight_gradients: float
    weights: int
    saved: int
    sent: int
    parameters: int

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def time_on(self, device: Device) -> StageTime:
        """As a timeline takes it."""
        send = device.latency + self.sent / device.link
        return StageTime(
            self.forward, self.backward, self.weight_gradients, send, self.saved, self.weights
        )


def plan_stages(
    program: Program,
    count: int,
    sizes: Mapping[str, int],
    device: Device,
    *,
    memory: float | None = None,
    in_flight: int | None = None,
    of_nodes: Mapping[fx.Node, NodeTraining] | None = None,
) -> dict[fx.Node, int]:
    """The stage of each carried node, balanced over ``count`` stages.

    Args:
        program: is not changed but for fake values; ``requires_grad`` says what trains.
        count: 1 or more.
        sizes: of a microbatch, one for each dynamic dimension.
        device: what runs a stage.
        memory: bytes that a stage may hold in training, with AdamW.
        in_flight: microbatches whose values a stage keeps; by default as 1F1B does.
        of_nodes: what :func:`training_costs` says of these sizes, where that is known.

    Raises:
        PreconditionError: when the graph is too small, or no cut fits in ``memory``.
    """
    costs = training_costs(program, sizes, device) if of_nodes is None else of_nodes
    computed = carried(program)
    nodes = [node for node in program.graph.nodes if node in computed]
    line = _line(program, nodes, costs, SizesAt(program, sizes), device)
    ends = balance(line, count, link=device.link, memory=memory, in_flight=in_flight)
    found: dict[fx.Node, int] = {}
    for stage, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        found.update(dict.fromkeys(nodes[start:end], stage))
    return found


def stage_costs(
    program: Program,
    stages: Sequence[Stage],
    sizes: Mapping[str, int],
    device: Device,
    of_nodes: Mapping[fx.Node, NodeTraining] | None = None,
) -> tuple[StageCost, ...]:
    """The cost of each stage that ``program`` was cut into.

    Args:
        program: whole.
        stages: of it.
        sizes: of a microbatch, one for each dynamic dimension.
        device: what runs a stage.
        of_nodes: what :func:`training_costs` says of these sizes, where that is known.
    """
    if of_nodes is None:
        of_nodes = training_costs(program, sizes, device)
    costs = {node.name: cost for node, cost in of_nodes.items()}
    known = {node.name: node for node in program.graph.nodes}
    at = SizesAt(program, sizes)
    loss = _loss(program, at, device)
    return tuple(
        _stage_cost(stage, costs, sum(at.nbytes(known[name]) for name in stage.sent),
                    loss if stage.outputs else NodeTraining(0.0, 0.0, 0.0, 0))
        for stage in stages
    )  # fmt: skip


def parse_bytes(text: str) -> float:
    """``80GB``, ``16 GB`` or ``800000`` as bytes; units are powers of a thousand.

    Raises:
        UsageError: for another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if not match:
        raise UsageError(f"{text!r} is no number of bytes", fix="write 80GB")
    return float(match[1]) * _UNITS[match[2]]


def _stage_cost(
    stage: Stage, costs: Mapping[str, NodeTraining], sent: int, loss: NodeTraining
) -> StageCost:
    own = [costs[node.name] for node in stage.module.graph.nodes if node.name in costs]
    own.append(loss)
    return StageCost(
        sum(each.forward for each in own),
        sum(each.backward for each in own),
        sum(each.weights for each in own),
        sum(size for _, size in set(weight_bytes(stage.program).values())),
        sum(each.saved for each in own),
        sent,
        sum(p.numel() for p in stage.module.parameters() if p.is_floating_point()),
    )


def _line(
    program: Program, nodes: Sequence[fx.Node], costs: Mapping[fx.Node, NodeTraining],
    at: SizesAt, device: Device,
) -> Line:  # fmt: skip
    """The carried nodes as work in order; the loss is part of the last."""
    seconds = [costs[node].forward + costs[node].backward for node in nodes]
    saved = [costs[node].saved for node in nodes]
    if nodes:
        loss = _loss(program, at, device)
        seconds[-1] += loss.forward + loss.backward
        saved[-1] += loss.saved
    held = weight_bytes(program)
    weights = [[held[each] for each in node.all_input_nodes if each in held] for node in nodes]
    return Line(seconds, _crossing(nodes, at), saved, weights)


def _crossing(nodes: Sequence[fx.Node], at: SizesAt) -> list[int]:
    """Bytes of the values that are made at or before each position and read behind it."""
    position = {node: i for i, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for node, made in position.items():
        readers = [position.get(user, len(nodes)) for user in node.users
                   if user in position or user.op == "output"]  # fmt: skip
        last = min(max(readers, default=made), len(nodes) - 1)
        if last > made:
            size = at.nbytes(node)
            change[made] += size
            change[last] -= size
    found, total = [], 0
    for each in change[:-1]:
        total += each
        found.append(total)
    return found


def _loss(program: Program, at: SizesAt, device: Device) -> NodeTraining:
    """What a loss on the program's outputs costs: it passes over them a few times."""
    outputs: Any = program.graph.output_node().args[0]
    size = sum(at.nbytes(each) for each in set(outputs) if _is_float(each))
    seconds = _LOSS_PASSES * size / device.bandwidth
    return NodeTraining(seconds, seconds, 0.0, size)


def _is_float(node: fx.Node) -> bool:
    val = node.meta.get(shapes.VAL)
    return isinstance(val, Tensor) and val.is_floating_point()
