"""Cache: tokens as transformers gives them; pieces are the whole; a padded row is the row alone."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.cache_inputs import Names, present_of
from ftc.graph.cached import run_in_pieces, states, step_inputs, token_limit
from ftc.graph.errors import OrderError, PreconditionError, UsageError
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.passes.cache import Cache
from ftc.passes.context import random_probe
from ftc.passes.pipeline import Pipeline
from ftc.runtime.compile import compile_model
from ftc.runtime.continuation import Asked, generate
from ftc.runtime.engine import OnnxEngine, open_engine
from ftc.runtime.generate import next_tokens
from ftc.runtime.lower import lower, save_onnx
from ftc.runtime.parity import parity
from ftc.runtime.sampling import Sampler, Sampling
from ftc.runtime.session import OnnxSession
from ftc.runtime.torch_engine import TorchEngine
from ftc.tests.families import captured, family
from ftc.tests.small import decoder, short_decoder
from ftc.tests.tiny import tiny

FAMILIES = ["gpt2", "opt", "llama", "qwen2", "qwen3", "gemma2", "olmo2", "phi", "gpt-neox",
            "falcon", "falcon-grouped", "falcon-alibi", "mixtral", "bloom"]  # fmt: skip


@functools.cache
def cached(name: str, logits: str = "last") -> Program:
    return Cache(logits=logits)(captured(name)[1]).program


def ids_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 99, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_transformers(name):
    """Past gemma2's window of 8, and a shorter row beside: it says what it says alone."""
    model, _ = captured(name)
    engine = TorchEngine(cached(name))
    rows = ids_of(7, 3)
    got = list(islice(next_tokens(engine, rows), 12))
    for number, row in enumerate(rows):
        with torch.no_grad():
            wanted = model.generate(
                torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.int64),
                do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        assert [step[number] for step in got] == wanted[0, len(row) :].tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "falcon-alibi"])
def test_two_hundred_tokens_are_those_of_transformers(name, tmp_path):
    """Through the written file, past where buffers are copied into longer ones."""
    short = family(name)
    options = {key: 256 if "positions" in key or "position_e" in key else value
               for key, value in short.options.items()}  # fmt: skip
    model = replace(short, options=options).save(tmp_path)
    program = Cache()(capture(tmp_path)).program
    save_onnx(lower(program), tmp_path / "model.onnx")
    (row,) = ids_of(7)
    engine = OnnxEngine(program, tmp_path / "model.onnx", 1)
    got = [token for (token,) in islice(next_tokens(engine, [row]), 200)]
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.int64),
            do_sample=False, max_new_tokens=200, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert len(got) == 200 and got == wanted[0, len(row) :].tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "falcon-alibi"])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_pieces_are_the_whole(name, data):
    pieces = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    rows = [torch.tensor(row) for row in ids_of(sum(pieces), max(1, sum(pieces) - 2))]
    program = cached(name, "all")
    with torch.no_grad():
        parts = run_in_pieces(program, rows, pieces)["logits"]
        whole = run_in_pieces(program, rows, [sum(pieces)])["logits"]
        alone = captured(name)[1](
            input_ids=rows[0][None], attention_mask=torch.ones_like(rows[0])[None]
        )["logits"]
    torch.testing.assert_close(parts[0], whole[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts[1, -len(rows[1]) :], whole[1, -len(rows[1]) :],
                               atol=1e-4, rtol=1e-4)  # fmt: skip
    torch.testing.assert_close(parts[0], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "falcon-grouped"])
@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
def test_onnxruntime_gives_the_same(name, dialect):
    program = cached(name)
    session = OnnxSession(lower(program, dialect))
    probes = [program.signature.probe(seed=n, sequence=s, past=p)
              for n, (s, p) in enumerate([(1, 9), (5, 1), (4, 13)])]  # fmt: skip
    parity(program, session, probes)
    rows = [torch.tensor(row) for row in ids_of(9, 6)]
    with torch.no_grad():
        wanted = run_in_pieces(program, rows, [6, 1, 2])
    got = run_in_pieces(session, rows, [6, 1, 2], program.signature)
    torch.testing.assert_close(got["logits"], wanted["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_attention_joins_the_past_itself(name):
    """Each cache goes into one operator and comes out of it; nothing splits or turns heads."""
    model = lower(cached(name), "standard")
    attentions = [n for n in model.graph if n.op_type == "Attention"]
    for number, node in enumerate(attentions):
        assert [v.name for v in node.inputs[4:]] == list(Names.past(number))
        assert [v.name for v in node.outputs[1:]] == list(Names.present(number))
        assert "Transpose" not in [v.producer().op_type for v in node.inputs[:3]]
    held = {v for v in model.graph.inputs if v.name in Names.past(0)}
    assert [n.op_type for v in held for n in v.consumers()] == ["Attention"] * 2
    assert len({n.inputs[3] for n in attentions}) == 1  # one mask for all layers


def test_only_the_last_row_is_scored():
    program = cached("llama")
    assert program.signature.outputs[0].shape == ("batch", 1, 99)
    product = program.graph.output_node().args[0][0]
    assert product.args[0].meta["val"].shape[1] == 1  # cut before the product


@pytest.mark.parametrize("passes", ["int4{min_size=0,group_size=16}", "int8{min_size=0}"])
def test_behind_quantization_and_from_disk(passes, tmp_path):
    program = Pipeline.parse(f"{passes},cache").run(tiny("llama")).program
    save_bundle(program, tmp_path / "out")
    loaded = load_bundle(tmp_path / "out")
    inputs = loaded.signature.probe(seed=2)
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), program(inputs))


