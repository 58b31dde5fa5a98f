"""Sources: every kind of place a model can be, and every way it can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ftc.graph.bundle import save_bundle
from ftc.graph.errors import CaptureError, FtcError, SourceError, UsageError
from ftc.graph.sources import capture
from ftc.graph.tokenizer import tokenizer

from .families import FAMILIES, Family, Mlp

BERT = next(f for f in FAMILIES if f.name == "bert")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    BERT.save(folder)
    return folder


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "model"))


def refused(call: Any, *words: str, kind: type[FtcError] = SourceError) -> FtcError:
    """The error of ``call``, which must speak of ``words``, and say what to do."""
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix
    return caught.value


# Folders of transformers


def test_ranges_limits_and_mask_come_from_the_model(bert: Path) -> None:
    signature = capture(bert).signature
    ids, mask, types = signature.inputs
    assert (ids.name, ids.high) == ("input_ids", 99)
    assert mask.role == "mask"
    assert (types.name, types.high) == ("token_type_ids", 2)
    assert signature.limits == {"sequence": 64}


def test_padding_rows_are_no_positions(tmp_path: Path) -> None:
    """RoBERTa's 66 rows hold 64 positions: so many run, one more is refused."""
    family = next(f for f in FAMILIES if f.name == "roberta")
    model = family.save(tmp_path)
    program = capture(tmp_path)
    assert program.signature.limits == {"sequence": 64}
    inputs = program.signature.probe(sequence=64)
    with torch.no_grad():
        torch.testing.assert_close(
            program(inputs)["last_hidden_state"][0], model(**inputs).last_hidden_state[0]
        )
    with pytest.raises(UsageError):
        program.signature.probe(sequence=65)


def test_rotary_positions_have_no_limit(tmp_path: Path) -> None:
    next(f for f in FAMILIES if f.name == "mistral").save(tmp_path)
    assert capture(tmp_path).signature.limits == {}


def test_shards(bert: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForMaskedLM.from_pretrained(bert)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(capture(tmp_path), capture(bert))
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    refused(lambda: capture(tmp_path), "model-00001-of", "index.json")


def test_tensors_only_pickle_is_read(bert: Path, copy: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    assert same(capture(copy), capture(bert))


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_pickled_objects_are_refused(copy: Path, tmp_path: Path, write: Any) -> None:
    (copy / "model.safetensors").unlink()
    write({"w": torch.ones(1), "x": Bomb(tmp_path / "trace")}, copy / "pytorch_model.bin")
    refused(lambda: capture(copy), "pytorch_model.bin", "safetensors")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".ckpt"])
def test_pickle_files_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    refused(lambda: capture(file), file.name, "pickle", "save_file(")
    refused(lambda: capture(tmp_path), file.name)
    assert not (tmp_path / "trace").exists()


def test_missing_folder_names_its_neighbour(bert: Path) -> None:
    refused(lambda: capture(bert.with_name("brt0")), "brt0", bert.name)


def test_no_network_without_a_hub_id(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    assert capture(bert).signature.inputs
    refused(lambda: capture("./org/model"))
    refused(lambda: capture(Path("org/model")))
    (tmp_path / "org").mkdir()
    refused(lambda: capture("org/model"))


def test_a_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(lambda: capture("no-such-org/no-such-model"), "no-such-org/no-such-model", "hub id")


def drop(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def config(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop("model.safetensors"), ["no weights"]),
        (drop("config.json"), ["model.safetensors", "config.json"]),
        (cut, ["model.safetensors", "truncated"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 4), ["model.safetensors", "4"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), ["model.safetensors"]),
        (lambda f: (f / "config.json").write_text('{"model_type": "be'), ["config.json", "JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json"]),
        (config(model_type="bertt"), ["config.json", "bertt", "bert"]),
        (config(model_type="mine", auto_map={"AutoModel": "mine.Mine"}), ["never run"]),
        (config(model_type=None), ["model_type"]),
        (config(hidden_size=64), ["shape"]),
        (config(num_hidden_layers=3), ["layer.2"]),
        (config(hidden_size="wide"), ["config.json"]),
    ],
)
def test_damaged_folders(copy: Path, damage: Any, words: list[str]) -> None:
    damage(copy)
    refused(lambda: capture(copy), *words)


def test_unknown_task_names_the_nearest(bert: Path) -> None:
    refused(lambda: capture(bert, task="masked-ml"), "masked-lm", kind=UsageError)
    refused(lambda: capture(bert, task="module"), "masked-lm", kind=UsageError)


def test_a_task_the_kind_of_model_has_not(bert: Path) -> None:
    refused(
        lambda: capture(bert, task="image-classification"), "feature-extraction", kind=UsageError
    )


def test_a_head_nobody_trained_is_refused(bert: Path) -> None:
    refused(
        lambda: capture(bert, task="sequence-classification"),
        "classifier.weight",
        "feature-extraction",
    )


def test_outputs_nobody_trained_are_dropped(bert: Path) -> None:
    """A masked language model has no pooler: its features are captured without."""
    program = capture(bert, task="feature-extraction")
    assert program.signature.output_names == ("last_hidden_state",)
    assert any("pooler_output" in note for note in program.notes)
    assert not any("pooler" in name for name, _ in program.tensors())
    assert program(program.signature.probe())


