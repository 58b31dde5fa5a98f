"""Lowering: what the ONNX model is called, shares, contains, and computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ftc.graph import quantized_ops, shapes
from ftc.graph.errors import LoweringError
from ftc.graph.program import Program
from ftc.graph.quantize import Scheme, choose_qparams, quantize
from ftc.graph.target import target
from ftc.passes.pipeline import Pipeline
from ftc.runtime import lowering
from ftc.runtime.lower import lower
from ftc.runtime.parity import parity
from ftc.runtime.session import OnnxSession
from ftc.tests.tiny import custom, tiny

assert quantized_ops
ops: Any = torch.ops.ftc


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def probes(program: Program) -> list[dict[str, Tensor]]:
    dims = program.signature.dims
    return [
        program.signature.probe(seed=1),
        program.signature.probe(seed=2, **dict.fromkeys(dims, 1)),
        program.signature.probe(seed=3, **{d: 7 + i for i, d in enumerate(dims)}),
    ]


@pytest.mark.parametrize(
    "name",
    ["mlp", "cnn", "written", "bert", "bert-eager", "gpt2", "llama", "llama-eager", "cohere", "t5",
     "xlnet", "albert", "vit"],
)  # fmt: skip
def test_parity_at_other_shapes(name: str) -> None:
    program = tiny(name)
    assert parity(program, OnnxSession(lower(program)), probes(program)).relative < 1e-5


@pytest.mark.parametrize("name", ["cnn", "bert", "gpt2", "llama", "xlnet"])
@pytest.mark.parametrize("spec", ["int8{min_size=1}", "int8{min_size=1,activation=none}"])
def test_parity_of_quantized_programs(name: str, spec: str) -> None:
    program = Pipeline.parse(spec).run(tiny(name)).program
    parity(program, OnnxSession(lower(program)), probes(program))


def test_interface_keeps_names_and_named_dimensions() -> None:
    program = tiny("bert")
    graph = lower(program).graph
    assert tuple(v.name for v in graph.inputs) == program.signature.input_names
    assert tuple(v.name for v in graph.outputs) == program.signature.output_names
    assert [str(d) for d in graph.inputs[0].shape] == ["batch", "sequence"]
    assert [str(d) for d in graph.outputs[0].shape] == ["batch", "sequence", "16"]


def test_weights_keep_their_names_and_their_memory() -> None:
    program = tiny("llama")
    memory = {tensor.data_ptr() for _, tensor in program.tensors()}
    weights = lower(program).graph.initializers
    for name, tensor in program.tensors():
        assert weights[name].const_value.raw.data_ptr() in memory, name
        assert weights[name].const_value.size == tensor.numel()


@pytest.mark.parametrize("passes", ["cleanup", "int8{min_size=1}"])
def test_a_tied_weight_is_stored_once(passes: str) -> None:
    program = Pipeline.parse(passes).run(tiny("llama")).program
    held = sum(t.numel() * t.element_size() for _, t in program.tensors())
    stored = sum(v.const_value.nbytes for v in lower(program).graph.initializers.values())
    assert held <= stored < held + 1500, "constants are all that may come on top"


def test_nodes_say_where_they_come_from() -> None:
    model = lower(tiny("bert"))
    norm = next(n for n in model.graph if n.op_type == "LayerNormalization")
    assert "LayerNorm" in norm.metadata_props["module"]
    assert ".py:" in norm.metadata_props["source"]
    assert norm.outputs[0].name.startswith("layer_norm")


def test_size_is_linear_in_layers() -> None:
    two, twelve = (sum(kinds(lower(tiny(n))).values()) for n in ("llama", "llama-12"))
    per_layer, rest = divmod(twelve - two, 10)
    assert rest == 0
    assert per_layer < 50


def test_heads_are_not_split_and_joined_around_attention() -> None:
    found = kinds(lower(tiny("bert")))
    assert found["Attention"] == 2
    assert found["Transpose"] == 0


def test_keys_and_values_are_not_repeated_for_groups_of_heads() -> None:
    model = lower(tiny("llama"))
    attention = next(n for n in model.graph if n.op_type == "Attention")
    assert not {v.producer().op_type for v in attention.inputs[:3]} & {"Expand", "Reshape"}


def test_written_out_rms_norm_is_one_operator() -> None:
    found = kinds(lower(tiny("llama")))
    assert found["RMSNormalization"] == 5
    assert found["ReduceMean"] == 0


def test_products_of_one_input_quantize_it_once() -> None:
    program = Pipeline.parse("int8{min_size=1,select=product}").run(tiny("bert")).program
    found = kinds(lower(program))
    # queries, keys and values share one
    assert found["MatMulIntegerToFloat"] - found["QuantizeLinear"] == 2 * 2
    assert found["QuantizeLinear"] == found["ReduceMax"]


@pytest.mark.parametrize("dialect", ["onnxruntime", "standard"])
def test_a_row_does_not_depend_on_the_rows_beside_it(dialect: Any) -> None:
    program = Pipeline.parse("int8{min_size=1}").run(tiny("mlp")).program
    run = OnnxSession(lower(program, dialect))
    (probe,) = (program.signature.probe(seed=1, batch=5),)
    (name,) = probe
    rows = probe[name] * torch.tensor([1.0, 1e-3, 50.0, 1.0, 0.0]).unsqueeze(1)
    together = next(iter(run({name: rows}).values()))
    alone = torch.cat([next(iter(run({name: row}).values())) for row in rows.split(1)])
    assert torch.equal(together, alone)


class Quantized(nn.Module):
    """Every quantized operator on one weight."""

    def __init__(self, scheme: Scheme, activation: str) -> None:
        super().__init__()
        weight = torch.randn(12, 8)
        scale, zero = choose_qparams(weight, scheme)
        self.register_buffer("data", quantize(weight, scale, zero, scheme))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias, self.scheme, self.activation = nn.Parameter(torch.randn(12)), scheme, activation

    def forward(self, x: Tensor, i: Tensor) -> dict[str, Tensor]:
        weight = (self.data, self.scale, self.zero)
        how = (self.scheme.bits, self.scheme.group_size)
        return {
            "linear": ops.quantized_linear(x, *weight, self.bias, *how, self.activation),
            "no_bias": ops.quantized_linear(x * 2, *weight, None, *how, self.activation),
            "rows": ops.quantized_embedding(*weight, i, *how),
            "weight": ops.dequantize(*weight, *how) + x.sum() * 0,
        }


@pytest.mark.parametrize("activation", ["row", "tensor", "none"])
@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_operators(activation: str, group_size: int, symmetric: bool) -> None:
    """With codes that this machine's integer products are right for."""
    torch.manual_seed(0)
    reduced = not target("native").wide
    scheme = Scheme(group_size=group_size, symmetric=symmetric, reduce_range=reduced)
    x = torch.randn(3, 5, 8)
    program = custom(Quantized(scheme, activation), x=x, i=torch.randint(0, 12, (3, 5)))
    x = torch.randn(4, 5, 8) * torch.tensor([100.0, 1, 1, 0]).view(4, 1, 1)
    given = {"x": x, "i": torch.randint(0, 12, (4, 5))}
    found = OnnxSession(lower(program))(given)
    for name, expected in program(given).items():
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-4, msg=name)


