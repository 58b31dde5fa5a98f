"""Rotate: outliers are spread over their neighbours, exactly, where that pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.capture import capture_module
from ftc.graph.drift import measure_drift
from ftc.graph.errors import OrderError, UsageError
from ftc.graph.program import Program
from ftc.graph.quantize import Scheme, choose_qparams, dequantize, is_reduced, quantize
from ftc.passes.base import Context
from ftc.passes.pipeline import Pipeline
from ftc.passes.rotate import BLOCK, find_sites, hadamard, turn
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession


class Tied(nn.Module):
    """A table that is the head too; behind the norm one channel is large, which smooth fixes
    only before products that it can reach, so not before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(96, 64), nn.LayerNorm(64)
        self.middle = nn.Linear(64, 64)
        with torch.no_grad():
            self.norm.weight[5] = 60.0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.middle(self.table(ids))))
        return nn.functional.linear(x, self.table.weight)


@pytest.fixture(scope="module")
def tied() -> Program:
    torch.manual_seed(0)
    dims = {"ids": {0: "batch", 1: "sequence"}}
    return capture_module(Tied().eval(), {"ids": torch.arange(6).view(2, 3)}, dynamic=dims)


def run(program: Program, spec: str) -> Any:
    return Pipeline.parse(spec).run(program, Context.for_program(program))


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_matrix_is_its_own_inverse(size: int) -> None:
    matrix = hadamard(size)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))


def test_an_outlier_is_shared_by_its_block() -> None:
    row = torch.zeros(1, 48)
    row[0, 20] = 16.0
    turned = turn(row, hadamard(BLOCK))
    assert turned.abs().max() == 4.0
    assert torch.equal(turned.nonzero()[:, 1], torch.arange(16, 32))
    assert turned.norm() == row.norm()


@pytest.mark.parametrize("gain", [0.4, 1.0])
def test_outputs_stay_and_a_tied_table_stays_one(tied: Program, gain: float) -> None:
    done = run(tied, f"rotate{{gain={gain}}}")
    assert done.drift.relative < 1e-5
    assert done.records[-1].modified > 0
    names = [name for name, _ in done.program.tensors()]
    assert sum("table" in name or "lm_head" in name for name in names) == 1


def test_it_rotates_where_it_pays_and_nowhere_else(tied: Program) -> None:
    (note,) = run(tied, "rotate").records[-1].notes[-1:]
    assert "rotated the inputs of 1 product by" in note and "table.weight" in note
    assert run(tied, "rotate{gain=none}").records[-1].modified == 0


def test_int8_gains_from_it(tied: Program) -> None:
    probe = tied.signature.probe(seed=7, batch=4, sequence=9)
    errors = [
        measure_drift(tied, run(tied, spec).program, probe).relative
        for spec in ("int8{min_size=1}", "rotate{gain=none},int8{min_size=1}")
    ]
    assert errors[0] < 0.7 * errors[1]


def test_a_rotated_program_is_lowered_faithfully(tied: Program) -> None:
    program = run(tied, "rotate{gain=1},int8{min_size=1}").program
    probes = [tied.signature.probe(seed=n, batch=n, sequence=n + 1) for n in (1, 3)]
    for dialect in ("onnxruntime", "standard"):
        session = OnnxSession(lower(program, dialect))  # type: ignore[arg-type]
        assert parity(program, session, probes).relative < 1e-4


def test_a_width_that_is_no_multiple_of_the_block_is_left() -> None:
    torch.manual_seed(0)
    program = capture_module(nn.Linear(24, 8), {"input": torch.randn(3, 24)})
    assert not list(find_sites(run(program, "canonicalize").program))


def test_options_and_order_are_checked(tied: Program) -> None:
    with pytest.raises(UsageError, match="gain lies in"):
        Pipeline.parse("rotate{gain=1.5}")
    with pytest.raises(UsageError, match="min_size"):
        Pipeline.parse("int8{min_size=-5}")
    with pytest.raises(OrderError):
        run(tied, "int8,rotate")


def test_weights_alone_need_no_preparation_of_activations(tied: Program) -> None:
    names = [[each.name for each, _ in Pipeline.parse(spec).plan(tied)] for spec in
             ("int8", "int8{activation=none}")]  # fmt: skip
    assert {"smooth", "rotate"} <= set(names[0])
    assert not {"smooth", "rotate"} & set(names[1])


@pytest.mark.parametrize("width", [7, 64])
def test_a_reduced_range_holds_for_pairs_and_is_finer_than_64_codes(width: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(300, width)
    scheme = Scheme(reduce_range=True)
    scale, zero = choose_qparams(weight, scheme)
    codes = quantize(weight, scale, zero, scheme)
    assert is_reduced(codes) and int(codes.abs().max()) > 64
    assert (dequantize(codes, scale, zero) - weight).abs().le(scale * 0.5001).all()
    assert scale.squeeze(1).lt(weight.abs().amax(1) / 64).float().mean() > 0.9
    assert not is_reduced(quantize(weight, *choose_qparams(weight, Scheme()), Scheme()))


def test_what_a_zero_keeps_apart_is_not_mixed() -> None:
    """A channel that is always 0, with weights 400 times the others: sums would lose digits."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight[:, 3] = 60.0
    given = {"input": torch.randn(16, 64).index_fill(1, torch.tensor([3]), 0.0)}
    program = capture_module(layer, {"input": torch.randn(4, 64)})
    context = Context(probes=(given,), probe_source="one channel asleep")
    assert Pipeline.parse("rotate{gain=1}").run(program, context).records[-1].modified == 0
