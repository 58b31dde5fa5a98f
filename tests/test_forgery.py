"""A bundle from anyone: what is damaged or forged is refused, and nothing in it runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.bundle.graph_json import decode_graph, encode_graph
from ftc.graph.errors import BundleError
from ftc.graph.program import PassRecord, Program
from ftc.graph.shapes import propagate

from .bundles import broken, files, odd


@pytest.fixture(scope="module")
def program() -> Program:
    return odd()


@pytest.fixture
def bundle(program: Program, tmp_path: Path) -> Path:
    return save_bundle(program, tmp_path / "bundle")


RECORD = asdict(PassRecord("cleanup", "exact", 0, (), None, 1, 4, 1, 0.1, (), "00"))


def change(bundle: Path, name: str, edit: Callable[[Any], Any], *, seal: bool = True) -> None:
    """Edits a JSON file of a bundle; ``seal`` makes the hashes right again, as a forger would."""
    file = bundle / name
    content = json.loads(file.read_text())
    content = edit(content) or content
    file.write_text(json.dumps(content))
    if seal and name != "ftc.json":
        head = json.loads((bundle / "ftc.json").read_text())
        data = file.read_bytes()
        head["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (bundle / "ftc.json").write_text(json.dumps(head))


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors"])
def test_one_changed_byte(bundle: Path, name: str) -> None:
    file = bundle / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    broken(bundle, name, "hash")
    file.write_bytes(data[:-1])
    broken(bundle, name, "bytes")
    file.unlink()
    broken(bundle, name, "missing")


def test_no_bundle(tmp_path: Path) -> None:
    broken(tmp_path, "no bundle")
    (tmp_path / "ftc.json").write_text("{")
    broken(tmp_path, "ftc.json")


def test_a_later_format(bundle: Path) -> None:
    change(bundle, "ftc.json", lambda h: {**h, "format": 2, "ftc": "9.9"})
    broken(bundle, "format 2", "ftc 9.9", "pip install")


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h.pop("signature"),
        lambda h: h["signature"]["inputs"][0].update(dtype="Tensor"),
        lambda h: h["signature"]["inputs"][0].update(name="other"),
        lambda h: h["signature"]["outputs"].pop(),
        lambda h: h["files"].pop("graph.json"),
        lambda h: h["files"].update({"../x": {"bytes": 0, "sha256": ""}}),
        lambda h: h.update(history=[{"spec": 1}]),
        lambda h: h.update(history=[{**RECORD, "spec": 3}]),
        lambda h: h.update(history=[{**RECORD, "seconds": "fast"}]),
        lambda h: h.update(history=[{**RECORD, "modified": True}]),
        lambda h: h.update(history=[{**RECORD, "drift": {"relative": 0.0}}]),
        lambda h: h.update(notes=[1]),
        lambda h: h.update(notes="one"),
        lambda h: h.update(ties=[[1, 2]]),
        lambda h: h.update(format="1"),
    ],
)
def test_forged_heads(bundle: Path, edit: Callable[[Any], Any]) -> None:
    change(bundle, "ftc.json", lambda h: edit(h) and None)
    broken(bundle)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("inputs.0.shape", ["batch", -3]),
        ("inputs.0.shape", ["batch", 2**40]),
        ("inputs.0.shape", [2**20, 2**20]),
        ("inputs.0.shape", ["batch", True]),
        ("inputs.0.shape", ["batch", 2.5]),
        ("inputs.0.shape", ["batch", [4]]),
        ("inputs.0.shape", ["batch", ""]),
        ("inputs.0.shape", "batch"),
        ("inputs.0.shape", None),
        ("inputs.0.high", -1),
        ("inputs.0.high", 2**70),
        ("inputs.0.high", "20"),
        ("inputs.0.role", "evil"),
        ("inputs.0.dtype", "float33"),
        ("inputs.0.name", 7),
        ("outputs.0.shape", ["batch", -1]),
        ("limits", {"sequence": 0}),
        ("limits", {"sequence": "many"}),
        ("limits", {"nowhere": 7}),
    ],
)
def test_what_no_signature_can_say_is_refused_with_its_place(
    bundle: Path, place: str, value: Any
) -> None:
    *path, last = place.split(".")

    def edit(head: Any) -> None:
        part = head["signature"]
        for step in path:
            part = part[int(step) if step.isdigit() else step]
        part[last] = value

    change(bundle, "ftc.json", edit)
    broken(bundle, "signature.", path[0] if path else last)


def test_a_signature_of_another_program_is_refused_at_the_node(bundle: Path) -> None:
    change(bundle, "ftc.json", lambda h: h["signature"]["inputs"][0].update(dtype="float32"))
    program = load_bundle(bundle)
    with pytest.raises(BundleError, match="do not fit together") as caught:
        propagate(program.module, program.signature)
    assert "embedding" in caught.value.where


def call(target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {
        "op": "call_function",
        "name": "evil",
        "target": target,
        "args": list(args),
        "kwargs": kwargs,
    }


@pytest.mark.parametrize(
    "node",
    [
        call("os.system", "true"),
        call("builtins.eval", "1"),
        call("torch.load", "x"),
        call("operator.attrgetter", "x"),
        call("aten.from_file.default", "/etc/passwd", True, 8),
        call("aten.save.default", 1, "x"),
        call("aten.relu_.default", {"node": "ids"}),
        call("aten.set_.source_Tensor", {"node": "ids"}, {"node": "ids"}),
        call("aten.add.out", {"node": "ids"}, 1),
        call("aten.no_such_operator.default"),
        call("aten.relu.no_such_overload", {"node": "ids"}),
        call("aten.__dict__.default"),
        call("aten.set_grad_enabled.default", False),
        call("aten.manual_seed.default", 1),
        call("aten.warn.default", "x"),
        call("prim.Print.default"),
        call("higher_order.cond.default"),
        call("ftc.no_such.default"),
        call("aten.zeros.default", [2**16, 2**16]),
        call("aten.zeros.default", size=[2**40]),
        call("aten.full.default", [2**33], 1.0),
        call("aten.arange.default", 2**40),
        call("aten.arange.start_step", 0, 2**20, 1e-9),
        call("aten.new_zeros.default", {"node": "ids"}, [2**40]),
        call("aten.expand.default", {"node": "ids"}, [2**20, 2**20, 5]),
        call("aten.repeat.default", {"node": "ids"}, [2**40, 1]),
        call("aten.zeros.default", [2**70]),
        call("operator.pow", 10, 10**9),
        call("operator.mul", "x", 10**9),
        call("aten.relu.default", {"node": "later"}),
        call("aten.relu.default", {"node": "ids"}, 1, 2, 3),
        call("aten.relu.default", {"node": "ids"}, **{"x=print(1)": 1}),
        call("aten.relu.default", {"code": "print(1)"}),
        call("aten.relu.default", {"dtype": "load"}),
        call("aten.relu.default", {"device": "cpu'); print('"}),
        {"op": "call_method", "name": "evil", "target": "backward", "args": []},
        {"op": "call_module", "name": "evil", "target": "up", "args": []},
        {"op": "get_attr", "name": "evil", "target": 'x"); print(1); ("', "args": []},
        {"op": "get_attr", "name": "evil", "target": "no.such.tensor", "args": []},
        {"op": "placeholder", "name": "evil", "target": "evil", "args": []},
        {"op": "output", "name": "evil", "target": "output", "args": [{"tuple": []}]},
        {
            "op": "call_function",
            "name": "x = print(1)",
            "target": "aten.relu.default",
            "args": [{"node": "ids"}],
        },
        {
            "op": "call_function",
            "name": "ids",
            "target": "aten.relu.default",
            "args": [{"node": "ids"}],
        },
        {
            "op": "call_function",
            "name": "class",
            "target": "aten.relu.default",
            "args": [{"node": "ids"}],
        },
        {"op": "get_attr", "name": "evil"},
        {"name": 3},
        "node",
    ],
    ids=lambda n: str(n)[:60],
)
def test_forged_nodes(bundle: Path, node: Any, capsys: pytest.CaptureFixture[str]) -> None:
    change(bundle, "graph.json", lambda g: g["nodes"].insert(-1, node))
    broken(bundle)
    assert not capsys.readouterr().out


def test_forged_inputs_and_tensors(bundle: Path) -> None:
    change(bundle, "graph.json", lambda g: g["nodes"][0].update(name="a=print(1)"))
    broken(bundle)


@pytest.mark.parametrize(
    "name", ["forward", "x.y", "graph", "__class__", "scale.x", "a..b", "", "a\nb", 'a"b']
)
def test_forged_tensor_names(bundle: Path, name: str) -> None:
    """Names of methods and paths through other tensors load as data, or are refused."""

    def forge(graph: Any) -> None:
        graph["tensors"][name] = {"kind": "buffer", "of": "scale"}
        node = {"op": "get_attr", "name": "evil", "target": name, "args": []}
        graph["nodes"].insert(-1, node)

    change(bundle, "graph.json", forge)
    if name != "x.y":
        broken(bundle)
        return
    program = load_bundle(bundle)
    assert torch.equal(program.tensor(name), program.tensor("scale"))
    assert program(program.signature.probe())


def test_tensors_that_nothing_reads(program: Program, bundle: Path, tmp_path: Path) -> None:
    """They are not saved; a bundle that lists some is forged."""
    spare = program.clone()
    spare.module.register_buffer("spare", torch.ones(3))
    assert files(save_bundle(spare, tmp_path / "spare")) == files(bundle)
    change(bundle, "graph.json", lambda g: g["tensors"].update(x={"kind": "buffer", "of": "scale"}))
    broken(bundle, "x")


@pytest.mark.parametrize(
    "fact",
    [
        {"kind": "parameter", "grad": True, "of": "keep"},
        {"kind": "buffer", "of": "none"},
        {"kind": "buffer", "order": [0, 0]},
        {},
        7,
    ],
)
def test_forged_tensor_facts(bundle: Path, fact: Any) -> None:
    change(bundle, "graph.json", lambda g: g["tensors"].update(mix=fact))
    broken(bundle)


def test_deep_nesting(bundle: Path) -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    change(
        bundle, "graph.json", lambda g: g["nodes"].insert(-1, call("aten.relu.default", deep, deep))
    )
    broken(bundle)
    (bundle / "ftc.json").write_text("[" * 100_000)
    broken(bundle)


def test_operators_that_cannot_be_loaded_are_not_saved(program: Program, tmp_path: Path) -> None:
    program = program.clone()
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.mul.Tensor:
            node.target = torch.ops.aten.mul_.Tensor
    with pytest.raises(BundleError, match=r"mul_.*\n.*node "):
        save_bundle(program, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_graphs_round_trip(program: Program) -> None:
    entries = encode_graph(program.graph)
    assert encode_graph(decode_graph(json.loads(json.dumps(entries)))) == entries