def test_a_program_without_fake_values_is_lowered_and_not_touched() -> None:
    program = tiny("bert")
    for node in program.graph.nodes:
        node.meta.pop(shapes.VAL, None)
    assert kinds(lower(program)) == kinds(lower(tiny("bert")))
    assert shapes.fake_mode(program.graph) is None


class Awkward(nn.Module):
    """Outputs that are inputs, weights or each other; sizes that must be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        batch, length = x.shape
        wide = x.repeat(2, 1).reshape(length, 2 * batch)[:, : 2 * batch - 1]
        return {
            "same": x, "weight": self.weight, "y": x + 1, "again": x + 1,
            "wide": wide.reshape(2 * batch - 1, length), "size": x.new_full((batch + 1,), length),
        }  # fmt: skip


def test_outputs_and_sizes_of_every_kind() -> None:
    example = torch.randn(3, 7)
    from ftc.graph.capture import capture_module

    program = capture_module(Awkward(), {"x": example}, dynamic={"x": {0: "batch", 1: "sequence"}})
    model = lower(program)
    assert len({v.name for v in model.graph.outputs}) == 6
    for probe in probes(program):
        found = OnnxSession(model)(probe)
        for name, expected in program(probe).items():
            assert torch.equal(found[name], expected), name


@pytest.fixture
def strange() -> Iterator[Any]:
    """An operator that nobody can translate."""
    with torch.library._scoped_library("ftc_test", "FRAGMENT") as library:
        library.define("strange(Tensor x) -> Tensor")
        library.impl("strange", lambda x: x * 3, "CompositeExplicitAutograd")
        library.impl("strange", lambda x: torch.empty_like(x), "Meta")
        yield torch.ops.ftc_test.strange.default


class Holder(nn.Module):
    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.forward = operator  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


def test_an_unknown_operator_is_named_with_its_place_and_can_be_taught(
    strange: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = custom(Holder(strange), x=torch.randn(3, 4))
    with pytest.raises(LoweringError) as caught:
        lower(program)
    assert "ftc_test.strange" in str(caught.value)
    assert "module inner" in (caught.value.where or "")
    assert "lowers" in (caught.value.fix or "")

    monkeypatch.setattr(lowering.table, "_TABLE", dict(lowering.table._TABLE))

    @lowering.lowers(strange)
    def translate(e: lowering.Emitter, x: Any) -> Any:
        return e.op("Mul", x, e.const(3, e.dtype(x)))

    parity(program, OnnxSession(lower(program)), probes(program))


def test_a_program_in_train_mode_is_refused() -> None:
    program = custom(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), input=torch.randn(3, 4))
    dropout = next(n for n in program.graph.nodes if "dropout" in str(n.target))
    dropout.args = (dropout.args[0], 0.5, True)
    with pytest.raises(LoweringError, match="train mode"):
        lower(program)
