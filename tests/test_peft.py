"""PEFT's folders, both ways, against PEFT itself: the same outputs to 1e-5."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftc.graph.adapters import adapter_parameters, lora_adapters
from ftc.graph.errors import BundleError, FtcError, PreconditionError, UsageError
from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.passes.pipeline import Pipeline
from ftc.runtime.adapters import load_adapters, load_peft, save_adapters, save_peft
from ftc.tests.peft_models import CLOSE, agree, make, peft, quiet, theirs, trained_by_peft  # noqa: F401
from ftc.tests.test_lora import drift, randomize

CASES = {
    "bert": {"target_modules": ["query", "value"]},
    "bert-dense": {"target_modules": ["dense"], "r": 2, "lora_alpha": 3},
    "bert-rslora": {"target_modules": ["key"], "use_rslora": True, "r": 4},
    "bert-patterns": {
        "target_modules": ["query", "key", "output.dense"],
        "rank_pattern": {"query": 2, "layer.1.output.dense": 3},
        "alpha_pattern": {"key": 5},
    },
    "bert-pissa": {"target_modules": ["query", "value"], "init_lora_weights": "pissa", "r": 3},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "llama-head": {"target_modules": ["lm_head", "q_proj"]},
    "classifier": {"target_modules": ["query"], "task_type": "SEQ_CLS"},
}


@pytest.mark.parametrize("case", CASES)
def test_from_peft_and_back(case: str, tmp_path: Path) -> None:
    kind = case.split("-")[0]
    source = make(kind, tmp_path / "model")
    adapted = trained_by_peft(kind, theirs(kind, source), CASES[case], tmp_path / "peft")
    program = load_peft(capture(source), tmp_path / "peft")
    agree(program, adapted)
    folder = save_peft(program, tmp_path / "again", base=str(source))
    agree(program, peft.PeftModel.from_pretrained(theirs(kind, source), folder))
    one, two = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "peft", folder))
    assert {n for n in one if ".base_layer." not in n} == two.keys()
    for name, tensor in two.items():
        assert torch.equal(one[name], tensor)


SPECS = [
    "lora",
    "lora{rank=2,target=ffn},lora{rank=4}",
    'lora{target="layer[1] & attention",rank=3,dropout=0.1}',
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_to_peft(kind: str, spec: str, tmp_path: Path) -> None:
    source = make(kind, tmp_path / "model")
    program = randomize(Pipeline.parse(spec).run(capture(source)).program)
    folder = save_peft(program, tmp_path / "peft")
    agree(program, peft.PeftModel.from_pretrained(theirs(kind, source), folder))
    again = load_peft(capture(source), folder)
    assert drift(program, again) < 1e-6
    assert set(adapter_parameters(again)) == set(adapter_parameters(program))


def test_pissa_goes_to_peft_as_pissa(tmp_path: Path) -> None:
    source = make("bert", tmp_path / "model")
    program = Pipeline.parse("lora{init=pissa,rank=3}").run(capture(source)).program.clone()
    for name in adapter_parameters(program):
        program.tensor(name).data = program.tensor(name).data * 1.25
    folder = save_peft(program, tmp_path / "peft")
    agree(program, peft.PeftModel.from_pretrained(theirs("bert", source), folder))


@pytest.mark.parametrize("spec", ["prefix{tokens=5}", "prompt{tokens=5}"])
def test_a_model_that_peft_has_no_task_for_uses_its_prefix(spec: str, tmp_path: Path) -> None:
    source = make("masked", tmp_path / "model")
    program = randomize(Pipeline.parse(spec).run(capture(source)).program)
    model = peft.PeftModel.from_pretrained(theirs("masked", source),
                                           save_peft(program, tmp_path / "peft"))  # fmt: skip
    inputs = program.signature.probe(seed=3, batch=2, sequence=7)
    inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])  # PEFT drops them
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits[:, -7:]
    torch.testing.assert_close(program(inputs)["logits"], wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_prefixes_and_prompts(kind: str, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model")
    spec = "prefix{tokens=5}" if kind == "PREFIX_TUNING" else "prompt{tokens=5}"
    program = randomize(Pipeline.parse(spec).run(capture(source)).program)
    folder = save_peft(program, tmp_path / "peft")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == kind
    again = load_peft(capture(source), folder)
    assert drift(program, again) == 0
    model = peft.PeftModel.from_pretrained(theirs("llama", source), folder)
    inputs = program.signature.probe(seed=3, batch=2, sequence=7)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.no_grad():
        wanted = model(**inputs).logits[:, -7:]
    torch.testing.assert_close(program(inputs)["logits"], wanted, **CLOSE)


STILL = "smooth{alpha=none},rotate{gain=none}"
MOVING = {
    "smooth": "smooth",
    "rotate": "smooth{alpha=none},rotate{gain=1}",
    "awq": "awq{group_size=8}",
    "int8": "int8{min_size=0}",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, dict[str, Path]]:
    """A small Llama, and folders of PEFT's with a prompt, a prefix and low-rank adapters for it."""
    place = tmp_path_factory.mktemp("llama")
    source = make("llama", place / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"target_modules": ["lm_head", "q_proj", "gate_proj", "down_proj"]}
        trained_by_peft("llama", theirs("llama", source), options, place / "lora")
    program = capture(source)
    for kind in ("prompt", "prefix"):
        made = Pipeline.parse(f"{kind}{{tokens=5}}").run(program).program
        save_peft(randomize(made), place / kind)
    return program, {kind: place / kind for kind in ("lora", "prefix", "prompt")}


