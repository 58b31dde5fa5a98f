"""Merge: the adapters are gone and the outputs are what they were, or it says how far they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftc.graph.adapters import adapter_parameters, lora_adapters
from ftc.graph.errors import BudgetError, PreconditionError, UsageError
from ftc.graph.program import Program
from ftc.graph.structure import find_structure
from ftc.passes.base import Effect
from ftc.passes.merge import Merge
from ftc.passes.pipeline import Pipeline
from ftc.passes.text import parse_pass
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.test_lora import drift, randomize, run
from ftc.tests.tiny import Cnn, custom

INT8 = "int8{min_size=0,activation=none}"


def adapted(base: str, model: str, lora: str = "lora{rank=4,target=attention|ffn}") -> Program:
    return randomize(run(f"{base},{lora}", model))


@pytest.mark.parametrize("base", ["canonicalize", "lowrank{rank=3}", "lora{rank=2},merge"])
@pytest.mark.parametrize("model", ["bert", "llama", "gpt2", "albert", "xlnet"])
def test_the_merged_program_is_the_adapted_one(base: str, model: str) -> None:
    before = run(base, model)
    program = adapted(base, model)
    merged = Merge()(program).program
    assert drift(program, merged) < 1e-5 < drift(before, merged)
    assert not adapter_parameters(merged)
    assert len(list(merged.graph.nodes)) == len(list(before.graph.nodes))
    held, plain = dict(merged.tensors()), dict(before.tensors())
    assert held.keys() == plain.keys()
    biases = find_structure(before).roles["bias"]
    assert all(torch.equal(held[name], plain[name]) for name in biases)


def test_factors_take_the_adapter_in_as_rank() -> None:
    merged = Merge()(adapted("lowrank{rank=3}", "bert")).program
    for core in find_structure(merged).cores:
        for node in (*core.q, *core.k, *core.v, *core.out):
            assert merged.tensor(str(node.args[1].target)).shape[1] == 3 + 4


def test_pissa_and_back_is_the_weight() -> None:
    """An adapter that starts as a part of the weight, merged at once, is the weight again."""
    before = run("canonicalize", "bert")
    after = run("lora{init=pissa,rank=3},merge", "bert")
    for name, tensor in before.tensors():
        torch.testing.assert_close(after.tensor(name), tensor)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_tied_head_is_stored_apart_and_the_table_keeps_its_values(model: str) -> None:
    before = run("canonicalize", model)
    program = adapted("canonicalize", model, "lora{target=head}")
    result = Merge()(program)
    merged = result.program
    assert before.ties and not merged.ties
    assert drift(program, merged) < 1e-5 < drift(before, merged)
    (table,) = (
        str(n.args[0].target)
        for n in merged.graph.nodes
        if n.target is torch.ops.aten.embedding.default
        and merged.tensor(str(n.args[0].target)).shape[0] == 50
    )
    (tie,) = before.ties
    (read,) = tie & {name for name, _ in before.tensors()}
    assert torch.equal(merged.tensor(table), before.tensor(read))
    assert table in tie and "head" not in table
    assert any("apart" in note for note in result.record.notes)


def test_a_weight_that_something_else_reads_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.w) * self.w.abs().sum()

    program = custom(Shared(), x=torch.randn(2, 6))
    program = Pipeline.parse("lora{target=product,rank=2}").run(program).program
    with pytest.raises(PreconditionError, match="reads w too"):
        Merge()(program)


def test_convolutions_merge() -> None:
    torch.manual_seed(0)
    program = custom(Cnn(), x=torch.randn(2, 3, 8, 8))
    program = randomize(Pipeline.parse("lora{target=conv,rank=2}").run(program).program)
    merged = Merge()(program).program
    assert drift(program, merged) < 1e-5
    assert not lora_adapters(merged)


# Quantized weights


@pytest.mark.parametrize("base", [INT8, "int4{min_size=0,group_size=16,activation=none}"])
def test_codes_are_rounded_again_only_when_that_is_asked_for(base: str) -> None:
    program = adapted(base, "bert")
    with pytest.raises(PreconditionError, match="changes the outputs by") as caught:
        Merge()(program)
    wanted = parse_pass(str(caught.value.fix).rsplit("with ", 1)[1])
    assert isinstance(wanted, Merge)
    result = wanted(program)
    assert result.record.effect == "approximate"
    assert result.record.drift is not None
    assert 0 < result.record.drift.relative <= wanted.max_loss
    assert not adapter_parameters(result.program)
    with pytest.raises(BudgetError, match=r"and 0\.01% is allowed"):
        Merge(max_loss=1e-4)(program)
    merged = result.program
    parity(merged, OnnxSession(lower(merged)), [merged.signature.probe(seed=1)])
    before = {n: t.dtype for n, t in program.tensors() if n.endswith(("quantized", "zero_point"))}
    assert before == {n: merged.tensor(n).dtype for n in before}


def test_codes_and_floats_merge_together() -> None:
    base = 'int8{min_size=0,activation=none,select="product & ffn"}'
    result = Merge(max_loss=0.2)(adapted(base, "bert"))
    assert {"merged the adapters of 8 weights"} <= set(result.record.notes)
    assert any("4 quantized weights" in note for note in result.record.notes)


def test_an_adapter_of_zeros_is_merged_into_codes_for_nothing() -> None:
    program = run(f"{INT8},lora", "bert")
    merged = Merge()(program).program
    assert not adapter_parameters(merged)
    assert drift(program, merged) < 1e-5


def test_a_quantized_convolution_is_rounded_again() -> None:
    torch.manual_seed(0)
    program = custom(Cnn(), x=torch.randn(2, 3, 8, 8))
    program = Pipeline.parse(f"{INT8},lora{{target=conv,rank=2}}").run(program).program
    program = randomize(program)
    merged = Merge(max_loss=0.5)(program).program
    assert 0 < drift(program, merged) < 0.1


def test_codes_with_extra_columns_become_plain() -> None:
    """Codes that keep a grid of fractional zero points: see test_lora."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    codes = torch.randint(0, 16, (48, 4, 16)).float()
    codes[..., 0], codes[..., 1] = 0, 15
    steps = torch.rand(48, 4, 1).half().float() + 0.5
    layer.weight.data = (codes * steps - torch.rand(48, 4, 1).half().float()).flatten(1)
    program = custom(nn.Sequential(layer), input=torch.randn(3, 64))
    passes = "int4{min_size=0,group_size=16,activation=none},lora{target=product}"
    program = Pipeline.parse(passes).run(program).program
    assert program.tensor("0.weight.quantized").shape[1] * 2 > 64
    merged = Merge(max_loss=0.1)(randomize(program)).program
    assert merged.tensor("0.weight.quantized").shape[1] * 2 == 64


