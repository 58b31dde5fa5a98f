"""Example inputs of folders: sizes of images, padding, decoders, and what cannot be guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftc.graph.errors import CaptureError, SourceError
from ftc.graph.sources import capture
from ftc.graph.sources.tokenizer import tokenizer

from .families import family
from .places import refused
from .small import encoder


def save(name: str, folder: Path) -> Any:
    return family(name).save(folder)


def write(folder: Path, name: str, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    save("resnet", folder)
    return folder


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 48}}, (32, 48)),
        ({"size": {"shortest_edge": 40}, "crop_size": 32, "do_center_crop": False}, (40, 40)),
        ({"size": 48}, (48, 48)),
        ({"size": {"longest_edge": 7}}, (224, 224)),
        (None, (224, 224)),
    ],
)
def test_the_size_of_images(resnet: Path, said: Any, size: tuple[int, int]) -> None:
    (resnet / "preprocessor_config.json").unlink(missing_ok=True)
    if said is not None:
        write(resnet, "preprocessor_config.json", said)
    program = capture(resnet)
    assert program.signature.inputs[0].shape == ("batch", 3, *size)
    assert f"{size[0]} x {size[1]}" in program.notes[0]


def test_a_size_that_the_model_has_is_its_own(tmp_path: Path) -> None:
    save("vit", tmp_path)
    write(tmp_path, "preprocessor_config.json", {"size": 48})
    program = capture(tmp_path)
    assert program.signature.inputs[0].shape == ("batch", 3, 16, 16)
    assert not program.notes


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_preprocessor(resnet: Path, content: str) -> None:
    write(resnet, "preprocessor_config.json", content)
    refused(lambda: capture(resnet), "preprocessor_config.json", "JSON")


def test_padding_comes_from_the_tokenizer(tmp_path: Path) -> None:
    model = save("gpt-neox-classes", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    write(tmp_path / "model", "config.json", {**config, "pad_token_id": None})
    refused(lambda: capture(tmp_path / "model"), "pad_token_id", "padding")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = encoder(tmp_path / "encoder") / name
        (tmp_path / "model" / name).write_bytes(source.read_bytes())
    program = capture(tmp_path / "model")
    assert "token 0, [PAD]" in program.notes[0]
    inputs = program.signature.probe()
    with torch.no_grad():
        torch.testing.assert_close(program(inputs)["logits"], model(**inputs).logits)


def test_a_decoder_s_length_is_its_own(tmp_path: Path) -> None:
    model = save("t5", tmp_path)
    program = capture(tmp_path)
    inputs = program.signature.probe(sequence=9, decoder_sequence=4)
    with torch.no_grad():
        expected = model(**inputs).logits
    assert expected.shape[:2] == (2, 4)
    torch.testing.assert_close(program(inputs)["logits"], expected)


def test_what_a_model_may_also_need_is_said(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16}  # fmt: skip
    words = {**size, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=words, vision_config={**size, "image_size": 8, "patch_size": 4})
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    refused(lambda: capture(tmp_path), "input_ids", "also takes pixel_values", kind=CaptureError)
    examples = {"input_ids": torch.arange(10).view(2, 5), "pixel_values": torch.randn(2, 3, 8, 8)}
    program = capture(tmp_path, examples=examples)
    with torch.no_grad():
        expected = model(**examples).logits_per_text
    torch.testing.assert_close(program(examples)["logits_per_text"], expected)


def test_sounds_are_captured_on_given_examples(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=[8], conv_stride=[5], conv_kernel=[10], num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(tmp_path)
    refused(lambda: capture(tmp_path), "input_values", "examples=")
    program = capture(tmp_path, examples={"input_values": torch.randn(2, 200)})
    assert program.signature.input_names == ("input_values",)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "NoSuch"}}', "\0\1"])
def test_damaged_tokenizers_are_named(tmp_path: Path, name: str, content: str) -> None:
    folder = encoder(tmp_path / "model")
    write(folder, name, content)
    try:
        tokenizer(folder)
    except SourceError as error:
        assert name in str(error)
        assert error.fix
    else:
        assert name == "tokenizer_config.json" and content.startswith('{"')
