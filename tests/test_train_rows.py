"""``ftc train``: rows, labels and columns that data may have, and those that are named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftc.graph.errors import UsageError
from ftc.runtime.training.run import train

from .conftest import Command
from .small import SPECIAL, WORDS, encoder
from .training import config, own_cache, place  # noqa: F401


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": "a cat"}', "no 'label'"), ('{"text": "a cat", "label": null}', "no label"),
     ('{"text": " ", "label": "pos"}', "empty"),
     ('{"text": "a cat", "label": 0.5}', "0.5"), ('{"text": "a cat", "label": "odd"}', "3 labels")],
)  # fmt: skip
def test_a_bad_row_stops_before_training(
    place: Path, tmp_path: Path, command: Command, line: str, message: str
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text((place / "s.jsonl").read_text() + line + "\n")
    ran = command("train", place / "cls", "--data", data, "--objective",
                  "sequence-classification", "-o", tmp_path / "out")  # fmt: skip
    assert ran.status == 2 and message in ran.err
    assert not (tmp_path / "out").exists() and "Traceback" not in ran.err
    assert f"{data}:49" in ran.err
    given = config(place / "cls", place / "s.jsonl", "sequence-classification", tmp_path / "out")
    assert train(dataclasses.replace(given, steps=1)).steps == 1, "what was refused blocks nothing"


@pytest.mark.parametrize(
    ("model", "objective", "column"),
    [("cls", "sequence-classification", "label"), ("number", "regression", "label"),
     ("words", "token-classification", "words"),
     ("causal", 'prompt{template="{text} {second}"}', "second")],
)  # fmt: skip
def test_a_missing_column_is_named_with_those_there(
    place: Path, tmp_path: Path, model: str, objective: str, column: str
) -> None:
    row = {"text": "a cat", "stars": "5", **({"label": "x"} if column == "second" else {})}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "a.txt").write_text("a cat\n")
    with pytest.raises(UsageError, match=f"no '{column}'") as caught:
        train(config(place / model, tmp_path / "a.jsonl", objective, tmp_path / "out"))
    assert "read as jsonl" in str(caught.value) and "stars" in str(caught.value.fix)
    assert f"--columns {column}=NAME" in str(caught.value.fix)
    with pytest.raises(UsageError, match="read as text") as caught:
        train(config(place / model, tmp_path / "a.txt", objective, tmp_path / "out"))
    assert "give JSONL or CSV" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("model", "row"),
    [("cls", {"text": "a cat", "label": "pos"}), ("words", {"words": ["cat"], "labels": ["O"]})],
)
def test_one_label_is_too_few(place: Path, tmp_path: Path, model: str, row: dict[str, Any]) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps(row) + "\n")
    objective = "token-classification" if model == "words" else "sequence-classification"
    with pytest.raises(UsageError, match="nothing to tell apart") as caught:
        train(config(place / model, data, objective, tmp_path / "out"))
    assert f"{data}:1" in str(caught.value) and "head{" not in str(caught.value)


def test_an_unknown_label_in_the_evaluation_is_named(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "eval.jsonl"
    other.write_text('{"text": "a cat", "label": "poss"}\n')
    given = config(place / "cls", place / "s.jsonl", "sequence-classification", tmp_path / "out",
                   eval=str(other))  # fmt: skip
    with pytest.raises(UsageError, match="did you mean pos") as caught:
        train(given)
    assert f"{other}:1" in str(caught.value)


def test_the_same_bytes_in_another_format_are_other_examples(place: Path, tmp_path: Path) -> None:
    content = "text\nthe cat runs\na dog sits\n"
    examples = []
    for name in ("a.csv", "a.txt", "a.CSV", "a.csv"):
        (tmp_path / name).write_text(content)
        given = config(place / "mlm", tmp_path / name, "mlm", "", length=8, steps=0)
        (note,) = (note for note in train(given).notes if " example" in note)
        examples.append(note.partition(": ")[2])
    assert examples[0] != examples[1] and "encoded" in examples[1]
    assert examples[2] == examples[3] == examples[0].replace("encoded", "from the cache")


def test_words_are_learned_under_the_names_that_the_model_has(tmp_path: Path) -> None:
    import transformers

    names = {0: "O", 1: "PER", 2: "LOC"}
    head = "BertForTokenClassification"
    source = encoder(tmp_path / "model", head, id2label=names, num_labels=3)
    words, labels = ["the", "cat", "runs", "on"], ["O", "PER", "O", "LOC"]
    data = tmp_path / "w.jsonl"
    data.write_text(json.dumps({"words": words, "labels": labels}) + "\n")
    given = config(source, data, "token-classification", tmp_path / "out", steps=0)
    ids = torch.tensor([[len(SPECIAL) + WORDS.index(word) for word in words]])
    targets = torch.tensor([list(names.values()).index(label) for label in labels])
    with torch.no_grad():
        scores = getattr(transformers, head).from_pretrained(source).eval()(ids).logits[0]
    before = train(given).before
    assert before is not None
    assert before["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(scores, targets)), rel=1e-4
    )
    data.write_text(json.dumps({"words": words, "labels": ["O", "PERS", "O", "O"]}) + "\n")
    with pytest.raises(UsageError, match="unknown label 'PERS'") as caught:
        train(given)
    assert f"{data}:1" in str(caught.value) and "did you mean PER" in str(caught.value)


def test_names_of_a_datasets_classes_are_the_labels(place: Path, tmp_path: Path) -> None:
    """In the order of their numbers, or, where the model has names, in the model's."""
    import datasets

    texts, names = ["the cat runs", "a dog sits", "it is good"], ["pos", "neg"]
    features = {"text": datasets.Value("string"), "stars": datasets.ClassLabel(names=names)}
    rows = {"text": texts, "stars": [0, 1, 0]}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).save_to_disk(tmp_path / "data")
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"text": text, "stars": names[n]}) + "\n"
        for text, n in zip(texts, rows["stars"], strict=True)
    ))  # fmt: skip
    named = encoder(tmp_path / "named", "BertForSequenceClassification", num_labels=2,
                    id2label={0: "neg", 1: "pos"})  # fmt: skip
    for source, order in ((place / "cls", names), (named, ["neg", "pos"])):
        given = config(source, tmp_path / "data", "sequence-classification", tmp_path / "out",
                       steps=1, columns="label=stars")  # fmt: skip
        report = train(given, force=True)
        stored = json.loads((tmp_path / "out/config.json").read_text())["id2label"]
        assert [stored[str(i)] for i in range(2)] == order
    again = dataclasses.replace(given, data=str(tmp_path / "a.jsonl"))
    assert train(again, force=True).first_loss == report.first_loss


def test_data_and_metrics_that_are_not_there_are_named(place: Path, tmp_path: Path) -> None:
    given = {"program": place / "cls", "data": place / "s.jsonl", "out": tmp_path / "out",
             "objective": "sequence-classification"}  # fmt: skip
    with pytest.raises(UsageError, match="did you mean accuracy"):
        train(config(**given, eval="0.3", metric="accurracy", patience=1))
    for change in ({"data": tmp_path / "no.jsonl"}, {"eval": str(tmp_path / "no.jsonl")}):
        with pytest.raises(UsageError, match=r"no\.jsonl is not there"):
            train(config(**{**given, "program": "nowhere", **change}))


def test_labels_that_no_row_has_are_noted(place: Path, tmp_path: Path) -> None:
    rows = [{"text": "the cat runs", "label": str(i % 2)} for i in range(8)]
    data = tmp_path / "two.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for labels, noted in ((3, True), (2, False)):
        given = config(place / "mlm", data, "sequence-classification", tmp_path / str(labels),
                       steps=1, passes=f"head{{labels={labels}}}")  # fmt: skip
        notes = train(given).notes
        assert noted == any("1 of the program's 3 labels is in no row" in note for note in notes)
