"""Evaluation on data: perplexity, accuracy, and the cosine of embeddings.

    perplexity = exp( - 1/N sum_i log p(token_i | tokens before it in its window) )

over windows of ``length`` tokens that do not overlap, padding left out. Accuracy
is the share of texts whose likeliest label is the one in the file. Cosine
compares sentence embeddings with those of another program, text by text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftc.graph.cached import is_cached
from ftc.graph.errors import UsageError, nearest
from ftc.graph.program import Program
from ftc.graph.words import plural

from .engine import Engine
from .examples import Example, read_examples
from .lengths import cut_texts
from .past import past_of
from .predict import embed, labels, logits_output
from .text import encode, need_tokenizer, pad

METRICS = ("perplexity", "accuracy", "cosine")
WINDOW = 128
_TASKS = {"perplexity": "causal-lm", "accuracy": "sequence-classification",
          "cosine": "feature-extraction"}  # fmt: skip
_MEASURED = "ftc train PROGRAM --steps 0 --data FILE --objective {} measures it"
_BATCH = {"perplexity": 4, "accuracy": 16}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One metric of one program, beside that of another where one was given.

    Attributes:
        metric: its name.
        value: of the program.
        against: of the other program; None without one, and for ``cosine``.
        details: further numbers: tokens, texts, the smallest cosine, agreement.
        engines: what ran it, in words.
        data: what it was measured on, in words.
    """

    metric: str
    value: float
    against: float | None
    details: dict[str, float | int]
    engines: tuple[str, ...]
    data: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def evaluate(
    engine: Engine,
    path: Path,
    metric: str,
    *,
    against: Engine | None = None,
    length: int = WINDOW,
    limit: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """One metric of a program on the texts of a file.

    Args:
        engine: the program.
        path: a text, or JSONL with ``text`` and ``label``.
        metric: one of :data:`METRICS`.
        against: another program on the same data; ``cosine`` needs one.
        length: tokens in a window of ``perplexity``.
        limit: stop after this many texts, or windows.
        progress: told what runs.

    Raises:
        UsageError: when metric, program and data do not fit together.
    """
    check_call(metric, against is not None)
    for each in (engine, against):
        if each is not None:
            _check_task(each.program, metric)
    examples = read_examples(path)
    measure = {"perplexity": _perplexities, "accuracy": _accuracies, "cosine": _cosines}[metric]
    engines = [engine] if against is None else [engine, against]
    values, details, data = measure(engines, examples, length, limit, progress)
    other = values[1] if len(values) > 1 else None
    return Evaluation(
        metric, values[0], other, details, tuple(e.label for e in engines), f"{path.name}: {data}"
    )


def check_call(metric: str, against: bool) -> None:
    """Refuses an unknown metric, and ``cosine`` without another program.

    Raises:
        UsageError: with the fix.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}", fix=nearest(metric, METRICS))
    if metric == "cosine" and not against:
        raise UsageError("cosine compares two programs", fix="--against MODEL")


def _check_task(program: Program, metric: str) -> None:
    task = program.signature.task
    if task != _TASKS[metric]:
        fitting = next((f"--metric {m}" for m, t in _TASKS.items() if t == task), None)
        raise UsageError(f"{metric} is for {_TASKS[metric]}, and this program is for {task}",
                         fix=fitting or _MEASURED.format(task))  # fmt: skip
    if metric == "accuracy" and program.signature.outputs[0].shape[-1] == 1:
        raise UsageError("this program gives one number for a text, not a label",
                         fix=_MEASURED.format("regression"))  # fmt: skip


Measured = tuple[list[float], dict[str, float | int], str]
Progress = Callable[[str], None]


def _tokenizer(engine: Engine) -> Any:
    """The tokenizer of a program, without which nothing can be evaluated on text.

    Raises:
        UsageError: when it has none.
    """
    try:
        return need_tokenizer(engine.program)
    except UsageError as error:
        raise UsageError(
            f"evaluation needs text: {error.what}",
            fix="put tokenizer.json beside the model's config.json and compile again, "
            "or evaluate it in Python",
        ) from None


def _perplexities(
    engines: Sequence[Engine],
    examples: Sequence[Example],
    length: int,
    limit: int | None,
    progress: Progress,
) -> Measured:
    found = _tokenizer(engines[0])
    stream = found("\n\n".join(e.text for e in examples), add_special_tokens=False)["input_ids"]
    bounds = (each.spoken.limit for each in engines)
    size = min([length, *(bound for bound in bounds if bound is not None)])
    windows = [stream[i : i + size] for i in range(0, len(stream), size)]
    windows = [w for w in windows if len(w) > 1][:limit]
    if not windows:
        raise UsageError("the text has fewer than two tokens", fix="give more text")
    tokens = sum(len(w) - 1 for w in windows)
    values = [math.exp(negative_log_likelihood(e, windows, found, progress) / tokens)
              for e in engines]  # fmt: skip
    details: dict[str, float | int] = {"tokens": tokens, "windows": len(windows), "window": size}
    if len(values) > 1:
        details["ratio"] = values[0] / values[1]
    data = f"{plural(tokens, 'token')} in {plural(len(windows), 'window')} of {size}"
    return values, details, data


def negative_log_likelihood(
    engine: Engine,
    windows: Sequence[Sequence[int]],
    found: Any,
    progress: Progress = lambda _: None,
) -> float:
    """Sum of ``-log p`` over every token of every window but its first, in nats."""
    total = 0.0
    groups: dict[int, list[Sequence[int]]] = {}
    for window in windows:
        groups.setdefault(len(window), []).append(window)
    done = 0
    for group in groups.values():
        for start in range(0, len(group), _BATCH["perplexity"]):
            batch = group[start : start + _BATCH["perplexity"]]
            for scores, ids in _scored(engine, batch, found):
                chosen = scores.gather(-1, ids[..., None])[..., 0].double()
                total += float((scores.double().logsumexp(-1) - chosen).sum())
            done += len(batch)
            progress(f"perplexity: {done} of {len(windows)} windows ({engine.label})")
    return total


def _scored(
    engine: Engine, batch: Sequence[Sequence[int]], found: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores ``[.., vocabulary]`` and the tokens ``[..]`` they are for, of texts of one length.

    A cached program that scores the last token only reads one token after the other.
    """
    signature = engine.program.signature
    if not is_cached(signature):
        inputs = pad(batch, signature, found)
        logits = engine(inputs)[logits_output(engine.program)]
        yield logits[:, :-1], inputs["input_ids"][:, 1:]
        return
    ids, run, spoken = torch.tensor(batch), past_of(engine), engine.spoken
    front, past = len(spoken.prompt), spoken.past(len(ids)) or None
    given, mask = ids.numpy(), ids.new_ones(len(ids), front + ids.shape[1]).numpy()
    piece = 1 if signature.outputs[0].shape[1] == 1 else ids.shape[1] - 1
    for begin in range(0, ids.shape[1] - 1, piece):
        end = begin + piece
        scores, past = run(given[:, begin:end], mask[:, : front + end], past)
        yield torch.from_numpy(scores), ids[:, begin + 1 : end + 1]


def _accuracies(
    engines: Sequence[Engine],
    examples: Sequence[Example],
    length: int,
    limit: int | None,
    progress: Progress,
) -> Measured:
    chosen = examples[:limit]
    wanted = [_label_id(example, labels(engines[0].program)) for example in chosen]
    guesses = [_predicted(engine, [e.text for e in chosen], progress) for engine in engines]
    values = [sum(a == b for a, b in zip(g, wanted, strict=True)) / len(wanted) for g in guesses]
    details: dict[str, float | int] = {"texts": len(chosen)}
    if len(guesses) > 1:
        same = sum(a == b for a, b in zip(*guesses, strict=True))
        details["agreement"] = same / len(chosen)
    return values, details, _texts(engines[0], [example.text for example in chosen])


def _label_id(example: Example, names: dict[int, str]) -> int:
    by_name = {name.lower(): number for number, name in names.items()}
    if example.label is None:
        raise UsageError(
            'accuracy needs the field "label"',
            where=example.place,
            fix='{"text": "...", "label": "..."} on every line',
        )
    if isinstance(example.label, int):
        if names and example.label not in names:
            raise UsageError(
                f"label {example.label} is not one of the model's",
                where=example.place,
                fix=f"0 to {max(names)}",
            )
        return example.label
    if example.label.lower() not in by_name:
        raise UsageError(
            f"label {example.label!r} is not one of the model's",
            where=example.place,
            fix=nearest(example.label, names.values()),
        )
    return by_name[example.label.lower()]


def _predicted(engine: Engine, texts: Sequence[str], progress: Progress) -> list[int]:
    found, name = _tokenizer(engine), engine.program.signature.output_names[0]
    predicted: list[int] = []
    for start in range(0, len(texts), _BATCH["accuracy"]):
        batch = texts[start : start + _BATCH["accuracy"]]
        logits = engine(encode(found, engine.program.signature, batch))[name]
        predicted += logits.argmax(-1).tolist()
        progress(f"accuracy: {len(predicted)} of {len(texts)} texts ({engine.label})")
    return predicted


def _cosines(
    engines: Sequence[Engine],
    examples: Sequence[Example],
    length: int,
    limit: int | None,
    progress: Progress,
) -> Measured:
    texts = [example.text for example in examples[:limit]]
    for engine in engines:
        _tokenizer(engine)
    vectors = []
    for engine in engines:
        progress(f"embedding {len(texts)} texts ({engine.label})")
        vectors.append(embed(engine, texts)[0].double())
    if vectors[0].shape != vectors[1].shape:
        raise UsageError(
            f"embeddings of width {vectors[0].shape[1]} and {vectors[1].shape[1]}",
            fix="compare programs of one model",
        )
    found = torch.nn.functional.cosine_similarity(*vectors, dim=-1)
    details: dict[str, float | int] = {"texts": len(texts), "least": float(found.min())}
    return [float(found.mean())], details, _texts(engines[0], texts)


def _texts(engine: Engine, texts: Sequence[str]) -> str:
    """``12 texts, 2 of them cut at 512 tokens``"""
    cut = cut_texts(engine.program, texts, _tokenizer(engine))
    more = f", {len(cut)} of them cut at {cut[0].kept:,} tokens" if cut else ""
    return plural(len(texts), "text") + more
