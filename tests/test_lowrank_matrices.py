"""lowrank beyond one product: convolutions, tables, and tables tied to a head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.drift import measure_drift
from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.fisher import moments
from ftc.graph.matrices import (
    Matrix,
    input_level,
    input_rows,
    is_convolution,
    matrices,
    output_rows,
    source,
)
from ftc.graph.observe import values
from ftc.graph.program import Program
from ftc.graph.rewriter import Rewriter
from ftc.graph.spectrum import spectrum
from ftc.passes.base import Context, PassResult
from ftc.passes.factors import factor
from ftc.passes.lowrank_correct import corrected_biases
from ftc.passes.pipeline import Pipeline
from ftc.passes.text import parse_pass
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.tiny import custom, tiny


class Convolutions(nn.Module):
    """Of one, two and three dimensions, strided, dilated, padded, one in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 12, 5, stride=2, padding=1)
        self.plane = nn.Conv2d(12, 8, (3, 2), dilation=2, bias=False)
        self.same = nn.Conv2d(8, 8, 3, padding="same")
        self.groups = nn.Conv2d(8, 8, 3, groups=2)
        self.space = nn.Conv3d(2, 10, 2)
        self.out = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.line(x)).unflatten(2, (12, 12))
        x = torch.relu(self.groups(self.same(self.plane(x))))
        return self.out(self.space(x.unflatten(1, (2, 4))).mean((2, 3, 4)))


def convolutions() -> Program:
    torch.manual_seed(0)
    model = Convolutions().eval()
    return Pipeline.parse("canonicalize").run(custom(model, x=torch.randn(2, 3, 289))).program


def canonical(name: str) -> Program:
    return Pipeline.parse("canonicalize").run(tiny(name)).program


def able(program: Program) -> list[Matrix]:
    return [each for each in matrices(program) if isinstance(each, Matrix)]


def run(spec: str, program: Program) -> PassResult:
    data = tuple(program.signature.probe(seed=50 + run, batch=8) for run in range(2))
    return parse_pass(spec)(program, Context.for_program(program, calibration=data))


def test_a_convolution_is_a_product_of_its_patches():
    program = convolutions()
    given = program.signature.probe(seed=1)
    found = [each for each in able(program) if is_convolution(each.node)]
    assert [each.weight for each in found] == [
        "line.weight", "plane.weight", "same.weight", "space.weight",
    ]  # fmt: skip
    for matrix in found:
        node = matrix.node
        seen = values(program, given, [node.args[0], node])
        rows = input_rows(node, seen[node.args[0]])
        made = rows @ matrix.of(program).T
        if len(node.args) > 2 and node.args[2] is not None:
            made += program.tensor(str(node.args[2].target)).detach()
        torch.testing.assert_close(made, output_rows(node, seen[node]), rtol=1e-4, atol=1e-5)
        level = input_level(node, seen[node.args[0]])
        assert level == pytest.approx(float(rows.square().mean()), rel=1e-4)


def test_moments_of_a_convolutions_outputs_are_those_of_its_patches():
    program = convolutions()
    nodes = {each.node: each for each in able(program)}
    given = [program.signature.probe(seed=1)]
    whole = moments(program, given, nodes)
    thin = moments(program, given, nodes, by_outputs=nodes)
    for node, matrix in nodes.items():
        weight, gram = matrix.of(program), whole.inputs[source(node)]
        torch.testing.assert_close(thin.outputs[node], weight @ gram @ weight.T,
                                   rtol=1e-3, atol=1e-5)  # fmt: skip
        assert len(whole.gradients[node]) == len(weight)


@pytest.mark.parametrize("make", [convolutions, lambda: canonical("llama")])
def test_at_full_rank_every_factored_weight_is_itself(make):
    program = make()
    rw = Rewriter(program.clone(), "test")
    for matrix in able(rw.program):
        weight = matrix.of(rw.program)
        factor(rw, matrix, *spectrum(weight).factors(min(weight.shape)))
    rw.finish()
    drift = measure_drift(program, rw.program, program.signature.probe(seed=2))
    assert drift.relative < 1e-5


def test_a_budget_counts_convolutions_and_onnx_runs_their_factors():
    program = convolutions()
    cut = run("lowrank{budget=0.6}", program).program
    counted = [each.of(program).numel() for each in able(program)]
    whole = sum(tensor.numel() for _, tensor in program.tensors())
    left = sum(tensor.numel() for _, tensor in cut.tensors())
    assert whole - left >= 0.4 * sum(counted)
    assert any(tensor.dim() == 4 for name, tensor in cut.tensors() if name.endswith(".A"))
    assert parity(cut, OnnxSession(lower(cut)), [cut.signature.probe(seed=3)]).relative < 1e-4


