"""What trained whole beside adapters, and heads and biases, in PEFT's folders and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ftc.graph.errors import UsageError
from ftc.graph.sources import capture
from ftc.passes.pipeline import Pipeline
from ftc.runtime.adapters import load_peft, save_peft
from ftc.tests.peft_models import CLOSE, agree, make, peft, quiet, theirs, trained_by_peft  # noqa: F401
from ftc.tests.test_lora import drift, randomize


def test_what_trained_whole_is_in_modules_to_save(tmp_path: Path) -> None:
    source = make("classifier", tmp_path / "model")
    program = randomize(Pipeline.parse("lora").run(capture(source)).program)
    with torch.no_grad():
        program.tensor("classifier.weight").data = program.tensor("classifier.weight") * 2
    folder = save_peft(program, tmp_path / "peft")
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    agree(program, peft.PeftModel.from_pretrained(theirs("classifier", source), folder))


@pytest.mark.parametrize("also", ["none", "norm", "bias", "bias & attention", "bias|head"])
def test_what_else_trained_beside_the_adapters_of_a_classifier(also: str, tmp_path: Path) -> None:
    source = make("classifier", tmp_path / "model")
    program = randomize(Pipeline.parse(f'lora{{also="{also}"}}').run(capture(source)).program)
    for parameter in program.module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.randn_like(parameter) / 8
    folder = save_peft(program, tmp_path / "peft")
    agree(program, peft.PeftModel.from_pretrained(theirs("classifier", source), folder))
    assert drift(program, load_peft(capture(source), folder)) < 1e-6


def test_a_module_is_adapted_or_trained_whole(tmp_path: Path) -> None:
    program = capture(make("classifier", tmp_path / "model"))
    program = Pipeline.parse("lora,freeze{train=adapter|attention}").run(program).program
    with pytest.raises(UsageError, match="whole or adapts it") as caught:
        save_peft(program, tmp_path / "peft")
    assert "save_adapters" in str(caught.value.fix)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_a_classifier_goes_with_its_prefix_or_prompt_both_ways(kind: str, tmp_path: Path) -> None:
    source = make("classifier", tmp_path / "model")
    options = {"task_type": "SEQ_CLS", "num_virtual_tokens": 4}
    named = {"PREFIX_TUNING": peft.PrefixTuningConfig, "PROMPT_TUNING": peft.PromptTuningConfig}
    model = peft.get_peft_model(theirs("classifier", source), named[kind](**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "peft")
    program = load_peft(capture(source), tmp_path / "peft")
    assert not torch.equal(program.tensor("classifier.weight"),
                           capture(source).tensor("classifier.weight"))  # fmt: skip
    back = save_peft(program, tmp_path / "again")
    inputs = program.signature.probe(seed=3, batch=2, sequence=7)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    again = peft.PeftModel.from_pretrained(theirs("classifier", source), back)
    for each in (model.eval(), again.eval()):
        with torch.no_grad():
            torch.testing.assert_close(program(inputs)["logits"], each(**inputs).logits, **CLOSE)


def test_biases_of_a_saved_module_are_read_once(tmp_path: Path) -> None:
    source = make("classifier", tmp_path / "model")
    options = {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}
    model = trained_by_peft("classifier", theirs("classifier", source), options, tmp_path / "peft")
    agree(load_peft(capture(source), tmp_path / "peft"), model)
