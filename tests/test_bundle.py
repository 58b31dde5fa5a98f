"""The bundle: exact, the same bytes every time, whole at every moment, and never code."""

from __future__ import annotations

import hashlib
import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftc.graph import replace_folder
from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.capture import capture_module
from ftc.graph.errors import BundleError, UsageError
from ftc.graph.graph_json import decode, decode_graph, encode, encode_graph
from ftc.graph.mode import set_mode
from ftc.graph.program import Drift, PassRecord, Program
from ftc.graph.provenance import provenance

from .families import Mlp


class Odd(nn.Module):
    """What makes saving hard: a tie, a transposed weight, scalars, infinities, a strided buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.mix = nn.Parameter(torch.randn(6, 8).t())
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("every", torch.randn(16)[::2])
        self.register_buffer("keep", torch.rand(6) > 0.5)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.table(ids) * self.frozen + self.every
        y = (x @ self.mix).masked_fill(~self.keep, -math.inf).softmax(-1)
        q = x.unsqueeze(1)
        z = nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1 * self.training)
        return {"mixed": y, "logits": self.head(self.drop(z.squeeze(1))) * self.scale}


def odd() -> Program:
    torch.manual_seed(0)
    dims = {"ids": {0: "batch", 1: "sequence"}}
    return capture_module(Odd(), {"ids": torch.randint(0, 20, (2, 5))}, dynamic=dims)


def mlp(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return capture_module(Mlp(), torch.randn(2, 12))


@pytest.fixture(scope="module")
def program() -> Program:
    return odd()


@pytest.fixture
def bundle(program: Program, tmp_path: Path) -> Path:
    return save_bundle(program, tmp_path / "bundle")


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def hashes(folder: Path) -> str:
    return hashlib.sha256(repr(files(folder)).encode()).hexdigest()


# What comes back


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


# Replacing


def test_an_output_that_exists_is_refused(program: Program, bundle: Path, tmp_path: Path) -> None:
    before = files(bundle)
    with pytest.raises(UsageError, match="--force"):
        save_bundle(program, bundle)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("")
    for force in (False, True):
        with pytest.raises(UsageError, match="not a bundle"):
            save_bundle(program, other, force=force)
    with pytest.raises(UsageError, match="is a file"):
        save_bundle(program, other / "cat.jpg", force=True)
    assert files(bundle) == before
    (tmp_path / "empty").mkdir()
    assert save_bundle(program, tmp_path / "empty")


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces(bundle: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(replace_folder, "_exchange", lambda *_: False)
    program = mlp()
    save_bundle(program, bundle, force=True)
    assert load_bundle(bundle).signature == program.signature
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_a_death_between_two_renames_is_recovered(bundle: Path) -> None:
    before = files(bundle)
    bundle.rename(bundle.with_name(".bundle.ftc-old"))
    assert load_bundle(bundle)
    assert files(bundle) == before


def failing_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``count``-th flush, rename or file of a save fails as a full disk does."""
    calls = iter(range(1000))

    def wrap(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == count:
                raise OSError(28, "No space left on device", "file")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    wrap(replace_folder, "_flush_entry")
    wrap(replace_folder, "_exchange")
    wrap(Path, "write_text")
    wrap(sys.modules["ftc.graph.bundle"], "write_tensors")


@pytest.mark.parametrize("count", range(7))
def test_a_full_disk_leaves_the_old_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    before = files(bundle)
    with monkeypatch.context() as patch:
        failing_at(count, patch)
        with pytest.raises(BundleError, match="No space left") as caught:
            save_bundle(mlp(), bundle, force=True)
        assert caught.value.fix
    assert files(bundle) == before
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_a_file_size_limit_leaves_the_old_bundle(bundle: Path) -> None:
    before = files(bundle)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(BundleError, match="File too large"):
            save_bundle(mlp(), bundle, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(bundle) == before


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from ftc.graph.bundle import load_bundle, save_bundle
torch.set_num_threads(1)
path = Path(sys.argv[1])
programs = [load_bundle(p) for p in sys.argv[2:]]
random.seed(0)
for _ in range(10):
    child = os.fork()
    if child == 0:
        while True:
            for program in programs:
                save_bundle(program, path, force=True)
    time.sleep(random.uniform(0.01, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    load_bundle(path)
    print("whole")
"""


def test_a_kill_leaves_a_whole_bundle(program: Program, bundle: Path, tmp_path: Path) -> None:
    """Ten children that save without end are killed at random moments."""
    sources = [save_bundle(p, tmp_path / f"source{i}") for i, p in enumerate((program, mlp()))]
    ran = subprocess.run(
        [sys.executable, "-c", KILLER, str(bundle), *map(str, sources)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.stdout.count("whole") == 10, ran.stderr
    assert files(bundle) in [files(s) for s in sources]
    save_bundle(program, bundle, force=True)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"bundle", "source0", "source1"}, "what the dead left is cleaned up"


# What is refused


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


def broken(bundle: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle)
    for word in words:
        assert word in str(caught.value)


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
        lambda h: h.update(format="1"),
    ],
)
def test_forged_heads(bundle: Path, edit: Callable[[Any], Any]) -> None:
    change(bundle, "ftc.json", lambda h: edit(h) and None)
    broken(bundle)


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
