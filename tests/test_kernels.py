"""Kernels: measured and remembered, chosen by ``int8``, lowered, and right."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ftc.graph.capture import capture_module
from ftc.graph.cost import argument, operator_name
from ftc.graph.errors import UsageError
from ftc.graph.program import Program
from ftc.graph.quantize import is_reduced
from ftc.graph.signature import Signature
from ftc.graph.target import KERNELS, CostTable, Point, target, with_table
from ftc.passes.base import Context
from ftc.passes.pipeline import Pipeline
from ftc.runtime import kernels
from ftc.runtime.assigned import assigned
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.runtime.shape_ranges import parse_ranges
from ftc.tests.tiny import tiny


class Tied(nn.Module):
    """A table of 96 rows that is also the head, a product between, and one of odd width."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(96, 64), nn.Linear(64, 64)
        self.odd_in, self.odd_out = nn.Linear(64, 50), nn.Linear(50, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.middle(self.table(ids)))
        return nn.functional.linear(x + self.odd_out(self.odd_in(x)), self.table.weight)


@pytest.fixture(scope="module")
def tied() -> Program:
    torch.manual_seed(0)
    dims = {"ids": {0: "batch", 1: "sequence"}}
    return capture_module(Tied().eval(), {"ids": torch.arange(6).view(2, 3)}, dynamic=dims)


def compiled(program: Program, spec: str, **fields: Any) -> tuple[Program, list[str]]:
    done = Pipeline.parse(spec).run(program, Context.for_program(program, **fields))
    return done.program, [note for record in done.records for note in record.notes]


def seen(program: Program) -> list[dict[str, Tensor]]:
    """Calibration data."""
    return [program.signature.probe(seed=seed, batch=4, sequence=16) for seed in (5, 6)]


def got(program: Program) -> dict[str, str | None]:
    return {each.weight: each.kernel for each in assigned(program, target("portable"), ())}


def agree(program: Program) -> float:
    dims = program.signature.dims
    probes = [program.signature.probe(seed=1, **dict.fromkeys(dims, n)) for n in (1, 3, 8)]
    return parity(program, OnnxSession(lower(program)), probes).relative


def test_measuring_gives_a_table_for_every_kernel() -> None:
    table = kernels.measure_table(rows=(1, 4), shapes=((32, 32), (64, 128)), seconds=0.0)
    assert table.measured
    for kernel in KERNELS:
        assert [point.rows for point in table.points[kernel]] == [1, 4]
        assert 0 < table.seconds(kernel, 1, 48, 48) <= table.seconds(kernel, 4, 48, 48)


def test_a_line_is_recovered_and_never_negative() -> None:
    assert kernels.line([(n, 3e-6 + 2e-9 * n) for n in (100, 1000, 5000)]) == pytest.approx(
        (3e-6, 2e-9)
    )
    for samples in ([(100, 3e-6), (1000, 1e-6)], [(100, 1e-7), (1000, 3e-6)]):
        fixed, slope = kernels.line(samples)
        assert fixed >= 0 <= slope


def test_a_table_is_remembered_and_a_broken_file_is_none(tmp_path: Path) -> None:
    table = CostTable("x", True, {"float": (Point(1, 1e-6, 1e-9),)})
    assert kernels.remembered(tmp_path) is None
    path = kernels.remember(table, tmp_path)
    assert kernels.remembered(tmp_path) == table
    path.write_text("[1, 2")
    assert kernels.remembered(tmp_path) is None
    path.write_text("[1, 2]")
    assert kernels.remembered(tmp_path) is None


def test_this_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    table, asked = CostTable("x", True, {"float": (Point(1, 1e-6, 1e-9),)}), []
    held: list[CostTable] = []
    monkeypatch.setattr(kernels, "measure_table", lambda **_: asked.append(1) or table)
    monkeypatch.setattr(kernels, "remember", held.append)
    monkeypatch.setattr(kernels, "remembered", lambda: held[0] if held else None)
    assert kernels.resolve("native").table is table
    assert kernels.resolve("native").table is table
    assert len(asked) == 1
    kernels.resolve("native", measure=True)
    assert len(asked) == 2


