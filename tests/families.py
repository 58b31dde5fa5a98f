"""Model families as tiny random models: what capture must cope with, and nothing more.

Each family is one architecture of transformers with a few layers of a few
numbers each, or a module written by hand.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftc.graph.program import Program
from ftc.graph.sources import capture

_SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 99, "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "pad_token_id": 0}
_IMAGE = {**{k: v for k, v in _SMALL.items() if "position" not in k and "vocab" not in k},
          "image_size": 16, "patch_size": 8}  # fmt: skip
_FALCON = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
       "decoder_start_token_id": 0}  # fmt: skip
_MODERN = {**_SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
           "sep_token_id": 2, "local_attention": 8, "global_attn_every_n_layers": 2}  # fmt: skip
_DEBERTA = {**_SMALL, "pad_token_id": 0, "relative_attention": True, "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "position_biased_input": False, "type_vocab_size": 0}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: as in the test's id.
        model: the class in transformers that has the weights and the task, or a function
            that returns ``(module, examples, dynamic)``.
        task: the task that capture must find.
        options: of the configuration, that make it tiny.
    """

    name: str
    model: str | Callable[[], tuple[nn.Module, dict[str, Tensor], Any]]
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> nn.Module:
        """Writes a random model as transformers would, and returns it in eval mode."""
        import transformers

        assert isinstance(self.model, str)
        torch.manual_seed(0)
        made: Any = getattr(transformers, self.model)
        model: nn.Module = made(made.config_class(**self.options)).eval()
        for parameter in model.parameters():  # initial biases of 0 and scales of 1 hide mistakes
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(folder)
        return model


class Residual(nn.Module):
    """Two convolutions with batch norm around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.act(y)


class Net(nn.Module):
    """A small residual network over images ``[batch, 3, 16, 16]`` -> ``[batch, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Residual(8), nn.MaxPool2d(2), Residual(8))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.stem(image))
        return self.head(self.drop(x.mean((2, 3))))


class Mlp(nn.Module):
    """Two layers, ``[batch, 12]`` -> ``[batch, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 24)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(nn.functional.gelu(self.up(x))))


def cnn() -> tuple[nn.Module, dict[str, Tensor], Any]:
    torch.manual_seed(0)
    net = Net()
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))
    return net.eval(), {"image": torch.randn(2, 3, 16, 16)}, {"image": {0: "batch"}}


def mlp() -> tuple[nn.Module, dict[str, Tensor], Any]:
    torch.manual_seed(0)
    return Mlp().eval(), {"x": torch.randn(2, 12)}, None


FAMILIES = (
    Family("bert", "BertForMaskedLM", "masked-lm", _SMALL),
    Family("bert-pretraining", "BertForPreTraining", "pretraining", _SMALL),
    Family("bert-tokens", "BertForTokenClassification", "token-classification",
           {**_SMALL, "num_labels": 5}),
    Family("roberta", "RobertaModel", "feature-extraction",
           {**_SMALL, "max_position_embeddings": 66, "type_vocab_size": 1}),
    Family("distilbert", "DistilBertForSequenceClassification", "sequence-classification",
           {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99,
            "max_position_embeddings": 64}),
    Family("albert", "AlbertForMaskedLM", "masked-lm",
           {**_SMALL, "embedding_size": 16, "hidden_dropout_prob": 0.1}),
    Family("electra", "ElectraModel", "feature-extraction", {**_SMALL, "embedding_size": 16}),
    Family("mpnet", "MPNetForMaskedLM", "masked-lm", {**_SMALL, "max_position_embeddings": 66}),
    Family("modernbert", "ModernBertForMaskedLM", "masked-lm", _MODERN),
    Family("deberta-v2", "DebertaV2ForMaskedLM", "masked-lm", _DEBERTA),
    Family("xlnet", "XLNetLMHeadModel", "causal-lm",
           {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    Family("gpt2", "GPT2LMHeadModel", "causal-lm",
           {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "bos_token_id": 1, "eos_token_id": 1}),
    Family("opt", "OPTForCausalLM", "causal-lm",
           {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    Family("llama", "LlamaForCausalLM", "causal-lm", {**_GROUPED, "tie_word_embeddings": True}),
    Family("qwen2", "Qwen2ForCausalLM", "causal-lm", _GROUPED),
    Family("qwen3", "Qwen3ForCausalLM", "causal-lm", {**_GROUPED, "head_dim": 8}),
    Family("gemma2", "Gemma2ForCausalLM", "causal-lm",
           {**_GROUPED, "head_dim": 8, "sliding_window": 8}),
    Family("olmo2", "Olmo2ForCausalLM", "causal-lm", _GROUPED),
    Family("mistral", "MistralModel", "feature-extraction", {**_GROUPED, "sliding_window": 8}),
    Family("phi", "PhiForCausalLM", "causal-lm", _SMALL),
    Family("gpt-neox", "GPTNeoXForCausalLM", "causal-lm", _SMALL),
    Family("gpt-neox-classes", "GPTNeoXForSequenceClassification", "sequence-classification",
           {**_SMALL, "pad_token_id": 0}),
    Family("bloom", "BloomForCausalLM", "causal-lm",
           {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Family("falcon", "FalconForCausalLM", "causal-lm", _FALCON),
    Family("falcon-grouped", "FalconForCausalLM", "causal-lm",
           {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    Family("falcon-alibi", "FalconForCausalLM", "causal-lm",
           {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}),
    Family("mixtral", "MixtralForCausalLM", "causal-lm", {**_GROUPED, "num_local_experts": 4}),
    Family("t5", "T5ForConditionalGeneration", "seq2seq-lm", _T5),
    Family("t5-encoder", "T5EncoderModel", "feature-extraction", _T5),
    Family("vit", "ViTForImageClassification", "image-classification", _IMAGE),
    Family("swin", "SwinForImageClassification", "image-classification",
           {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1],
            "num_heads": [2, 2], "window_size": 4}),
    Family("resnet", "ResNetForImageClassification", "image-classification",
           {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3}),
    Family("convnext", "ConvNextForImageClassification", "image-classification",
           {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}),
    Family("cnn", cnn, "module"),
    Family("mlp", mlp, "module"),
)  # fmt: skip


@functools.cache
def captured(name: str) -> tuple[nn.Module, Program]:
    """The model of a family and its program, made once a session: clone it to change it."""
    each = family(name)
    if not isinstance(each.model, str):
        model, examples, dynamic = each.model()
        return model, capture(model, examples=examples, dynamic=dynamic)
    with tempfile.TemporaryDirectory() as folder:
        return each.save(Path(folder)), capture(folder)


def family(name: str) -> Family:
    """The family of that name."""
    return next(f for f in FAMILIES if f.name == name)
