"""Training the graph is training the model: the same losses as plain torch, with dropout too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ftc.graph.program import Program
from ftc.graph.sources import capture
from ftc.passes.pipeline import Pipeline
from ftc.runtime.training.engine import EngineOptions, OneProcess
from ftc.runtime.training.modules import owned
from ftc.runtime.training.objectives import Batch, Objective, Scene, parse_objective
from ftc.runtime.training.schedule import Schedule
from ftc.runtime.training.trainer import Options, Trainer

STEPS = 50
VOCABULARY = 40
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip


def _bert(dropout: float) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(
        **_SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))  # fmt: skip


def _gpt2(dropout: float) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))  # fmt: skip


def _llama(dropout: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True,
                                        attention_dropout=dropout))  # fmt: skip


MODELS: dict[str, Callable[[float], nn.Module]] = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}


def _batches(causal: bool) -> list[Batch]:
    """Rows that count from a random number on, with random padding, which has no targets."""
    made = torch.Generator().manual_seed(5)
    found = []
    for _ in range(STEPS):
        first = torch.randint(VOCABULARY, (4, 1), generator=made)
        ids = (first + torch.arange(9)) % VOCABULARY
        mask = (torch.arange(9) < torch.randint(5, 10, (4, 1), generator=made)).long()
        targets = ids.masked_fill(mask == 0, -100)
        if causal:
            targets = torch.cat([targets[:, 1:], targets.new_full((4, 1), -100)], 1)
        inputs, count = {"input_ids": ids, "attention_mask": mask}, float((targets != -100).sum())
        found.append(Batch(inputs, {"tokens": targets}, {"loss": count}, 4, int(mask.sum())))
    return found


class _Data:
    """A loader of given batches."""

    class order:
        steps_per_epoch = STEPS

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def steps(self, done: int) -> Iterator[list[Batch]]:
        yield from ([batch] for batch in self.batches[done:])


class _Log:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def write(self, record: Any) -> None:
        self.losses.append(record["loss"])


def _trained(program: Any, objective: Objective, batches: list[Batch], **options: Any) -> list[
    float]:  # fmt: skip
    program = owned(program)
    scene: Any = Scene(program, encoder=None)  # type: ignore[arg-type]
    engine = OneProcess(program, objective, scene, EngineOptions(**options))
    loop = Options(STEPS, Schedule("linear", STEPS, 5), 1e-3, log_every=1, weight_decay=0.01)
    trainer = Trainer(engine, objective, _Data(batches), None, loop, Path())  # type: ignore[arg-type]
    log = _Log()
    trainer.log = log  # type: ignore[assignment]
    torch.manual_seed(3)
    trainer.run()
    return log.losses


def _eager(model: nn.Module, batches: list[Batch]) -> list[float]:
    """The loop as anyone writes it."""
    from transformers import get_linear_schedule_with_warmup

    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01},
                                   {"params": others, "weight_decay": 0.0}], lr=1e-3)  # fmt: skip
    schedule = get_linear_schedule_with_warmup(optimizer, 5, STEPS)
    losses = []
    model.train()
    torch.manual_seed(3)
    for batch in batches:
        logits = model(**batch.inputs).logits
        loss = nn.functional.cross_entropy(
            logits.view(-1, VOCABULARY), batch.targets["tokens"].view(-1)
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _model(name: str, dropout: float) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name](dropout)
    model.config.use_cache = False
    return model


@functools.cache
def _program(name: str, dropout: float) -> Program:
    ids = torch.arange(2, 14).view(2, 6)
    dims = {0: "batch", 1: "sequence"}
    return capture(
        _model(name, dropout), task="masked-lm" if name == "bert" else "causal-lm",
        examples={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic={"input_ids": dims, "attention_mask": dims}, masks=["attention_mask"],
        ranges={"input_ids": VOCABULARY},
    )  # fmt: skip


def _pair(name: str, dropout: float) -> tuple[Program, nn.Module, Objective, list[Batch]]:
    """A program, and a model of its own with the same weights."""
    objective = parse_objective("mlm" if name == "bert" else "clm")
    return _program(name, dropout), _model(name, dropout), objective, _batches(name != "bert")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_fifty_losses_are_those_of_plain_torch(name: str, dropout: float) -> None:
    program, model, objective, batches = _pair(name, dropout)
    found = _trained(program, objective, batches)
    expected = _eager(model, batches)
    assert found[0] > 1.05 * found[-1]
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours - theirs) <= 1e-5 * theirs


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_layers_give_the_same_losses(name: str) -> None:
    program, _, objective, batches = _pair(name, 0.1)
    assert _trained(program, objective, batches, gradient_checkpointing=True) == _trained(
        program, objective, batches
    )


def test_batches_of_a_step_count_as_one() -> None:
    """Two halves of different token counts give the gradient of the whole."""
    program, _, objective, batches = _pair("llama", 0.0)
    whole = batches[0]
    halves = []
    for rows in (slice(0, 1), slice(1, 4)):
        targets = whole.targets["tokens"][rows]
        inputs = {name: tensor[rows] for name, tensor in whole.inputs.items()}
        count = float((targets != -100).sum())
        halves.append(Batch(inputs, {"tokens": targets}, {"loss": count}, 1, 1))
    gradients = []
    for step in ([whole], halves):
        own = owned(program)
        engine = OneProcess(own, objective, Scene(own, None), EngineOptions())  # type: ignore[arg-type]
        loss = engine.gradients(step)["loss"]
        gradients.append([p.grad for p in engine.parameters().values()])
        assert loss == pytest.approx(3.7, abs=0.5)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("train", ["ffn", "head", "norm|bias"])
def test_frozen_weights_have_no_gradient_and_keep_nothing(train: str) -> None:
    """What autograd keeps is what the gradients of the trained weights need, and no more."""
    program, _, objective, batches = _pair("llama", 0.0)
    chosen = Pipeline.parse(f'freeze{{train="{train}"}}').run(program).program
    kept = {}
    for name, each in (("all", program), ("some", chosen)):
        own = owned(each)
        engine = OneProcess(own, objective, Scene(own, None), EngineOptions())  # type: ignore[arg-type]
        kept[name] = _saved_bytes(lambda: engine.gradients(batches[:1]))  # noqa: B023
        for key, parameter in own.module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, key
    assert kept["some"] < kept["all"]


def test_a_frozen_front_is_computed_without_a_graph() -> None:
    """Below the first trained weight nothing is kept at all."""
    program, _, objective, batches = _pair("bert", 0.0)
    sizes = []
    for layer in (0, 1):
        train = f'freeze{{train="layer[{layer}] & ffn"}}'
        own = owned(Pipeline.parse(train).run(program).program)
        engine = OneProcess(own, objective, Scene(own, None), EngineOptions())  # type: ignore[arg-type]
        sizes.append(_saved_bytes(lambda: engine.gradients(batches[:1])))  # noqa: B023
    assert sizes[1] < 0.75 * sizes[0]


def _saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of activations that autograd keeps while ``run`` runs."""
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(found.values())
