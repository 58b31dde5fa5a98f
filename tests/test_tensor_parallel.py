"""Programs cut over ranks: outputs and gradients of all ranks, in lockstep and in processes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.errors import PreconditionError, UsageError
from ftc.graph.lockstep import run_ranks
from ftc.graph.program import Program
from ftc.graph.sharding import Shard, layout, part, shard_program, whole
from ftc.passes.pipeline import Pipeline
from ftc.passes.split import Split, Whole, viewed
from ftc.runtime.lower import decomposed, lower
from ftc.runtime.session import OnnxSession
from ftc.tests.families import captured
from ftc.tests.ranks import (
    assert_same_step,
    check_in_processes,
    gradients,
    in_float64,
    loss_of,
    whole_gradients,
)
from ftc.tests.tiny import custom

BASES = {
    "full": "canonicalize",
    "lora": "lora{target=product,rank=3}",
    "low rank": "lowrank{ratio=0.7}",
    "int8": "int8{min_size=0},lora{rank=2}",
}
MODELS = ("bert", "gpt2", "llama", "t5")
COUNTS = {"bert": (2, 2), "gpt2": (2, 2), "llama": (2, 2), "t5": (6, 4)}


@functools.cache
def based(name: str, base: str) -> Program:
    """A model after the passes of a base, with adapters that are not at zero."""
    program = Pipeline.parse(BASES[base]).run(captured(name)[1]).program
    draw = torch.Generator().manual_seed(0)
    for parameter_name, parameter in program.module.named_parameters():
        if parameter_name.endswith("_lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=draw) / 10
    return program


@functools.cache
def cut(name: str, base: str, size: int) -> Program:
    return Pipeline.parse(f"tensor_parallel{{size={size}}}").run(based(name, base)).program


def notes(program: Program) -> str:
    return "; ".join(program.history[-1].notes)


def in_lockstep(program: Program, size: int) -> None:
    """Every rank's outputs and gradients are those of the whole program."""
    program = in_float64(program)
    probe = program.signature.probe(seed=3)
    expected = whole_gradients(program, probe)
    ranks = [shard_program(program, rank, size) for rank in range(size)]
    outputs = run_ranks(ranks, probe)
    torch.stack([loss_of(each) for each in outputs]).sum().backward()
    for rank, own in enumerate(ranks):
        assert_same_step(program, rank, size, outputs[rank], gradients(own), expected)


STEPS = [(name, base, 4) for name in MODELS for base in BASES if name != "t5" or base == "full"]


@pytest.mark.parametrize(("name", "base", "size"), [*STEPS, *((n, "full", 2) for n in MODELS)])
def test_ranks_compute_the_same_step(name: str, base: str, size: int) -> None:
    program = cut(name, base, size)
    assert "{} attentions, {} feed-forwards".format(*COUNTS[name]) in notes(program)
    assert "whole" not in notes(program)
    in_lockstep(program, size)
    if base == "full":
        before, after = in_float64(based(name, base)), in_float64(program)
        probe = after.signature.probe(seed=3)
        step = whole_gradients(after, probe)
        assert_same_step(before, 0, 1, *step, whole_gradients(before, probe))


def test_processes_compute_the_same_step(tmp_path: Path) -> None:
    """Over gloo, cut for four and run by two and by four, read back from disk."""
    chosen = [("bert", "lora"), ("gpt2", "full"), ("llama", "int8"), ("llama", "full"),
              ("t5", "full")]  # fmt: skip
    folders = [save_bundle(cut(name, base, 4), tmp_path / f"{name}-{base}".replace(" ", "-"))
               for name, base in chosen]  # fmt: skip
    check_in_processes(folders, (2, 4))


@pytest.mark.parametrize(("name", "base"), [("llama", "int8"), ("t5", "full")])
def test_it_lowers_to_what_the_whole_program_does(name: str, base: str) -> None:
    """One file is for one rank: the operators between ranks are gone."""
    program = cut(name, base, 4)
    probe = program.signature.probe(seed=9)
    model = lower(program)
    assert not decomposed(model)
    found = OnnxSession(model)(probe)
    for output, expected in program(probe).items():
        torch.testing.assert_close(found[output], expected, rtol=1e-4, atol=1e-5)


OTHERS = ("gpt-neox", "qwen3", "gemma2", "albert", "modernbert", "falcon-grouped")


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str) -> None:
    """Fused and rotary, norms of heads, bounded scores, one layer's weights in all."""
    program = cut(name, "full", 2)
    assert "2 attentions, 2 feed-forwards" in notes(program)
    in_lockstep(program, 2)


def test_a_rank_holds_its_share() -> None:
    program = cut("llama", "full", 2)
    own = shard_program(program, 1, 2)
    sizes = [sum(t.numel() for _, t in p.tensors()) for p in (own, program)]
    assert 0.49 < sizes[0] / sizes[1] < 0.53
    for name, tensor in program.tensors():
        held = own.tensor(name)
        assert isinstance(held, nn.Parameter) == isinstance(tensor, nn.Parameter)
        assert held.is_contiguous()
        if name not in layout(program):
            assert torch.equal(held, tensor)


def test_few_key_heads_stay_whole_and_are_used_in_part() -> None:
    """Two key heads on four ranks: each of them is on two, whose gradients are summed."""
    program = cut("llama", "full", 4)
    kept = [n for n, _ in program.tensors() if "k_proj" in n or "v_proj" in n]
    assert len(kept) == 4
    assert layout(program).keys().isdisjoint(kept)
    assert "model.layers.0.self_attn.q_proj.weight" in layout(program)


