"""Data and configurations of small runs, for the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ftc.graph.bundle import save_bundle
from ftc.graph.sources import capture
from ftc.runtime.training.config import TrainConfig

from .small import WORDS, decoder, encoder

PLACES = [w for w in WORDS if w.isalpha() and w not in ("good", "bad")]


def sentences(path: Path, count: int = 48, seed: int = 0) -> Path:
    """Sentences with the word ``good`` or ``bad`` somewhere, labelled ``pos`` and ``neg``."""
    made = random.Random(seed)
    rows = []
    for _ in range(count):
        good = made.random() < 0.5
        words = [*made.choices(PLACES, k=made.randint(3, 12)), "good" if good else "bad"]
        made.shuffle(words)
        rows.append({"text": " ".join(words), "label": "pos" if good else "neg",
                     "score": float(good)})  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prose(path: Path, paragraphs: int = 12, seed: int = 0) -> Path:
    """Paragraphs of sentences that repeat a pattern."""
    made = random.Random(seed)
    text = [
        " ".join(
            f"{' '.join(made.choices(PLACES, k=3))} the cat sits on the mat ." for _ in range(6)
        )
        for _ in range(paragraphs)
    ]
    path.write_text("\n\n".join(text) + "\n")
    return path


def config(program: Path, data: Path, objective: str, out: Path, **more: Any) -> TrainConfig:
    """A configuration of a few fast steps."""
    values = {"learning_rate": 1e-3, "batch": 8, "epochs": 1.0, **more}
    return TrainConfig.of(
        {"program": str(program), "data": str(data), "objective": objective, "out": str(out),
         **values}
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of small models, one for each kind of head, and data."""
    path = tmp_path_factory.mktemp("train")
    for name, head, options in (
        ("mlm", "BertForMaskedLM", {}),
        ("pair", "BertForPreTraining", {}),
        ("cls", "BertForSequenceClassification", {"num_labels": 2}),
        ("number", "BertForSequenceClassification", {"num_labels": 1}),
        ("words", "BertForTokenClassification", {"num_labels": 2}),
    ):
        save_bundle(capture(encoder(path / "source" / name, head, **options)), path / name)
    save_bundle(capture(decoder(path / "source/causal")), path / "causal")
    sentences(path / "s.jsonl")
    prose(path / "p.txt")
    rows = [{"words": ["the", "cat", "runs"], "labels": ["O", "N", "O"]}] * 8
    (path / "w.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Data is encoded anew in each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
