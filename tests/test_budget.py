"""Mixed precision under a budget of drift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ftc.graph.capture import capture_module
from ftc.graph.errors import BudgetError, UsageError
from ftc.graph.program import Program
from ftc.passes.base import Context
from ftc.passes.budget import Levels, Search
from ftc.passes.pipeline import Pipeline

ERRORS = {"a": (0.09, 0.03), "b": (0.02, 0.01), "c": (0.01, 0.008)}


def drift(levels: Levels) -> float:
    """Independent errors, a fifth larger together than alone."""
    alone = [ERRORS[n][level] ** 2 if level < 2 else 0.0 for n, level in levels.items()]
    return sum(alone) ** 0.5 * (1.2 if sum(x > 0 for x in alone) > 1 else 1.0)


@pytest.mark.parametrize("budget", [1.0, 0.1, 0.05, 0.02, 0.011])
def test_levels_keep_the_budget_and_the_most_sensitive_moves_first(budget: float) -> None:
    sizes = dict.fromkeys(ERRORS, 100)
    levels = Search(sizes, 2, drift)(budget, "int8")
    assert drift(levels) <= budget
    assert levels["a"] >= levels["b"] >= levels["c"]
    assert any(level < 2 for level in levels.values())


def test_nothing_is_measured_twice_alone_and_nothing_at_all_where_it_fits() -> None:
    calls: list[Levels] = []

    def counted(levels: Levels) -> float:
        calls.append(dict(levels))
        return drift(levels)

    Search(dict.fromkeys(ERRORS, 100), 2, counted)(1.0, "int8")
    assert len(calls) == 1
    calls.clear()
    Search(dict.fromkeys(ERRORS, 100), 2, counted)(0.05, "int8")
    alone = [tuple(c.items()) for c in calls if sum(level < 2 for level in c.values()) == 1]
    assert len(alone) == len(set(alone))


def test_a_budget_that_leaves_nothing_says_the_best() -> None:
    with pytest.raises(BudgetError, match=r"cannot keep a drift of 0\.001: with c alone .* 0\.008"):
        Search(dict.fromkeys(ERRORS, 100), 2, drift)(0.001, "int8")


@pytest.fixture(scope="module")
def chain() -> Program:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)]
    dynamic = {"input": {0: "batch"}}
    return capture_module(nn.Sequential(*layers), {"input": torch.randn(4, 64)}, dynamic=dynamic)


def run(program: Program, spec: str) -> Any:
    return Pipeline.parse(spec).run(program, Context.for_program(program))


def test_int8_keeps_its_budget(chain: Program) -> None:
    free = run(chain, "int8{min_size=1}")
    budget = free.drift.relative * 0.6
    kept = run(chain, f"int8{{min_size=1,max_drift={budget}}}")
    assert 0 < kept.drift.relative <= budget
    assert any("to keep a drift of" in note for note in kept.records[-1].notes)
    assert run(chain, "int8{min_size=1,max_drift=0.5}").drift == free.drift
    with pytest.raises(BudgetError, match="cannot keep"):
        run(chain, "int8{min_size=1,max_drift=0.000001}")


@pytest.mark.parametrize("fallback", ["int8", "none"])
def test_int4_keeps_its_budget_with_a_fallback(chain: Program, fallback: str) -> None:
    free = run(chain, "int4{min_size=1}")
    budget = free.drift.relative * 0.9
    kept = run(chain, f"int4{{min_size=1,max_drift={budget},fallback={fallback}}}")
    assert 0 < kept.drift.relative <= budget
    nodes = [n for n in kept.program.graph.nodes if "quantized_linear" in str(n.target)]
    found = {node.args[5] for node in nodes}
    assert 4 in found
    assert len(nodes) < 3 or found == {4, 8}  # something was left to the fallback, or in float


@pytest.mark.parametrize("spec", ["int8{max_drift=0}", "int4{max_drift=-1}", "int8{max_drift=5}"])
def test_a_budget_without_a_meaning_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="lies in"):
        Pipeline.parse(spec)
