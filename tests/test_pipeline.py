"""Registry and pipeline: what is found, what is refused, what is named when it breaks."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import ftc.passes
from ftc.graph.errors import BudgetError, PromiseError, UsageError
from ftc.graph.printer import fingerprint
from ftc.graph.provenance import KEY
from ftc.passes import registry
from ftc.passes.base import Context, Effect, Pass
from ftc.passes.pipeline import Pipeline, PrintIr
from ftc.tests.tiny import custom, tiny

aten = torch.ops.aten


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies by ``by`` after every relu; claims to be exact."""

    name: ClassVar[str] = "scale"
    effect: ClassVar[Effect] = Effect.EXACT

    by: float = 1.5

    def rewrite(self, rw, ctx):
        for node in list(rw.graph.nodes):
            if node.target is aten.relu.default:
                with rw.at(node):
                    relu = rw.call(aten.relu.default, *node.args)
                    scaled = rw.call(aten.mul.Tensor, relu, self.by)
                rw.replace(node, scaled)


@dataclass(frozen=True)
class Approximate(Scale):
    name: ClassVar[str] = "approximate"
    effect: ClassVar[Effect] = Effect.APPROXIMATE


@dataclass(frozen=True)
class Annotation(Scale):
    name: ClassVar[str] = "annotation"
    effect: ClassVar[Effect] = Effect.ANNOTATION


@dataclass(frozen=True)
class NoProvenance(Pass):
    name: ClassVar[str] = "no-provenance"
    effect: ClassVar[Effect] = Effect.EXACT

    def rewrite(self, rw, ctx):
        next(n for n in rw.graph.nodes if n.op == "call_function").meta.pop(KEY)
        rw.modified += 1


@dataclass(frozen=True)
class Idle(Pass):
    name: ClassVar[str] = "idle"
    effect: ClassVar[Effect] = Effect.EXACT

    def rewrite(self, rw, ctx):
        rw.note("nothing to do")


def test_every_pass_of_the_package_is_found():
    """The registry reads sources; importing everything must find the same classes."""
    for module in pkgutil.iter_modules(ftc.passes.__path__):
        importlib.import_module(f"ftc.passes.{module.name}")
    classes, found = [Pass], set()
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        if cls.__module__.startswith("ftc.passes.") and "name" in vars(cls):
            found.add(cls)
    assert {registry.get(name) for name in registry.names()} >= found
    assert {cls.name for cls in found} >= {"canonicalize", "cleanup", "freeze", "lowrank", "int8"}


def test_unknown_pass_names_the_nearest():
    with pytest.raises(UsageError, match="lowrank"):
        registry.get("lowrnk")


