"""A folded prompt behind a cache: its keys and values are the first entries."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from numpy.linalg import norm

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.cached import start_of
from ftc.graph.errors import BundleError, OrderError, PreconditionError
from ftc.graph.program import Program
from ftc.graph.sources.tokenizer import tokenizer
from ftc.passes.cache import Cache
from ftc.passes.pipeline import Pipeline
from ftc.passes.prompt import Prompt
from ftc.runtime.compile import compile_model
from ftc.runtime.decoder import Decoder
from ftc.runtime.engine import open_engine
from ftc.runtime.evaluate import evaluate
from ftc.runtime.export import export
from ftc.runtime.generate import next_tokens
from ftc.runtime.summary import summarize
from ftc.runtime.torch_engine import TorchEngine
from ftc.tests.families import captured
from ftc.tests.small import decoder, short_decoder

TEXT = "the cat sat on the mat"
PASS = f'prompt{{text="{TEXT}",fold=true}}'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder(tmp_path_factory.mktemp("model"))


def ids_of(program: Program) -> list[int]:
    ids: list[int] = tokenizer(program)(TEXT, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon-alibi"])
def test_tokens_are_those_with_the_text_in_front(name, model):
    """Past a window, with learned and rotary positions and a bias; rows of two lengths too."""
    plain = replace(Cache()(captured(name)[1]).program, assets=model)
    program = Prompt(text=TEXT, fold=True)(plain).program
    front = ids_of(plain)
    for rows in ([[7, 8, 9]], [[7, 8, 9], [11, 12, 13]], [[7, 8, 9], [11]]):
        wanted = list(islice(next_tokens(TorchEngine(plain), [front + r for r in rows]), 8))
        assert list(islice(next_tokens(TorchEngine(program), rows), 8)) == wanted


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_compiled(engine, model, tmp_path):
    """The prompt is read once, when it is folded; another text begins behind it again."""
    compile_model(model, "", tmp_path / "plain", task="generate")
    compile_model(model, PASS, tmp_path / "out", task="generate")
    plain, folded = (Decoder(open_engine(str(tmp_path / n), engine)) for n in ("plain", "out"))
    front = ids_of(plain.engine.program)
    read = []
    run = folded._run
    folded._run = lambda ids, mask, past: read.append(ids.shape[1]) or run(ids, mask, past)
    for row in ([5, 6, 7], [8], [5, 6, 7, 8, 9]):
        torch.testing.assert_close(folded([row]), plain([front + row]), atol=1e-4, rtol=1e-4)
    assert read == [3, 1, 5]


def test_perplexity_is_that_behind_the_prompt(model, tmp_path):
    """Scores of the same tokens, whole and through the cache."""
    compile_model(model, PASS, tmp_path / "out", task="generate")
    (tmp_path / "text.txt").write_text("the dog ran. a bird sang. " * 6)
    compile_model(model, PASS, tmp_path / "whole")
    found = [
        evaluate(
            open_engine(str(tmp_path / name)), tmp_path / "text.txt", "perplexity", length=16
        ).value
        for name in ("out", "whole")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_on_disk(model, tmp_path):
    plain = replace(Cache()(captured("llama")[1]).program, assets=model)
    save_bundle(Prompt(text=TEXT, fold=True)(plain).program, tmp_path / "out")
    loaded = load_bundle(tmp_path / "out")
    assert list(start_of(loaded).ids) == ids_of(plain)
    head = json.loads((tmp_path / "out" / "ftc.json").read_text())
    head["signature"]["start"].pop("past_key_0")
    (tmp_path / "out" / "ftc.json").write_text(json.dumps(head))
    with pytest.raises(BundleError):
        load_bundle(tmp_path / "out")


def test_onto_a_bundle_with_a_cache(model, tmp_path):
    """Probes of text are first steps; the exported file is told to lack the prompt."""
    compile_model(model, "", tmp_path / "plain", task="generate")
    compile_model(tmp_path / "plain", PASS, tmp_path / "folded")
    compile_model(tmp_path / "folded", "int8{min_size=0}", tmp_path / "int8")
    with pytest.raises(OrderError, match="prompted"):
        compile_model(tmp_path / "int8", PASS, tmp_path / "twice")
    with pytest.raises(OrderError, match="fold=true"):
        compile_model(tmp_path / "plain", 'prompt{text="the cat"}', tmp_path / "twice")
    plain, *folded = (Decoder(open_engine(str(tmp_path / n))) for n in ("plain", "folded", "int8"))
    wanted = plain([[*ids_of(plain.engine.program), 5, 6, 7]])
    for each, tolerance in zip(folded, (1e-4, 0.1), strict=True):
        assert norm(each([[5, 6, 7]]) - wanted) < tolerance * norm(wanted)
    notes = export(str(tmp_path / "folded"), tmp_path / "model.onnx").notes
    assert "not in the file" in notes[0]
    notes = summarize(load_bundle(tmp_path / "folded"), "x").notes
    assert (
        notes[-1]
        == f"every text begins behind a prompt of {len(ids_of(plain.engine.program))} tokens"
    )
    assert not export(str(tmp_path / "plain"), tmp_path / "plain.onnx").notes


def test_windows_leave_room_for_the_prompt(tmp_path):
    """Of 16 positions the prompt takes 6: a window of perplexity has 10 tokens."""
    short = short_decoder(tmp_path / "short")
    compile_model(short, PASS, tmp_path / "out", task="generate")
    text = tmp_path / "text.txt"
    text.write_text("the dog runs on the mat and the cat sits . " * 4)
    engine = open_engine(str(tmp_path / "out"))
    found = evaluate(engine, text, "perplexity")
    assert found.details["window"] == 16 - len(ids_of(engine.program)) == 10
    plain = evaluate(open_engine(str(short)), text, "perplexity", against=engine)
    assert plain.details["window"] == 10 and plain.against == pytest.approx(found.value, rel=1e-6)


def test_what_is_refused(model, tmp_path):
    with pytest.raises(OrderError, match=r"use cleanup,.*fold=true"):  # not folded
        compile_model(model, 'prompt{text="the cat"}', tmp_path / "out", task="generate")
    plain = replace(Cache()(captured("llama")[1]).program, assets=model)
    with pytest.raises(OrderError):
        Pipeline.parse(f"{PASS},{PASS}").run(plain)
    short = short_decoder(tmp_path / "short")
    with pytest.raises(PreconditionError, match="reads 16"):
        compile_model(short, f'prompt{{text="{TEXT * 4}",fold=true}}', tmp_path / "o",
                      task="generate")  # fmt: skip
