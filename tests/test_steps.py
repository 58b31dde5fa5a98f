"""One run of a program as it is used: a cached one behind its past, any other on all tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftc.graph.cache_inputs import Names
from ftc.graph.errors import UsageError
from ftc.passes.pipeline import Pipeline
from ftc.runtime.bench import bench, usual_shapes
from ftc.runtime.compile import compile_model
from ftc.runtime.engine import open_engine
from ftc.runtime.steps import parse_step, steps, token_types, usual_steps
from ftc.runtime.torch_engine import TorchEngine
from ftc.tests.families import captured
from ftc.tests.small import decoder


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and its bundle with a cache."""
    model, out = decoder(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("out") / "chat"
    compile_model(str(model), "", out, task="generate")
    return model, out


@pytest.mark.parametrize("past", [0, 5])
def test_a_step_reads_what_is_new_and_says_what_the_whole_text_says(
    chat: tuple[Path, Path], past: int
) -> None:
    plain = TorchEngine(captured("llama")[1])
    cached = TorchEngine(Pipeline.parse("cache").run(plain.program).program)
    in_place, whole = open_engine(str(chat[1]), "onnx"), open_engine(str(chat[0]), "torch")
    for pair in ((cached, plain), (in_place, whole)):
        step, all_of_it = steps(pair, {"batch": 2, "sequence": 3, Names.PAST: past})
        wanted: Any = all_of_it()
        for _ in range(2):  # a round must not move the past of the next
            scores: Any = step()
            torch.testing.assert_close(
                torch.from_numpy(scores[0]), wanted["logits"][:, -1:], atol=1e-4, rtol=1e-4
            )


def test_sizes_of_a_step_are_within_what_is_read() -> None:
    signature = Pipeline.parse("cache").run(captured("llama")[1]).program.signature
    total = Names.total("sequence")
    assert parse_step(signature, "past=7") == {"batch": 1, "sequence": 1, "past": 7}
    for limit in (2, 100, 10_000):
        limited = replace(signature, limits={total: limit})
        bounded = usual_steps(limited) + usual_steps(signature, limit)
        assert all(s["sequence"] + s["past"] <= limit for s in bounded)
        parse_step(limited, f"sequence=1,past={limit - 1}")
        with pytest.raises(UsageError, match=f"{limit + 1:,} tokens") as caught:
            parse_step(limited, f"sequence=1,past={limit}")
        assert f"{limit:,}" in (caught.value.fix or "")
    assert token_types(signature) == captured("llama")[1].signature.input_types


def test_bench_of_caches_of_any_kind(chat: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = chat
    compile_model(str(out), "int8_cache", tmp_path / "long")
    for against in (str(model), str(out), None):
        found = bench(str(tmp_path / "long"), against, shapes=("past=6", "sequence=4"), seconds=0)
        assert [each.sizes["past"] for each in found.latencies] == [6, 0]
    both = bench(str(model), str(out), seconds=0)
    assert [each.sizes["sequence"] > 1 for each in both.latencies] == [True, False, False]


def test_a_cached_bundle_is_compiled_again_and_measured(
    chat: tuple[Path, Path], tmp_path: Path
) -> None:
    report = compile_model(str(chat[1]), "cleanup", tmp_path / "again")
    assert {each.sizes["past"] for each in report.latencies} > {0}


def test_what_is_measured_unasked_is_bounded() -> None:
    program = Pipeline.parse("cache").run(captured("llama")[1]).program
    lengths = [
        max(s["sequence"] + s["past"] for s in usual_shapes(program, most))
        for most in (1.0, 1e5, 1e12)
    ]
    assert lengths == sorted(set(lengths)) and lengths[0] == 2