def test_a_registered_pass_is_found_and_its_name_is_taken(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    assert registry.register(Scale) is Scale
    assert registry.get("scale") is Scale
    assert "scale" in registry.names()
    other = dataclass(frozen=True)(type("Other", (Scale,), {"name": "scale"}))
    with pytest.raises(UsageError, match="two passes"):
        registry.register(other)


@pytest.mark.parametrize("bad", [int, type("Plain", (Scale,), {})])
def test_what_is_not_a_pass_is_refused(bad):
    with pytest.raises(UsageError, match=r"not a pass|dataclass"):
        registry.register(bad)


def test_a_broken_promise_names_pass_and_node():
    with pytest.raises(PromiseError) as caught:
        Scale()(tiny("mlp"))
    assert "scale promises exact results" in str(caught.value)
    assert "made by scale" in str(caught.value.where)
    assert caught.value.exit_code == 1


def test_a_promise_kept_to_rounding_passes():
    record = Scale(by=1.0)(tiny("mlp")).record
    assert record.modified == 1
    assert record.drift.relative <= 1e-6


def test_an_annotation_that_computes_is_refused():
    with pytest.raises(PromiseError, match="no arithmetic"):
        Annotation()(tiny("mlp"))


def test_a_budget_names_the_worst_node():
    program = tiny("mlp")
    drift = Approximate()(program).record.drift.relative
    assert Approximate()(program, Context(max_drift=drift * 1.01)).modified == 1
    with pytest.raises(BudgetError) as caught:
        Approximate()(program, Context(max_drift=drift * 0.9))
    assert "most of it at node linear_1" in caught.value.where
    assert "node mul_tensor" in caught.value.where
    assert "made by approximate" in caught.value.where


def test_a_budget_holds_for_the_whole_pipeline():
    program = tiny("mlp")
    drift = Approximate(by=1.1)(program).record.drift.relative
    two = Pipeline((Approximate(by=1.1), Approximate(by=1.2)))
    with pytest.raises(BudgetError) as caught:
        two.run(program, Context(max_drift=drift * 2.5))
    assert "approximate{by=1.2} drifts most" in caught.value.what
    assert two.run(program, Context(max_drift=drift * 5)).drift.relative > drift


def test_an_illegal_result_names_the_pass():
    from ftc.graph.errors import VerifyError

    with pytest.raises(VerifyError, match="no-provenance"):
        NoProvenance()(tiny("mlp"))


def test_a_pass_that_does_nothing_returns_the_same_module():
    program = tiny("mlp")
    result = Idle()(program)
    assert result.program.module is program.module
    assert result.modified == 0
    assert result.record.drift.relative == 0
    assert result.record.notes == ("nothing to do",)


def test_a_record_says_what_is():
    result = Pipeline.parse("int8{min_size=0}").run(tiny("mlp"))
    first, *_, last = result.records
    assert last.bytes < first.bytes
    assert last.parameters == first.parameters
    assert last.fingerprint == fingerprint(result.program)
    assert last.effect == "approximate"
    assert result.program.facts >= {"canonical", "quantized"}
    assert 0 < result.drift.relative < 0.1


def test_outputs_on_probes_are_computed_once_for_a_program(monkeypatch):
    from ftc.passes import context

    runs = []
    real = context.run_probe
    monkeypatch.setattr(
        context, "run_probe", lambda program, probe: runs.append(1) or real(program, probe)
    )
    Pipeline.parse("canonicalize,freeze{train=none},cleanup").run(tiny("gpt2"))
    assert len(runs) == 3 * 2  # captured, canonical, clean; two probes each


def test_given_probes_are_used():
    program = tiny("mlp")
    probe = {"x": torch.zeros(5, 8)}
    drift = Approximate()(program, Context(probes=(probe,), probe_source="zeros")).record.drift
    assert drift.inputs == "zeros"
    with pytest.raises(UsageError, match="does not run on a probe"):
        Approximate()(program, Context(probes=({"x": torch.zeros(5, 9)},)))


def test_observers_hear_everything_and_print():
    heard, printed = [], []

    class Listener(PrintIr):
        def planned(self, passes):
            heard.append([p.name for p in passes])

        def started(self, given, program):
            heard.append(given.name)

        def failed(self, given, before, error):
            heard.append(error)

    with pytest.raises(PromiseError):
        Pipeline((registry.get("lowrank")(), Scale())).run(
            tiny("mlp"), observer=Listener({"canonicalize"}, printed.append)
        )
    assert heard[:4] == [["canonicalize", "lowrank", "scale"], "canonicalize", "lowrank", "scale"]
    assert isinstance(heard[4], PromiseError)
    assert len(printed) == 1
    assert "aten.linear" in printed[0]


def test_a_result_that_does_not_run_is_the_fault_of_the_pass():
    """A view that the strides no longer allow: shapes are right, the program is not."""

    @dataclass(frozen=True)
    class Breaks(Pass):
        name: ClassVar[str] = "breaks"
        effect: ClassVar[Effect] = Effect.EXACT

        def rewrite(self, rw, ctx):
            node = next(n for n in rw.graph.nodes if n.target is aten.contiguous.default)
            rw.replace(node, node.args[0])

    class Viewed(torch.nn.Module):
        def forward(self, x):
            return x.transpose(1, 2).contiguous().view(-1)

    with pytest.raises(PromiseError, match="breaks: the result does not run"):
        Breaks()(custom(Viewed(), x=torch.randn(2, 3, 4)))
