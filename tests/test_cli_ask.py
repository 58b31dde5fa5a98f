"""The commands that ask a bundle: inspect, run, bench and export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ftc.graph.bundle import load_bundle
from ftc.runtime.tensors import read_tensors
from ftc.runtime.text import need_tokenizer, pad

from .cli_bundles import bundle, masked, mistake  # noqa: F401
from .conftest import Command
from .small import decoder, encoder


def test_inspect(bundle: Path, command: Command) -> None:
    found = command("inspect", bundle, "--json", "--layers").data
    assert (
        found["task"] == "masked-lm" and found["inputs"]["input_ids"] == "int64 [batch, sequence]"
    )
    assert sum(row["parameters"] for row in found["roles"]) == found["parameters"]
    assert sum(row["bytes"] for row in found["layers"]) == found["bytes"]
    assert sum(row["operations"] for row in found["layers"]) == found["operations"]
    assert [record["spec"] for record in found["history"]][-1] == "int8{min_size=16}"
    text = command("inspect", bundle, "--layers").out
    assert "layer.1" in text and "attention" in text and "lowrank{ratio=0.5}" in text


def test_inspect_counts_operations_at_a_shape(bundle: Path, command: Command) -> None:
    one, two = (command("inspect", bundle, "--json", "--shape", f"batch={n},sequence=8").data
                ["operations"] for n in (1, 2))  # fmt: skip
    assert 1.9 * one < two <= 2 * one
    mistake(command("inspect", bundle, "--shape", "batches=2"), "batch")


def test_inspect_shows_graph_and_selection(masked: Path, command: Command) -> None:
    assert command("inspect", masked, "--ir").out.startswith("program masked-lm\n")
    found = command("inspect", masked, "--select", "layer[0] & ffn", "--json").data["weights"]
    assert found and all("layer.0" in each["name"] for each in found)
    mistake(command("inspect", masked, "--select", "fnn"), "ffn")


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_run_fills_masks(bundle: Path, engine: str, command: Command) -> None:
    text = "the [MASK] sits on the [MASK]"
    found = command("run", bundle, "--text", text, "--engine", engine, "--json").data
    assert engine in found["engine"]
    gaps = found["labels"][0]
    assert [gap["text"] for gap in gaps] == ["[MASK] 1", "[MASK] 2"]
    for gap in gaps:
        numbers = [probability for _, probability in gap["guesses"]]
        assert numbers == sorted(numbers, reverse=True) and 0 < sum(numbers) <= 1
    mistake(command("run", bundle, "--text", "no gap"), "[MASK]")


def test_run_classifies_with_the_models_labels(tmp_path: Path, command: Command) -> None:
    names = {0: "sad", 1: "glad"}
    model = encoder(tmp_path / "model", "BertForSequenceClassification", id2label=names)
    assert command("compile", model, "--passes", "cleanup", "-o", tmp_path / "out").status == 0
    found = command("run", tmp_path / "out", "--text", "i like it", "--json").data["labels"][0][0]
    assert {label for label, _ in found["guesses"]} == {"sad", "glad"}
    assert sum(p for _, p in found["guesses"]) == pytest.approx(1, abs=1e-5)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "i like it", "label": "glad"}\n{"text": "bad dog", "label": 0}\n')
    call = ("eval", tmp_path / "out", "--data", data, "--metric", "accuracy")
    score = command(*call, "--against", model, "--json").data
    assert score["value"] == score["against"] in (0, 0.5, 1)
    assert score["details"]["agreement"] == 1
    data.write_text('{"text": "i like it", "label": "glad"}\n{"text": "it", "label": "gald"}\n')
    mistake(command(*call), "rows.jsonl:2", "glad")
    data.write_text('{"text": "i like it", "label": "glad"}\n{"txt": "it"}\n')
    mistake(command(*call), "rows.jsonl:2", "txt")
    data.write_text("{not json}\n")
    mistake(command(*call), "rows.jsonl:1")


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_run_says_the_number_of_a_regression(engine: str, tmp_path: Path, command: Command) -> None:
    model = encoder(tmp_path / "model", "BertForSequenceClassification", num_labels=1)
    assert command("compile", model, "--passes", "cleanup", "-o", tmp_path / "out").status == 0
    call = ("run", tmp_path / "out", "--text", "the cat", "--engine", engine)
    (((_, number),),) = [each["guesses"] for each in command(*call, "--json").data["labels"][0]]
    program = load_bundle(tmp_path / "out")
    ids = need_tokenizer(program)("the cat")["input_ids"]
    wanted = program(pad([ids], program.signature, None))["logits"].item()
    assert number == pytest.approx(wanted, rel=1e-3) and "number" in command(*call).out
    refused = command("eval", tmp_path / "out", "--data", "x.jsonl", "--metric", "accuracy")
    assert refused.status == 2 and "one number" in refused.err and "--steps 0" in refused.err


def test_run_continues_and_both_engines_agree(tmp_path: Path, command: Command) -> None:
    model, out = decoder(tmp_path / "model"), tmp_path / "out"
    assert command("compile", model, "--passes", "cleanup", "-o", out).status == 0
    call = ("run", out, "--text", "the cat", "--max-new-tokens", 5)
    onnx, torch_ = (command(*call, "--engine", e, "--json").data for e in ("onnx", "torch"))
    assert onnx["continuations"] == torch_["continuations"]
    assert command(*call).out.startswith("the cat")
    data = tmp_path / "prose.txt"
    data.write_text("the cat sits on the mat . " * 20)
    score = command("eval", out, "--data", data, "--metric", "perplexity", "--against", model,
                    "--length", 16, "--json").data  # fmt: skip
    assert score["value"] == pytest.approx(score["against"], rel=1e-4)
    assert score["value"] == pytest.approx(25, rel=0.5)  # nothing learned: all 25 words alike
    mistake(command("eval", out, "--data", data, "--metric", "accuracy"), "perplexity")


def test_run_takes_tensors(compiled_mlp: Path, tmp_path: Path, command: Command) -> None:
    mistake(command("run", compiled_mlp, "--text", "hello"), "--input")
    path = tmp_path / "x.npz"
    np.savez(path, input=np.ones((2, 64), np.float32))
    found = command("run", compiled_mlp, "--input", path, "--json").data["outputs"]
    assert np.shape(next(iter(found.values()))) == (2, 48)
    assert "2 × 48" in command("run", compiled_mlp, "--input", path).out
    np.savez(path, inputs=np.ones((2, 64), np.float32))
    mistake(command("run", compiled_mlp, "--input", path), "did you mean input")
    path.write_bytes(b"no zip")
    mistake(command("run", compiled_mlp, "--input", path), "x.npz")
    mistake(command("run", compiled_mlp, "--input", tmp_path / "x.pt"), ".safetensors")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", input=np.array([{"a": 1}], dtype=object))
    with pytest.raises(Exception, match=r"x\.npz"):
        read_tensors(tmp_path / "x.npz")


def test_embeddings_cosine(tmp_path: Path, command: Command) -> None:
    model, out = encoder(tmp_path / "model", "BertModel"), tmp_path / "out"
    assert command("compile", model, "--passes", "cleanup", "-o", out).status == 0
    texts = (
        "--text",
        "the cat sits",
        "--text",
        "the dog runs in the house",
        "--text",
        "the cat sits",
    )
    found = command("run", out, *texts, "--json").data
    vectors = torch.tensor(found["embeddings"])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    assert found["similarity"][0][2] == pytest.approx(1, abs=1e-5)
    alone = torch.tensor(command("run", out, *texts[:2], "--json").data["embeddings"])
    assert torch.allclose(alone[0], vectors[0], atol=1e-5)  # padding changes nothing
    assert "cosine" in command("run", out, *texts).out
    data = tmp_path / "rows.txt"
    data.write_text("the cat sits\n\nthe dog runs\n")
    score = command("eval", out, "--data", data, "--metric", "cosine", "--against", model, "--json")
    assert score.data["value"] == pytest.approx(1, abs=1e-5) and score.data["details"]["texts"] == 2


def test_bench(bundle: Path, masked: Path, command: Command) -> None:
    call = ("bench", bundle, "--seconds", 0, "--shapes", "batch=2,sequence=4")
    found = command(*call, "--against", masked, "--json").data
    (each,) = found["latencies"]
    assert each["sizes"] == {"batch": 2, "sequence": 4} and each["base"]["rounds"] == 3
    assert each["base"]["quartiles"][0] <= each["base"]["median"] <= each["base"]["quartiles"][1]
    assert "onnxruntime" in found["base"] and "onnxruntime" in found["other"]
    assert "torch" in command(*call, "--json").data["base"]
    assert isinstance(each["noise"], str)
    mistake(command("bench", bundle, "--shapes", "8x128"), "batch=8")
    mistake(command("bench", bundle, "--against", "ftc.tests.small:mlp"), "input_ids")


def test_bench_takes_a_model_as_it_is(masked: Path, bundle: Path, command: Command) -> None:
    call = ("--seconds", 0, "--shapes", "batch=2,sequence=4", "--json")
    alone = command("bench", masked, *call).data
    assert "torch" in alone["base"] and "onnxruntime" in alone["other"]
    both = command("bench", masked, "--against", bundle, *call).data
    assert "onnxruntime" in both["base"] and "onnxruntime" in both["other"]


def test_export(bundle: Path, tmp_path: Path, command: Command) -> None:
    target = tmp_path / "new" / "m.onnx"
    found = command("export", bundle, "-o", target, "--json").data
    assert found["bytes"] == target.stat().st_size
    assert target.read_bytes() == (bundle / "model.onnx").read_bytes()
    mistake(command("export", bundle, "-o", target), "--force")
    assert command("export", bundle, "-o", target, "--force").status == 0
    assert command("export", bundle, "-o", tmp_path / "dir").status == 0
    assert sorted(p.name for p in (tmp_path / "dir").iterdir()) == ["model.onnx"]