def test_a_tied_quantized_head_is_refused() -> None:
    with pytest.raises(PreconditionError, match="reads the codes"):
        Merge()(adapted(INT8, "llama", "lora{target=head}"))


# What it says


def test_options_and_effect() -> None:
    assert Merge.effect is Merge().effect is Effect.EXACT
    assert Merge(max_loss=0.1).effect is Effect.APPROXIMATE
    assert parse_pass("merge{max_loss=0.1}") == Merge(max_loss=0.1)
    for bad in ("0", "-1", "1"):
        with pytest.raises(UsageError, match="lies in"):
            parse_pass(f"merge{{max_loss={bad}}}")


def test_nothing_to_merge_is_refused() -> None:
    assert Merge()(run("lora,merge", "bert")).record.modified == 0  # once more changes nothing
    with pytest.raises(PreconditionError, match="no low-rank adapters") as caught:
        Merge()(run("canonicalize", "bert"))
    assert "leave merge out" in str(caught.value)
    with pytest.raises(PreconditionError, match=r"others cannot.*\n.*prefix_key"):
        Merge()(run("prefix{tokens=2}", "bert"))


def test_adapters_that_were_quantized_are_refused() -> None:
    program = run('lora{target=ffn},int8{min_size=0,select="adapter | product"}', "bert")
    with pytest.raises(PreconditionError, match="not part of an adapter"):
        Merge()(program)
