"""``ftc train`` from the command line: objectives, configuration, faults, and what is shipped."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ftc.cli import ftc as cli
from ftc.graph.bundle import load_bundle
from ftc.graph.errors import UsageError
from ftc.runtime.training.config import TrainConfig
from ftc.runtime.training.data.encoder import Encoder
from ftc.runtime.training.data.order import generator
from ftc.runtime.training.data.rows import Row
from ftc.runtime.training.data.table import Table
from ftc.runtime.training.objectives import OBJECTIVES, Scene, parse_objective
from ftc.runtime.training.run import train

from .conftest import Command
from .small import SPECIAL, encoder
from .training import config, own_cache, place  # noqa: F401

MASK = SPECIAL.index("[MASK]")


RUNS = [
    ("cls", "s.jsonl", "sequence-classification", {}),
    ("number", "s.jsonl", "regression", {"columns": "label=score"}),
    ("words", "w.jsonl", "token-classification", {}),
    ("mlm", "p.txt", "mlm", {"length": 32, "gradient_checkpointing": True}),
    ("mlm", "p.txt", "mlm{whole_word}", {"length": 32, "accumulate": 2}),
    ("pair", "p.txt", "pretraining", {"length": 32}),
    ("causal", "p.txt", "clm", {"length": 32}),
    ("mlm", "s.jsonl", "distillation{hidden=1.0}", {"passes": "lowrank{ratio=0.5}"}),
    ("causal", "s.jsonl", 'prompt{template="{text} is",words="neg=bad|pos=good"}', {}),
    ("mlm", "s.jsonl", 'prompt{template="{text} is {mask}",words="neg=bad|pos=good"}', {}),
]


@pytest.mark.parametrize(("model", "data", "objective", "more"), RUNS)
def test_every_objective_learns(
    place: Path, tmp_path: Path, model: str, data: str, objective: str, more: dict[str, Any]
) -> None:
    given = config(place / model, place / data, objective, tmp_path / "out", steps=24,
                   learning_rate=5e-3, log_every=1, **more)  # fmt: skip
    report = train(given)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert not any("loss_loss" in line for line in lines)
    assert len(losses) == 24 and sum(losses[-8:]) < 0.95 * sum(losses[:8])
    assert report.steps == 24 and report.tokens > 0


def test_what_was_trained_is_what_ships(place: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    ran = command("train", place / "source/cls", "--data", place / "s.jsonl", "--objective",
                  "sequence-classification", "-o", out, "--eval", place / "s.jsonl",
                  "--epochs", 40, "--batch", 8, "--learning-rate", 3e-3, "--json")  # fmt: skip
    assert ran.status == 0, ran.err
    assert ran.data["after"]["accuracy"] > 0.9 > ran.data["before"]["accuracy"]
    assert load_bundle(out).history[-1].spec.startswith("train{")
    assert (out / "loss.png").stat().st_size > 1000
    exported = command("export", out, "-o", tmp_path / "m.onnx", "--json")
    assert exported.status == 0 and exported.data["drift"]["max_abs"] < 1e-4
    evaluated = command("eval", out, "--data", place / "s.jsonl", "--metric", "accuracy",
                        "--engine", "torch", "--json")  # fmt: skip
    assert evaluated.data["value"] > 0.9, "the bundle keeps the names of the labels"
    again = command("train", "--config", out / "train.toml", "-o", tmp_path / "again", "--json")
    assert again.status == 0, again.err
    weights = [p / "model.safetensors" for p in (out, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_only_what_learns_changes(place: Path, tmp_path: Path) -> None:
    before = load_bundle(place / "causal")
    given = config(place / "causal", place / "p.txt", "clm", tmp_path / "out", length=32, steps=2,
                   passes='freeze{train="ffn"}')  # fmt: skip
    train(given)
    after = load_bundle(tmp_path / "out")
    for name, parameter in after.module.named_parameters():
        same = torch.equal(parameter, before.tensor(name))
        assert same != parameter.requires_grad, name


def test_patience_stops_and_keeps_the_best(place: Path, tmp_path: Path) -> None:
    given = config(place / "cls", place / "s.jsonl", "sequence-classification", tmp_path / "out",
                   eval="0.3", steps=400, evaluate_every=5, patience=2,
                   learning_rate=2e-2)  # fmt: skip
    report = train(given)
    assert report.steps < 400 and report.best_step == report.steps - 10
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    found = {
        r["step"]: r["evaluation"]["loss"] for r in map(json.loads, lines) if "evaluation" in r
    }
    assert report.after["loss"] == pytest.approx(found[report.best_step])
    assert found[report.best_step] == min(found.values())


def test_scoring_changes_and_writes_nothing(place: Path, tmp_path: Path, command: Command) -> None:
    prompt = 'prompt{template="{text} is",words="neg=bad|pos=good cat"}'
    ran = command("train", place / "causal", "--steps", 0, "--data", place / "s.jsonl",
                  "--objective", prompt, "--json")  # fmt: skip
    assert ran.status == 0, ran.err
    assert 0 <= ran.data["before"]["accuracy"] <= 1 and ran.data["steps"] == 0


def test_a_dry_run_computes_a_step_and_writes_nothing(
    place: Path, tmp_path: Path, command: Command
) -> None:
    call = ("train", place / "cls", "--data", place / "s.jsonl", "--objective",
            "sequence-classification", "-o", tmp_path / "out", "--eval", "0.25", "--batch", 8,
            "--epochs", 2, "--length", 8, "--dry-run", "--json")  # fmt: skip
    ran = command(*call)
    assert ran.status == 0, ran.err
    assert (ran.data["steps"], ran.data["planned"]) == (0, 10)
    assert ran.data["first_loss"] > 0 and "10 steps of 8 examples" in ran.data["notes"][-1]
    assert any("fill all 8 tokens" in note for note in ran.data["notes"])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()
    for more, message in (
        (("--metric", "accurracy"), "did you mean accuracy"),
        (("--passes", "lora{target=atention}"), "did you mean attention"),
        (("--passes", "freeze{train=none}"), "freeze{train=all}"),
        (("--resume",), "leave --resume out"),
        (("--bucket", "--passes", "prefix{tokens=64}"), "use fewer than 64"),
    ):
        ran = command(*call, *more)
        assert ran.status and message in ran.data["error"]["fix"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "mlx"}, "did you mean mlm"),
        ({"objective": "mlm{shar=0.1}"}, "did you mean share"),
        ({"lerning_rate": 1.0}, "did you mean learning_rate"),
        ({"batch": "many"}, "a whole number"),
        ({"batch": 0}, "1 or more"),
        ({"schedule": "linea"}, "linear, cosine, constant"),
        ({"learning_rate": 0}, "more than 0"),
        ({"patience": 2}, "--eval"),
        ({"device": "cuda"} if not torch.cuda.is_available() else {"batch": 0}, ""),
        ({"passes": "lor"}, "lora"),
        ({"out": ""}, "-o OUT"),
        ({"learning_rate": math.nan}, "more than 0"),
        ({"steps": -2}, "0 or more"),
        ({"weight_decay": -0.1}, "0 or more"),
        ({"beta2": 1.0}, "[0, 1)"),
        ({"tensorboard": __file__}, "a folder"),
        ({"columns": "review=text"}, "text=review"),
        ({"columns": "txet=review"}, "did you mean text"),
        ({"columns": "text=a,text=b"}, "twice"),
    ],
)
def test_a_wrong_configuration_is_refused_at_once(change: dict[str, Any], message: str) -> None:
    values = {"program": "p", "data": "d", "objective": "mlm", "out": "o"}
    with pytest.raises(UsageError) as caught:
        TrainConfig.of({**values, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("objective", "columns"),
    [("clm", "document=book"), ("regression", "label=stars,second=b"),
     ("distillation", "second=b"), ('prompt{template="{text} by {author}: "}', "author=name")],
)  # fmt: skip
def test_what_an_objective_may_read_can_be_renamed(objective: str, columns: str) -> None:
    values = {"program": "p", "data": "d", "objective": objective, "out": "o"}
    assert TrainConfig.of({**values, "columns": columns}).columns_map()


def test_a_program_that_does_not_fit_is_refused(place: Path, tmp_path: Path) -> None:
    for model, objective in (("mlm", "clm"), ("causal", "mlm"), ("cls", "regression"),
                             ("mlm", "sequence-classification"), ("causal", "nsp")):  # fmt: skip
        with pytest.raises(UsageError, match=objective):
            train(config(place / model, place / "s.jsonl", objective, tmp_path / "out"))


HEADS = [
    ("BertForNextSentencePrediction", None, "nsp", None),
    ("BertForSequenceClassification", None, "mlm", None),
    ("BertForPreTraining", "feature-extraction", "mlm", {"task": "masked-lm"}),
    ("BertModel", None, "token-classification",
     {"passes": "head{labels=2,task=token-classification}"}),
    ("BertForMaskedLM", None, "token-classification",
     {"passes": "head{labels=2,task=token-classification}"}),
]  # fmt: skip


@pytest.mark.parametrize(("head", "task", "objective", "fix"), HEADS)
def test_a_fix_names_heads_that_the_model_has(
    place: Path, tmp_path: Path, head: str, task: str | None, objective: str,
    fix: dict[str, str] | None,
) -> None:  # fmt: skip
    source = encoder(tmp_path / "model", head)
    data = "w.jsonl" if objective == "token-classification" else "p.txt"
    given = config(source, place / data, objective, "", task=task, length=32, steps=0)
    with pytest.raises(UsageError) as caught:
        train(given)
    said = str(caught.value.fix)
    if fix is None:
        assert "--task" not in said and "take a model" in said and "For" in said
    else:
        assert next(iter(fix.values())) in said
        assert train(dataclasses.replace(given, **fix)).before is not None


def test_every_key_is_an_option() -> None:
    options = {p.name for p in cli.get_command(None, "train").params}  # type: ignore[union-attr]
    keys = {field.name for field in dataclasses.fields(TrainConfig)}
    assert keys - options == {"beta1", "beta2", "epsilon"}
    assert options - keys == {"config", "resume", "dry_run", "force", "json", "debug"}


def test_the_help_says_the_defaults() -> None:
    params = {p.name: p for p in cli.get_command(None, "train").params}  # type: ignore[union-attr]
    for field in dataclasses.fields(TrainConfig):
        value = field.default
        if field.name in params and value not in (None, "") and not isinstance(value, bool):
            said = f"{value:g}" if isinstance(value, float) else str(value)
            assert f"; {said}" in params[field.name].help, field.name


def test_steps_or_epochs(command: Command, tmp_path: Path) -> None:
    ran = command("train", "p", "--data", "d", "--objective", "mlm", "-o", tmp_path / "out",
                  "--steps", 3, "--epochs", 2)  # fmt: skip
    assert ran.status == 2 and "give one of them" in ran.err
    settings = {"program": "p", "data": "d", "objective": "mlm", "out": "o", "steps": 3}
    made = TrainConfig.of({**settings, "epochs": 2.0}, "train.toml")
    assert made.total_steps(per_epoch=10) == 3


def _scene(place: Path, model: str, length: int = 16) -> Scene:
    program = load_bundle(place / model)
    return Scene(program, Encoder.of(program, length), ("neg", "pos"))


def test_masks_are_eighty_ten_ten(place: Path) -> None:
    scene, objective = _scene(place, "mlm"), parse_objective("mlm{share=0.3}")
    rows = [Row({"text": "the cat sits on the mat and it is good"}, "here")] * 400
    table = Table.of(objective.encode(rows, scene), {})

    def draw(index: int) -> torch.Generator:
        return generator(0, 0, index)

    batch = objective.batch(table, range(400), scene, draw)
    ids, targets = batch.inputs["input_ids"], batch.targets["tokens"]
    chosen = targets != -100
    counts = Counter[str]()
    counts["mask"] = int((ids[chosen] == MASK).sum())
    counts["same"] = int((ids[chosen] == targets[chosen]).sum())
    total, tokens = int(chosen.sum()), int(batch.inputs["attention_mask"].sum()) - 400
    assert abs(total / tokens - 0.3) < 0.02
    assert abs(counts["mask"] / total - 0.8) < 0.03 and abs(counts["same"] / total - 0.1) < 0.03
    assert not chosen[:, 6].any(), "special tokens, here [UNK] for `and`, are no targets"
    some = objective.batch(table, [7, 3], scene, draw)
    assert torch.equal(some.inputs["input_ids"][0], ids[7]), "masks hang on the example alone"


def test_no_token_is_predicted_over_a_border(place: Path) -> None:
    scene, objective = _scene(place, "causal", 8), parse_objective("clm")
    rows = [Row({"text": "the cat runs"}, "1"), Row({"text": "a dog sits on it"}, "2")]
    table = objective.arrange(Table.of(objective.encode(rows, scene), {}), scene)
    batch = objective.batch(table, range(len(table)), scene, lambda i: generator(i))
    ids, targets = batch.inputs["input_ids"][0], batch.targets["tokens"][0]
    end = scene.encoder.tokenizer.eos_token_id
    border = ids.tolist().index(end)
    assert targets[border] == -100 and targets[border - 1] == end
    inside = [i for i in range(7) if i != border]
    assert torch.equal(targets[inside], ids[[i + 1 for i in inside]])


def test_half_of_the_pairs_follow(place: Path) -> None:
    scene, objective = _scene(place, "pair", 20), parse_objective("nsp")
    rows = [Row({"text": f"{'the cat runs on the mat . ' * 8}"}, str(i)) for i in range(40)]
    table = objective.arrange(Table.of(objective.encode(rows, scene), {}), scene)
    batch = objective.batch(table, range(len(table)), scene, lambda i: generator(1, i))
    share = batch.targets["follows"].float().mean()
    assert len(table) > 100 and abs(share - 0.5) < 0.1
    types, mask = batch.inputs["token_type_ids"], batch.inputs["attention_mask"]
    assert (types.sum(1) > 2).all() and (types * (1 - mask) == 0).all()


def test_objectives_are_written_as_they_are_read() -> None:
    for name in OBJECTIVES:
        assert parse_objective(parse_objective(name).spec) == parse_objective(name)
