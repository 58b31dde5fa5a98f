"""lowrank: the metric, ranks under a budget, and what its options promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.graph.capture import capture_module
from ftc.graph.drift import measure_drift
from ftc.graph.errors import BudgetError, PreconditionError, UsageError
from ftc.graph.matrices import matrices
from ftc.graph.products import products
from ftc.graph.program import Program
from ftc.graph.target import CostTable, Point, Target, target
from ftc.passes import lowrank
from ftc.passes.base import Context, PassResult
from ftc.passes.pace import Pace
from ftc.passes.pipeline import Pipeline
from ftc.passes.ranks import Curve, Size, check_budget, share_out
from ftc.passes.text import parse_pass
from ftc.tests.tiny import canonical, custom, data, tiny


def run(spec: str, program: Program, **fields: object) -> PassResult:
    ctx = Context.for_program(program, calibration=data(program), **fields)
    return parse_pass(spec)(program, ctx)


def weights(program: Program) -> int:
    """Weights of products, factored or not."""
    return sum(program.tensor(product.weight).numel() for product in products(program))


def table(fixed: float) -> Target:
    return replace(target("portable"), table=CostTable(
        "a test", True, {"float": (Point(1, fixed, 1.0), Point(64, fixed, 64.0))}))  # fmt: skip


def test_factors_that_are_slower_are_used_for_bytes_only():
    """Starting a product costs more here than all of its weights."""
    program = canonical("mlp")
    slow = {"target": table(1e9), "shapes": (program.signature.sizes(batch=1),)}
    with pytest.raises(PreconditionError, match="cannot be met"):
        run("lowrank{budget=0.6}", program, **slow)
    kept = run("lowrank{ratio=0.6}", program, **slow)
    assert not kept.modified and any("slower" in note for note in kept.record.notes)
    assert run("lowrank{budget=0.6,of=bytes}", program, **slow).modified
    free = {**slow, "target": table(0.0)}
    assert run("lowrank{budget=0.6}", program, **free).modified


def test_the_limit_is_the_last_rank_that_is_no_slower():
    program = canonical("mlp")
    product = next(iter(matrices(program)))
    weight = product.of(program)
    ctx = Context.for_program(program, target=table(20.0), shapes=(program.signature.sizes(),))
    pace = Pace(program, ctx)
    limit = pace.limit(product, weight)
    assert 0 < limit < min(weight.shape)
    assert pace.ratio(product, weight, limit) <= 1 < pace.ratio(product, weight, limit + 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.3, 1.0))
def test_ranks_hold_the_budget_and_no_swap_is_better(seed, share):
    """Against every pair of ranks of two products that is no more expensive."""
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for name, shape in (("a", (6, 8)), ("b", (10, 5))):
        squares = torch.rand(min(shape), generator=generator, dtype=torch.float64).sort().values
        tails = torch.cat([squares.cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        curves[name] = Curve(Size(shape), tails)
    whole = sum(curve.size.dense for curve in curves.values())
    if sum(curve.size.least for curve in curves.values()) > share * whole:
        with pytest.raises(PreconditionError, match="cannot be met"):
            share_out(curves, share)
        return
    ranks = share_out(curves, share)

    def both(a: int | None, b: int | None) -> tuple[float, float]:
        pair = ((curves["a"], a), (curves["b"], b))
        return (sum(c.size.cost(r) for c, r in pair),
                sum(0.0 if r is None else float(c.tails[r]) for c, r in pair))  # fmt: skip

    cost, lost = both(ranks.get("a"), ranks.get("b"))
    assert cost <= share * whole * (1 + 1e-9)
    for a in (None, *range(1, 7)):
        for b in (None, *range(1, 6)):
            other, loses = both(a, b)
            assert other > cost - 1e-9 or loses >= lost - 1e-9


@pytest.mark.parametrize("name", ["mlp", "bert", "llama"])
@pytest.mark.parametrize("budget", [0.9, 0.6])
def test_a_budget_is_kept(name, budget):
    program = canonical(name)
    able = parse_pass(f"lowrank{{budget={budget}}}")
    result = able(program, Context.for_program(program, calibration=data(program)))
    shared = {p.weight for p in products(program)} & {p.weight for p in products(result.program)}
    assert weights(result.program) < weights(program)
    fixed = sum(program.tensor(n).numel() for n in shared if "head" in n)
    assert weights(result.program) - fixed <= budget * (weights(program) - fixed) + 1e-6


def test_by_budget_drifts_less_than_one_ratio_for_all():
    """An important product keeps its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(),
                          nn.Linear(24, 8))  # fmt: skip
    model[2].weight.data *= 0.01
    program = Pipeline.parse("canonicalize").run(custom(model, input=torch.randn(3, 24))).program
    drifts = [run(f"lowrank{{{how}}}", program).record.drift for how in ("budget=0.7", "ratio=0.7")]
    assert drifts[0].relative < drifts[1].relative


