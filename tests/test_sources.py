"""Folders of transformers: what capture finds in them, and every way they can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from ftc.graph.errors import UsageError
from ftc.graph.sources import capture
from ftc.graph.sources.tokenizer import tokenizer

from .families import FAMILIES, Family, family
from .places import refused, same

BERT = family("bert")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    BERT.save(folder)
    return folder


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "model"))


def test_ranges_limits_and_mask_come_from_the_model(bert: Path) -> None:
    signature = capture(bert).signature
    ids, mask, types = signature.inputs
    assert (ids.name, ids.high) == ("input_ids", 99)
    assert mask.role == "mask"
    assert (types.name, types.high) == ("token_type_ids", 2)
    assert signature.limits == {"sequence": 64}


def test_padding_rows_are_no_positions(tmp_path: Path) -> None:
    """RoBERTa's 66 rows hold 64 positions: so many run, one more is refused."""
    model = family("roberta").save(tmp_path)
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
    family("mistral").save(tmp_path)
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


def test_missing_folder_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    refused(lambda: capture(tmp_path / "my-modle"), "my-modle", "my-model")


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


def test_half_precision_weights_are_computed_in_fp32(bert: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForMaskedLM.from_pretrained(bert).half()
    model.save_pretrained(tmp_path)
    program = capture(tmp_path)
    assert {p.dtype for p in program.module.parameters()} == {torch.float32}
    assert program.signature.outputs[0].dtype == torch.float32


def drop(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["cls.predictions.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, name: Any) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


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
        (config(hidden_size="wide"), ["config.json", "hidden_size"]),
        (config(hidden_act="nope"), ["nope"]),
        (spoil, ["NaN", "predictions"]),
        (lambda f: shard(f, 3), ["index.json", "3"]),
        (lambda f: shard(f, "../x"), ["index.json", "outside"]),
    ],
)
def test_damaged_folders(copy: Path, damage: Any, words: list[str]) -> None:
    damage(copy)
    refused(lambda: capture(copy), *words)


def test_weights_without_a_place_are_said(copy: Path) -> None:
    config(num_hidden_layers=1)(copy)
    (note,) = capture(copy).notes
    assert "no place" in note and "layer.1" in note


@pytest.mark.parametrize("named", ["Bert", [1], [], None])
def test_architectures_that_say_nothing(copy: Path, named: Any) -> None:
    config(architectures=named)(copy)
    assert capture(copy).signature.task == "feature-extraction"


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


def test_an_encoder_decoder_gives_its_encoder_for_features(tmp_path: Path) -> None:
    model = family("t5").save(tmp_path)
    program = capture(tmp_path, task="feature-extraction")
    inputs = program.signature.probe()
    with torch.no_grad():
        expected = model.encoder(**inputs).last_hidden_state  # type: ignore[operator]
        torch.testing.assert_close(program(inputs)["last_hidden_state"][0], expected[0])
    assert program.notes == ("an encoder-decoder model: captured its encoder",)


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


def test_families_cover_the_tasks() -> None:
    from ftc.graph.sources.tasks import TASKS

    found = {f.task for f in FAMILIES if isinstance(f, Family)}
    assert found == set(TASKS)