@pytest.mark.parametrize("passes", MOVING.values(), ids=MOVING)
def test_a_base_whose_channels_moved_is_refused_and_the_fix_is_right(
    passes: str, trained: tuple[Program, dict[str, Path]], tmp_path: Path
) -> None:
    program, folders = trained
    base = Pipeline.parse(passes).run(program).program
    for kind in ("lora", "prefix"):
        with pytest.raises(PreconditionError, match="changed the channels") as caught:
            load_peft(base, folders[kind])
        (given,) = re.findall(r"parse\('(.*)'\)", str(caught.value.fix))
        adapted = load_peft(program, folders[kind])
        after = Pipeline.parse(given).run(adapted).program
        assert drift(adapted, after) < (0.05 if "int8" in passes else 1e-5)
    own = randomize(Pipeline.parse("lora").run(base).program)
    with pytest.raises(PreconditionError, match="changed the channels"):
        save_peft(own, tmp_path / "peft")
    again = load_adapters(base, save_adapters(own, tmp_path / "own"))
    assert drift(own, again) == 0
    with pytest.raises(PreconditionError, match="another base"):
        load_adapters(program, tmp_path / "own")


@pytest.mark.parametrize("passes", list(MOVING.values())[:3], ids=list(MOVING)[:3])
def test_a_soft_prompt_meets_nothing_that_moved(
    passes: str, trained: tuple[Program, dict[str, Path]], tmp_path: Path
) -> None:
    program, folders = trained
    base = load_peft(Pipeline.parse(passes).run(program).program, folders["prompt"])
    assert drift(load_peft(program, folders["prompt"]), base) < 1e-5
    save_peft(base, tmp_path / "again")


def test_adapters_of_a_float_model_run_on_a_quantized_one(tmp_path: Path) -> None:
    source = make("bert", tmp_path / "model")
    trained_by_peft("bert", theirs("bert", source), CASES["bert"], tmp_path / "peft")
    base = Pipeline.parse(f"{STILL},int8{{min_size=0}}").run(capture(source)).program
    program = load_peft(base, tmp_path / "peft")
    assert len(lora_adapters(program)) == 4
    assert drift(base, program) > 1e-4
    assert drift(load_peft(capture(source), tmp_path / "peft"), program) < 0.1
    factored = Pipeline.parse("lowrank{rank=12}").run(capture(source)).program
    assert len(lora_adapters(load_peft(factored, tmp_path / "peft"))) == 4


def test_the_same_body_under_another_first_module(tmp_path: Path) -> None:
    """Trained below a head, loaded on the features alone; the head stays behind, and says so."""
    source = make("classifier", tmp_path / "model")
    model = theirs("classifier", source)
    options = {"target_modules": ["query"]}
    trained_by_peft("classifier", model, options, tmp_path / "peft")
    program = load_peft(capture(source, task="feature-extraction"), tmp_path / "peft")
    assert len(lora_adapters(program)) == 2
    back = save_peft(program, tmp_path / "features")
    again = load_peft(capture(source), back)
    assert len(lora_adapters(again)) == 2


def test_targets_are_written_briefly(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "model")
    trained_by_peft("llama", theirs("llama", source), CASES["llama"], tmp_path / "peft")
    program = load_peft(capture(source), tmp_path / "peft")
    assert len(program.history[-1].spec) < 150


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_ftc_has_not_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = make("bert", tmp_path / "model")
    trained_by_peft("bert", theirs("bert", source), CASES["bert"], tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UsageError, match=words) as caught:
        load_peft(capture(source), tmp_path / "peft")
    assert caught.value.fix


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    source = make("bert", tmp_path / "model")
    trained_by_peft("bert", theirs("bert", source), CASES["bert"], tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft/adapter_model.bin")
    with pytest.raises(BundleError, match="pickle") as caught:
        load_peft(capture(source), tmp_path / "peft")
    assert "safe_serialization=True" in str(caught.value.fix)


def test_adapters_of_another_model_are_refused(tmp_path: Path) -> None:
    source = make("bert", tmp_path / "model")
    trained_by_peft("bert", theirs("bert", source), CASES["bert"], tmp_path / "peft")
    with pytest.raises(PreconditionError, match="no such product"):
        load_peft(capture(make("gpt2", tmp_path / "other")), tmp_path / "peft")


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("cleanup", "no adapters"),
        ("lora,prefix{tokens=2}", "one kind"),
        ("head,lora", "no place for what head"),
        ("lora{rank=2},lora{rank=3,target=ffn,init=pissa}", "pissa"),
    ],
)
def test_what_peft_has_not_is_refused(passes: str, words: str, tmp_path: Path) -> None:
    program = Pipeline.parse(passes).run(capture(make("bert", tmp_path / "model"))).program
    with pytest.raises(FtcError, match=words):
        save_peft(program, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
