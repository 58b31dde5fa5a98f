"""Partition: balanced where the best cut is, narrow, read off disk again, quick on deep graphs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftc.graph.balance import SLACK, Line, balance
from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.cut import cut
from ftc.graph.errors import FtcError, PreconditionError, UsageError
from ftc.graph.fold import stage_nodes
from ftc.graph.program import Program
from ftc.graph.stage_plan import parse_bytes, plan_stages, stage_costs
from ftc.graph.stages import annotated
from ftc.graph.structure import find_structure
from ftc.graph.training_cost import DEVICES, training_costs, usual_sizes, weight_bytes
from ftc.passes.partition import Partition
from ftc.passes.pipeline import Pipeline

from .tiny import custom, tiny

CPU = DEVICES["cpu"]
_seconds = st.lists(st.integers(1, 20), min_size=2, max_size=9)


def _line(seconds: list[int], crossing: list[int], saved: list[int] | None = None) -> Line:
    weights = [[("shared", 7)] if i % 3 == 0 else [(f"w{i}", i)] for i in range(len(seconds))]
    return Line(seconds, crossing, saved or [0] * len(seconds), weights)


def _parts(ends: tuple[int, ...]) -> list[range]:
    return [range(a, b) for a, b in itertools.pairwise((0, *ends))]


def _held(line: Line, part: range) -> int:
    return sum(size for _, size in {w for i in part for w in line.weights[i]})


@settings(max_examples=60, deadline=None)
@given(_seconds, st.integers(1, 4), st.data())
def test_no_cut_has_a_smaller_largest_part_or_less_traffic(
    seconds: list[int], parts: int, data: st.DataObject
) -> None:
    parts = min(parts, len(seconds))
    crossing = data.draw(st.lists(st.integers(1, 5), min_size=len(seconds), max_size=len(seconds)))
    crossing[-1] = 0
    saved = data.draw(st.lists(st.integers(0, 5), min_size=len(seconds), max_size=len(seconds)))
    line = _line(seconds, crossing, saved)
    memory = data.draw(st.integers(1, 120))

    def fits(ends: tuple[int, ...]) -> bool:
        return all(
            _held(line, part) + (parts - k) * sum(saved[i] for i in part) <= memory
            for k, part in enumerate(_parts(ends))
        )

    def largest(ends: tuple[int, ...]) -> int:
        return max(sum(seconds[i] for i in part) for part in _parts(ends))

    def traffic(ends: tuple[int, ...]) -> int:
        return sum(crossing[end - 1] for end in ends)

    every = [(*c, len(seconds)) for c in
             itertools.combinations(range(1, len(seconds)), parts - 1)]  # fmt: skip
    legal = [ends for ends in every if fits(ends)]
    if not legal:
        with pytest.raises(PreconditionError, match="no cut into"):
            balance(line, parts, link=torch.inf, memory=memory)
        return
    found = balance(line, parts, link=torch.inf, memory=memory)
    best = min(map(largest, legal))
    assert fits(found) and largest(found) <= best * (1 + SLACK)
    assert traffic(found) == min(traffic(e) for e in legal if largest(e) <= best * (1 + SLACK))
    even = min(largest(e) for e in legal if traffic(e) <= traffic(found))
    assert largest(found) <= even + best * SLACK / 2**8


class Uneven(nn.Module):
    """24 blocks whose inner widths differ up to sixteenfold."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        inner = [(1, 16, 4, 2, 12, 8)[i % 6] * width // 2 for i in range(24)]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in inner)
        self.up = nn.ModuleList(nn.Linear(width, n) for n in inner)
        self.down = nn.ModuleList(nn.Linear(n, width) for n in inner)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(norm(x))))
        return x


def _seconds_of(program: Program, sizes: dict[str, int]) -> list[float]:
    return [cost.seconds for cost in stage_costs(program, cut(program), sizes, CPU)]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_uneven_blocks_give_even_stages(count: int) -> None:
    program = custom(Uneven(), ids=torch.randint(0, 100, (2, 6)))
    after = Partition(stages=count, shape="batch=8,sequence=64")(program).program
    found = _seconds_of(after, {"batch": 8, "sequence": 64})
    assert len(found) == count and max(found) <= 1.1 * sum(found) / count


@pytest.mark.parametrize("name", ["bert", "llama-12", "gpt2", "t5"])
def test_no_more_crosses_than_where_a_person_would_cut(name: str) -> None:
    program = tiny(name)
    sizes = usual_sizes(program.signature)
    layers = find_structure(program).layers
    by_hand = {n: max(layer, 0) * 2 // len(layers)
               for n, layer in stage_nodes(program, layers).stage.items()}  # fmt: skip
    after = Partition(stages=2)(program).program
    found, hand = (
        sum(c.sent for c in stage_costs(program, stages, sizes, CPU))
        for stages in (cut(after), cut(program, by_hand))
    )
    assert 0 < found <= hand


