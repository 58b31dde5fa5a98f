"""Model families as tiny random models: what capture must cope with, and nothing more.

Each family is one architecture of transformers with a few layers of a few
numbers each, or a module written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: as in the test's id.
        model: the class in transformers that has the weights and the task, or a function
            that returns ``(module, examples, dynamic)``.
        config: class of the configuration in transformers, "" for a module by hand.
        options: what makes it tiny.
        task: the task that capture must find.
    """

    name: str
    model: str | Callable[[], tuple[nn.Module, dict[str, Tensor], Any]]
    task: str
    config: str = ""
    options: dict[str, Any] | None = None

    def save(self, folder: Path) -> nn.Module:
        """Writes a random model as transformers would, and returns it in eval mode."""
        import transformers

        assert isinstance(self.model, str)
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options or {})
        model: nn.Module = getattr(transformers, self.model)(config).eval()
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
    Family("bert", "BertForMaskedLM", "masked-lm", "BertConfig", _SMALL),
    Family("bert-pretraining", "BertForPreTraining", "pretraining", "BertConfig", _SMALL),
    Family(
        "bert-tokens",
        "BertForTokenClassification",
        "token-classification",
        "BertConfig",
        {**_SMALL, "num_labels": 5},
    ),
    Family(
        "roberta",
        "RobertaModel",
        "feature-extraction",
        "RobertaConfig",
        {**_SMALL, "max_position_embeddings": 66, "type_vocab_size": 1},
    ),
    Family(
        "distilbert",
        "DistilBertForSequenceClassification",
        "sequence-classification",
        "DistilBertConfig",
        {
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "vocab_size": 99,
            "max_position_embeddings": 64,
        },
    ),
    Family(
        "albert",
        "AlbertForMaskedLM",
        "masked-lm",
        "AlbertConfig",
        {**_SMALL, "embedding_size": 16, "hidden_dropout_prob": 0.1},
    ),
    Family(
        "electra",
        "ElectraModel",
        "feature-extraction",
        "ElectraConfig",
        {**_SMALL, "embedding_size": 16},
    ),
    Family(
        "xlnet",
        "XLNetLMHeadModel",
        "causal-lm",
        "XLNetConfig",
        {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        "causal-lm",
        "GPT2Config",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    Family(
        "opt",
        "OPTForCausalLM",
        "causal-lm",
        "OPTConfig",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        "causal-lm",
        "LlamaConfig",
        {**_GROUPED, "tie_word_embeddings": True},
    ),
    Family("qwen2", "Qwen2ForCausalLM", "causal-lm", "Qwen2Config", _GROUPED),
    Family(
        "mistral",
        "MistralModel",
        "feature-extraction",
        "MistralConfig",
        {**_GROUPED, "sliding_window": 8},
    ),
    Family("phi", "PhiForCausalLM", "causal-lm", "PhiConfig", _SMALL),
    Family(
        "t5",
        "T5EncoderModel",
        "feature-extraction",
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    Family(
        "vit",
        "ViTForImageClassification",
        "image-classification",
        "ViTConfig",
        {
            **{k: v for k, v in _SMALL.items() if "position" not in k and "vocab" not in k},
            "image_size": 16,
            "patch_size": 8,
        },
    ),
    Family("cnn", cnn, "module"),
    Family("mlp", mlp, "module"),
)