def test_max_drift_is_the_least_budget_within_it():
    program = canonical("bert")
    ctx = Context.for_program(program, calibration=data(program))
    found = parse_pass("lowrank{max_drift=0.2}")(program, ctx)
    assert 0 < found.record.drift.relative <= 0.2
    looser = parse_pass("lowrank{max_drift=0.4}")(program, ctx)
    assert looser.record.parameters <= found.record.parameters
    with pytest.raises(BudgetError, match="no cut"):
        parse_pass("lowrank{max_drift=1e-9}")(program, ctx)


@pytest.mark.parametrize("method", ["plain", "diagonal", "whitened", "fisher"])
def test_every_method_cuts_to_its_ratio(method):
    program = canonical("bert")
    result = run(f"lowrank{{ratio=0.5,method={method}}}", program)
    assert result.modified and weights(result.program) < weights(program)


@pytest.mark.parametrize("cut", ["budget=0.6", "ratio=0.6", "rank=3", "max_drift=0.95"])
def test_without_calibration_data_the_notes_say_what_stood_for_it(cut):
    notes = parse_pass(f"lowrank{{{cut}}}")(canonical("mlp")).record.notes
    assert any("random inputs" in note for note in notes)
    assert any("fisher metric, of the data" in note for note in notes)


def test_what_becomes_no_smaller_is_told_with_what_would():
    program = Pipeline.parse("canonicalize").run(custom(nn.Linear(8, 8), input=torch.randn(3, 8)))
    program = program.program
    (note,) = (note for note in run("lowrank{rank=8}", program).record.notes if "smaller" in note)
    assert "left 1 weight alone: at rank=8" in note and "rank=3 is the largest that" in note
    assert run("lowrank{rank=3}", program).modified
    assert run("lowrank{rank=4}", program).modified == 0
    notes = run("lowrank{ratio=1}", program).record.notes
    assert any("a lower ratio would" in note for note in notes)


def test_energy_says_that_it_is_of_the_weights_alone():
    notes = run("lowrank{energy=0.5}", canonical("mlp")).record.notes
    assert any("plain metric, of the weights alone" in note for note in notes)


def test_too_much_drift_leads_to_the_search_for_the_drift():
    program = canonical("bert")
    with pytest.raises(BudgetError) as caught:
        run("lowrank{ratio=0.3,select=product}", program, max_drift=0.2)
    assert "--sensitivity" not in caught.value.fix
    asked = caught.value.fix.partition("let ")[2].partition(" look")[0]
    assert asked == "lowrank{max_drift=0.2,select=product}"
    assert run(asked, program, max_drift=0.2).record.drift.relative <= 0.2


