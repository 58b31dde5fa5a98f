"""Schemes of 8 bits: ranges, one scale for all, groups; each lowered as it is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.quantize import Scheme, choose_qparams, dequantize, is_reduced, quantize
from ftc.passes.base import Context
from ftc.passes.context import random_probes
from ftc.passes.pipeline import Pipeline
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.tiny import tiny

SCHEMES = st.builds(
    Scheme,
    bits=st.just(8),
    group_size=st.just(0),
    symmetric=st.booleans(),
    reduce_range=st.booleans(),
    per_tensor=st.booleans(),
)


def weights(seed: int, shift: float) -> Tensor:
    """Rows of very different sizes, off centre."""
    torch.manual_seed(seed)
    return torch.randn(6, 10) * torch.logspace(-2, 1, 6).unsqueeze(1) + shift


@given(scheme=SCHEMES, seed=st.integers(0, 99), shift=st.floats(-3, 3))
def test_every_scheme_is_within_half_a_step(scheme: Scheme, seed: int, shift: float) -> None:
    weight = weights(seed, shift)
    scale, zero = choose_qparams(weight, scheme)
    codes = quantize(weight, scale, zero, scheme)
    assert scale.shape == (6, 1) and (zero is None) == scheme.symmetric
    assert not scheme.per_tensor or len(scale.unique()) == 1
    assert not scheme.reduce_range or is_reduced(codes)
    error = (dequantize(codes, scale, zero) - weight).abs()
    slack = 1.0 if scheme.symmetric else 2.0  # a zero point is rounded too
    assert bool((error <= scale * (slack / 2 + 1e-4)).all())


def test_a_range_is_finer_than_a_peak_off_centre() -> None:
    weight = weights(0, 3.0).abs()
    errors = {}
    for symmetric in (True, False):
        scheme = Scheme(symmetric=symmetric)
        scale, zero = choose_qparams(weight, scheme)
        errors[symmetric] = (dequantize(quantize(weight, scale, zero, scheme), scale, zero)
                             - weight).norm()  # fmt: skip
    assert errors[False] < errors[True] * 0.7


SPECS = [
    "int8{min_size=0,symmetric=false}",
    "int8{min_size=0,per_tensor=true}",
    "int8{min_size=0,symmetric=false,per_tensor=true,activation=tensor}",
    "int8{min_size=0,symmetric=false,activation=none}",
    "int8{min_size=0,kernel=blocked,group_size=16}",
    "int8{min_size=0,kernel=blocked,group_size=16,symmetric=false}",
]


def quantized(spec: str, model: str) -> Program:
    program = tiny(model)
    done: Program = Pipeline.parse(spec).run(program, Context.for_program(program)).program
    return done


@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
@pytest.mark.parametrize("spec", SPECS)
def test_schemes_run_as_they_are_computed(spec: str, dialect: Any) -> None:
    after = quantized(spec, "bert")
    parity(after, OnnxSession(lower(after, dialect)), random_probes(after))


@pytest.mark.parametrize("spec", SPECS)
def test_zero_points_are_where_the_scheme_has_them(spec: str) -> None:
    after = quantized(spec, "bert")
    named = [name for name, _ in after.tensors() if name.endswith(".zero_point")]
    assert bool(named) == ("symmetric=false" in spec)


def test_wrong_schemes_are_refused() -> None:
    with pytest.raises(UsageError, match="groups are 16, 32"):
        Pipeline.parse("int8{group_size=20}")
    with pytest.raises(UsageError, match="a scale for each group"):
        Pipeline.parse("int8{per_tensor=true,kernel=blocked}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("kernel=blocked,activation=static", "each group"),
        ("kernel=blocked,reduce_range=false", "integer products"),
        ("kernel=integer,group_size=64", "blocked products"),
    ],
)
def test_options_that_do_nothing_are_refused(options: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Pipeline.parse(f"int8{{{options}}}")


@pytest.mark.parametrize("again", ["int8{min_size=0}", "int4{min_size=0,method=rtn}"])
def test_quantizing_twice_is_told(again: str) -> None:
    program, first = tiny("bert"), "int8{min_size=0}"
    from_codes = Pipeline.parse(first).run(program).program
    for done in (
        Pipeline.parse(f"{first},{again}").run(program),
        Pipeline.parse(again).run(from_codes),
    ):
        assert any("nothing was left for it after int8" in n for n in done.records[-1].notes)


def test_a_rank_that_nothing_is_large_enough_for_is_refused() -> None:
    spec = "int4{min_size=0,group_size=16,method=rtn,residual_rank=1000}"
    with pytest.raises(UsageError, match="no product is that thin") as told:
        Pipeline.parse(spec).run(tiny("bert"))
    assert "at most" in str(told.value.fix)
