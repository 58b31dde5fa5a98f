"""What a run refuses before its first step, and what of its options it says had no effect."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftc.graph.bundle import save_bundle
from ftc.graph.errors import UsageError
from ftc.graph.sources import capture
from ftc.passes.pipeline import Pipeline
from ftc.runtime.training.config import TrainConfig
from ftc.runtime.training.data.table import Table
from ftc.runtime.training.objectives.causal import Causal
from ftc.runtime.training.objectives.masked import mask_tokens
from ftc.runtime.training.run import train
from ftc.runtime.training.start import CONFIG, rounding, run_folder
from ftc.runtime.training.toml_file import read_config

from .small import decoder, encoder
from .training import config, prose, sentences


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Programs by what they say, and texts."""
    place = tmp_path_factory.mktemp("said")
    made = {"mlm": encoder(place / "m"), "lm": decoder(place / "d"),
            "two": encoder(place / "two", "BertForSequenceClassification", num_labels=2),
            "three": encoder(place / "three", "BertForSequenceClassification", num_labels=3),
            "thin": encoder(place / "thin", hidden_dropout_prob=0.0)}  # fmt: skip
    for name, source in made.items():
        save_bundle(capture(source), place / f"{name}.program")
    found = {name: place / f"{name}.program" for name in made}
    return {**found, "rows": sentences(place / "s.jsonl"), "prose": prose(place / "p.txt")}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_one_number_is_learned_from_a_teacher(tmp_path: Path, models: dict[str, Path]) -> None:
    """It is no distribution, whose divergence from another of one column is 0."""
    head = "BertForSequenceClassification"
    student = encoder(tmp_path / "m", head, num_labels=1)
    other = Pipeline.parse("lowrank{rank=1}").run(capture(student)).program
    save_bundle(other, tmp_path / "teacher")
    given = config(student, models["rows"], "distillation", tmp_path / "out",
                   teacher=str(tmp_path / "teacher"))  # fmt: skip
    report = train(given)
    assert report.first_loss is not None and report.first_loss > 1e-4


def test_what_this_torch_cannot_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    again: dict[str, Any] = {"compile": True, "gradient_checkpointing": True}
    for options, words in (({"device": "tpu"}, "no device"), ({"device": "meta"}, "no device"),
                           (again, "computed again")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            train(config(models["mlm"], models["rows"], "mlm", tmp_path / "out", **options))


def test_a_program_with_a_cache_is_trained_before_it(
    models: dict[str, Path], tmp_path: Path
) -> None:
    cached = Pipeline.parse("cache").run(capture(decoder(tmp_path / "m"))).program
    save_bundle(cached, tmp_path / "program")
    with pytest.raises(UsageError, match="has a cache"):
        train(config(tmp_path / "program", models["prose"], "clm", tmp_path / "out"))


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [("mlm", "two", None), ("two", "three", r"\[…, 2\].*\[…, 3\]")],
)
def test_a_teacher_says_what_can_be_compared(
    student: str, teacher: str, words: str | None, models: dict[str, Path], tmp_path: Path
) -> None:
    given = config(models[student], models["rows"], "distillation", tmp_path / "out",
                   teacher=str(models[teacher]))  # fmt: skip
    with pytest.raises(UsageError, match=words or "output") as caught:
        train(given)
    assert caught.value.fix and not run_folder(given).joinpath("data.json").exists()