@pytest.mark.parametrize("spec", ["lowrank{budget=0.5}", "lowrank{ratio=0.5}"])
def test_products_that_read_each_other_are_both_factored(spec):
    """The second one's input is another node by the time it is factored."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    program = Pipeline.parse("canonicalize").run(custom(model, input=torch.randn(3, 24))).program
    assert len(list(products(run(spec, program).program))) > 2


def test_a_rank_beyond_the_full_one_is_refused_with_the_largest():
    program = canonical("mlp")
    most = min(min(program.tensor(p.weight).shape) for p in products(program))
    with pytest.raises(PreconditionError, match="rank exceeds") as caught:
        run(f"lowrank{{rank={most + 1}}}", program)
    assert f"rank <= {most}" in caught.value.fix


def test_full_budget_changes_nothing():
    assert run("lowrank{budget=1.0}", canonical("mlp")).modified == 0


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("lowrank{budget=0}", "budget"), ("lowrank{budget=0.5,ratio=0.5}", "one of"),
        ("lowrank{max_drift=0}", "max_drift"), ("lowrank{damping=0}", "damping"),
        ("lowrank{budget=0.5,method=plain}", "compare"), ("lowrank{rank=0}", "rank"),
        ("lowrank{ratio=0.7,of=bytes}", "budget=0.7,of=bytes"),
        ("lowrank{rank=4,of=bytes}", "what a budget counts"),
        ("lowrank{of=operations}", "leave of out"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(spec, word):
    with pytest.raises(UsageError, match=word) as caught:
        parse_pass(spec)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("spec", "fix"),
    [
        ("lowrank{budget=80}", "lowrank{budget=0.8}"),
        ("lowrank{max_drift=20,select=ffn}", "lowrank{max_drift=0.2,select=ffn}"),
        ("lowrank{ratio=55}", "lowrank{ratio=0.55}"),
        ("lowrank{energy=99}", "lowrank{energy=0.99}"),
        ("lowrank{energy=-3}", "lowrank{energy=0.9}"),
        ("lowrank{energy=2}", "lowrank{energy=0.9}"),
        ("lowrank{budget=150}", "lowrank{budget=0.8}"),
        ("lora{dropout=10}", "lora{dropout=0.1}"),
        ("int8{max_drift=2}", "int8{max_drift=0.02}"),
    ],
)
def test_a_percentage_leads_to_the_share_that_was_meant(spec, fix):
    with pytest.raises(UsageError, match="lies in") as caught:
        parse_pass(spec)
    assert caught.value.fix == fix
    parse_pass(fix)


@pytest.mark.parametrize("of", ["params", "bytes", "operations"])
def test_a_budget_below_rank_one_is_refused_before_anything_is_measured(of, monkeypatch):
    """And the least that it names can be met, to the thousandth that it is rounded to."""
    program = canonical("mlp")
    with monkeypatch.context() as patch:
        patch.setattr(lowrank, "Measure", None)
        with pytest.raises(PreconditionError, match="cannot be met") as caught:
            run(f"lowrank{{budget=0.01,of={of}}}", program)
    least, _, _ = caught.value.fix.partition(" or more")
    assert run(f"lowrank{{{least},of={of}}}", program).modified
    less = float(least.partition("=")[2]) - 0.001
    with pytest.raises(PreconditionError, match="cannot be met"):
        run(f"lowrank{{budget={less},of={of}}}", program)


def test_biases_without_calibration_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(lowrank, "Measure", None)
    with pytest.raises(PreconditionError, match="biases are corrected on calibration data"):
        parse_pass("lowrank{budget=0.5,correct_bias=true}")(canonical("mlp"))


def test_a_size_knows_the_ranks_that_make_it_smaller():
    assert Size((6, 8)).largest == 3 and Size((6, 8), most=2).largest == 2
    assert Size((1, 9)).largest == 0 and Size((1, 9)).least == Size((1, 9)).dense == 9
    check_budget([Size((6, 8)), Size((1, 9))], (14 + 9) / (48 + 9))
    with pytest.raises(PreconditionError, match="wherever factors are no slower keeps 1") as caught:
        check_budget([Size((6, 8), most=0)], 0.9)
    assert caught.value.fix.startswith("of=bytes")


def test_factors_train_and_compose_with_int8():
    program = canonical("llama")
    cut = run("lowrank{budget=0.7}", program).program
    both = Pipeline.parse("int8{min_size=0}").run(cut, Context.for_program(cut)).program
    assert any(name.endswith(".A.quantized") for name, _ in both.tensors())
    assert measure_drift(cut, both, program.signature.probe(seed=3)).relative < 0.2


def test_lowrank_twice_measures_thin_products_whose_value_another_reads() -> None:
    program = tiny("bert")
    once = Pipeline.parse("lowrank{ratio=0.9}").run(program).program
    twice = Pipeline.parse("lowrank{budget=0.8}").run(once)
    assert twice.records[-1].modified


def test_without_calibration_the_drift_is_that_of_other_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10)).eval()
    dims = {"input": {0: "batch"}}
    program = capture_module(model, {"input": torch.randn(2, 64)}, dynamic=dims)
    done = Pipeline.parse("lowrank{budget=0.5}").run(program)
    x = {"input": torch.randn(500, 64)}
    seen = measure_drift(program, done.program, x).relative
    assert done.drift is not None and seen < 1.5 * done.drift.relative


def test_a_selection_with_nothing_to_factor_is_told() -> None:
    done = Pipeline.parse("lowrank{budget=0.8,select=norm}").run(tiny("bert"))
    assert any("nothing that was selected" in note for note in done.records[-1].notes)
