"""Small random models, captured once a session, that several test files read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ftc.graph.capture import capture_module
from ftc.graph.program import Program
from ftc.passes.pipeline import Pipeline

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 50, 16, 24, 2, 2


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x)))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.block_norm, self.out = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + torch.relu(self.block_norm(self.block(x)))
        return self.out(x.mean((2, 3)))


class Written(nn.Module):
    """Attention, norms and a gated block written out by hand, without one fused operator."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b", "c", "d", "e", "f"):
            self.register_parameter(name, nn.Parameter(torch.randn(WIDTH, WIDTH) / 4))
        self.g, self.h = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.i = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
        self.j = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-5) * self.g + self.h
        q, k, v = y @ self.a, y @ self.b + self.j, y @ self.c
        x = x + torch.softmax(q @ k.transpose(1, 2) * 0.25, -1) @ v @ self.d
        return x + (torch.sigmoid(x @ self.e) * (x @ self.f)) @ self.i


def _capture(model: nn.Module, **inputs: Tensor) -> Program:
    dynamic = {
        name: {0: "batch", 1: "sequence"} if t.dim() == 2 and not t.is_floating_point()
        else {0: "batch"}
        for name, t in inputs.items()
    }  # fmt: skip
    masks = [name for name in inputs if "mask" in name]
    return capture_module(model, inputs, dynamic=dynamic, masks=masks)


def _text(model: nn.Module) -> Program:
    model.config.use_cache = False
    ids = torch.arange(2, 14).view(2, 6)
    return _capture(model, input_ids=ids, attention_mask=torch.ones_like(ids))


def _bert(attention: str = "sdpa") -> Program:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, intermediate_size=INNER,
        num_attention_heads=HEADS, max_position_embeddings=32, attn_implementation=attention,
    )  # fmt: skip
    return _text(BertModel(config))


def _gpt2() -> Program:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _text(GPT2LMHeadModel(config))


def _llama(layers: int = LAYERS, attention: str = "sdpa") -> Program:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=INNER, max_position_embeddings=64,
        tie_word_embeddings=True, attn_implementation=attention,
    )  # fmt: skip
    return _text(LlamaForCausalLM(config))


def _cohere() -> Program:
    """Attention and feed-forward side by side; norms without a bias, written out."""
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=INNER, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _text(CohereForCausalLM(config))


def _mixtral() -> Program:
    """Experts: products with one weight each, chosen by a router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=INNER, max_position_embeddings=64,
        num_local_experts=4,
    )  # fmt: skip
    return _text(MixtralForCausalLM(config))


def _t5() -> Program:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=LAYERS,
        num_heads=HEADS,
    )  # fmt: skip
    return _text(T5EncoderModel(config))


def _xlnet() -> Program:
    from transformers import XLNetConfig, XLNetModel

    config = XLNetConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, n_layer=LAYERS, n_head=HEADS, d_inner=INNER
    )
    return _text(XLNetModel(config))


def _albert() -> Program:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=8, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, intermediate_size=INNER, max_position_embeddings=32,
    )  # fmt: skip
    return _text(AlbertModel(config))


def _vit() -> Program:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER, image_size=16, patch_size=8,
    )  # fmt: skip
    return _capture(ViTModel(config), pixel_values=torch.randn(2, 3, 16, 16))


MODELS: dict[str, Callable[[], Program]] = {
    "mlp": lambda: _capture(Mlp(), x=torch.randn(3, 8)),
    "cnn": lambda: _capture(Cnn(), x=torch.randn(2, 3, 8, 8)),
    "written": lambda: _capture(Written(), x=torch.randn(2, 6, WIDTH)),
    "bert": _bert,
    "bert-eager": functools.partial(_bert, "eager"),
    "gpt2": _gpt2,
    "llama": _llama,
    "llama-eager": functools.partial(_llama, attention="eager"),
    "llama-12": functools.partial(_llama, 12),
    "cohere": _cohere,
    "mixtral": _mixtral,
    "t5": _t5,
    "xlnet": _xlnet,
    "albert": _albert,
    "vit": _vit,
}


@functools.cache
def _captured(name: str) -> Program:
    torch.manual_seed(0)
    return MODELS[name]()


def tiny(name: str) -> Program:
    """A clone of the captured model ``name``, which the caller may change."""
    return _captured(name).clone()


def custom(model: nn.Module, **inputs: Any) -> Program:
    """A model of the caller's own, with a dynamic batch."""
    return _capture(model, **inputs)


def canonical(name: str) -> Program:
    return Pipeline.parse("canonicalize").run(tiny(name)).program


def data(program: Program, runs: int = 3) -> tuple[dict[str, torch.Tensor], ...]:
    return tuple(program.signature.probe(seed=50 + run, batch=8) for run in range(runs))
