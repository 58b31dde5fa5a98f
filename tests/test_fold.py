"""Folding: the same numbers and gradients, the same Parameters under the same names."""

from __future__ import annotations

import pytest
import torch

from ftc.graph.fold import fold, layer_outputs
from ftc.graph.mode import set_mode
from ftc.graph.program import Program
from ftc.graph.structure import find_structure
from ftc.passes.pipeline import Pipeline

from .tiny import LAYERS, WIDTH, tiny

TEXT = ["bert", "bert-eager", "gpt2", "llama", "llama-12", "cohere", "mixtral", "t5", "xlnet",
        "albert", "written", "vit", "cnn", "mlp"]  # fmt: skip


def _gradients(module: torch.nn.Module, program: Program) -> dict[str, torch.Tensor]:
    module.zero_grad()
    probe = program.signature.probe(seed=3)
    torch.manual_seed(0)
    sum(out.float().square().mean() for out in module(*program.signature.bind(probe))).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TEXT)
def test_a_folded_program_has_the_same_gradients(name: str) -> None:
    program = tiny(name)
    set_mode(program.module, training=True)
    program.module.recompile()
    folded = fold(program)
    expected = _gradients(program.module, program)
    found = _gradients(folded.module, program)
    assert expected and found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key


@pytest.mark.parametrize("name", TEXT)
def test_parameters_are_the_same_objects_under_the_same_names(name: str) -> None:
    program = tiny(name)
    folded = fold(program)
    expected = dict(program.module.named_parameters())
    found = dict(folded.module.named_parameters())
    assert found.keys() == expected.keys()
    assert all(found[key] is parameter for key, parameter in expected.items())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "llama-12"])
def test_each_layer_is_a_block_that_owns_its_weights(name: str) -> None:
    program = tiny(name)
    layers = find_structure(program).layers
    folded = fold(program)
    assert folded.blocks == tuple(layer.scope for layer in layers)
    for path, layer in zip(folded.blocks, layers, strict=True):
        held = {f"{path}.{n}" for n, _ in folded.module.get_submodule(path).named_parameters()}
        assert layer.names <= held
    outer = [n for n in folded.module.graph.nodes if n.op == "call_function"]
    assert len(outer) < len(program.graph.nodes) / 2


@pytest.mark.parametrize(("name", "blocks"), [("albert", LAYERS), ("written", 1)])
def test_layers_without_a_scope_of_their_own_are_given_their_weights(
    name: str, blocks: int
) -> None:
    folded = fold(tiny(name))
    assert folded.blocks == tuple(f"block_{i}" for i in range(blocks))
    for path in folded.blocks:
        assert not list(folded.module.get_submodule(path).parameters())


@pytest.mark.parametrize("spec", ["int8", "lowrank{ratio=0.5}", "int4"])
def test_rewritten_programs_fold(spec: str) -> None:
    program = Pipeline.parse(spec).run(tiny("llama")).program
    folded = fold(program)
    probe = program.signature.probe(seed=1)
    for a, b in zip(program(probe).values(), folded.module(*program.signature.bind(probe)),
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)
    assert len(folded.blocks) == LAYERS


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_layer_outputs_are_the_residual_stream(name: str) -> None:
    program = tiny(name)
    found = layer_outputs(program)
    assert len(found) == LAYERS
    assert all(node.meta["val"].shape[-1] == WIDTH for node in found)
