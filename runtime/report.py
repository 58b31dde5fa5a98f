"""The report of a compilation: every step, what it promised, and what was measured.

One step a row: the model as it came, each pass (those that the pipeline added
included), and the ONNX file. A step's drift is measured against the step before
it; ``total`` compares the ONNX file in onnxruntime with the model as it came.
The table for people is made in :mod:`ftc.runtime.render`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ftc.graph.cost import Cost
from ftc.graph.program import Drift, PassRecord

from .assigned import Assigned
from .bench import Latency
from .shipped import Shipped

ORIGINAL, ONNX = "original", "onnx"


@dataclass(frozen=True, slots=True)
class Step:
    """One row.

    Attributes:
        name: ``original``, a pass's text form, or ``onnx``.
        effect: the promise; empty for ``original``.
        parameters, bytes, operations: of the program after it; of the file for
            ``onnx``, where the first and last are None.
        drift: against the step before; None where nothing was compared.
        seconds: wall time without verification.
        notes: what it chose and why.
    """

    name: str
    effect: str
    parameters: int | None
    bytes: int
    operations: int | None
    drift: Drift | None
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What one ``ftc compile`` did.

    Attributes:
        source, out: as the user named them.
        task: what the program computes.
        pipeline: the text form of the passes that ran.
        steps: the rows of the table.
        total: result against original, on the probes; None where the inputs changed.
        latencies: original in torch against result in onnxruntime.
        engines: what ran the original and the result.
        sizes: of the dynamic dimensions that operations are counted at.
        machine: processor, instruction sets, versions.
        notes: what capture and lowering decided.
        phases: wall and processor seconds by phase.
        products: the kernel of each product of the result, and what it gains on the target.
        shipped: sizes of source and bundle on disk, and a command that asks the bundle.
    """

    source: str
    out: str
    task: str
    pipeline: str
    steps: tuple[Step, ...]
    total: Drift | None
    latencies: tuple[Latency, ...]
    engines: tuple[str, str]
    sizes: Mapping[str, int]
    machine: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    phases: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    products: tuple[Assigned, ...] = ()
    shipped: Shipped | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes, seconds, multiply-adds."""
        return {
            "source": self.source, "out": self.out, "task": self.task, "pipeline": self.pipeline,
            "steps": [asdict(step) for step in self.steps],
            "total": None if self.total is None else asdict(self.total),
            "latencies": [each.to_dict() for each in self.latencies],
            "engines": {"original": self.engines[0], "result": self.engines[1]},
            "sizes": dict(self.sizes), "machine": dict(self.machine),
            "notes": list(self.notes), "products": [asdict(each) for each in self.products],
            "shipped": self.shipped and self.shipped.to_dict(),
            "phases": {n: {"wall": w, "cpu": c} for n, (w, c) in self.phases.items()},
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What a dry run found: the program as captured, and the passes that would run."""

    source: str
    out: str
    task: str
    pipeline: str
    original: Step
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"dry_run": True, **asdict(self)}


def original_step(total: Cost, seconds: float) -> Step:
    """The row of the model as it came."""
    return Step(ORIGINAL, "", total.parameters, total.bytes, total.operations, None, seconds)


def pass_step(record: PassRecord) -> Step:
    """The row of a pass."""
    return Step(record.spec, record.effect, record.parameters, record.bytes, record.operations,
                record.drift, record.seconds, record.notes)  # fmt: skip
