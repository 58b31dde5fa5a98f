"""Cutting: stages in a row are the program, in outputs and gradients, wherever it is cut."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.cut import Stage, cut, run_stages, shared_parameters
from ftc.graph.errors import PreconditionError
from ftc.graph.fold import fold, stage_nodes
from ftc.graph.mode import set_mode
from ftc.graph.program import Program
from ftc.graph.structure import find_structure
from ftc.graph.verify import verify
from ftc.passes.pipeline import Pipeline

from .families import captured
from .tiny import WIDTH, custom, tiny


class UNet(nn.Module):
    """Long skips from the way down to the way up, and outputs of two depths."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 4, 6, 8]
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in sizes[1:])
        self.up = nn.ModuleList(nn.Conv2d(2 * b, b, 3, padding=1) for b in reversed(sizes[1:]))
        self.narrow = nn.ModuleList(
            nn.Conv2d(b, a, 1) for a, b in zip(sizes[::-1][1:], sizes[::-1], strict=False)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = []
        for conv, norm in zip(self.down, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
            skips.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        middle = x
        for conv, narrow, skip in zip(self.up, self.narrow, reversed(skips), strict=True):
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = narrow(torch.relu(conv(torch.cat([x, skip], 1))))
        return x, middle.mean((2, 3))


@functools.cache
def _unet() -> Program:
    torch.manual_seed(0)
    return custom(UNet(), x=torch.randn(2, 3, 16, 16))


def _model(name: str) -> Program:
    if name == "unet":
        return _unet().clone()
    return captured(name)[1].clone() if name == "t5" else tiny(name)


def _by_layer(program: Program, count: int) -> dict[fx.Node, int]:
    """Layers shared out over ``count`` stages; by order of the graph where there are none."""
    layers = find_structure(program).layers
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    if not layers:
        return {node: i * count // len(nodes) for i, node in enumerate(nodes)}
    found = stage_nodes(program, layers).stage
    return {node: max(layer, 0) * count // len(layers) for node, layer in found.items()}


def _run(
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], program: Program
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs at sizes other than the example's, and gradients of all that trains."""
    program.module.zero_grad()
    probe = program.signature.probe(seed=3)
    outputs = run(probe)
    sum(out.float().square().mean() for out in outputs.values()).backward()
    return outputs, {
        name: parameter.grad.clone()
        for name, parameter in program.module.named_parameters()
        if parameter.grad is not None
    }


def _check(program: Program, stages: tuple[Stage, ...]) -> None:
    set_mode(program.module, training=False)
    outputs, gradients = _run(program, program)
    found, others = _run(functools.partial(run_stages, stages), program)
    assert found.keys() == outputs.keys() and others.keys() == gradients.keys()
    for name, output in outputs.items():
        torch.testing.assert_close(found[name], output, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-12", "t5", "unet", "cnn", "albert",
                                  "mixtral", "xlnet"])  # fmt: skip
def test_stages_in_a_row_are_the_program(name: str, count: int) -> None:
    program = _model(name)
    stages = cut(program, _by_layer(program, count))
    _check(program, stages)
    for stage in stages:
        verify(stage.program)


@pytest.mark.parametrize(
    "spec", ["freeze{train=head}", "freeze{train=norm}", "lora{rank=2}", "int8,lora{rank=2}",
             "int4,lora{rank=2}", "lowrank{ratio=0.5}", "prefix{tokens=3}", "prompt{tokens=3}"]
)  # fmt: skip
@pytest.mark.parametrize("name", ["bert", "llama-12"])
def test_rewritten_and_partly_frozen_programs(name: str, spec: str) -> None:
    program = Pipeline.parse(spec).run(_model(name)).program
    if not any(p.requires_grad for p in program.module.parameters()):
        pytest.skip("no parameter of this name trains")
    _check(program, cut(program, _by_layer(program, 3)))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["bert", "llama", "unet", "cnn"]), st.randoms(use_true_random=False))
def test_any_annotation_gives_the_same(name: str, random: object) -> None:
    program = _model(name)
    nodes = list(program.graph.nodes)
    chosen = random.sample(nodes, len(nodes) // 3)  # type: ignore[attr-defined]
    stages = cut(program, {node: random.randrange(4) for node in chosen})  # type: ignore[attr-defined]
    _check(program, stages)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-12", "cohere"])
def test_one_tensor_crosses_between_layers(name: str) -> None:
    program = _model(name)
    stages = cut(program, _by_layer(program, 2))
    assert len(stages[0].sent) == 1 and stages[1].received == stages[0].sent
    (crossing,) = (i for i in stages[1].program.signature.inputs if i.name in stages[0].sent)
    assert crossing.shape == ("batch", "sequence", WIDTH)
    assert stages[1].inputs == ("attention_mask",)


def test_skips_are_relayed_and_the_last_stage_yields_all() -> None:
    program = _model("unet")
    stages = cut(program, _by_layer(program, 5))
    for before, after in itertools.pairwise(stages):
        assert before.sent == after.received
    assert set(stages[2].received) & set(stages[2].sent)
    assert [stage.outputs for stage in stages[:-1]] == [()] * 4
    assert stages[-1].outputs == program.signature.output_names


def test_names_are_kept_and_only_what_is_read_is_held() -> None:
    program = _model("llama-12")
    stages = cut(program, _by_layer(program, 3))
    expected = dict(program.module.named_parameters())
    seen: dict[str, Tensor] = {}
    for stage in stages:
        held = dict(stage.module.named_parameters())
        assert all(expected[name] is parameter for name, parameter in held.items())
        assert len(held) < len(expected) / 2
        seen.update(held)
    assert seen.keys() == expected.keys()
    assert shared_parameters(stages) == {"lm_head.weight": (0, 2)}


def test_each_stage_folds_its_own_layers() -> None:
    program = _model("llama-12")
    for stage in cut(program, _by_layer(program, 3)):
        assert len(fold(stage.program).blocks) == 4


def test_annotations_are_read_and_survive_a_bundle(tmp_path: object) -> None:
    program = _model("bert")
    for node, stage in _by_layer(program, 2).items():
        node.meta["custom"] = {"stage": stage}
    save_bundle(program, tmp_path / "b")  # type: ignore[operator]
    for each in (program.clone(), load_bundle(tmp_path / "b")):  # type: ignore[operator]
        stages = cut(each)
        assert len(stages) == 2
        _check(each, stages)


def test_without_annotations_there_is_one_stage() -> None:
    program = _model("gpt2")
    (stage,) = cut(program)
    assert stage.inputs == program.signature.input_names and not stage.sent


@pytest.mark.parametrize("stage", [-1, 10**9, "1", 1.0, True])
def test_a_forged_annotation_is_refused(stage: object) -> None:
    program = _model("mlp")
    next(n for n in program.graph.nodes if n.op == "call_function").meta["custom"] = {
        "stage": stage
    }
    with pytest.raises(PreconditionError, match="no number of a stage"):
        cut(program)
