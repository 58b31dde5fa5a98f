"""Prefix: keys and values in front at every attention, against transformers' own cache."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.peft_layout import prefix_from_peft, prefix_names, prefix_to_peft
from ftc.graph.program import Program
from ftc.passes.context import Context
from ftc.passes.pipeline import Pipeline
from ftc.passes.prefix import Prefix
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.text_models import TEXT, assert_same, text_ids, text_model, with_text
from ftc.tests.tiny import custom, tiny

CAUSAL = ["gpt2", "opt", "llama", "qwen2", "phi", "bloom"]
TOKENS = 4


@functools.cache
def prefixed(name: str) -> Program:
    """With a prefix of numbers that matter: what the pass draws at random is small."""
    program = Prefix(tokens=TOKENS)(text_model(name)[1]).program
    torch.manual_seed(0)
    for each in prefix_names(program):
        program.tensor(each).data.normal_()
    return program


def cache_of(program: Program, flat: Tensor, batch: int) -> Any:
    """A cache of transformers that holds a prefix in PEFT's layout, taken apart as PEFT does."""
    from transformers import DynamicCache

    layers = len(prefix_names(program)) // 2
    heads, tokens, dim = program.tensor(prefix_names(program)[0]).shape
    states = flat.view(1, tokens, layers * 2, heads, dim).expand(batch, -1, -1, -1, -1)
    pairs = states.permute(2, 0, 3, 1, 4).split(2)
    return DynamicCache([(key, value) for key, value in pairs])


@pytest.mark.parametrize("name", [*CAUSAL, "bert", "roberta"])
@settings(max_examples=6, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 12), seed=st.integers(0, 99))
def test_equal_to_a_cache_that_holds_the_prefix(name, batch, length, seed):
    """Which is what PEFT gives the model: positions go on after the prefix."""
    program = prefixed(name)
    model, _ = text_model(name)
    inputs = program.signature.probe(seed=seed, batch=batch, sequence=length)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        whole = torch.cat([torch.ones(batch, TOKENS, dtype=mask.dtype), mask], 1)
        past = cache_of(program, prefix_to_peft(program), batch)
        wanted = model(**{**inputs, "attention_mask": whole}, past_key_values=past)
        got = program(inputs)
    assert_same({n: wanted[n] for n in got}, got, mask)


@pytest.mark.parametrize("name", CAUSAL)
@settings(max_examples=5, deadline=None)
@given(batch=st.integers(1, 3), length=st.integers(1, 12), left=st.booleans())
def test_a_prefix_from_a_text_starts_as_the_text(name, batch, length, left):
    program = text_model(name)[1]
    inputs = program.signature.probe(seed=length, batch=batch, sequence=length)
    if left:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with torch.no_grad():
        got = from_text(name)(inputs)
    assert_same(with_text(program, inputs), got, inputs["attention_mask"])


@functools.cache
def from_text(name: str) -> Program:
    return Prefix(init="text", text=TEXT)(text_model(name)[1]).program


def test_the_length_of_the_prefix_is_the_texts():
    program = from_text("llama")
    assert {program.tensor(n).shape[1] for n in prefix_names(program)} == {len(text_ids())}
    assert program.tensor(prefix_names(program)[0]).shape[0] == 2  # grouped: heads of the keys


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradients_reach_the_prefix_and_nothing_else(name):
    program = prefixed(name).clone()
    names = set(prefix_names(program))
    parameters = dict(program.module.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} == names
    inputs = program.signature.probe(seed=1)
    next(iter(program(inputs).values())).square().mean().backward()
    for each, parameter in parameters.items():
        if each in names:
            assert (parameter.grad.flatten(2).abs().amax((0, 2)) > 0).all()  # of every token
        else:
            assert parameter.grad is None


def test_the_head_of_a_classifier_trains_too():
    program = Prefix()(text_model("distilbert")[1]).program
    trained = {n for n, p in program.module.named_parameters() if p.requires_grad}
    assert trained > set(prefix_names(program))
    assert all("classifier" in name for name in trained - set(prefix_names(program)))


def test_every_query_sees_the_whole_prefix_past_a_sliding_window():
    program = prefixed("mistral").clone()  # which reaches back 8 tokens
    inputs = program.signature.probe(batch=1, sequence=30)
    key = program.tensor(prefix_names(program)[0])
    program(inputs)["last_hidden_state"][0, -1].square().sum().backward()
    assert (key.grad.abs().amax((0, 2)) > 0).all()