@pytest.mark.parametrize(
    ("name", "words"),
    [("bert", "hides later tokens"), ("xlnet", "more keys"), ("vit", "reads no tokens")],
)
def test_what_has_no_cache_is_refused(name, words):
    with pytest.raises(PreconditionError, match=words) as caught:
        Cache()(captured(name)[1])
    assert caught.value.fix


def test_outputs_of_a_whole_text_have_no_cache():
    program = Pipeline.parse("head{labels=2}").run(tiny("llama")).program
    with pytest.raises(PreconditionError, match=r"no row for each .*added: int8_cache") as caught:
        Pipeline.parse("int8_cache").run(program)
    assert "causal-lm" in (caught.value.fix or "")


@pytest.mark.parametrize("other", ["cache", "prompt{tokens=3}", "prefix{tokens=3}"])
def test_twice_or_with_tokens_in_front_is_refused(other):
    """A prompt behind a cache would go in front of every piece."""
    for passes in (f"cache,{other}", f"{other},cache"):
        with pytest.raises(OrderError):
            Pipeline.parse(passes).run(tiny("llama"))


def test_compiled_to_generate(tmp_path):
    folder = decoder(tmp_path / "model")
    compile_model(folder, "", tmp_path / "out", task="generate")
    texts = [
        "".join(generate(open_engine(str(tmp_path / "out"), engine), "the cat", Asked(6)))
        for engine in ("onnx", "torch")
    ]
    plain = "".join(generate(open_engine(str(folder)), "the cat", Asked(6)))
    assert texts == [plain, plain]


def test_positions_end(tmp_path):
    """Of 16 positions the prompt has 12: four tokens are read back, and a fifth comes of them."""
    folder = short_decoder(tmp_path / "model")
    compile_model(folder, "", tmp_path / "out", task="generate")
    engine = open_engine(str(tmp_path / "out"))
    assert token_limit(engine.program.signature) == 16
    assert len(list(next_tokens(engine, [[5] * 12]))) == 5
    for rows in ([[5] * 16], [], [[]]):
        with pytest.raises(UsageError):
            next_tokens(engine, rows)


def test_no_tokenizer():
    with pytest.raises(UsageError, match="without a tokenizer"):
        next(generate(TorchEngine(replace(cached("llama"), assets=None)), "a"))


def test_sampling():
    logits = np.array([[2.0, 1.0, 0.0, -1.0]], np.float32)

    def drawn(**how: float) -> set[int]:
        samplers = (Sampler(Sampling(seed=seed, **how)) for seed in range(60))
        return {choose(logits, [[0]]).item() for choose in samplers}

    assert drawn() == {0}
    assert drawn(temperature=1, top_k=1) == {0}
    assert drawn(temperature=2, top_k=2) == {0, 1}
    assert drawn(temperature=1, top_p=0.5) == {0}  # it has .64 alone
    assert drawn(temperature=1, top_p=0.7) == {0, 1}
    assert drawn(temperature=9) == {0, 1, 2, 3}
    assert drawn(penalty=3.0) == {1}
    again = [[Sampler(Sampling(1.0, seed=4))(logits, [[]]).item() for _ in range(9)] for _ in "ab"]
    assert again[0] == again[1]
    choose = Sampler(Sampling(2.0))
    counts = np.bincount([choose(logits, [[]]).item() for _ in range(8000)], minlength=4)
    chances = np.exp(logits[0] / 2)
    np.testing.assert_allclose(counts / counts.sum(), chances / chances.sum(), atol=0.02)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0.0},
        {"top_k": -1},
        {"penalty": 0.0},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_senseless_sampling_is_refused(wrong):
    with pytest.raises(UsageError, match="out of range"):
        Sampling(**wrong)


@pytest.mark.parametrize("given", [{"top_k": 4}, {"top_p": 0.9}])
def test_what_is_drawn_from_needs_a_temperature(given):
    with pytest.raises(UsageError, match="nothing is drawn"):
        Sampling(**given)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_probes_go_on_from_tokens(name):
    """Keys of a text's first token are those of some token, alone."""
    program = cached(name)
    probe = random_probe(program, {"batch": 3, "sequence": 2, "past": 4}, seed=5)
    tokens = program.signature.inputs[0]
    ids = torch.arange(tokens.low, tokens.high)[:, None]
    alone = program(step_inputs(program.signature, ids, torch.ones_like(ids), {}))
    for kept in states(program.signature):
        assert probe[kept.name].shape[2] == 4
        each = alone[present_of(kept.name)][:, :, 0].flatten(1)
        apart = (probe[kept.name][:, None, :, 0].flatten(2) - each).norm(dim=-1)
        assert apart.amin(1).max() < 1e-5