def test_layers_of_another_width_are_not_compared(models: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    made = transformers.BertConfig.from_pretrained(models["mlm"])
    made.update({"hidden_size": 16, "intermediate_size": 24})
    folder = encoder(tmp_path / "narrow")
    transformers.BertForMaskedLM(made).save_pretrained(folder)
    given = config(models["mlm"], models["rows"], "distillation{hidden=1.0}", tmp_path / "out",
                   teacher=str(folder))  # fmt: skip
    with pytest.raises(UsageError, match="width 32, the teacher's 16"):
        train(given)


def test_distillation_says_what_it_cuts(models: dict[str, Path], tmp_path: Path) -> None:
    given = config(models["mlm"], models["prose"], "distillation", tmp_path / "out", length=8)
    report = train(given, dry_run=True)
    assert any("fill all 8 tokens" in note for note in report.notes)


def test_less_text_than_a_row(models: dict[str, Path], tmp_path: Path) -> None:
    """It is a shorter row where a mask says so, and refused where none can."""
    data = tmp_path / "short.txt"
    data.write_text("the cat")
    given = config(models["lm"], data, "clm", tmp_path / "out", length=64, steps=1, batch=1)
    assert any("1 example" in note for note in train(given, dry_run=True).notes)
    table = Table.of(iter([{"ids": [5, 6], "starts": [1, 0]}]), {})
    scene: Any = SimpleNamespace(encoder=SimpleNamespace(length=64, masked=False))
    with pytest.raises(UsageError, match="less than one row of 64"):
        Causal().arrange(table, scene)


@pytest.mark.parametrize("objective", ["mlm", "sequence-classification"])
def test_only_distillation_has_a_teacher(objective: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{objective} has no teacher"):
        config(tmp_path, tmp_path, objective, tmp_path, teacher="x")


def test_options_without_effect_are_said(models: dict[str, Path], tmp_path: Path) -> None:
    given = config(models["mlm"], models["rows"], "mlm", tmp_path / "out", warmup=9.0, steps=3,
                   microbatches=2, pipeline="gpipe", passes="freeze{train=norm}")  # fmt: skip
    notes = " ".join(train(given, dry_run=True).notes)
    assert "warmup=9 is not shorter than the run of 3 steps" in notes
    assert "microbatches=2 is of a mesh" in notes and "pipeline=gpipe is of a mesh" in notes
    assert "freeze: " in notes  # what the passes chose, too
    quiet = config(models["mlm"], models["rows"], "mlm", tmp_path / "out", steps=3)
    assert not any("warmup" in n or "mesh" in n for n in train(quiet, dry_run=True).notes)


def test_a_run_that_goes_on_otherwise_says_so(tmp_path: Path) -> None:
    before = config(tmp_path, tmp_path, "mlm", tmp_path / "out", threads=1)
    run_folder(before).mkdir()
    (run_folder(before) / CONFIG).write_text(before.to_toml())
    assert rounding(before) == []
    values = {**read_config(run_folder(before) / CONFIG), "threads": 2, "mesh": "dp=2"}
    said = rounding(TrainConfig.of(values))
    assert len(said) == 2 and all("up to rounding" in each for each in said)


def test_a_new_head_that_stays_random_is_said(models: dict[str, Path]) -> None:
    program = capture(models["mlm"])
    for passes, told in (("head{labels=2},freeze{train=ffn}", True), ("lora,freeze", False),
                         ("head{labels=2},freeze{train=ffn|head}", False),
                         ("lora,freeze{train=norm}", True)):  # fmt: skip
        notes = Pipeline.parse(passes).run(program).records[-1].notes
        assert any("as a pass began them" in note for note in notes) == told, passes


def test_rows_behind_the_limit_are_not_read(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [json.dumps({"text": "the cat sits"})] * 4 + ["{broken"]
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(rows))
    call: dict[str, Any] = {"steps": 1, "batch": 2}
    given = config(models["mlm"], data, "mlm", tmp_path / "out", limit=4, **call)
    assert train(given, dry_run=True).notes
    with pytest.raises(UsageError, match=r"d\.jsonl:5"):
        train(config(models["mlm"], data, "mlm", tmp_path / "out", **call), dry_run=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "no words"), (["the", " "], "word 2 is ' '"), ([None], "word 1 is None")],
)
def test_words_are_words(
    words: list[Any], said: str, models: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "w.jsonl"
    data.write_text(json.dumps({"words": words, "labels": ["a"] * len(words)}))
    given = config(models["mlm"], data, "token-classification", tmp_path / "out",
                   passes="head{labels=2,task=token-classification}")  # fmt: skip
    with pytest.raises(UsageError, match=said):
        train(given, dry_run=True)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=9), st.integers(0, 99))
def test_a_row_with_words_has_a_target(words: list[int], seed: int) -> None:
    class Scene:
        class encoder:
            vocabulary = 50

            @staticmethod
            def special(name: str) -> int:
                return 4

    made = torch.Generator().manual_seed(seed)
    ids = torch.arange(10, 10 + len(words))
    _, targets = mask_tokens(ids, torch.tensor(words), 0.01, Scene, made)  # type: ignore[arg-type]
    chosen = targets != -100
    assert chosen.any() == any(word >= 0 for word in words)
    assert {word for word, c in zip(words, chosen, strict=True) if c and word < 0} == set()
