"""GGUF files: what transformers would read, from one pass over the file."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ftc.graph.bundle import save_bundle
from ftc.graph.sources import capture
from ftc.graph.sources.tokenizer import tokenizer

from .places import refused


def write_gguf(path: Path, *, tied: bool = True) -> None:
    """A tiny Llama in Q8_0 and fp32, with a vocabulary of bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for key, number in {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "head_count": 4,
        "head_count_kv": 2,
    }.items():
        getattr(writer, f"add_{key}")(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    letters = [chr(c) for c in range(33, 127)]
    tokens = ["<s>", "</s>", *letters, "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    sizes = {"token_embd.weight": (len(tokens), 64), "output_norm.weight": (64,)}
    if not tied:
        sizes["output.weight"] = (len(tokens), 64)
    for i in range(2):
        sizes |= {
            f"blk.{i}.attn_norm.weight": (64,),
            f"blk.{i}.ffn_norm.weight": (64,),
            f"blk.{i}.attn_q.weight": (64, 64),
            f"blk.{i}.attn_k.weight": (32, 64),
            f"blk.{i}.attn_v.weight": (32, 64),
            f"blk.{i}.attn_output.weight": (64, 64),
            f"blk.{i}.ffn_gate.weight": (96, 64),
            f"blk.{i}.ffn_up.weight": (96, 64),
            f"blk.{i}.ffn_down.weight": (64, 96),
        }
    for name, shape in sizes.items():
        data = random.standard_normal(shape).astype(np.float32) * 0.1
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else None
        if kind is not None:
            data = gguf.quants.quantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf")
    return folder / "tiny.gguf"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_gives_what_transformers_gives(tmp_path: Path, tied: bool) -> None:
    import transformers

    write_gguf(tmp_path / "tiny.gguf", tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    program = capture(tmp_path)
    assert program.signature.task == "causal-lm"
    assert len(program.ties) == tied
    weights = model.state_dict()
    for name, parameter in program.module.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    inputs = program.signature.probe()
    with torch.no_grad():
        torch.testing.assert_close(program(inputs)["logits"][0], model(**inputs).logits[0])


def test_a_gguf_tokenizer_goes_into_the_bundle(llama: Path, tmp_path: Path) -> None:
    program = capture(llama)
    found = tokenizer(program)
    ids = found("ab")["input_ids"]
    assert ids
    again = capture(save_bundle(program, tmp_path / "bundle"))
    assert (tmp_path / "bundle" / "tokenizer.json").is_file()
    assert tokenizer(again)("ab")["input_ids"] == ids


def test_a_saved_tokenizer_cuts_as_little_as_its_source(llama: Path, tmp_path: Path) -> None:
    program = capture(llama)
    save_bundle(program, tmp_path / "before")
    tokenizer(program)(["ab"], truncation=True, max_length=1)
    save_bundle(program, tmp_path / "after")
    before, after = ((tmp_path / n / "tokenizer.json").read_text() for n in ("before", "after"))
    assert before == after and json.loads(after)["truncation"] is None


def test_damaged_gguf(llama: Path, tmp_path: Path) -> None:
    data = llama.read_bytes()
    file = tmp_path / "model.gguf"
    for length in (3, 30, 200, 3000, len(data) - 500):
        file.write_bytes(data[:length])
        refused(lambda: capture(file), "model.gguf")
    file.write_bytes(b"GGML" + data[4:])
    refused(lambda: capture(file), "model.gguf")
    file.write_bytes(data[:4] + struct.pack("<I", 9) + data[8:])
    refused(lambda: capture(file), "version 9")


def test_a_truncated_gguf_is_told_by_its_size(llama: Path, tmp_path: Path) -> None:
    """Before anything of it is read: how many bytes there are, and how many there should be."""
    data, file = llama.read_bytes(), tmp_path / "model.gguf"
    file.write_bytes(data[:-1])
    refused(lambda: capture(file), "truncated", f"{len(data) - 1:,} bytes", f"{len(data):,}")


def test_gguf_without_the_package(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(lambda: capture(llama), "pip install 'ftc[gguf]'")


def test_a_gguf_file_without_a_usable_vocabulary(llama: Path, tmp_path: Path) -> None:
    """The model is captured and saved; a note says that text will not work."""
    data = llama.read_bytes().replace(b"gpt2", b"gptx")
    (tmp_path / "tiny.gguf").write_bytes(data)
    program = capture(tmp_path)
    refused(lambda: tokenizer(program), "tokenizer")
    again = capture(save_bundle(program, tmp_path / "bundle"))
    assert any("without a tokenizer" in note for note in again.notes)
    assert tokenizer(again) is None
    data = data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.nokens")
    (tmp_path / "tiny.gguf").write_bytes(data)
    assert tokenizer(tmp_path / "tiny.gguf") is None


def test_an_architecture_nobody_knows(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(llama.read_bytes().replace(b"llama", b"lhasa"))
    refused(lambda: capture(file), "lhasa", "safetensors")


def test_two_gguf_files(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama, tmp_path / "a.gguf")
    shutil.copy(llama, tmp_path / "b.gguf")
    refused(lambda: capture(tmp_path), "a.gguf", "b.gguf")
