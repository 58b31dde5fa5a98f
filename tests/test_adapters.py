"""Adapters on disk: they come back as they were, and only to the model they were trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ftc.graph.adapters import adapter_kind, adapter_parameters
from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.errors import BundleError, FtcError, PreconditionError, UsageError
from ftc.graph.program import Program
from ftc.passes.pipeline import Pipeline
from ftc.runtime.adapters import load_adapters, save_adapters
from ftc.tests.bundles import hashes
from ftc.tests.test_lora import drift, randomize, run

CASES = [  # what the base is, and what is added to it
    ("canonicalize", "lora{dropout=0.1}"),
    ("canonicalize", "lora{rank=2,target=ffn},lora{rank=4}"),
    ("canonicalize", "lora{init=pissa,rank=2}"),
    ("lowrank{rank=3}", "lora{init=pissa,rank=2}"),
    ("int8{min_size=0}", "head{labels=3},lora"),
    ("canonicalize", "lora{init=pissa,rank=2},int8{min_size=0}"),
    ("canonicalize", "prefix{tokens=4}"),
    ("canonicalize", "head{labels=3},prompt{tokens=4}"),
    ("canonicalize", "freeze{train=norm}"),
]


def trained(program: Program) -> set[str]:
    return {n for n, p in program.module.named_parameters() if p.requires_grad}


def add(base: Program, passes: str) -> Program:
    """The base with adapters as if they were trained, and what else trains changed too."""
    program = randomize(Pipeline.parse(passes).run(base).program)
    for name in trained(program) - set(adapter_parameters(program)):
        program.tensor(name).data = program.tensor(name).data * 1.5
    return program


@pytest.mark.parametrize(("base", "passes"), CASES)
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_they_come_back(base: str, passes: str, model: str, tmp_path: Path) -> None:
    plain = run(base, model)
    program = add(plain, passes)
    folder = save_adapters(program, tmp_path / "adapters")
    assert {p.name for p in folder.iterdir()} == {"adapters.json", "adapters.safetensors"}
    for start in (plain, program):  # onto the base, and onto what has them already
        again = load_adapters(start, folder)
        assert drift(program, again) < 1e-6
        assert trained(program) <= trained(again)
        for name in trained(program):
            assert torch.equal(program.tensor(name), again.tensor(name)), name


def test_loading_changes_nothing_that_was_there(tmp_path: Path) -> None:
    plain = run("canonicalize", "bert")
    folder = save_adapters(add(plain, "lora"), tmp_path / "a")
    other = Pipeline.parse("lora").run(plain).program
    before = {n: t.detach().clone() for n, t in other.tensors()}
    load_adapters(other, folder)
    assert all(torch.equal(t, before[n]) for n, t in other.tensors())


def test_the_base_may_come_from_disk(tmp_path: Path) -> None:
    plain = run("int8{min_size=0}", "bert")
    program = add(plain, "lora")
    folder = save_adapters(program, tmp_path / "a")
    base = load_bundle(save_bundle(plain, tmp_path / "base"))
    assert drift(program, load_adapters(base, folder)) == 0


def test_what_was_trained_comes_back(tmp_path: Path) -> None:
    """A training stands in the history, and is no pass that could run again."""
    plain = run("canonicalize", "bert")
    program = add(plain, "lora")
    record = replace(program.history[-1], spec="train{objective=mlm,steps=3}", effect="approximate")
    program = replace(program, history=(*program.history, record))
    folder = save_adapters(program, tmp_path / "a")
    assert drift(program, load_adapters(plain, folder)) == 0


def test_the_same_adapters_give_the_same_bytes(tmp_path: Path) -> None:
    program = add(run("canonicalize", "bert"), "lora")
    one, two = (save_adapters(program, tmp_path / name) for name in "ab")
    assert hashes(one) == hashes(two)


def test_another_base_is_refused_with_the_tensor_and_the_right_one(tmp_path: Path) -> None:
    plain = run("canonicalize,lowrank{rank=3}", "bert")
    folder = save_adapters(add(plain, "lora"), tmp_path / "a")
    other = plain.clone()
    name = "encoder.layer.1.output.dense.weight.A"
    other.tensor(name).data = other.tensor(name).data * 1.01
    with pytest.raises(PreconditionError, match="another base") as caught:
        load_adapters(other, folder)
    assert name in str(caught.value.where) and "lowrank{rank=3}" in str(caught.value.fix)
    rounded = plain.clone()
    rounded.tensor(name).data = (rounded.tensor(name).data.double() * (1 + 1e-7)).float()
    load_adapters(rounded, folder)
    with pytest.raises(FtcError, match=r"another base|does not fit|no product|matches no"):
        load_adapters(run("canonicalize", "gpt2"), folder)


def test_merged_and_whole_models_have_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="every parameter trains"):
        save_adapters(run("canonicalize", "bert"), tmp_path / "a")
    with pytest.raises(UsageError, match="no adapters"):
        save_adapters(run("lora,merge", "bert"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_adapters_on_merged_weights_begin_there(tmp_path: Path) -> None:
    base = randomize(run("lora{rank=2}", "bert"))
    base = Pipeline.parse("merge").run(base).program
    program = add(base, "lora{rank=3}")
    folder = save_adapters(program, tmp_path / "a")
    assert json.loads((folder / "adapters.json").read_text())["passes"] == ["lora{rank=3}"]
    assert drift(program, load_adapters(base, folder)) == 0


def test_a_place_that_is_taken_is_kept(tmp_path: Path) -> None:
    program = add(run("canonicalize", "bert"), "lora")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds no adapters"):
        save_adapters(program, tmp_path / "mine", force=True)
    folder = save_adapters(program, tmp_path / "a")
    with pytest.raises(UsageError, match="exists"):
        save_adapters(program, folder)
    other = randomize(program, seed=1)
    save_adapters(other, folder, force=True)
    assert drift(other, load_adapters(other, folder)) == 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    plain = run("canonicalize", "bert")
    folder = save_adapters(add(plain, "lora"), tmp_path / "a")
    head, file = folder / "adapters.json", folder / "adapters.safetensors"
    good = head.read_text(), file.read_bytes()

    def refuses(words: str) -> None:
        with pytest.raises(BundleError, match=words) as caught:
            load_adapters(plain, folder)
        assert caught.value.fix
        head.write_text(good[0])
        file.write_bytes(good[1])

    file.write_bytes(good[1][:-1] + bytes([good[1][-1] ^ 1]))
    refuses("hash")
    file.write_bytes(good[1][:100])
    refuses("damaged")
    file.unlink()
    refuses("missing")
    file.unlink()
    file.with_suffix(".bin").write_bytes(b"\x80\x04.")
    refuses("pickle")
    head.write_text("{")
    refuses("cannot be read")
    head.write_text("[]")
    refuses("JSON object")
    head.write_text("{}")
    refuses("malformed")
    head.write_text(good[0].replace('"format": 1', '"format": 2'))
    refuses("format 2")
    with pytest.raises(BundleError, match="holds no adapters"):
        load_adapters(plain, tmp_path)


def test_kinds_of_parameters() -> None:
    assert adapter_kind("a.weight_lora_A") == adapter_kind("w_lora_B") == "lora"
    assert adapter_kind("a.lora.weight") is None
    assert {adapter_kind(n) for n in adapter_parameters(run("prefix{tokens=2}", "bert"))} == {
        "prefix"
    }