class Causal(nn.Module):
    """Attention with a flag in place of a mask, over tokens without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.q, self.k = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k))
        return nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True)


def test_a_causal_flag_becomes_a_mask_that_shows_the_prefix():
    torch.manual_seed(0)
    program = custom(Causal(), ids=torch.arange(12).view(2, 6))
    after = Prefix(tokens=3)(program).program
    key, value = (after.tensor(n).detach() for n in prefix_names(after))
    ids = torch.randint(0, 20, (3, 5))
    x = program.tensor("table.weight")[ids]
    q, k = (
        (x @ program.tensor(f"{n}.weight").T + program.tensor(f"{n}.bias"))
        .unflatten(-1, (2, 4)).transpose(1, 2)
        for n in "qk"
    )  # fmt: skip
    seen = torch.ones(5, 8, dtype=torch.bool).tril(3)
    keys, values = (torch.cat([s.expand(3, -1, -1, -1), k], 2) for s in (key, value))
    scores = (q @ keys.transpose(2, 3) / 2).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(after(ids=ids)["output"], scores.softmax(-1) @ values)


def test_attention_written_out_without_heads_or_mask():
    program = tiny("written")
    after = Prefix(tokens=2)(program).program
    key, value = (after.tensor(n).detach() for n in prefix_names(after))
    x = torch.randn(3, 6, 16)
    t = program.tensor
    y = x - x.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * t("g") + t("h")
    q, k, v = y @ t("a"), y @ t("b") + t("j"), y @ t("c")
    k, v = (torch.cat([s.expand(3, -1, -1), own], 1) for s, own in ((key, k), (value, v)))
    z = x + (q @ k.transpose(1, 2) * 0.25).softmax(-1) @ v @ t("d")
    z = z + ((z @ t("e")).sigmoid() * (z @ t("f"))) @ t("i")
    torch.testing.assert_close(after(x=x)["output"], z)


@pytest.mark.parametrize("name", ["bert-eager", "llama-eager"])
def test_attention_written_out_is_the_fused_one(name):
    eager, fused = (Prefix()(tiny(n)).program for n in (name, name.removesuffix("-eager")))
    for left, right in zip(prefix_names(eager), prefix_names(fused), strict=True):
        assert torch.equal(eager.tensor(left), fused.tensor(right))
    inputs = eager.signature.probe(seed=3, batch=3, sequence=9)
    with torch.no_grad():
        assert_same(fused(inputs), eager(inputs), inputs["attention_mask"])


@pytest.mark.parametrize(
    "spec", ["prefix", "int8{min_size=0},prefix", "prefix,int8{min_size=0}", "lowrank,prefix"]
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_lowers_at_any_shape_beside_other_passes(spec, name):
    program = Pipeline.parse(spec).run(text_model(name)[1]).program
    probes = [
        program.signature.probe(seed=1, batch=1, sequence=1),
        program.signature.probe(seed=2, batch=3, sequence=17),
    ]
    assert parity(program, OnnxSession(lower(program)), probes).relative < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "written", "t5", "vit"])
def test_it_lowers(name):
    program = Prefix()(tiny(name)).program
    probe = program.signature.probe(batch=3)
    assert parity(program, OnnxSession(lower(program)), [probe]).relative < 1e-5


def test_a_bundle_keeps_it(tmp_path: Path):
    program = prefixed("llama")
    save_bundle(program, tmp_path / "out")
    loaded = load_bundle(tmp_path / "out")
    inputs = program.signature.probe(batch=2)
    assert torch.equal(loaded(inputs)["logits"], program(inputs)["logits"])
    trained = {n for n, p in loaded.module.named_parameters() if p.requires_grad}
    assert trained == set(prefix_names(program))


def test_a_layer_that_runs_twice_has_a_prefix_for_each_time():
    program = Prefix()(tiny("albert")).program
    assert len(prefix_names(program)) == 4
    assert len({program.tensor(n).data_ptr() for n in prefix_names(program)}) == 4


def test_positions_are_left_for_the_caller():
    program = text_model("gpt2")[1]
    after = Prefix(tokens=10)(program).program
    assert after.signature.limits["sequence"] == program.signature.limits["sequence"] - 10
    with torch.no_grad():
        after(after.signature.probe(sequence=after.signature.limits["sequence"]))
    with pytest.raises(PreconditionError, match="64 tokens in front, and the model reads 64"):
        Prefix(tokens=64)(program)


def test_probes_and_calibration_are_cut_to_what_is_left():
    program = text_model("gpt2")[1]
    whole = program.signature.probe(batch=2, sequence=64)
    ctx = Context(probes=(whole,), calibration=[whole])
    result = Pipeline.parse("prefix,int8{min_size=0}").run(program, ctx)
    assert all(record.drift is not None for record in result.records)


def test_it_is_an_interface_and_the_drift_is_reported():
    result = Prefix()(text_model("llama")[1], Context(max_drift=1e-9))
    assert result.record.effect == "interface"
    assert result.record.drift.relative > 1e-9
    assert "2 attentions" in result.record.notes[0]


def test_an_encoder_with_a_decoder_is_refused():
    with pytest.raises(PreconditionError, match="two sequences"):
        Prefix()(text_model("t5")[1])


@pytest.mark.parametrize("name", ["mlp", "xlnet"])
def test_models_that_allow_none_are_refused(name):
    with pytest.raises(PreconditionError) as caught:
        Prefix()(tiny(name))
    assert caught.value.fix


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"init": "text"}, {"text": "a"}, {"init": "text", "text": "a",
                "tokens": 3}]
)  # fmt: skip
def test_options_that_contradict_are_refused(options):
    with pytest.raises(UsageError, match="prefix"):
        Prefix(**options)


@pytest.mark.parametrize("text", ["", "   "])
def test_a_text_without_tokens_is_refused(text):
    with pytest.raises(PreconditionError, match="no tokens"):
        Prefix(init="text", text=text)(text_model("llama")[1])


def test_a_model_without_a_tokenizer_is_told_so():
    with pytest.raises(PreconditionError, match="no tokenizer"):
        Prefix(init="text", text="a")(tiny("llama"))


@given(tokens=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=5, deadline=None)
def test_pefts_layout_goes_both_ways(tokens, seed):
    program = Prefix(tokens=tokens)(tiny("llama"), Context(seed=seed)).program
    flat = prefix_to_peft(program)
    assert flat.shape == (tokens, sum(program.tensor(n).numel() for n in prefix_names(program))
                          // tokens)  # fmt: skip
    for name, tensor in prefix_from_peft(program, flat).items():
        assert torch.equal(tensor, program.tensor(name))
    with pytest.raises(UsageError, match="do not fit"):
        prefix_from_peft(program, flat[:, 1:])
    with pytest.raises(UsageError, match="no prefix"):
        prefix_to_peft(tiny("llama"))
