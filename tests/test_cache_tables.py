"""Caches of models that look positions up, or cut their mask out of a table."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from ftc.graph.errors import PreconditionError
from ftc.graph.sources import capture
from ftc.passes.cache import Cache
from ftc.passes.pipeline import Pipeline
from ftc.runtime.engine import OnnxEngine
from ftc.runtime.generate import next_tokens
from ftc.runtime.lower import lower, save_onnx
from ftc.runtime.torch_engine import TorchEngine
from ftc.tests.families import Family, captured

_NEO = Family("gpt-neo", "GPTNeoForCausalLM", "causal-lm", {
    "vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "window_size": 8, "attention_types": [[["global", "local"], 1]],
})  # fmt: skip
_MPT = Family("mpt", "MptForCausalLM", "causal-lm", {
    "vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
})  # fmt: skip


def test_a_mask_that_is_cut_out_of_a_table(tmp_path: Path) -> None:
    """Through the file too, past a window of 8 tokens."""
    model = _NEO.save(tmp_path)
    program = Cache()(capture(tmp_path)).program
    save_onnx(lower(program), tmp_path / "model.onnx")
    row = [5, 17, 3, 44, 8]
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.int64),
            do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0,
        )[0, len(row) :].tolist()  # fmt: skip
    for engine in (TorchEngine(program), OnnxEngine(program, tmp_path / "model.onnx", 1)):
        assert [token for (token,) in islice(next_tokens(engine, [row]), 12)] == wanted


@pytest.mark.parametrize("passes", ["int8{min_size=0}", "int4{min_size=0,group_size=16}"])
def test_a_table_of_positions_that_is_quantized(passes: str) -> None:
    """Rows of different length in one batch have their own positions, as the pass compares."""
    made = Pipeline.parse(f"{passes},cache").run(captured("gpt2")[1]).program
    lookups = [n for n in made.graph.nodes if "quantized_embedding" in str(n.target)]
    assert len(lookups) == 2
    assert all(node.meta["val"].shape[0] != 1 for node in lookups)  # by row, not one for all


def test_what_is_not_understood_is_not_called_what_it_is_not(tmp_path: Path) -> None:
    _MPT.save(tmp_path)
    with pytest.raises(
        PreconditionError, match="nothing that was found in this attention"
    ) as caught:
        Cache()(capture(tmp_path))
    assert "--task causal-lm" in str(caught.value.fix)
