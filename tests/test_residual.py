"""int4{residual_rank=…}: the rounding error comes back where inputs are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftc.graph.drift import measure_drift
from ftc.graph.errors import UsageError
from ftc.passes.base import Context
from ftc.passes.pipeline import Pipeline
from ftc.passes.residual import residual
from ftc.passes.text import parse_pass
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.tiny import custom


def model():
    """A program whose inputs lie in few directions, and calibration data of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    plane = torch.randn(6, 64)
    data = tuple({"input": torch.randn(64, 6) @ plane} for _ in range(3))
    program = Pipeline.parse("canonicalize").run(custom(net, input=torch.randn(4, 64))).program
    return program, Context.for_program(program, calibration=data, probes=data[:1]), data


def test_a_residual_in_the_metric_of_the_inputs_is_better_there_than_a_plain_one():
    _, _, data = model()
    x = data[0]["input"]
    torch.manual_seed(1)
    weight = torch.randn(128, 64)
    rounded = weight + 0.1 * torch.randn(128, 64)
    gram = x.T @ x / len(x)

    def error(found):
        return float((x @ (weight - rounded - found.weight()).T).norm())

    here, plain = residual(weight, rounded, 6, gram), residual(weight, rounded, 6, None)
    assert here is not None and plain is not None
    assert error(here) < 0.2 * error(plain)
    assert here.a.shape == (6, 64) and here.b.shape == (128, 6)
    assert residual(weight, rounded, 0, gram) is None
    assert residual(weight, rounded, 40, gram) is None  # not thin


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_it_brings_the_outputs_closer(method):
    program, ctx, data = model()
    drifts = []
    for rank in (0, 8):
        spec = f"int4{{method={method},residual_rank={rank}}}"
        done = parse_pass(spec)(program, ctx)
        drifts.append(measure_drift(program, done.program, data).relative)
    assert drifts[1] < drifts[0]
    names = {name for name, _ in done.program.tensors()}
    assert any(name.endswith("residual.A.quantized") for name in names)
    assert any("a residual of rank 8 at 2 products" in note for note in done.record.notes)


def test_it_is_lowered_like_the_rest():
    program, ctx, data = model()
    done = parse_pass("int4{residual_rank=8}")(program, ctx).program
    found = parity(done, OnnxSession(lower(done)), data[0])
    assert found.relative < 0.02


def test_ranks_that_no_product_is_large_enough_for_and_negative_ones_are_refused():
    program, ctx, _ = model()
    with pytest.raises(UsageError, match="that thin"):
        parse_pass("int4{residual_rank=60}")(program, ctx)
    with pytest.raises(UsageError, match="0 or more"):
        parse_pass("int4{residual_rank=-1}")
