"""The bundle: exact, and the same bytes every time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.bundle.graph_json import decode, encode
from ftc.graph.errors import BundleError
from ftc.graph.mode import set_mode
from ftc.graph.program import Drift, PassRecord, Program
from ftc.graph.provenance import provenance

from .bundles import files, hashes, mlp, odd


@pytest.fixture(scope="module")
def program() -> Program:
    return odd()


@pytest.fixture
def bundle(program: Program, tmp_path: Path) -> Path:
    return save_bundle(program, tmp_path / "bundle")


def test_everything_comes_back(program: Program, tmp_path: Path) -> None:
    record = PassRecord(
        "lowrank{ratio=0.5}",
        "approximate",
        3,
        ("canonical",),
        Drift(0.1, math.inf, 0.9, 0.8, "text"),
        10,
        40,
        99,
        0.25,
        ("one", "two"),
        "abc",
    )
    program = replace(
        program.clone(), history=(record, replace(record, drift=None)), notes=("a note",)
    )
    for i, node in enumerate(program.graph.nodes):
        node.meta["custom"] = {"stage": i, "name": "x", "p": 0.1}
    again = load_bundle(save_bundle(program, tmp_path / "bundle"))
    assert (again.signature, again.ties) == (program.signature, program.ties)
    assert (again.history, again.notes) == (program.history, program.notes)
    for before, after in zip(program.graph.nodes, again.graph.nodes, strict=True):
        assert (before.op, before.name, str(before.target)) == (
            after.op,
            after.name,
            str(after.target),
        )
        assert str(before.args) == str(after.args)
        assert provenance(before) == provenance(after)
        assert before.meta["custom"] == after.meta["custom"]


def test_tensors_come_back(program: Program, bundle: Path) -> None:
    again = load_bundle(bundle)
    before, after = dict(program.tensors()), dict(again.tensors())
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])
        assert isinstance(tensor, nn.Parameter) == isinstance(after[name], nn.Parameter)
        assert tensor.requires_grad == after[name].requires_grad
    assert after["mix"].stride() == before["mix"].stride()
    inputs = program.signature.probe(batch=3, sequence=9)
    for name, value in program(inputs).items():
        assert torch.equal(value, again(inputs)[name])


def test_a_loaded_program_trains_and_switches_mode(bundle: Path) -> None:
    program = load_bundle(bundle)
    before = hashes(bundle)
    program(program.signature.probe())["logits"].sum().backward()
    with torch.no_grad():
        for parameter in program.module.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    assert hashes(bundle) == before
    assert set_mode(program.module, training=True) == 2
    assert set_mode(program.module, training=False) == 2


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    program = mlp()
    module = program.module
    module.register_parameter("again", nn.Parameter(module.up.weight.data))  # type: ignore[union-attr, arg-type]
    with program.graph.inserting_before(program.graph.output_node()):
        node = program.graph.get_attr("again")
        total = program.graph.call_function(torch.ops.aten.sum.default, (node,))
    output = program.graph.output_node()
    output.args = ((*output.args[0], total),)  # type: ignore[misc]
    spec = replace(program.signature.outputs[0], name="total", shape=())
    program = replace(
        program, signature=replace(program.signature, outputs=(*program.signature.outputs, spec))
    )
    module.recompile()
    one = save_bundle(mlp(), tmp_path / "one") / "model.safetensors"
    path = save_bundle(program, tmp_path / "two")
    assert abs((path / "model.safetensors").stat().st_size - one.stat().st_size) < 500
    again = load_bundle(path)
    assert again.tensor("again").data_ptr() == again.tensor("up.weight").data_ptr()


def test_other_tools_read_the_weights(program: Program, bundle: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(bundle / "model.safetensors")
    assert torch.equal(stored["every"], program.tensor("every"))


def test_the_same_program_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    assert files(save_bundle(odd(), tmp_path / "fresh")) == files(bundle)
    assert files(save_bundle(load_bundle(bundle), tmp_path / "loaded")) == files(bundle)


def test_callers_add_files(program: Program, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("{}")

    path = save_bundle(program, tmp_path / "bundle", files={"report.json": write})
    assert load_bundle(path).signature == program.signature
    (path / "report.json").write_text("[]")
    with pytest.raises(BundleError, match=r"report\.json"):
        load_bundle(path)


literal = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text()
    | st.sampled_from(
        [
            torch.float32,
            torch.int8,
            torch.strided,
            torch.contiguous_format,
            torch.device("cpu"),
            torch.device("cuda:1"),
            2j,
        ]
    ),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.builds(slice, inner, inner, inner)
    ),
    max_leaves=12,
)


@given(literal)
@settings(max_examples=200, deadline=None)
def test_literals_round_trip(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    again = decode(json.loads(text), {})
    assert repr(again) == repr(value)


def test_a_loaded_tensor_holds_no_more_than_itself(bundle: Path) -> None:
    """A view holds its base: the whole file would stay in memory when weights are replaced."""
    assert all(tensor._base is None for _, tensor in load_bundle(bundle).tensors())
