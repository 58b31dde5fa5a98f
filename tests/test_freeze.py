"""Freeze: gradients reach what was chosen and nothing else, in every family of models."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.structure import ROLES, find_structure
from ftc.passes.freeze import Freeze
from ftc.passes.pipeline import Pipeline
from ftc.passes.text import parse_pass
from ftc.tests.families import FAMILIES
from ftc.tests.tiny import tiny

PLAIN = ["resnet", "cnn", "mlp"]  # no attention, no feed-forward blocks
BLOCKS = [f.name for f in FAMILIES if f.name not in (*PLAIN, "convnext")]


@functools.cache
def family(name: str) -> Program:
    found = next(f for f in FAMILIES if f.name == name)
    if not isinstance(found.model, str):
        model, examples, dynamic = found.model()
        return capture(model, examples=examples, dynamic=dynamic)
    folder = Path(tempfile.mkdtemp())
    found.save(folder)
    return capture(folder)


def trained(program: Program) -> set[str]:
    return {n for n, p in program.module.named_parameters() if p.requires_grad}


def reached(program: Program) -> set[str]:
    """Parameters with a gradient, after a loss on every output."""
    program.module.zero_grad()
    outputs = program(program.signature.probe()).values()
    sum(o.square().mean() for o in outputs).backward()
    return {n for n, p in program.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("role", ["ffn", "attention", "norm", "bias"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_role_trains_alone_in_every_family(name: str, role: str) -> None:
    program = family(name)
    wanted = find_structure(program).roles[role]
    if not wanted:  # Llama has no biases, say
        with pytest.raises(UsageError, match="matches no weight"):
            Freeze(train=role)(program)
        return
    result = Freeze(train=role)(program)
    assert trained(result.program) == program.with_ties(wanted) & {n for n, _ in program.tensors()}
    assert reached(result.program) == trained(result.program)
    share = 100 * sum(
        p.numel() for p in result.program.module.parameters() if p.requires_grad
    ) / sum(p.numel() for p in program.module.parameters())  # fmt: skip
    assert f"({share:.1f}%)" in result.record.notes[-1]


@pytest.mark.parametrize("name", BLOCKS)
def test_feed_forward_and_attention_are_apart(name: str) -> None:
    """Neither has a weight of the other, and every layer has some of both."""
    program = family(name)
    ffn, attention = (trained(Freeze(train=t)(program).program) for t in ("ffn", "attention"))
    assert not ffn & attention
    for layer in find_structure(program).layers:
        assert ffn & layer.names and attention & layer.names


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_without_blocks_says_what_it_has(name: str) -> None:
    with pytest.raises(UsageError, match="matches no weight") as caught:
        Freeze(train="ffn")(family(name))
    assert "product (" in str(caught.value.fix)
    assert trained(Freeze(train="head")(family(name)).program)


@settings(max_examples=15, deadline=None)
@given(
    roles=st.sets(st.sampled_from(["ffn", "attention", "norm", "embedding", "bias"]), min_size=1)
)
def test_unions_and_their_text(roles: set[str]) -> None:
    text = "|".join(sorted(roles))
    given_pass = Freeze(train=text)
    assert parse_pass(given_pass.spec) == given_pass
    program = tiny("bert")
    structure = find_structure(program)
    wanted = frozenset().union(*(structure.roles[role] for role in roles))
    assert trained(given_pass(program).program) == wanted


def test_all_and_none_and_back() -> None:
    program = tiny("llama")
    names = {n for n, _ in program.module.named_parameters()}
    none = Freeze(train="none")(program).program
    assert not trained(none)
    assert trained(Freeze()(none).program) == names == trained(program)
    assert Freeze(train="none")(none).modified == 0


def test_a_tied_head_trains_with_its_table() -> None:
    program = Freeze(train="head")(tiny("llama")).program
    assert trained(program) == find_structure(program).roles["embedding"]


def test_codes_do_not_train() -> None:
    program = Pipeline.parse('int8{min_size=0,select="product & ffn"}').run(tiny("bert")).program
    result = Freeze(train="ffn")(program)  # the biases are left
    assert trained(result.program) <= find_structure(program).roles["bias"]
    assert "4 selected weights quantized" in result.record.notes[0]
    with pytest.raises(PreconditionError, match="quantized") as caught:
        Freeze(train="ffn - bias")(program)
    fix = str(caught.value.fix)
    adapted = Pipeline.parse(fix[fix.index("lora") :]).run(program).program
    assert len(trained(adapted)) == 2 * 4


def test_adapters_are_a_role() -> None:
    assert "adapter" in ROLES
    program = Pipeline.parse("lora,freeze{train=all},freeze{train=adapter}").run(tiny("bert"))
    assert trained(program.program) == find_structure(program.program).roles["adapter"]


def test_the_weights_are_shared_and_the_choice_is_not() -> None:
    program = tiny("bert")
    frozen = Freeze(train="norm")(program).program
    for name, tensor in program.tensors():
        assert frozen.tensor(name).data_ptr() == tensor.data_ptr()
    assert trained(program) == {n for n, _ in program.module.named_parameters()}
    assert torch.equal(
        frozen(frozen.signature.probe())["last_hidden_state"],
        program(program.signature.probe())["last_hidden_state"],
    )