def test_a_tie_is_one_tensor_cut_once() -> None:
    program = cut("llama", "full", 2)
    assert layout(program)["lm_head.weight"] == Shard(0, (99,), 2)
    assert program.ties == captured("llama")[1].ties
    without = Pipeline.parse("tensor_parallel{vocabulary=false}").run(based("llama", "full"))
    assert "lm_head.weight" not in layout(without.program)


def test_layout_and_numbers_survive_the_disk(tmp_path: Path) -> None:
    program = cut("gpt2", "full", 2)
    read = load_bundle(save_bundle(program, tmp_path / "cut"))
    assert layout(read) == layout(program)
    assert layout(read)["transformer.h.0.attn.c_attn.weight"] == Shard(0, (32, 32, 32), 2)
    in_lockstep(read, 2)


def test_one_rank_changes_nothing() -> None:
    result = Pipeline.parse("tensor_parallel{size=1}").run(based("bert", "full"))
    assert result.records[-1].modified == 0
    with pytest.raises(UsageError, match="1 or more"):
        Pipeline.parse("tensor_parallel{size=0}")


def test_heads_that_do_not_divide_are_left_whole() -> None:
    program = Pipeline.parse("tensor_parallel{size=3}").run(based("bert", "full")).program
    assert "2 feed-forwards" in notes(program)
    assert "left 2 attentions whole: 4 heads" in notes(program)
    in_lockstep(program, 3)


def test_what_cannot_be_cut_at_all_is_refused() -> None:
    with pytest.raises(PreconditionError, match="nothing in this program"):
        Pipeline.parse("tensor_parallel{size=5,vocabulary=false}").run(based("llama", "full"))


def test_another_number_of_ranks_is_refused() -> None:
    program = cut("bert", "full", 4)
    in_lockstep(program, 2)
    with pytest.raises(PreconditionError, match="for 4 ranks, and there are 3"):
        shard_program(program, 0, 3)
    with pytest.raises(PreconditionError, match="not split"):
        shard_program(based("bert", "full"), 0, 2)


def test_adapters_added_afterwards_are_refused() -> None:
    late = Pipeline.parse("lora{target=product}").run(cut("bert", "full", 2)).program
    with pytest.raises(PreconditionError, match="tensor_parallel last"):
        shard_program(late, 0, 2)


class Prefixed(nn.Module):
    """A block whose bias is added apart, whose gate is fused, and which has a scale a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.randn(12))
        self.slope = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return x + self.down(torch.nn.functional.silu(gate * self.slope) * up * self.scale)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_fused_gate_and_parameters_on_the_way(size: int) -> None:
    """One parameter a feature is cut like the features, one for all has its gradient summed."""
    program = custom(Prefixed(), x=torch.randn(5, 8))
    after = Pipeline.parse(f"tensor_parallel{{size={size}}}").run(program).program
    assert layout(after)["up.weight"] == Shard(0, (12, 12), size)
    assert layout(after)["scale"] == Shard(0, (12,), size)
    assert layout(after).keys().isdisjoint({"slope", "down.bias"})
    in_lockstep(after, size)


def test_a_weight_that_others_read_stays_whole() -> None:
    class Shared(Prefixed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.scale.sum() + self.up.weight.sum()

    program = custom(Shared(), x=torch.randn(5, 8))
    with pytest.raises(PreconditionError, match="nothing in this program") as caught:
        Pipeline.parse("tensor_parallel").run(program)
    assert "up.weight" in caught.value.where


def test_dropped_gradients_would_be_seen() -> None:
    """Without the copy operator losses are right and gradients wrong: the check is worth it."""
    program = cut("bert", "full", 2).clone()
    for node in list(program.graph.nodes):
        if node.target is torch.ops.ftc.parallel_copy.default:
            node.replace_all_uses_with(node.args[0])
    program.module.recompile()
    with pytest.raises(AssertionError, match=r"of|e-"):
        in_lockstep(program, 2)


@given(st.data())
def test_parts_make_the_whole(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5))
    segments = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    axis = data.draw(st.integers(0, 1))
    shape = [3, 3]
    shape[axis] = sum(segments)
    tensor = torch.randn(shape)
    shard = Shard(axis, segments, size)
    parts = [part(tensor, shard, rank, size) for rank in range(size)]
    assert torch.equal(whole(parts, shard), tensor)


@settings(max_examples=60)
@given(st.data())
def test_a_view_moves_a_cut_as_the_elements_say(data: st.DataObject) -> None:
    """The parts of a value, viewed by themselves, are the parts of the view."""
    heads, width, size = (data.draw(st.sampled_from(n)) for n in ((2, 4, 6), (2, 3), (2, 3)))
    dims = data.draw(st.permutations([5, 7]))
    shapes = [(*dims, heads * width), (*dims, heads, width), (dims[0] * dims[1], heads * width),
              (*dims, heads, width, 1)]  # fmt: skip
    before, after = (data.draw(st.sampled_from(shapes)) for _ in range(2))
    axis = {3: 2, 4: 2, 2: 1, 5: 2}[len(before)]
    length = before[axis]
    if length % size:
        return
    try:
        out = viewed(Split(axis, (length,), (length,)), before, after, size)
    except Whole:
        assert heads % size
        return
    value = torch.arange(5 * 7 * heads * width).view(before)
    local = list(after)
    local[out.axis] = -1
    for rank in range(size):
        own = part(value, Shard(axis, (length,), size), rank, size).view(local)
        wanted = part(value.view(after), Shard(out.axis, (after[out.axis],), size), rank, size)
        assert torch.equal(own, wanted)
