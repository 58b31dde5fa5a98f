"""Folders of small random models with a tokenizer, for the command line; and a factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WORDS = [
    "the", "a", "cat", "dog", "sits", "runs", "on", "in", "mat", "house", "is", "good", "bad",
    "blue", "sky", ".", ",", "i", "like", "it",
]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "vocab_size": len(SPECIAL) + len(WORDS),
}


def mlp() -> tuple[nn.Module, dict[str, Tensor]]:
    """A module and its example, as a factory returns them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48)), {
        "input": torch.randn(3, 64)
    }


def encoder(folder: Path, head: str = "BertForMaskedLM", **config: Any) -> Path:
    """A BERT of two layers under a head of transformers' with that name."""
    import transformers

    torch.manual_seed(0)
    made = transformers.BertConfig(**_SIZES, **config)
    getattr(transformers, head)(made).save_pretrained(folder)
    return _with_tokenizer(folder)


def decoder(folder: Path) -> Path:
    """A Llama of two layers that generates."""
    import transformers

    torch.manual_seed(0)
    made = transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, bos_token_id=2, eos_token_id=3)
    transformers.LlamaForCausalLM(made).save_pretrained(folder)
    return _with_tokenizer(folder)


def short_decoder(folder: Path) -> Path:
    """A GPT-2 of two layers that takes 16 tokens at most."""
    import transformers

    torch.manual_seed(0)
    made = transformers.GPT2Config(
        vocab_size=_SIZES["vocab_size"], n_embd=32, n_layer=2, n_head=4, n_positions=16,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(made).save_pretrained(folder)
    return _with_tokenizer(folder)


def _with_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]")
    )
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]",
        cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    return folder
