"""Compilation: from a model to a smaller one that was proven, in one call.

::

    capture -> cleanup -> passes, each proven on probes -> lower -> save
                              |                              |
                              '--- onnxruntime on the same probes, and timed

Nothing stands at ``out`` before everything held: the ONNX file is written into
the bundle's temporary folder, opened there by onnxruntime and compared with the
graph, and only then does the folder get its name.

Drift is measured on real text where the model takes text and brought a
tokenizer, and always on random inputs of another shape too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ftc.graph.bundle import save_bundle
from ftc.graph.cost import cost
from ftc.graph.drift import compare, summarize
from ftc.graph.program import Drift, Program
from ftc.graph.signature import Signature
from ftc.passes.base import Context, Effect
from ftc.passes.context import Inputs
from ftc.passes.ordering import order_text
from ftc.passes.pipeline import Observer

from .assigned import assigned
from .bench import Latency, usual_shapes
from .bench import compare as compare_latency
from .engine import MODEL, OnnxEngine
from .kernels import resolve
from .lower import Dialect, decomposed, lower, save_onnx
from .measure import machine
from .memory import collected_by_hand, release, trim
from .parity import check_parity
from .prepare import captured, prepare
from .probes import check_measuring, make_context
from .recover import recovering
from .report import ONNX, CompileReport, Plan, Step, original_step, pass_step
from .shipped import describe_shipped
from .torch_engine import TorchEngine, torch_threads

REPORT = "report.json"
_MEASURE_SECONDS, _MEASURE_MOST = 0.25, 2.5e9


@dataclass
class _Run:
    """What one compilation tells the outside as it goes, and how long its phases took.

    Attributes:
        progress: told what runs.
        phases: wall and processor seconds by phase.
    """

    progress: Callable[[str], None]
    phases: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        """Times a phase, apart from phases within it."""
        self.progress(text)
        before = self._clock()
        try:
            yield
        finally:
            wall, cpu = (b - a for a, b in zip(before, self._clock(), strict=True))
            spent = self.phases.get(name, (0.0, 0.0))
            self.phases[name] = spent[0] + wall, spent[1] + cpu

    def _clock(self) -> tuple[float, float]:
        """Wall and processor time that no finished phase has counted."""
        wall, cpu = (sum(times[i] for times in self.phases.values()) for i in (0, 1))
        return time.perf_counter() - wall, time.process_time() - cpu


@collected_by_hand()
def compile_model(
    source: Any,
    passes: str,
    out: str | Path,
    *,
    task: str | None = None,
    calib: str | None = None,
    target: str = "portable",
    shapes: str | None = None,
    dialect: Dialect = "onnxruntime",
    max_drift: float | None = None,
    recover: int | None = None,
    force: bool = False,
    trust: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    observer: Observer | None = None,
) -> CompileReport:
    """Captures, rewrites, proves, lowers, saves and measures.

    Args:
        source: whatever :func:`ftc.capture` takes, or a program.
        passes: a pipeline's text form, ``lowrank{ratio=0.8},int8``; ``""`` for none.
        out: the bundle's folder.
        task: what to capture for; by default what the model says. ``generate`` is
            ``causal-lm`` with the pass ``cache`` at the end.
        calib: text, a text file, or tensors (``.npz``, ``.safetensors``) to probe and
            calibrate on; by default Python's documentation.
        target: the machine that will run it.
        shapes: the sizes it will meet, ``batch=1:8,sequence=1:128``, to choose kernels for.
        dialect: ``standard`` for an ONNX file of standard operators only.
        max_drift: largest relative drift of any pass and of the whole.
        recover: steps to train the factors of ``lowrank`` for, on the calibration data.
        force: replace a bundle that is there.
        trust: allow a ``.pt2``.
        seed: of random probes.
        progress: told what runs.
        observer: hears of each pass.

    Raises:
        UsageError: for a wrong call, before any work is done.
        FtcError: as capture, passes, lowering and bundle raise it; nothing is written then.
    """
    run = _Run(progress)
    pipeline = recovering(prepare(passes, out, target, force, task), recover, progress)
    check_measuring(calib, max_drift)
    with run.phase("capture", f"capturing {source}"):
        held = [captured(source, task, trust)]
        signature, notes = held[0].signature, held[0].notes
        machine_of = resolve(target, progress=progress)
        ctx = make_context(held[0], calib, machine_of, shapes, max_drift, seed)
        first = original_step(cost(held[0]), 0.0)
    with run.phase("passes", "running passes"):
        expected, told = ctx.outputs(held[0]), _Told(run, observer, held[0])
        done = pipeline.run(held.pop(), ctx, told)
        result, original = done.program, told.reference
        if told.replaced:
            release()
    made: list[CompileReport] = []

    def write_onnx(path: Path) -> None:
        lowered, lowering_notes = _lower(result, path, run, dialect)
        engine = OnnxEngine(result, path, threads=1)
        trim()  # what onnxruntime needed only to load
        with run.phase("parity", "comparing onnxruntime with the graph"):
            step, total = _prove(signature, expected, result, engine, ctx, path, lowered)
        with run.phase("latency", "measuring latency"), torch_threads(1):
            latencies = _latency(base := TorchEngine(original), engine)
            label = f"{base.label}, the graph after its exact passes"
        steps = (first, *(pass_step(record) for record in done.records), step)
        made.append(CompileReport(
            str(source), str(out), result.signature.task,
            ",".join(record.spec for record in done.records), steps, total, latencies,
            (label, engine.label), signature.sizes(), machine(), (*notes, *lowering_notes),
            run.phases, assigned(result, ctx.target, ctx.shapes),
        ))  # fmt: skip

    def write_report(path: Path) -> None:
        found = describe_shipped(source, result, out, path.parent)
        made[0] = replace(made[0], shipped=found)
        path.write_text(json.dumps(made[0].to_dict(), indent=1) + "\n", encoding="utf-8")

    with run.phase("save", f"saving {out}"):
        save_bundle(result, out, force=force, files={MODEL: write_onnx, REPORT: write_report})
    return made[0]


def plan(
    source: Any,
    passes: str,
    out: str | Path,
    *,
    task: str | None = None,
    target: str = "portable",
    force: bool = False,
    trust: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Plan:
    """What :func:`compile_model` would do: checks the call, captures, and orders the passes.

    Raises:
        FtcError: as :func:`compile_model` does.
    """
    pipeline = prepare(passes, out, target, force, task)
    progress(f"capturing {source}")
    start = time.perf_counter()
    original = captured(source, task, trust)
    step = original_step(cost(original), time.perf_counter() - start)
    order = order_text(each for each, _ in pipeline.plan(original))
    return Plan(str(source), str(out), original.signature.task, order, step, original.notes)


class _Told(Observer):
    """Tells the progress line which pass runs, passes everything on, and keeps the reference.

    Attributes:
        reference: the program after the exact passes the pipeline began with. It
            computes what the original does, so the original itself can go.
        replaced: whether weights can go: of the pass before, or what capture made.
    """

    def __init__(self, run: _Run, inner: Observer | None, original: Program) -> None:
        self._run, self._inner = run, inner or Observer()
        self.reference = original
        self.replaced = True

    def planned(self, passes: Any) -> None:
        self._inner.planned(passes)

    def started(self, given: Any, program: Program) -> None:
        if self.replaced:
            release()
        self._run.progress(f"running {given.spec}")
        self._inner.started(given, program)

    def finished(self, given: Any, before: Program, after: Program) -> None:
        if self.reference is before and given.effect in (Effect.EXACT, Effect.ANNOTATION):
            self.reference = after
        kept = {t.data_ptr() for held in (after, self.reference) for _, t in held.tensors()}
        self.replaced = any(tensor.data_ptr() not in kept for _, tensor in before.tensors())
        self._inner.finished(given, before, after)

    def failed(self, given: Any, before: Program, error: Any) -> None:
        self._inner.failed(given, before, error)


def _lower(
    result: Program, path: Path, run: _Run, dialect: Dialect
) -> tuple[float, tuple[str, ...]]:
    """Writes the ONNX file; its seconds, and which operators had to be decomposed."""
    start = time.perf_counter()
    with run.phase("lower", "lowering to ONNX"):
        model = lower(result, dialect)
        save_onnx(model, path)
    names = decomposed(model)
    notes = (f"lowered through their decomposition: {', '.join(names)}",) if names else ()
    return time.perf_counter() - start, notes


def _prove(
    signature: Signature, expected: Sequence[Mapping[str, Tensor]], result: Program,
    engine: OnnxEngine, ctx: Context, path: Path, seconds: float,
) -> tuple[Step, Drift | None]:  # fmt: skip
    """onnxruntime against the graph, and against the model as it came, on the same probes.

    Raises:
        PromiseError: when onnxruntime computes something else than the graph.
    """
    probes = ctx.probes_for(result)
    outputs = [engine(probe) for probe in probes]
    drift = check_parity(result, ctx.outputs(result), outputs, probes, ctx.probe_source)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    step = Step(ONNX, "exact", None, size, None, drift, seconds)
    if signature.input_types != result.signature.input_types:
        return step, None
    return step, _drift(signature, expected, outputs, probes, ctx.probe_source)


def _drift(
    signature: Signature, before: Any, after: Any, probes: tuple[Inputs, ...], source: str
) -> Drift:
    found = [
        difference
        for old, new, probe in zip(before, after, probes, strict=True)
        for difference in compare(old, new, probe, signature).values()
    ]
    return summarize(found, source)


def _latency(base: TorchEngine, engine: OnnxEngine) -> tuple[Latency, ...]:
    """Original against result at two shapes, one thread each; none where they take other inputs.

    One thread, because two engines that share cores slow each other down.
    """
    if base.program.signature.input_types != engine.program.signature.input_types:
        return ()
    shapes = usual_shapes(base.program, _MEASURE_MOST)
    return compare_latency(base, engine, shapes, seconds=_MEASURE_SECONDS)
