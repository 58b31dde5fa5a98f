"""What is said of inputs that do not fit: texts too long, ids unknown, files of another kind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from .conftest import Command
from .small import encoder, short_decoder

LONG = "the cat sits " * 40  # 120 tokens; the encoder takes 64, the decoder 16


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """Bundles of a model of each kind, by the name of its kind."""
    root = tmp_path_factory.mktemp("answers")
    heads = {"embedding": "BertModel", "masked": "BertForMaskedLM",
             "label": "BertForSequenceClassification"}  # fmt: skip
    models = {kind: encoder(root / f"{kind}-model", head) for kind, head in heads.items()}
    models["causal"] = short_decoder(root / "causal-model")
    for kind, model in models.items():
        ran = command("compile", model, "--passes", "cleanup", "-o", root / kind)
        assert ran.status == 0, ran.err
    return root


def test_an_embedding_is_the_same_alone_and_in_a_batch(
    bundles: Path, tmp_path: Path, command: Command
) -> None:
    model, out = bundles / "embedding-model", tmp_path / "out"
    assert command("compile", model, "--passes", "int8{min_size=16}", "-o", out).status == 0
    texts = [word for text in ("a cat", LONG, "the dog") for word in ("--text", text)]
    alone, batch = (np.array(command("run", out, *call, "--json").data["embeddings"])
                    for call in (texts[:2], texts))  # fmt: skip
    assert np.allclose(alone[0], batch[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "label"])
def test_a_text_that_is_cut_is_said_to_be(bundles: Path, kind: str, command: Command) -> None:
    call = ("run", bundles / kind, "--text", "a cat", "--text", LONG)
    (note,) = command(*call, "--json").data["notes"]
    assert note.startswith("text 2 has 120 tokens") and "takes 64" in note
    assert " ".join(note.split()) in " ".join(command(*call).out.split())
    assert not command("run", bundles / kind, "--text", "a cat", "--json").data["notes"]


def test_a_gap_that_is_cut_off_is_refused(bundles: Path, command: Command) -> None:
    ran = command("run", bundles / "masked", "--text", f"{LONG} [MASK]")
    assert ran.status == 2 and "within the 64 tokens" in ran.err and not ran.out
    ran = command("run", bundles / "masked", "--text", f"[MASK] {LONG}", "--json")
    assert ran.data["labels"][0] and "120" not in ran.data["texts"]
    assert "121 tokens" in ran.data["notes"][0]


def test_a_text_with_no_room_for_an_answer_is_refused(bundles: Path, command: Command) -> None:
    """And is not printed as if one came."""
    ran = command("run", bundles / "causal", "--text", LONG)
    assert ran.status == 2 and "120 tokens" in ran.err and "16" in ran.err and not ran.out
    room = "the cat sits " * 5  # 15 tokens: one is left
    ran = command("run", bundles / "causal", "--text", room)
    assert ran.status == 0 and ran.out.startswith(room)


def test_evaluation_counts_what_it_cut(bundles: Path, tmp_path: Path, command: Command) -> None:
    data = tmp_path / "rows.txt"
    call = ("eval", bundles / "embedding", "--data", data, "--metric", "cosine", "--against",
            bundles / "embedding-model", "--json")  # fmt: skip
    data.write_text(f"a cat\n\n{LONG}")
    assert command(*call).data["data"] == "rows.txt: 2 texts, 1 of them cut at 64 tokens"
    data.write_text("a cat")
    assert command(*call).data["data"] == "rows.txt: 1 text"


@pytest.mark.parametrize("engine", ["onnx", "torch"])
@pytest.mark.parametrize("wrong", [999, -99])
def test_an_id_beyond_the_vocabulary_is_named(
    bundles: Path, tmp_path: Path, wrong: int, engine: str, command: Command,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ids, ones = np.array([[1, wrong, 2]]), np.ones((1, 3), np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ids, attention_mask=ones, token_type_ids=0 * ones)
    ran = command("run", bundles / "embedding", "--input", tmp_path / "x.npz", "--engine", engine)
    assert ran.status == 2 and f"input_ids holds {wrong}" in ran.err and "0 to 24" in ran.err
    assert not capfd.readouterr().err  # onnxruntime prints below Python


def test_too_many_positions_are_not_taken_for_a_wrong_id(
    bundles: Path, tmp_path: Path, command: Command
) -> None:
    ones = np.ones((1, 99), np.int64)
    np.savez(tmp_path / "x.npz", input_ids=ones, attention_mask=ones, token_type_ids=0 * ones)
    ran = command("run", bundles / "embedding", "--input", tmp_path / "x.npz")
    assert ran.status == 2 and "[1, 99]" in ran.err and "holds" not in ran.err


def test_evaluation_without_a_tokenizer_names_what_it_has(
    bundles: Path, tmp_path: Path, command: Command
) -> None:
    model = shutil.copytree(bundles / "embedding-model", tmp_path / "model",
                            ignore=shutil.ignore_patterns("token*"))  # fmt: skip
    data = tmp_path / "rows.txt"
    data.write_text("a cat")
    for pair in ((model, bundles / "embedding-model"), (bundles / "embedding", model)):
        ran = command("eval", pair[0], "--data", data, "--metric", "cosine", "--against", pair[1])
        assert ran.status == 2 and "tokenizer.json" in ran.err and "--input" not in ran.err


def test_a_text_that_is_a_number_is_shown(bundles: Path, tmp_path: Path, command: Command) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a cat"}\n{"text": 3}\n')
    ran = command("eval", bundles / "embedding", "--data", data, "--metric", "cosine",
                  "--against", bundles / "embedding-model")  # fmt: skip
    assert ran.status == 2 and '"text" is 3' in ran.err and "rows.jsonl:2" in ran.err
    assert '"text": "3"' in ran.err


@pytest.mark.parametrize("threads", [0, -1, 999_999])
def test_threads_beyond_the_machine_are_refused_with_its_cores(
    threads: int, command: Command
) -> None:
    ran = command("run", "no/such", "--text", "x", "--threads", threads)
    assert ran.status == 2 and str(threads) in ran.err
    assert f"this machine has {os.cpu_count()} core" in ran.err
