"""Prompt: soft, hard and folded, against the program with the text in front."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.errors import OrderError, PreconditionError, PromiseError, UsageError
from ftc.graph.peft_layout import prompt_name
from ftc.graph.program import Program
from ftc.passes.context import Context
from ftc.passes.pipeline import Pipeline
from ftc.passes.prompt import Prompt
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.text_models import TEXT, assert_same, text_ids, text_model, with_text
from ftc.tests.tiny import custom, tiny

CAUSAL = ["gpt2", "opt", "llama", "mistral", "bloom"]
BOTH_WAYS = ["bert-pretraining", "roberta", "xlnet", "t5"]
HARD, SOFT = Prompt(text=TEXT), Prompt(init="text", text=TEXT)
FOLDED = Prompt(text=TEXT, fold=True)


@functools.cache
def prompted(name: str, given: Prompt) -> Program:
    return given(text_model(name)[1]).program


def inputs_of(program: Program, batch: int, length: int, left: bool = False) -> dict[str, Tensor]:
    sizes = {"batch": batch, "sequence": length}
    dims = program.signature.dims
    inputs = program.signature.probe(seed=length, **{d: sizes[d] for d in dims if d in sizes})
    if left:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


@pytest.mark.parametrize("given_", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("name", [*CAUSAL, *BOTH_WAYS])
@settings(max_examples=2, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 12), left=st.booleans())
def test_equal_to_the_text_in_front(name, given_, batch, length, left):
    program = text_model(name)[1]
    inputs = inputs_of(program, batch, length, left)
    with torch.no_grad():
        got = prompted(name, given_)(inputs)
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    assert_same(with_text(program, inputs), got, mask)


@pytest.mark.parametrize("name", CAUSAL)
@settings(max_examples=4, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 20), left=st.booleans())
def test_folded_is_unfolded(name, batch, length, left):
    """Also past mistral's sliding window of 8 tokens, from which the prompt drops out."""
    inputs = inputs_of(text_model(name)[1], batch, length, left)
    with torch.no_grad():
        hard, folded = (prompted(name, each)(inputs) for each in (HARD, FOLDED))
    assert_same(hard, folded, inputs["attention_mask"])


@pytest.mark.parametrize("name", ["llama-eager", "cohere", "mixtral"])
def test_folding_other_forms(name):
    """Attention written out, side by side with the rest, and beside experts."""
    program = replace(tiny(name), assets=text_model("llama")[1].assets)
    inputs = program.signature.probe(batch=3, sequence=9)
    with torch.no_grad():
        hard, folded = (each(program).program(inputs) for each in (HARD, FOLDED))
    assert_same(hard, folded, inputs["attention_mask"])


@pytest.mark.parametrize("name", ["bert", "roberta", "xlnet"])
def test_what_sees_both_ways_is_not_folded(name):
    with pytest.raises(PreconditionError) as caught:
        FOLDED(text_model(name)[1])
    assert "leave fold out" in caught.value.fix or "without fold" in caught.value.fix


def test_the_refusal_says_why_and_where():
    with pytest.raises(PreconditionError, match="hides later tokens") as caught:
        FOLDED(text_model("bert")[1])
    assert "encoder.layer.0" in caught.value.where


