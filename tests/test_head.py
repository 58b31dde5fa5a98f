"""Head: a classifier where the model's head was, on the states that its head read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftc.graph.body import token_states
from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.errors import FtcError, UsageError
from ftc.graph.mode import set_mode
from ftc.graph.observe import values
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.graph.structure import find_structure
from ftc.passes.head import Head
from ftc.passes.pipeline import Pipeline
from ftc.passes.text import parse_pass
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.conftest import Command
from ftc.tests.small import encoder
from ftc.tests.tiny import tiny

TEXT = ["bert", "bert-eager", "gpt2", "llama", "llama-eager", "cohere", "mixtral", "t5", "xlnet",
        "albert"]  # fmt: skip
CAUSAL = {"gpt2", "llama", "llama-eager", "cohere", "mixtral"}


def run(passes: str, model: str) -> Program:
    return Pipeline.parse(passes).run(tiny(model)).program


def states(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    node = token_states(program, find_structure(program))
    assert node is not None
    return values(program, inputs, [node])[node]


def padded(program: Program, lengths: list[int], side: str = "right") -> dict[str, Tensor]:
    """Random tokens of which each row shows ``lengths``."""
    width = max(lengths)
    inputs = program.signature.probe(batch=len(lengths), sequence=width)
    places = torch.arange(width)
    for row, length in enumerate(lengths):
        shown = places < length if side == "right" else places >= width - length
        inputs["attention_mask"][row] = shown.long()
    return inputs


@pytest.mark.parametrize("model", TEXT)
def test_states_are_what_the_head_reads(model: str) -> None:
    """The head's product of them, or they themselves, are the model's first output."""
    program = tiny(model)
    inputs = program.signature.probe()
    found = states(program, inputs)
    output = program(inputs)[program.signature.output_names[0]]
    if output.shape[-1] == found.shape[-1]:
        torch.testing.assert_close(found, output)
    else:  # Cohere multiplies its logits by a number
        (head,) = find_structure(program).roles["head"]
        logits = found @ program.tensor(head).T
        assert torch.cosine_similarity(logits.flatten(), output.flatten(), 0) > 1 - 1e-5


@pytest.mark.parametrize("pool", ["first", "mean", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", ["bert", "llama", "xlnet"])
def test_pooling_honours_the_mask(pool: str, side: str, model: str) -> None:
    before = tiny(model)
    after = Head(labels=3, pool=pool)(before).program
    inputs = padded(before, [5, 9, 1], side)
    mask, h = inputs["attention_mask"].bool(), states(before, inputs)
    rows = {
        "first": [row[0] for row in h],
        "mean": [row[shown].mean(0) for row, shown in zip(h, mask, strict=True)],
        "last": [row[shown][-1] for row, shown in zip(h, mask, strict=True)],
    }
    weight, bias = after.tensor("classifier.weight"), after.tensor("classifier.bias")
    expected = torch.stack(rows[pool]) @ weight.T + bias
    torch.testing.assert_close(after(inputs)["logits"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model", TEXT)
def test_what_the_pool_is_by_default(model: str) -> None:
    result = Head()(tiny(model))
    wanted = "last" if model in CAUSAL else "mean"
    assert result.record.notes[0].startswith(f"pooled: {wanted}")


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_tokens_are_classified_one_by_one(model: str) -> None:
    before = tiny(model)
    after = Head(labels=5, task="token-classification")(before).program
    inputs = padded(before, [4, 6])
    expected = states(before, inputs) @ after.tensor("classifier.weight").T
    torch.testing.assert_close(after(inputs)["logits"], expected, rtol=1e-4, atol=1e-6)
    assert after.signature.task == "token-classification"
    assert after.signature.outputs[0].shape == ("batch", "sequence", 5)


@pytest.mark.parametrize("base", ["", "int8{min_size=0},", "lora{target=product},"])
@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
def test_it_ships(base: str, model: str, tmp_path: Path) -> None:
    program = run(f"{base}head{{labels=3}}", model)
    assert program.signature.task == "sequence-classification"
    assert [(o.name, o.shape) for o in program.signature.outputs] == [("logits", ("batch", 3))]
    again = load_bundle(save_bundle(program, tmp_path / "bundle"))
    probes = [padded(program, [3, 8]), padded(program, [1])]
    for probe in probes:
        assert torch.equal(program(probe)["logits"], again(probe)["logits"])
    parity(again, OnnxSession(lower(again)), probes)


def test_the_old_head_is_gone_and_the_body_is_not() -> None:
    before = run("canonicalize", "bert")
    after = Pipeline.parse("head").run(before).program
    gone = {n for n, _ in before.tensors()} - {n for n, _ in after.tensors()}
    assert gone == {"pooler.dense.weight", "pooler.dense.bias"}
    assert find_structure(after).roles["head"] == {"classifier.weight", "classifier.bias"}


def test_a_classifier_gets_another_one_in_its_place(tmp_path: Path) -> None:
    program = capture(encoder(tmp_path, "BertForSequenceClassification", num_labels=3))
    assert program.tensor("classifier.weight").shape[0] == 3
    after = Pipeline.parse("head{labels=4}").run(program).program
    assert after.tensor("classifier.weight").shape[0] == 4
    inputs = padded(program, [3, 5])
    expected = states(program, inputs)
    torch.testing.assert_close(states(after, inputs), expected)
    assert Pipeline.parse("head{labels=3}").run(program).records[-1].drift is not None


def test_dropout_is_a_matter_of_the_mode() -> None:
    program = run("head{dropout=0.5}", "t5")
    inputs = padded(program, [6, 6])
    expected = program(inputs)["logits"]
    set_mode(program.module, training=True)
    program.module.recompile()
    assert not torch.equal(program(inputs)["logits"], expected)
    set_mode(program.module, training=False)
    program.module.recompile()
    assert torch.equal(program(inputs)["logits"], expected)


def test_it_learns() -> None:
    """A few steps on a frozen body bring the loss down, and gradients reach the head alone."""
    program = run("head{labels=2,dropout=0.0},freeze{train=head}", "bert")
    parameters = [p for p in program.module.parameters() if p.requires_grad]
    assert len(parameters) == 2
    inputs, labels = padded(program, [6] * 8), torch.tensor([0, 1] * 4)
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(program(inputs)["logits"], labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_lora_trains_a_new_head_too() -> None:
    program = run("head{labels=3},lora", "llama")
    trained = {n for n, p in program.module.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} < trained


@pytest.mark.parametrize(
    "options", ["labels=0", "dropout=1", "pool=second", "task=token-classification,pool=mean"]
)
def test_impossible_options_are_refused(options: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pass(f"head{{{options}}}")
    assert caught.value.fix


@pytest.mark.parametrize("model", ["vit", "cnn", "mlp", "written"])
def test_a_body_without_tokens_is_refused(model: str) -> None:
    with pytest.raises(FtcError) as caught:
        run("head", model)
    assert "states [batch, sequence, width]" in str(caught.value)
    assert "freeze{train=head}" in str(caught.value.fix)


def test_compiled_and_asked(command: Command, tmp_path: Path) -> None:
    """The command line knows the task and the classes, whatever the model's own labels were."""
    folder = encoder(tmp_path / "model", "BertModel", num_labels=4)
    out = tmp_path / "out"
    compiled = command(
        "compile", folder, "--passes", "head{labels=3},lora{rank=2}", "-o", out, "--json"
    )
    assert compiled.status == 0, compiled.err
    asked = command("run", out, "--text", "the cat sits", "--json")
    assert asked.status == 0, asked.err
    assert {"label 0", "label 1", "label 2"} == set(_words(json.loads(asked.out)))


def _words(found: object) -> list[str]:
    if isinstance(found, dict):
        return [w for v in found.values() for w in _words(v)]
    if isinstance(found, list):
        return [w for v in found for w in _words(v)]
    return [found] if isinstance(found, str) and found.startswith("label ") else []


def test_a_tie_of_the_old_head_goes_with_it() -> None:
    program = tiny("bert")
    pooler = next(name for name, _ in program.tensors() if name.endswith("pooler.dense.bias"))
    before = replace(program, ties=(frozenset({pooler, "another.name"}),))
    assert Head(labels=3)(before).program.ties == ()