def test_an_encoder_decoder_gives_its_encoder(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    small = {
        "vocab_size": 99,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**small)).eval()
    model.save_pretrained(tmp_path)
    program = capture(tmp_path)
    inputs = program.signature.probe()
    with torch.no_grad():
        expected = model.encoder(**inputs).last_hidden_state
        torch.testing.assert_close(program(inputs)["last_hidden_state"][0], expected[0])
    assert len(program.notes) == 2


def test_kernels_that_a_config_names_are_not_fetched(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(attn_implementation="someone/kernel", _attn_implementation="someone/kernel")(copy)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("the network was used"))
    assert capture(copy).signature.task == "masked-lm"


def test_loading_is_silent(bert: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capture(bert)
    out, err = capfd.readouterr()
    assert not out and not err


def test_a_folder_without_a_tokenizer(bert: Path) -> None:
    program = capture(bert)
    assert program.assets == bert.resolve()
    assert tokenizer(program) is None


# Modules, factories, archives, bundles


def make_mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Mlp(), torch.randn(2, 12)


def test_modules_need_examples() -> None:
    refused(lambda: capture(Mlp()), "example", kind=UsageError)


FACTORY = """
import torch
from torch import nn

def good():
    torch.manual_seed(0)
    return nn.Linear(3, 4), {"input": torch.randn(2, 3)}

def bare():
    return nn.Linear(3, 4)

def bad():
    raise OSError("no such weights")

def odd():
    return 7

class maker:
    make = staticmethod(good)

number = 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factory_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return name


def test_factories(factory: str) -> None:
    program = capture(f"{factory}:good")
    assert program.signature.input_names == ("input",)
    assert program.signature.dims == ("batch",)
    assert same(program, capture(f"{factory}:maker.make"))
    assert capture(f"{factory}:bare", examples=torch.randn(2, 3)).signature == program.signature


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("god", ["god", "good"]),
        ("bad", ["OSError", "no such weights", ".py:13"]),
        ("odd", ["int", "nn.Module"]),
        ("number", ["number", "callable"]),
    ],
)
def test_wrong_factories(factory: str, name: str, words: list[str]) -> None:
    refused(lambda: capture(f"{factory}:{name}"), *words)


def test_a_factory_without_examples(factory: str) -> None:
    refused(lambda: capture(f"{factory}:bare"), "example", kind=UsageError)


def test_an_unknown_module() -> None:
    refused(lambda: capture("no_such_package.models:make"), "no_such_package")


def test_a_factory_whose_module_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_factory.py").write_text("x = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    refused(lambda: capture("broken_factory:make"), "ZeroDivisionError", "broken_factory.py:1")


def test_archives_only_with_trust(tmp_path: Path) -> None:
    model, x = make_mlp()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))
    path = tmp_path / "model.pt2"
    torch.export.save(exported, path)
    refused(lambda: capture(path), "--trust", "code")
    program = capture(path, trust=True)
    assert program.signature.dims == ("batch",)
    other = torch.randn(5, 12)
    with torch.no_grad():
        torch.testing.assert_close(program(x=other)["output"], model(other))
    path.write_bytes(b"PK nothing")
    refused(lambda: capture(path, trust=True), "model.pt2")


def test_bundles_are_sources(tmp_path: Path) -> None:
    model, x = make_mlp()
    program = capture(model, examples=x)
    path = save_bundle(program, tmp_path / "bundle")
    assert same(capture(path), program)
    assert same(capture(str(path), task="module"), program)
    refused(lambda: capture(path, task="causal-lm"), "module", kind=UsageError)


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors", "config.json", "notes.txt"])
def test_other_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_text("{}")
    refused(lambda: capture(tmp_path / "sub" / name), *(["sub"] if "config" not in name else []))


def test_an_empty_folder_and_one_too_far_up(bert: Path, tmp_path: Path) -> None:
    refused(lambda: capture(tmp_path), "no model")
    shutil.copytree(bert, tmp_path / "inner")
    refused(lambda: capture(tmp_path), "inner")


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x - 1


def test_a_model_that_does_not_trace_shows_its_line() -> None:
    error = refused(
        lambda: capture(Branch(), examples=torch.ones(2, 3)), "torch.where", kind=CaptureError
    )
    assert error.where and "if x.sum() > 0" in error.where


# GGUF


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


def test_two_gguf_files(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama, tmp_path / "a.gguf")
    shutil.copy(llama, tmp_path / "b.gguf")
    refused(lambda: capture(tmp_path), "a.gguf", "b.gguf")


def same(a: Any, b: Any) -> bool:
    """Whether two programs have one signature and one set of tensors."""
    left, right = dict(a.tensors()), dict(b.tensors())
    return (
        a.signature == b.signature
        and left.keys() == right.keys()
        and all(torch.equal(left[k], right[k]) for k in left)
    )


def test_families_cover_the_tasks() -> None:
    from ftc.graph.tasks import TASKS

    found = {f.task for f in FAMILIES if isinstance(f, Family)}
    assert found == set(TASKS)