class Pooled(nn.Module):
    """A causal attention, and the mean over all tokens: of the prompt's too, when unfolded."""

    def __init__(self, rows: int = 40) -> None:
        super().__init__()
        self.table, self.k = nn.Embedding(rows, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        k = self.k(self.table(input_ids)).unsqueeze(1)
        y = nn.functional.scaled_dot_product_attention(k, k, k, is_causal=True)
        return y.squeeze(1).mean(1)


def test_an_output_over_the_prompts_own_tokens_is_not_folded():
    program = custom(Pooled(), input_ids=torch.arange(12).view(2, 6))
    program = replace(program, assets=text_model("llama")[1].assets)
    HARD(program)
    with pytest.raises(PromiseError, match="leave fold out"):
        FOLDED(program)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradients_reach_the_soft_prompt_and_nothing_else(name):
    program = Prompt(tokens=5)(text_model(name)[1]).program
    parameters = dict(program.module.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} == {prompt_name(program)}
    program(program.signature.probe())["logits"].square().mean().backward()
    soft = parameters.pop(prompt_name(program))
    assert soft.shape[0] == 5 and (soft.grad.abs().amax(1) > 0).all()
    assert all(p.grad is None for p in parameters.values())


def test_a_soft_prompt_starts_as_rows_of_the_table():
    program = text_model("llama")[1]
    after = Prompt(tokens=6)(program, Context(seed=3)).program
    rows = after.tensor(prompt_name(after))
    table = program.tensor("lm_head.weight")
    assert all((table == row).all(1).any() for row in rows)
    other = Prompt(tokens=6)(program, Context(seed=4)).program
    assert not torch.equal(rows, other.tensor(prompt_name(other)))


def test_a_hard_prompt_has_no_parameters():
    before = {n: p.requires_grad for n, p in text_model("llama")[1].module.named_parameters()}
    for each in (HARD, FOLDED):
        after = prompted("llama", each)
        assert {n: p.requires_grad for n, p in after.module.named_parameters()} == before


def test_the_folded_graph_computes_the_callers_tokens_only():
    from ftc.graph.cost import cost

    program = text_model("llama")[1]
    plain, hard, folded = (
        cost(p, batch=1, sequence=8).operations
        for p in (program, prompted("llama", HARD), prompted("llama", FOLDED))
    )
    count = len(text_ids())
    assert hard > plain * (8 + count) / 8 * 0.95
    assert folded < plain * 1.1


@pytest.mark.parametrize("given_", [Prompt(), HARD, FOLDED], ids=["soft", "hard", "folded"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_it_lowers_at_any_shape(given_, name):
    program = prompted(name, given_)
    probes = [inputs_of(program, 1, 1), inputs_of(program, 3, 17), inputs_of(program, 2, 9, True)]
    assert parity(program, OnnxSession(lower(program)), probes).relative < 1e-5


@pytest.mark.parametrize("name", ["bert-pretraining", "xlnet"])
def test_it_lowers_where_tokens_see_both_ways(name):
    program = prompted(name, HARD)
    assert parity(program, OnnxSession(lower(program)), [inputs_of(program, 3, 8)]).relative < 1e-5


@pytest.mark.parametrize("before", ["int8{min_size=0}", "int4{min_size=0,group_size=16}", "prefix"])
def test_other_passes_may_come_before(before):
    program = Pipeline.parse(before).run(text_model("llama")[1]).program
    after = HARD(program).program
    inputs = after.signature.probe(batch=2)
    with torch.no_grad():
        assert_same(with_text(program, inputs), after(inputs), inputs["attention_mask"], 0.05)


@pytest.mark.parametrize("given_", [HARD, FOLDED], ids=["hard", "folded"])
def test_int8_may_come_after(given_):
    program = Pipeline((given_, *Pipeline.parse("int8{min_size=0}").passes)).run(
        text_model("llama")[1]
    )
    probe = program.program.signature.probe(batch=2)
    parity(program.program, OnnxSession(lower(program.program)), [probe])


def test_orders_that_make_no_sense_are_refused():
    program = text_model("llama")[1]
    with pytest.raises(OrderError, match="prefix") as caught:
        Pipeline.parse("prompt,prefix").run(program)
    assert caught.value.fix == "use prefix,prompt"
    with pytest.raises(PreconditionError, match="prefix already"):
        FOLDED(Pipeline.parse("prefix").run(program).program)


def test_a_bundle_keeps_it(tmp_path: Path):
    program = prompted("llama", FOLDED)
    save_bundle(program, tmp_path / "out")
    inputs = program.signature.probe(batch=2)
    loaded = load_bundle(tmp_path / "out")
    assert torch.equal(loaded(inputs)["logits"], program(inputs)["logits"])


def test_positions_are_left_for_the_caller():
    program = text_model("gpt2")[1]
    for each in (HARD, FOLDED):
        after = prompted("gpt2", each)
        left = program.signature.limits["sequence"] - len(text_ids())
        assert after.signature.limits["sequence"] == left
        with torch.no_grad():
            after(after.signature.probe(sequence=left))
    with pytest.raises(PreconditionError, match="64 in all"):
        Prompt(tokens=64)(program)


@pytest.mark.parametrize(
    "options",
    [{"tokens": 0}, {"fold": True}, {"init": "text"}, {"init": "random", "text": "a"},
     {"text": "a", "tokens": 3}, {"text": "a", "init": "text", "fold": True}],
)  # fmt: skip
def test_options_that_contradict_are_refused(options):
    with pytest.raises(UsageError, match="prompt") as caught:
        Prompt(**options)
    assert caught.value.fix


def test_ids_beyond_the_table_are_refused():
    small = custom(Pooled(12), input_ids=torch.arange(12).view(2, 6))
    program = replace(small, assets=text_model("llama")[1].assets)
    with pytest.raises(PreconditionError, match="table"):
        HARD(program)


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_a_model_without_tokens_is_refused(name):
    with pytest.raises(PreconditionError, match="reads no tokens"):
        Prompt()(tiny(name))