def test_what_is_frozen_costs_no_backward() -> None:
    program = tiny("llama-12")
    frozen = Pipeline.parse("freeze{train='layer[6:12]'}").run(program).program
    costs = training_costs(frozen, usual_sizes(program.signature), CPU)
    behind = [cost.backward > 0 for cost in costs.values() if cost.forward > 0]
    assert not any(behind[: len(behind) // 3]) and all(behind[-len(behind) // 3 :])
    whole, part = (len(cut(Partition(stages=2)(p).program)[0].module.graph.nodes)
                   for p in (program, frozen))  # fmt: skip
    assert part > 1.2 * whole  # the frozen front takes more layers


def test_saved_bytes_are_those_that_autograd_keeps() -> None:
    for name in ("bert", "gpt2", "llama"):
        program = tiny(name)
        sizes = {"batch": 4, "sequence": 24}
        said = sum(c.saved for c in training_costs(program, sizes, CPU).values())
        kept: dict[int, int] = {}
        weights = {t.untyped_storage().data_ptr() for _, t in program.tensors()}

        def pack(t: Tensor, kept: dict[int, int] = kept, weights: set[int] = weights) -> Tensor:
            where = t.untyped_storage().data_ptr()
            if where not in weights and t.is_floating_point():
                kept[where] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs = program(program.signature.probe(**sizes))
        assert outputs and said == pytest.approx(sum(kept.values()), rel=0.2), name


def test_annotations_survive_and_are_taken_away(tmp_path: Path) -> None:
    result = Partition(stages=2)(tiny("bert"))
    assert "2 stages at batch 8, sequence 128" in result.record.notes[0]
    save_bundle(result.program, tmp_path / "b")
    expected = {n.name: s for n, s in annotated(result.program).items()}
    for each in (result.program.clone(), load_bundle(tmp_path / "b")):
        assert {n.name: s for n, s in annotated(each).items()} == expected
    again = Partition(stages=1)(result.program).program
    assert not annotated(again) and len(cut(again)) == 1


def test_rewrites_after_it_leave_whole_stages() -> None:
    program = Pipeline.parse("partition{stages=3}").run(tiny("llama-12")).program
    program = Pipeline.parse("lowrank{ratio=0.5},int8").run(program).program
    assert len(cut(program)) == 3


def test_a_stage_holds_no_more_than_its_memory() -> None:
    program = tiny("llama-12")
    sizes = usual_sizes(program.signature)
    stages = cut(Partition(stages=3, memory="15MB")(program).program)
    for costs, alive in zip(stage_costs(program, stages, sizes, CPU), (3, 2, 1), strict=True):
        assert costs.weights + alive * costs.saved <= 15e6
    with pytest.raises(PreconditionError, match="no cut into 3 stages fits in 1,000,000 bytes"):
        Partition(stages=3, memory="1MB")(program)


def test_a_tied_weight_is_counted_once_a_stage() -> None:
    program = tiny("gpt2")
    (whole,) = stage_costs(program, cut(program), usual_sizes(program.signature), CPU)
    sizes = dict(weight_bytes(program).values())
    assert whole.weights == sum(sizes.values())


def test_every_model_is_planned() -> None:
    for name in ("cnn", "mlp", "albert", "mixtral", "vit", "written"):
        program = tiny(name)
        plan = plan_stages(program, 2, usual_sizes(program.signature), CPU)
        assert len(cut(program, plan)) == 2, name


@pytest.mark.parametrize("spec", ["partition{stages=0}", "partition{memory=much}",
                                  "partition{device=abacus}"])  # fmt: skip
def test_wrong_options_are_refused_at_once(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(spec)
    assert caught.value.fix


@pytest.mark.parametrize("options", [{"shape": "rows=2"}, {"stages": 100}])
def test_what_this_program_does_not_allow_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(FtcError) as caught:
        Partition(**options)(tiny("mlp"))  # type: ignore[arg-type]
    assert caught.value.fix


def test_bytes_as_text() -> None:
    assert parse_bytes("80GB") == 80e9 and parse_bytes("1.5 mb") == 1.5e6
    assert parse_bytes("12") == 12


def test_costs_may_be_measured_here() -> None:
    """What is frozen has no backward, and neither tensors nor generators are touched."""
    program = Pipeline.parse('freeze{train="layer[1]"}').run(tiny("bert")).program
    before = {name: tensor.clone() for name, tensor in program.tensors()}
    state, sizes = torch.get_rng_state(), usual_sizes(program.signature, batch=2, sequence=8)
    here = training_costs(program, sizes, DEVICES["here"])
    said = training_costs(program, sizes, CPU)
    for node, cost in here.items():
        assert cost.forward > 0 and 0 <= cost.weights <= cost.backward
        assert bool(cost.backward) == bool(said[node].backward) or not said[node].forward
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in program.tensors())
    with pytest.raises(PreconditionError, match="does not run at"):
        training_costs(program, {**sizes, "sequence": 128}, DEVICES["here"])
