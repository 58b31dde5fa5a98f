"""Small models of transformers with PEFT's adapters, and whether a program says what they say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ftc.graph.program import Program

peft = pytest.importorskip("peft")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PEFT and transformers warn of each other, and that is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def make(kind: str, folder: Path) -> Path:
    """A small random model of transformers in ``folder``."""
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=1))
    elif kind == "llama":
        config = transformers.LlamaConfig(
            **_SIZES, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0
        )
        model = transformers.LlamaForCausalLM(config)
    elif kind == "classifier":
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**_SIZES, num_labels=3)
        )
    elif kind == "masked":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES))
    else:
        model = transformers.BertModel(transformers.BertConfig(**_SIZES))
    model.save_pretrained(folder)
    return folder


def theirs(kind: str, folder: Path) -> nn.Module:
    import transformers

    name = {"bert": "AutoModel", "classifier": "AutoModelForSequenceClassification",
            "masked": "AutoModelForMaskedLM"}  # fmt: skip
    maker = getattr(transformers, name.get(kind, "AutoModelForCausalLM"))
    return maker.from_pretrained(folder).eval()


def agree(program: Program, model: nn.Module) -> None:
    inputs = program.signature.probe(seed=3, batch=2, sequence=7)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    with torch.no_grad():
        found, wanted = program(inputs), model.eval()(**inputs)
    name = program.signature.output_names[0]
    torch.testing.assert_close(found[name], wanted[name], **CLOSE)


def trained_by_peft(
    kind: str, model: nn.Module, options: dict[str, Any], folder: Path
) -> nn.Module:
    """A model with PEFT's adapters as if they were trained, saved in ``folder``."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            step = torch.randn_like(parameter) / 8
            parameter.data = parameter.data + step if "pissa" in str(options) else step
    adapted.save_pretrained(folder)
    return adapted