def test_another_machine_cannot_be_measured() -> None:
    with pytest.raises(UsageError, match="only this machine"):
        kernels.resolve("avx2", measure=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_to_be_timed_computes_a_product(kernel: Any) -> None:
    run = kernels.one_product(kernel, 64, 96)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    y = run(x)
    assert y.shape == (5, 96)
    offset = run(np.zeros_like(x))
    assert np.allclose(run(2 * x) - offset, 2 * (y - offset), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("kernel", "activation"),
    [*product(["auto", "integer", "float"], ["row", "tensor", "static"]), ("blocked", "row")],
)
def test_every_kernel_is_lowered_faithfully(tied: Program, kernel: str, activation: str) -> None:
    spec = f"int8{{kernel={kernel},activation={activation},min_size=1}}"
    program, _ = compiled(tied, spec, calibration=seen(tied))
    assert agree(program) < 1e-4


def test_the_kernel_that_is_asked_for_is_what_products_get(tied: Program) -> None:
    program, notes = compiled(tied, "int8{kernel=blocked,min_size=1}")
    assert set(got(program).values()) == {"blocked", "integer"}
    assert got(program)["odd_out.weight"] == "integer"
    assert any("no whole groups of 32" in note for note in notes)
    assert set(got(compiled(tied, "int8{kernel=float}")[0]).values()) == {"float"}


def test_blocks_are_closer_than_channels(tied: Program) -> None:
    errors = {}
    for kernel in ("integer", "blocked"):
        program, _ = compiled(tied, f"int8{{kernel={kernel},min_size=1}}")
        errors[kernel] = program.history[-1].drift.relative  # type: ignore[union-attr]
    assert errors["blocked"] < errors["integer"]


@pytest.mark.parametrize(
    "spec", ["int8{kernel=blocked,min_size=1}", "int8{activation=static,min_size=1}",
             "int4{min_size=1}"],
)  # fmt: skip
def test_the_standard_dialect_computes_the_same(tied: Program, spec: str) -> None:
    program, _ = compiled(tied, spec, calibration=seen(tied) if "static" in spec else None)
    files = [lower(program, dialect) for dialect in ("onnxruntime", "standard")]
    domains = [{node.domain for node in file.graph} for file in files]
    assert domains == [{"", "com.microsoft"}, {""}]
    probe = program.signature.probe(seed=1)
    fast, plain = (next(iter(OnnxSession(file)(probe).values())) for file in files)
    assert torch.allclose(fast, plain, atol=1e-4)


def test_a_tied_table_in_blocks_is_stored_once(tied: Program) -> None:
    program, _ = compiled(tied, "int8{kernel=blocked,min_size=1}")
    held = sum(t.numel() * t.element_size() for _, t in program.tensors())
    stored = sum(v.const_value.nbytes for v in lower(program).graph.initializers.values())
    assert held <= stored < held + 1500


def test_shapes_and_costs_decide(tied: Program) -> None:
    """Blocked is made up to be the faster below 8 rows; the head sees all of them."""
    points = {
        "integer": (Point(1, 2.0, 0.0), Point(8, 2.0, 0.0)),
        "blocked": (Point(1, 1.0, 0.0), Point(8, 4.0, 0.0)),
        "float": (Point(1, 9.0, 0.0), Point(8, 9.0, 0.0)),
    }
    machine = with_table(target("portable"), CostTable("made up", False, points))
    for rows, kernel in ((1, "blocked"), (8, "integer")):
        shapes = ({"batch": 1, "sequence": rows},)
        program, notes = compiled(tied, "int8{min_size=1}", target=machine, shapes=shapes)
        assert got(program)["middle.weight"] == kernel
        assert any("fastest on portable" in note and "made up" in note for note in notes)
    found = assigned(program, machine, shapes)
    assert next(e for e in found if e.weight == "middle.weight").speed == (4.5,)


def test_float_is_kept_where_quantizing_does_not_pay(tied: Program) -> None:
    points = {k: (Point(1, s, 0.0),) for k, s in (("integer", 2.0), ("float", 1.0))}
    machine = with_table(target("portable"), CostTable("made up", False, points))
    shapes = ({"batch": 1, "sequence": 1},)
    program, notes = compiled(tied, "int8{min_size=1}", target=machine, shapes=shapes)
    assert set(got(program).values()) == {"float"}
    assert any("does not pay" in note for note in notes)


def reduced(program: Program) -> bool:
    """Whether no pair of any integer product's codes can saturate 16 bits."""
    nodes = [n for n in program.graph.nodes if operator_name(n) == "ftc.quantized_linear"]
    return all(is_reduced(program.tensor(str(argument(n, "data").target))) for n in nodes)


@pytest.mark.parametrize(
    ("name", "option", "bits"),
    [("portable", "", 7), ("avx2", "", 7), ("avx512-vnni", "", 8), ("arm-dotprod", "", 8),
     ("portable", ",reduce_range=false", 8), ("avx512-vnni", ",reduce_range=true", 7)],
)  # fmt: skip
def test_bits_follow_the_target(tied: Program, name: str, option: str, bits: int) -> None:
    program, notes = compiled(
        tied, f"int8{{kernel=integer,min_size=1{option}}}", target=target(name)
    )
    assert reduced(program) == (bits == 7)
    warned = any(f"which target {name} allows for" in note for note in notes)
    assert warned == (option == ",reduce_range=false")


def test_a_table_alone_uses_all_bits() -> None:
    program, _ = compiled(tiny("bert"), "int8{min_size=1}")
    codes = program.tensor("embeddings.word_embeddings.weight.quantized")
    assert int(codes.abs().max()) == 127


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="quantizes activations"):
        Pipeline.parse("int8{activation=none,kernel=blocked}")


def signature() -> Signature:
    return tiny("bert").signature


def test_ranges_stand_for_their_corners() -> None:
    assert parse_ranges(None, signature()) == ()
    assert parse_ranges("batch=1:8,sequence=1:16", signature()) == tuple(
        {"batch": b, "sequence": s} for b in (1, 8) for s in (1, 16)
    )
    assert parse_ranges("batch=3,sequence=4:4", signature()) == ({"batch": 3, "sequence": 4},)


@pytest.mark.parametrize("bad", ["batch", "batch=8:1", "batch=1,batch=2", "seq=1", "batch=-1", ""])
def test_what_is_no_range_is_refused(bad: str) -> None:
    with pytest.raises(UsageError):
        parse_ranges(bad, signature())
