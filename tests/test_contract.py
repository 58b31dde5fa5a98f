"""One suite that every registered pass runs through.

A new pass is picked up by its name. It needs a row in ``SPECS`` only for
options worth testing beyond the defaults, and, if it is approximate, a row in
``LOSSLESS``: options and a model for which it must lose nothing, or how much.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from ftc.graph.drift import compare, measure_drift
from ftc.graph.errors import FtcError, UsageError
from ftc.graph.printer import fingerprint, print_graph
from ftc.graph.program import PassRecord, Program
from ftc.graph.provenance import KEY, provenance
from ftc.passes import registry
from ftc.passes.base import Context, Effect, Pass
from ftc.passes.pipeline import Pipeline
from ftc.passes.text import SELECTORS, parse_pass
from ftc.tests.tiny import custom, tiny

REFUSED = {  # (the pass, a model that its defaults have nothing to do on)
    *(
        (spec, model)
        for spec in ("cache", "cache{logits=all}", "int8_cache")
        for model in ("mlp", "bert")
    ),
    ("lora", "mlp"),
    ("head", "mlp"),
    ("head{task=token-classification,labels=5}", "mlp"),
    ("prefix", "mlp"),
    ("prefix{tokens=2}", "mlp"),
    ("prompt", "mlp"),
    ("prompt{tokens=2}", "mlp"),
    ("tensor_parallel", "mlp"),
}
SPECS = {  # beyond the defaults, which are always tested
    "cache": ["cache{logits=all}"],
    "freeze": ["freeze{train=product}", "freeze{train=none}"],
    "head": ["head{task=token-classification,labels=5}"],
    "lora": [
        "lora{target=product,rank=2,dropout=0.1}",
        'lora{target="product - head",rank=2,init=pissa}',
    ],
    "lowrank": ["lowrank{ratio=0.5}", "lowrank{rank=3}"],
    "prefix": ["prefix{tokens=2}"],
    "prompt": ["prompt{tokens=2}"],
    "merge": ["merge{max_loss=0.1}"],
    "int4": ["int4{min_size=0,group_size=16}", "int4{min_size=0,group_size=16,symmetric=true}"],
    "int8": [
        "int8{min_size=0}",
        "int8{activation=none,min_size=0,reduce_range=false}",
        "int8{activation=static,min_size=0}",
        "int8{symmetric=false,min_size=0}",
    ],
}
BEFORE = {"merge": 'lora{target="product - head",rank=2}'}  # what a pass is for
AGAIN_MODIFIES = {"awq", "smooth"}  # exact, and balances what it balanced before once more
MODELS = ("mlp", "bert", "llama", "gpt2")
ALL = [spec for name in registry.names() for spec in (name, *SPECS.get(name, ()))]


def every_spec(models: tuple[str, ...]) -> pytest.MarkDecorator:
    """Runs a test on every spec and every one of ``models`` that the spec is for."""
    pairs = [(s, m) for s in ALL for m in models if (s, m) not in REFUSED]
    both = [pytest.param(spec, model, id=f"{spec}-{model}") for spec, model in pairs]
    return pytest.mark.parametrize(("spec", "model"), both)


EVERY_SPEC = every_spec(MODELS)


@dataclass(frozen=True)
class Snapshot:
    """All there is to see of a program, by value."""

    text: str
    tensors: dict[str, Tensor]
    trained: dict[str, bool]

    @classmethod
    def of(cls, program: Program) -> Snapshot:
        return cls(
            print_graph(program),
            {n: t.detach().clone() for n, t in program.tensors()},
            {n: p.requires_grad for n, p in program.module.named_parameters()},
        )

    def assert_same(self, other: Snapshot) -> None:
        assert self.text == other.text
        assert self.trained == other.trained
        assert self.tensors.keys() == other.tensors.keys()
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), name


@dataclass(frozen=True)
class Run:
    """A pass, the program it ran on, what that looked like before, and the result."""

    given: Pass
    before: Program
    snapshot: Snapshot
    after: Program

    @property
    def record(self) -> PassRecord:
        return self.after.history[-1]


@functools.cache
def run(spec: str, model: str) -> Run:
    """Runs one pass, after those that it needs."""
    given, before = parse_pass(spec), tiny(model)
    seen = [before.signature.probe(seed=5)] if "static" in spec else None
    ctx = Context(calibration=seen)
    if given.name in BEFORE:
        before = Pipeline.parse(BEFORE[given.name]).run(before, ctx).program
    for needed, reason in Pipeline((given,)).plan(before):
        if reason is not None:
            before = needed(before, ctx).program
    snapshot = Snapshot.of(before)
    return Run(given, before, snapshot, given(before, ctx).program)


@pytest.mark.parametrize("spec", ALL)
def test_text_form_round_trips(spec):
    given = parse_pass(spec)
    assert parse_pass(given.spec) == given
    assert parse_pass(given.spec).spec == given.spec


@pytest.mark.parametrize(("spec", "model"), sorted(REFUSED))
def test_a_model_without_a_place_for_it_is_refused_with_a_fix(spec, model):
    with pytest.raises(FtcError) as caught:
        run(spec, model)
    assert caught.value.fix


@EVERY_SPEC
def test_the_program_before_is_untouched(spec, model):
    result = run(spec, model)
    result.snapshot.assert_same(Snapshot.of(result.before))


@EVERY_SPEC
def test_it_did_what_it_promised(spec, model):
    """Measured here again, at other sizes than the pass measured."""
    result = run(spec, model)
    effect = result.given.effect
    assert result.record.effect == effect.value
    assert result.record.spec == result.given.spec
    if effect is Effect.INTERFACE:
        return
    probe = result.before.signature.probe(seed=7, batch=4)
    with torch.no_grad():
        outputs = result.before(probe), result.after(probe)
    found = compare(*outputs, probe, result.before.signature)
    assert found.keys() == set(result.before.signature.output_names)
    for difference in found.values():
        if effect is Effect.ANNOTATION:
            assert difference.max_abs == 0
        elif effect is Effect.EXACT:
            assert difference.is_rounding
        else:
            assert difference.relative < 1


@EVERY_SPEC
def test_ties_are_kept(spec, model):
    result = run(spec, model)
    assert result.after.ties == result.before.ties
    if model in ("llama", "gpt2"):
        assert result.after.ties


@EVERY_SPEC
def test_every_new_node_says_who_made_it_and_where(spec, model):
    result = run(spec, model)
    old = {node.name for node in result.before.graph.nodes}
    new = [n for n in result.after.graph.nodes if n.name not in old]
    for node in new:
        assert KEY in node.meta, node
        assert provenance(node).made_by == result.given.spec
        if node.op == "call_function":
            assert provenance(node).source, node


@EVERY_SPEC
def test_nothing_modified_means_the_same_module(spec, model):
    result = run(spec, model)
    same = result.after.module is result.before.module
    assert same == (result.record.modified == 0)
    if same:
        assert fingerprint(result.after) == fingerprint(result.before)


@EVERY_SPEC
def test_a_second_run_behaves_as_declared(spec, model):
    result = run(spec, model)
    if result.given.forbids & result.after.facts:
        with pytest.raises(FtcError):
            result.given(result.after)
        return
    again = result.given(result.after)
    settles = result.given.effect in (Effect.EXACT, Effect.ANNOTATION)
    if settles and result.given.name not in AGAIN_MODIFIES:
        assert again.modified == 0
    assert len(again.program.history) == len(result.after.history) + 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@every_spec(("mlp", "llama"))
def test_the_result_can_be_exported_again(spec, model):
    after = run(spec, model).after
    signature = after.signature
    example = signature.bind(signature.probe(seed=1))
    shapes = tuple(
        {axis: Dim.DYNAMIC for axis, dim in enumerate(i.shape) if isinstance(dim, str)}
        for i in signature.inputs
    )
    _ = after.module.code  # compiled before torch.export reads its arguments' names
    exported = torch.export.export(after.module, example, dynamic_shapes=shapes, strict=False)
    probe = signature.probe(seed=2, batch=5)
    with torch.no_grad():
        outputs = exported.module()(*signature.bind(probe))
        expected = after(probe)
    for output, name in zip(outputs, signature.output_names, strict=True):
        torch.testing.assert_close(output, expected[name])


@pytest.mark.parametrize("name", registry.names())
def test_bad_options_are_refused_with_a_caret(name):
    with pytest.raises(UsageError) as caught:
        parse_pass(f"{name}{{nonsense=1}}")
    assert caught.value.where.endswith("\n  " + " " * (len(name) + 1) + "^")
    for option in registry.describe(registry.get(name)).options:
        for value in bad_values(option):
            with pytest.raises(UsageError) as caught:
                parse_pass(f"{name}{{{option.name}={value}}}")
            assert "^" in caught.value.where, (option, value)
            assert caught.value.fix, (option, value)


def bad_values(option: registry.Option) -> list[str]:
    """Texts that no option of this type may take."""
    if option.name in SELECTORS:
        return ['"ffn |"', '"(ffn"', '"layer[x]"', "''"]
    if "a string" in option.type:
        return []
    bad = ["no-such-word", "''", "{"]
    return [*bad, "nan", "inf", "-inf"] if "number" in option.type else bad


# The lossless corner of each approximate pass.


def low_rank_loses_nothing_at_the_true_rank() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16))
    for layer in (model[0], model[2]):
        thin = torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features)
        layer.weight.data = thin / 4
    program = custom(model, input=torch.randn(3, 12))
    result = Pipeline.parse("lowrank{rank=2}").run(program)
    assert result.records[-1].modified == 2
    assert result.program.history[-1].parameters < program_parameters(program)
    probe = program.signature.probe(batch=9)
    assert measure_drift(program, result.program, probe).relative <= 1e-5


def int8_rounds_by_half_a_step() -> None:
    program = Pipeline.parse("canonicalize").run(tiny("llama")).program
    ready = Pipeline.parse("int8{min_size=0,reduce_range=false,activation=none}")
    before = program
    for each, _ in ready.plan(program)[:-1]:
        before = each(before).program
    after = ready.run(before).program
    quantized = 0
    for name, weight in before.tensors():
        scale = dict(after.tensors()).get(f"{name}.scale")
        if scale is not None:
            restored = after.tensor(f"{name}.quantized").float() * scale
            assert ((weight - restored).abs() <= scale / 2 * 1.0001).all(), name
            quantized += 1
    assert quantized > 10


def int4_keeps_weights_that_are_4_bits_already() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16))
    for layer in (model[0], model[2]):
        codes = torch.randint(0, 16, (layer.out_features, layer.in_features // 16, 16)).float()
        codes[..., 0], codes[..., 1] = 0, 15
        steps = torch.rand(layer.out_features, layer.in_features // 16, 1).half().float() + 0.5
        layer.weight.data = ((codes - torch.randint(0, 16, steps.shape)) * steps).flatten(1)
    program = custom(model, input=torch.randn(3, 64))
    result = Pipeline.parse("int4{min_size=0,group_size=16,activation=none}").run(program)
    assert result.records[-1].modified == 2
    probe = program.signature.probe(batch=9)
    assert measure_drift(program, result.program, probe).relative <= 1e-5


def program_parameters(program: Program) -> int:
    return sum(p.numel() for p in program.module.parameters())


LOSSLESS: dict[str, Callable[[], None]] = {
    "lowrank": low_rank_loses_nothing_at_the_true_rank,
    "int4": int4_keeps_weights_that_are_4_bits_already,
    "int8": int8_rounds_by_half_a_step,
}


@pytest.mark.parametrize(
    "name", [n for n in registry.names() if registry.get(n).effect is Effect.APPROXIMATE]
)
def test_an_approximate_pass_has_a_lossless_corner(name):
    torch.manual_seed(0)
    assert name in LOSSLESS, f"add the corner of {name} to LOSSLESS"
    LOSSLESS[name]()


@pytest.mark.parametrize("name", registry.names())
def test_candidates_are_legal_instances(name):
    cls = registry.get(name)
    for candidate in cls.candidates(tiny("bert")):
        assert isinstance(candidate, cls)
        assert parse_pass(candidate.spec) == candidate
