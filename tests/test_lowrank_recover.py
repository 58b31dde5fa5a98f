"""Recovery: only factors learn, they learn the original, and the record says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.drift import measure_drift
from ftc.graph.errors import PreconditionError, UsageError
from ftc.passes.base import Context
from ftc.passes.pipeline import Observer, Pipeline
from ftc.runtime.recover import recover, recovering
from ftc.tests.tiny import tiny


def cut(name: str, spec: str = "canonicalize,lowrank{budget=0.6}"):
    program = tiny(name)
    data = tuple(program.signature.probe(seed=70 + run, batch=8) for run in range(4))
    ctx = Context.for_program(program, calibration=data)
    return program, Pipeline.parse(spec).run(program, ctx).program, ctx


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_brings_the_outputs_closer(name):
    program, thin, ctx = cut(name)
    learned = recover(thin, program, ctx, 60)
    before, after = (measure_drift(program, each, ctx.calibration) for each in (thin, learned))
    assert after.relative < 0.95 * before.relative
    assert learned.history[-1].spec == "recover{steps=60}"
    assert learned.history[-1].drift is not None


def test_nothing_but_factors_changes():
    program, thin, ctx = cut("bert")
    kept = {name: tensor.clone() for name, tensor in thin.tensors()}
    trained = {name: p.requires_grad for name, p in thin.module.named_parameters()}
    learned = recover(thin, program, ctx, 3)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in thin.tensors())
    for name, tensor in learned.tensors():
        assert torch.equal(tensor, kept[name]) != name.endswith((".A", ".B")), name
    assert trained == {name: p.requires_grad for name, p in learned.module.named_parameters()}


def test_the_same_seed_gives_the_same_factors():
    program, thin, ctx = cut("mlp")
    runs = [dict(recover(thin, program, ctx, 5).tensors()) for _ in range(2)]
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_it_comes_before_quantization_and_is_saved(tmp_path: Path):
    program, _, ctx = cut("mlp")
    pipeline = Pipeline.parse("lowrank{budget=0.6},int8{min_size=0}")
    result = recovering(pipeline, 2).run(program, ctx, Observer())
    names = [record.spec.split("{")[0] for record in result.records]
    assert names.index("lowrank") + 1 == names.index("recover") < names.index("int8")
    save_bundle(result.program, tmp_path / "bundle")
    assert [r.spec for r in load_bundle(tmp_path / "bundle").history] == [
        r.spec for r in result.records
    ]


@pytest.mark.parametrize(
    ("asked", "fixed"),
    [
        ("int8", "CUT,int8"), ("cleanup", "CUT"), ("cleanup,smooth", "smooth,CUT"),
        ("smooth,int8,cache", "smooth,CUT,int8,cache"), ("cache", "CUT,cache"),
    ],
)  # fmt: skip
def test_without_lowrank_the_fix_puts_it_among_the_passes_that_were_given(asked, fixed):
    with pytest.raises(UsageError, match="no such pass") as caught:
        recovering(Pipeline.parse(asked), 5)
    passes = fixed.replace("CUT", "lowrank{budget=0.8}")
    assert caught.value.fix == f'--passes "{passes}"'
    assert recovering(Pipeline.parse(passes), 5)


def test_what_cannot_be_done_is_refused():
    program, thin, ctx = cut("mlp")
    with pytest.raises(UsageError, match="1 or more"):
        recovering(Pipeline.parse("lowrank"), 0)
    with pytest.raises(PreconditionError, match="calibration"):
        recover(thin, program, Context.for_program(program), 5)
    with pytest.raises(PreconditionError, match="lowrank made none"):
        recover(program, program, ctx, 5)