def test_a_tied_table_is_factored_once_where_it_is_selected(tmp_path: Path):
    program = canonical("llama")
    (tied,) = program.ties
    left = run("lowrank{ratio=0.5}", program).program
    assert left.ties == program.ties and tied & {name for name, _ in left.tensors()}
    cut = run("lowrank{ratio=0.5,select=embedding}", program).program
    factors = {name for name, _ in cut.tensors() if name.endswith((".A", ".B"))}
    assert sorted(name.rsplit("weight", 1)[1] for name in factors) == [".A", ".B"]
    assert set(cut.ties) == {frozenset(f"{name}.{part}" for name in tied) for part in "AB"}
    for name in factors:  # the gather and the head
        (reader,) = (n for n in cut.graph.nodes if n.op == "get_attr" and n.target == name)
        assert len(reader.users) == 2
    save_bundle(cut, tmp_path / "bundle")
    given = cut.signature.probe(seed=3)
    back = load_bundle(tmp_path / "bundle")
    torch.testing.assert_close(back(given)["logits"], cut(given)["logits"])
    assert parity(cut, OnnxSession(lower(cut)), [given]).relative < 1e-4


def test_a_table_keeps_what_is_read_often_and_matters():
    """Beside plain SVD, at one rank: of data that use half of the rows and columns."""
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 16)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table(input_ids)[..., :8].sum(1)

    ids = torch.randint(0, 20, (8, 6))
    program = Pipeline.parse("canonicalize").run(custom(Reader(), input_ids=ids)).program
    ctx = Context.for_program(program, calibration=({"input_ids": ids},))
    drifts = []
    for method in ("plain", "fisher"):
        spec = f"lowrank{{ratio=0.5,select=embedding,method={method}}}"
        cut = parse_pass(spec)(program, ctx).program
        drifts.append(measure_drift(program, cut, {"input_ids": ids}).relative)
    assert drifts[1] < 0.8 * drifts[0]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_corrected_biases_bring_the_outputs_closer(name):
    """On the data that they are corrected on; products without a bias get one."""
    program = canonical(name)
    data = tuple(program.signature.probe(seed=50 + run, batch=8) for run in range(4))
    ctx = Context.for_program(program, calibration=data)
    plain, better = (parse_pass(f"lowrank{{ratio=0.5,correct_bias={flag}}}")(program, ctx).program
                     for flag in ("false", "true"))  # fmt: skip
    drifts = [measure_drift(program, cut, data).relative for cut in (plain, better)]
    assert drifts[1] < drifts[0]
    factors = {n: t for n, t in plain.tensors() if n.endswith((".A", ".B"))}
    found = dict(better.tensors())
    assert factors and all(torch.equal(tensor, found[n]) for n, tensor in factors.items())


def test_a_bias_follows_tables_and_convolutions():
    """A product behind them has the mean that it had, though it is alone in being corrected."""
    program = convolutions()
    data = [program.signature.probe(seed=50 + run, batch=8) for run in range(2)]
    factors = {m: spectrum(m.of(program)).factors(2) for m in able(program)}
    biases = corrected_biases(program, data, factors, 0)
    assert set(biases) == {"out.weight"}
    rw = Rewriter(program.clone(), "test")
    for matrix in able(rw.program):
        pair = next(pair for m, pair in factors.items() if m.weight == matrix.weight)
        factor(rw, matrix, *pair, biases.get(matrix.weight))
    rw.finish()
    random = [program.signature.probe(seed=0, batch=8)]  # as the pass draws it
    runs = ((given, 0.35) for given in data), ((given, 0.3) for given in random)
    shift = torch.zeros(4)
    for given, share in (each for part in runs for each in part):
        gaps = [each(given)["output"].detach().mean(0) for each in (program, rw.program)]
        shift += share * (gaps[0] - gaps[1])
    assert float(shift.abs().max()) < 1e-5


def test_what_cannot_be_corrected_is_refused():
    with pytest.raises(UsageError, match="does not correct"):
        parse_pass("lowrank{max_drift=0.1,correct_bias=true}")
    with pytest.raises(PreconditionError, match="calibration"):
        parse_pass("lowrank{ratio=0.5,correct_bias=true}")(canonical("mlp"))


def test_int8_after_it_quantizes_the_factors_of_a_tied_table():
    cut = run("lowrank{ratio=0.5,select=embedding}", canonical("llama")).program
    both = Pipeline.parse("int8{min_size=0}").run(cut, Context.for_program(cut)).program
    assert any(name.endswith("weight.B.quantized") for name, _ in both.tensors())
    assert measure_drift(cut, both, cut.signature.probe(seed=3)).relative < 0.2
