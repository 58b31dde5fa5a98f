"""The order of a pipeline: what is added and for whom, what is refused, what would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.graph.errors import OrderError, PreconditionError
from ftc.passes import registry
from ftc.passes.base import Effect, Pass
from ftc.passes.ordering import arrange
from ftc.passes.pipeline import Observer, Pipeline
from ftc.tests.tiny import tiny


def test_what_is_needed_is_added_and_said():
    program = tiny("gpt2")
    result = Pipeline.parse("lowrank{ratio=0.9},cleanup").run(program)
    assert [r.spec.split("{")[0] for r in result.records] == ["canonicalize", "lowrank", "cleanup"]
    assert result.records[0].notes[0] == "added: lowrank needs a program that is canonical"
    assert len(result.program.history) == 3


def test_nothing_is_added_twice():
    program = tiny("mlp")
    once = Pipeline.parse("canonicalize").run(program).program
    plan = Pipeline.parse("lowrank,cleanup,lowrank").plan(once)
    assert [p.name for p, _ in plan] == ["lowrank", "cleanup", "lowrank"]


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ("int8,lowrank", "lowrank,int8"),
        ("int8,lowrank{ratio=0.5}", "lowrank{ratio=0.5},int8"),
        ("lowrank,canonicalize", "canonicalize,lowrank"),
        ("int4,int8", "int8,int4"),
        ("int4,cleanup,int8", "cleanup,int8,int4"),
    ],
)
def test_a_wrong_order_is_refused_before_anything_runs(text, better):
    class Started(Observer):
        def started(self, given, program):
            raise AssertionError("something ran")

    with pytest.raises(OrderError) as caught:
        Pipeline.parse(text).run(tiny("mlp"), observer=Started())
    assert caught.value.fix == f"use {better}"
    assert Pipeline.parse(better).plan(tiny("mlp"))


def test_an_added_pass_that_cannot_run_says_for_whom_it_was_added():
    with pytest.raises(OrderError) as caught:
        Pipeline.parse("int4,int8").plan(tiny("mlp"))
    assert "added for int8, cannot run after int4" in caught.value.what
    assert caught.value.where == "int4,int8"
    quantized = Pipeline.parse("int4{min_size=0}").run(tiny("llama")).program
    with pytest.raises(OrderError, match="added for int8, cannot run here"):
        Pipeline.parse("int8").plan(quantized)


def test_a_pass_with_nothing_left_to_do_says_after_which():
    first, second = Pipeline.parse("int8{min_size=0},int8").run(tiny("mlp")).records[-2:]
    assert first.modified and not second.modified
    assert second.notes[0] == "nothing was left for it after int8{min_size=0}"
    assert not any("nothing was left" in note for note in first.notes)


def test_a_program_that_is_past_it_is_refused():
    quantized = Pipeline.parse("int8{min_size=0}").run(tiny("mlp")).program
    with pytest.raises(OrderError, match="quantized") as caught:
        Pipeline.parse("lowrank").run(quantized)
    assert "before" in caught.value.fix


def test_a_fact_that_nothing_provides():
    @dataclass(frozen=True)
    class Wants(Pass):
        name: ClassVar[str] = "wants"
        effect: ClassVar[Effect] = Effect.EXACT
        needs: ClassVar[frozenset[str]] = frozenset({"blessed"})

        def rewrite(self, rw, ctx):
            raise AssertionError("it ran")

    with pytest.raises(OrderError, match="no known pass"):
        arrange((Wants(),), frozenset())
    with pytest.raises(PreconditionError, match="blessed"):
        Wants()(tiny("mlp"))


PLANNED = st.lists(
    st.sampled_from(["canonicalize", "cleanup", "lowrank", "int8", "freeze"]), max_size=5
)


@settings(deadline=None)  # a refusal tries other orders
@given(PLANNED)
def test_a_plan_meets_every_need_or_is_refused_with_a_plan_that_does(names):
    passes = tuple(registry.get(name)() for name in names)
    try:
        planned = [p for p, _ in arrange(passes, frozenset())]
    except OrderError as error:
        if error.fix.startswith("use "):
            better = Pipeline.parse(error.fix.removeprefix("use "))
            assert sorted(p.name for p in better.passes) == sorted(names)
            arrange(better.passes, frozenset())
        return
    facts = set()
    for each in planned:
        assert each.needs <= facts
        assert not each.forbids & facts
        facts |= each.provides
