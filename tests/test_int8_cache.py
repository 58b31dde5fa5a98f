"""A cache in 8 bits: scores beside those of floats, in torch and in onnxruntime."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.linalg import norm

from ftc.graph import quantized_ops
from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.cached import run_in_pieces, start_of, states
from ftc.graph.errors import BudgetError, PreconditionError
from ftc.passes.base import Context
from ftc.passes.int8_cache import Int8Cache
from ftc.passes.pipeline import Pipeline
from ftc.runtime.compile import compile_model
from ftc.runtime.decoder import Decoder
from ftc.runtime.engine import open_engine
from ftc.runtime.generate import next_tokens
from ftc.runtime.lower import lower
from ftc.runtime.session import OnnxSession
from ftc.runtime.torch_engine import TorchEngine
from ftc.tests.families import captured
from ftc.tests.small import decoder

PROMPT = 'prompt{text="the cat sat",fold=true}'
ROWS = [torch.tensor([7, 8, 9, 10, 11, 12]), torch.tensor([13, 14, 15])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("model"))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(0, 5), st.floats(1e-3, 10.0), st.integers(0, 99))
def test_a_code_is_within_half_a_step(heads: int, length: int, size: float, seed: int) -> None:
    x = size * torch.randn(2, heads, length, 4, generator=torch.Generator().manual_seed(seed))
    step = torch.full((heads, 1, 4), size / 25)
    codes = quantized_ops.quantize_states(x, step)
    assert codes.dtype == torch.int8
    gap = quantized_ops.dequantize_states(codes, step) - x.clamp(-128 * step, 127 * step)
    assert bool((gap.abs() <= 0.51 * step).all())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon-alibi", "qwen3"])
@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
def test_scores_move_by_the_rounding_alone(name: str, dialect: str) -> None:
    """Two texts of different length in pieces: floats, codes, and codes in onnxruntime."""
    plain = Pipeline.parse("cache{logits=all}").run(captured(name)[1]).program
    program = Int8Cache()(plain).program
    assert {spec.dtype for spec in states(program.signature)} == {torch.int8}
    run = OnnxSession(lower(program, dialect))  # type: ignore[arg-type]
    with torch.no_grad():
        wanted, found = (run_in_pieces(p, ROWS, (3, 1, 2))["logits"] for p in (plain, program))
        lowered = run_in_pieces(run, ROWS, (3, 1, 2), program.signature)["logits"]
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()
    assert (lowered - found).norm() < 0.2 * (found - wanted).norm()


def test_compiled(model: Path, tmp_path: Path) -> None:
    """The pass brings the cache; attention reads the codes where they lie."""
    compile_model(model, "int8_cache", tmp_path / "out", task="generate")
    compile_model(model, "", tmp_path / "plain", task="generate")
    kinds = [n for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node
             if any(a.name == "kv_cache_bit_width" for a in n.attribute)]  # fmt: skip
    program = load_bundle(tmp_path / "out")
    assert len(kinds) == len(states(program.signature)) // 2
    assert open_engine(str(tmp_path / "out")).session.in_place  # type: ignore[attr-defined]
    rows = [[5, 6, 7], [8]]
    wanted = list(islice(next_tokens(open_engine(str(tmp_path / "plain")), rows), 6))
    for engine in ("onnx", "torch"):
        found = list(islice(next_tokens(open_engine(str(tmp_path / "out"), engine), rows), 6))
        assert found == wanted


@pytest.mark.parametrize("passes", [f"int8_cache,{PROMPT}", f"{PROMPT},int8_cache"])
def test_behind_a_prompt(passes: str, model: Path, tmp_path: Path) -> None:
    compile_model(model, passes, tmp_path / "out", task="generate")
    compile_model(model, PROMPT, tmp_path / "plain", task="generate")
    start = start_of(load_bundle(tmp_path / "out"))
    assert {tensor.dtype for tensor in start.states.values()} == {torch.int8}
    wanted, found = (Decoder(open_engine(str(tmp_path / n)))([[5, 6, 7]]) for n in ("plain", "out"))
    assert norm(found - wanted) < 0.1 * norm(wanted)


def test_on_disk(tmp_path: Path) -> None:
    program = Pipeline.parse("int8_cache").run(captured("llama")[1]).program
    save_bundle(program, tmp_path / "out")
    loaded, rows = load_bundle(tmp_path / "out"), [[7, 8, 9]]
    tokens = [list(islice(next_tokens(TorchEngine(p), rows), 5)) for p in (program, loaded)]
    assert tokens[0] == tokens[1]


def test_once_is_enough() -> None:
    program = Pipeline.parse("int8_cache").run(captured("llama")[1]).program
    again = Int8Cache()(program).record
    assert again.modified == 0 and again.notes == ("the cache is in 8 bits already",)


def test_what_is_refused() -> None:
    cached = Pipeline.parse("cache").run(captured("llama")[1]).program
    with pytest.raises(BudgetError, match="budget"):
        Int8Cache()(cached, Context(max_drift=1e-6))
    shuffled = replace(cached, module=cached.clone().module)
    past = next(n for n in shuffled.graph.nodes if n.name == "past_key_0")
    (joined,) = [n for n in past.users if "cat" in str(n.target)]
    joined.args = ([*reversed(joined.args[0])], joined.args[1])
    with pytest.raises(PreconditionError, match="does not join past_key_0"):
        Int8Cache()(shuffled)
