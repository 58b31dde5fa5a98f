"""What a program says to a text: an embedding, a filled gap, a label.

Which of them is asked is the program's task; how its outputs are read follows
from their shapes, not from their names:

==========================  ==============================================
``feature-extraction``      the states ``[batch, sequence, width]``, averaged
                            over the mask (or the first token, where the
                            model's own pooling file says so), length 1
``masked-lm, pretraining``  the most likely words at every mask token
``causal-lm``               the next token, again and again
                            (:mod:`ftc.runtime.continuation`)
``…-classification``        probabilities by the configuration's labels
==========================  ==============================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ftc.graph.errors import UsageError
from ftc.graph.program import Program

from .engine import Engine
from .lengths import cut_texts
from .spoken import asset
from .text import encode, need_tokenizer
from .tokens import NO_SCORES, per_token

_BEST = 5


@dataclass(frozen=True, slots=True)
class Guess:
    """One answer and its probability; of a model with one output, that number."""

    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Labelled:
    """A token or a whole text, and the labels that fit it, the most likely first.

    Attributes:
        text: it.
        guesses: the labels.
        number: the model gives one number, which is no probability.
    """

    text: str
    guesses: tuple[Guess, ...]
    number: bool = False


def embed(engine: Engine, texts: Sequence[str], *, batch: int = 16) -> tuple[Tensor, str]:
    """Sentence embeddings ``[len(texts), width]`` of length 1, and how they were pooled."""
    program = engine.program
    found, name = need_tokenizer(program), states_output(program)
    first = _pools_first_token(program)
    vectors = []
    for start in range(0, len(texts), batch):
        inputs = encode(found, program.signature, texts[start : start + batch])
        states = engine(inputs)[name].float()
        weight = _mask(program, inputs, states).unsqueeze(-1)
        pooled = states[:, 0] if first else (states * weight).sum(1) / weight.sum(1)
        vectors.append(torch.nn.functional.normalize(pooled, dim=-1))
    return torch.cat(vectors), "first token" if first else "mean over the mask"


def fill_masks(engine: Engine, text: str) -> list[Labelled]:
    """The likeliest tokens at each mask token of ``text``, in their order.

    Raises:
        UsageError: when the text has no mask token.
    """
    found = need_tokenizer(engine.program)
    mask_id = getattr(found, "mask_token_id", None)
    if mask_id is None:
        raise UsageError("the tokenizer has no mask token", fix="use a tokenizer of a masked model")
    inputs = encode(found, engine.program.signature, [text])
    places = (inputs["input_ids"][0] == mask_id).nonzero().flatten().tolist()
    if not places:
        beyond = found.mask_token in text and cut_texts(engine.program, [text], found)
        why = f" within the {beyond[0].kept} tokens that the program takes" if beyond else ""
        raise UsageError(
            f"the text has no {found.mask_token} to fill{why}",
            fix=f'--text "Paris is the {found.mask_token} of France."',
        )
    logits = engine(inputs)[logits_output(engine.program)][0].float()
    filled = []
    for number, place in enumerate(places, 1):
        best = logits[place].softmax(-1).topk(_BEST)
        guesses = [Guess(found.decode([i]).strip(), float(p))
                   for p, i in zip(best.values, best.indices.tolist(), strict=True)]  # fmt: skip
        filled.append(Labelled(f"{found.mask_token} {number}", tuple(guesses)))
    return filled


def classify(engine: Engine, text: str) -> list[Labelled]:
    """Labels with probabilities, or one number: of the whole text, or of each of its tokens."""
    program = engine.program
    found, names = need_tokenizer(program), labels(program)
    inputs = encode(found, program.signature, [text])
    logits = engine(inputs)[program.signature.output_names[0]][0].float()
    if logits.shape[-1] == 1 and program.signature.task == "sequence-classification":
        return [Labelled(text, (Guess(names.get(0, "value"), float(logits)),), number=True)]
    if program.signature.task == "sequence-classification":
        return [_label(text, logits, names)]
    tokens = found.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    return [_label(token, row, names) for token, row in zip(tokens, logits, strict=True)]


def labels(program: Program) -> dict[int, str]:
    """``id2label`` of the model's configuration; empty where there is none, or of another head."""
    config = asset(program.assets, "config.json")
    named = config.get("id2label") if isinstance(config, dict) else None
    classes = {spec.shape[-1] for spec in program.signature.outputs}
    if not isinstance(named, dict) or len(named) not in classes:
        return {}
    return {int(k): str(v) for k, v in named.items()}


def states_output(program: Program) -> str:
    """The output that holds one vector a token.

    Raises:
        UsageError: when there is none.
    """
    return _token_output(program, "no output holds one vector a token: nothing to pool")


def logits_output(program: Program) -> str:
    """The output that holds scores of the vocabulary for each token.

    Raises:
        UsageError: when there is none.
    """
    return _token_output(program, NO_SCORES)


def _token_output(program: Program, otherwise: str) -> str:
    signature = program.signature
    outputs = {spec.name: spec.shape for spec in signature.outputs}
    return per_token(signature.inputs[0].shape, outputs, otherwise)


def _mask(program: Program, inputs: dict[str, Tensor], states: Tensor) -> Tensor:
    for spec in program.signature.inputs:
        if spec.role == "mask":
            return inputs[spec.name].to(states.dtype)
    return torch.ones(states.shape[:2])


def _pools_first_token(program: Program) -> bool:
    """Whether the model's own pooling file asks for the first token instead of the mean."""
    pooling = asset(program.assets, "1_Pooling/config.json")
    return isinstance(pooling, dict) and bool(pooling.get("pooling_mode_cls_token"))


def _label(text: str, logits: Tensor, names: dict[int, str]) -> Labelled:
    best = logits.softmax(-1).topk(min(_BEST, len(logits)))
    return Labelled(text, tuple(Guess(names.get(i, f"label {i}"), float(p))
                    for p, i in zip(best.values, best.indices.tolist(), strict=True)))  # fmt: skip
