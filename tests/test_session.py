"""Sessions, files and parity: what runs, what is refused, and what survives a failure."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ftc.graph.errors import PromiseError, SourceError, UsageError
from ftc.graph.program import Program
from ftc.passes.pipeline import Pipeline
from ftc.runtime.lower import lower, save_onnx
from ftc.runtime.lowering import file
from ftc.runtime.mapped import without_weights
from ftc.runtime.parity import check_parity, parity, rounding_noise, three_way
from ftc.runtime.session import OnnxSession
from ftc.tests.tiny import custom, tiny


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny("bert")


@pytest.fixture(scope="module")
def session(program: Program) -> OnnxSession:
    return OnnxSession(lower(program), threads=1)


def test_runs_by_name_from_tensors_and_arrays(program: Program, session: OnnxSession) -> None:
    probe = program.signature.probe()
    assert session.input_names == program.signature.input_names
    assert session.output_names == program.signature.output_names
    assert session.input_shapes["input_ids"] == ("batch", "sequence")
    by_tensor = session.run(probe)
    by_array = session({name: tensor.numpy() for name, tensor in probe.items()})
    for name, value in by_tensor.items():
        assert isinstance(value, Tensor)
        assert torch.equal(value, by_array[name])


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ({"input_id": torch.ones(2, 3).long()}, "unknown input", "input_ids"),
        ({"input_ids": None}, "missing input 'input_ids'", "input_ids"),
        ({"input_ids": torch.ones(2, 3)}, "float32", "int64"),
        ({"input_ids": torch.ones(2, 3, 1).long()}, "[2, 3, 1]", "[batch, sequence]"),
        ({"attention_mask": torch.ones(2, 4).long()}, "'sequence' is", "one size"),
    ],
)
def test_wrong_inputs_are_named(
    session: OnnxSession, change: dict[str, Any], what: str, fix: str
) -> None:
    good = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 3).long()}
    given = {name: tensor for name, tensor in {**good, **change}.items() if tensor is not None}
    with pytest.raises(UsageError) as caught:
        session(given)
    assert what in caught.value.what
    assert fix in (caught.value.fix or "")


def test_a_size_beyond_the_model_is_a_users_error(session: OnnxSession) -> None:
    long = torch.ones(1, 33).long()  # the model has 32 positions
    with pytest.raises(UsageError, match="cannot run"):
        session({"input_ids": long, "attention_mask": long})


def test_a_fixed_size_is_checked_before_it_runs() -> None:
    session = OnnxSession(lower(tiny("mlp")))
    with pytest.raises(UsageError, match=r"\[3, 9\]"):
        session({"x": torch.ones(3, 9)})


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no ONNX file"):
        OnnxSession(tmp_path / "missing.onnx")
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(SourceError, match="cannot load"):
        OnnxSession(path)


def test_the_file_is_valid_and_holds_what_the_model_does(program: Program, tmp_path: Path) -> None:
    model = lower(program)
    save_onnx(model, tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.producer_name == "ftc"
    assert [n.name for n in proto.graph.node] == [n.name for n in model.graph]
    assert {i.name for i in proto.graph.initializer} == set(model.graph.initializers)
    assert parity(program, OnnxSession(tmp_path / "model.onnx"), program.signature.probe())


def test_the_same_program_gives_the_same_bytes(program: Program, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_onnx(lower(program), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_large_weights_go_to_a_second_file(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "EXTERNAL_BEYOND", 1000)
    path = tmp_path / "model.onnx"
    save_onnx(lower(program), path)
    assert {f.name for f in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert parity(program, OnnxSession(path), program.signature.probe())


def test_a_failed_write_leaves_the_old_file_whole(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    save_onnx(lower(program), path)
    before = path.read_bytes()
    model = lower(tiny("llama"))
    last = list(model.graph.initializers.values())[-1].const_value

    def full(target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(last, "tofile", full)
    with pytest.raises(OSError, match="No space"):
        save_onnx(model, path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


def test_saving_copies_no_weights(tmp_path: Path) -> None:
    """A transposed weight is put in order when it is written: one tensor's worth at a time."""
    weight = nn.Linear(64, 32)
    program = custom(weight, input=torch.randn(3, 64))
    model = lower(program)
    stored = model.graph.initializers["weight"].const_value
    assert stored.raw.data_ptr() == program.tensor("weight").data_ptr()
    save_onnx(model, tmp_path / "model.onnx")
    on_disk = onnx.load(tmp_path / "model.onnx").graph.initializer
    found = onnx.numpy_helper.to_array(next(i for i in on_disk if i.name == "weight"))
    assert (found == program.tensor("weight").detach().numpy().T).all()


def test_parity_refuses_another_result(program: Program) -> None:
    probe = program.signature.probe()
    expected = program(probe)
    wrong = {name: value * 1.01 for name, value in expected.items()}
    with pytest.raises(PromiseError, match=r"last_hidden_state|pooler_output"):
        check_parity(program, [expected], [wrong], [probe])
    assert check_parity(program, [expected], [expected], [probe], "itself").inputs == "itself"


def test_rounding_noise_is_that_of_quantized_activations(program: Program) -> None:
    def noise(of: Program) -> float:
        probes = [of.signature.probe(batch=4, sequence=30)]
        return rounding_noise(of, [of(probes[0])], probes)

    assert noise(program) == 0
    weights = Pipeline.parse("int8{min_size=1,activation=none}").run(program).program
    assert noise(weights) == 0
    rows = Pipeline.parse("int8{min_size=1}").run(program).program
    assert 0 < noise(rows) < 0.1


def test_parity_of_a_quantized_program_still_sees_a_wrong_result(program: Program) -> None:
    rows = Pipeline.parse("int8{min_size=1}").run(program).program
    probe = rows.signature.probe()
    expected = rows(probe)
    wrong = {name: value + 0.2 * value.abs().mean() for name, value in expected.items()}
    with pytest.raises(PromiseError, match="is allowed"):
        check_parity(rows, [expected], [wrong], [probe])


def test_three_ways_agree() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)).eval()
    program = custom(model, input=torch.randn(3, 6))
    found = three_way(model, program, OnnxSession(lower(program)), program.signature.probe())
    assert set(found) == {"eager-graph", "graph-onnx", "eager-onnx"}
    assert max(found.values()) < 1e-5


def test_weights_stay_in_the_file(tmp_path: Path) -> None:
    """A file is opened without its large weights, and computes what the model in memory does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 160), nn.Linear(160, 4))
    program = custom(model, input=torch.randn(2, 160))
    lowered = lower(program)
    save_onnx(lowered, tmp_path / "model.onnx")
    slim = without_weights(tmp_path / "model.onnx")
    assert slim is not None and len(slim) < (tmp_path / "model.onnx").stat().st_size - 100_000
    first = onnx.load_from_string(slim).graph.initializer
    outside = [t for t in first if t.data_location == onnx.TensorProto.EXTERNAL]
    assert [list(t.dims) for t in outside] == [[160, 160]]
    probe = program.signature.probe()
    inside, mapped = OnnxSession(lowered)(probe), OnnxSession(tmp_path / "model.onnx")(probe)
    for name, value in inside.items():
        torch.testing.assert_close(mapped[name], value, atol=1e-6, rtol=1e-6)


@given(st.binary(max_size=60))
def test_a_file_that_is_no_model_is_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        with pytest.raises(SourceError, match="cannot load"):
            OnnxSession(path)
