"""Partition: which stage of a pipeline each node belongs to, balanced by what training costs.

The graph is cut as it stands, so run it after every pass that rewrites: a factored
or frozen layer costs less and its stage gets more of them. See
:mod:`ftc.graph.training_cost` for the costs and :mod:`ftc.graph.balance` for the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ftc.graph.cut import cut
from ftc.graph.errors import UsageError
from ftc.graph.rewriter import Rewriter
from ftc.graph.stage_plan import parse_bytes, plan_stages, stage_costs
from ftc.graph.stages import KEY
from ftc.graph.structure import find_structure
from ftc.graph.training_cost import find_device, training_costs, usual_sizes
from ftc.graph.words import plural

from .base import Context, Effect, Pass


@dataclass(frozen=True)
class Partition(Pass):
    """Cut the graph into stages that take the same time, where little crosses.

    Stages are annotations: they stay in bundles and through later passes, and
    ``stages=1`` removes them. What is frozen costs no backward, so run it last.

    Options:
        stages: how many.
        memory: what a stage may hold in training (weights, gradients, AdamW's moments, and
            activations of the microbatches that 1F1B keeps): ``16GB``.
        shape: sizes of a microbatch, ``"batch=8,sequence=512"``; what is left out is a batch of 8,
            and 128 of everything else.
        device: what runs a stage: ``cpu``, ``a100``, ``h100``, or ``here``: this machine, measured.
    """

    name: ClassVar[str] = "partition"
    effect: ClassVar[Effect] = Effect.ANNOTATION

    stages: int = 2
    memory: str | None = None
    shape: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise UsageError(f"{self.spec}: stages is 1 or more", fix="partition{stages=2}")
        find_device(self.device)
        if self.memory is not None:
            parse_bytes(self.memory)

    def rewrite(self, rw: Rewriter, ctx: Context) -> None:
        """Annotates every carried node with its stage, and no other."""
        signature, device = rw.program.signature, find_device(self.device)
        given = signature.parse_sizes(self.shape) if self.shape else {}
        sizes = usual_sizes(signature, **given)
        memory = None if self.memory is None else parse_bytes(self.memory)
        nodes = training_costs(rw.program, sizes, device)
        planned = plan_stages(rw.program, self.stages, sizes, device, memory=memory, of_nodes=nodes)
        for node in rw.graph.nodes:
            rw.annotate(node, KEY, planned.get(node) if self.stages > 1 else None)
        stages = cut(rw.program)
        costs = stage_costs(rw.program, stages, sizes, device, nodes)
        mean = sum(each.seconds for each in costs) / len(costs)
        largest = max(each.seconds for each in costs)
        crossing = max((each.sent for each in costs[:-1]), default=0)
        rw.note(
            f"{plural(len(stages), 'stage')} at {', '.join(f'{n} {s}' for n, s in sizes.items())}: "
            f"the largest takes {largest / mean:.2f} of the mean, "
            f"at most {crossing / 1e6:.2f} MB cross"
        )
        layers = len(find_structure(rw.program).layers)
        if 0 < layers < len(stages):
            rw.note(f"more stages than layers, of which there are {layers}: some cuts are inside "
                    "one, where more crosses")  # fmt: skip
