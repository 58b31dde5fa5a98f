"""Tasks: what a captured model computes.

A task names a class of transformers' own registry (``AutoModelFor…``); which
one a folder is for is told by the suffix of its ``architectures``.
"""

from __future__ import annotations

from typing import Any

from ftc.graph.errors import UsageError, nearest

FEATURES = "feature-extraction"
SEQ2SEQ = "seq2seq-lm"
_CLASSES = {  # task -> class of transformers
    FEATURES: "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "pretraining": "AutoModelForPreTraining",
    "causal-lm": "AutoModelForCausalLM",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}
_SUFFIXES = {  # of a name in `architectures` -> task
    "ForMaskedLM": "masked-lm",
    "ForPreTraining": "pretraining",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": SEQ2SEQ,
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}
TASKS = (*_CLASSES, "module")


def check_task(task: str | None) -> None:
    """Refuses an unknown task.

    Raises:
        UsageError: with the nearest known task.
    """
    if task is not None and task not in TASKS:
        made = "what `ftc compile --task generate` makes is a bundle, which knows its task itself"
        raise UsageError(
            f"unknown task {task!r}", fix=made if task == "generate" else nearest(task, TASKS)
        )


def default_task(config: Any) -> tuple[str, str | None]:
    """The task that ``architectures`` of a config.json says, and a note where it says none."""
    named = getattr(config, "architectures", None)
    for name in named if isinstance(named, list) else ():
        if not isinstance(name, str):
            continue
        for suffix, task in _SUFFIXES.items():
            if name.endswith(suffix) and supports(task, config):
                return task, None
        if not name.endswith("Model"):
            return FEATURES, f"no task fits {name}: captured for {FEATURES}, without its head"
    return FEATURES, None


def tasks_of(architectures: Any) -> frozenset[str]:
    """The tasks a model has trained heads for, as ``architectures`` of its config.json says."""
    named = architectures if isinstance(architectures, list) else []
    found = {task for name in map(str, named)
             for suffix, task in _SUFFIXES.items() if name.endswith(suffix)}  # fmt: skip
    return frozenset(found | ({"masked-lm"} if "pretraining" in found else set()))


def endings(task: str) -> str:
    """How names of architectures with a head for ``task`` end, in words."""
    return " or ".join(f"…{suffix}" for suffix, known in _SUFFIXES.items() if known == task)


def auto_class(task: str) -> Any:
    """The class of transformers that loads a model for ``task``.

    Raises:
        UsageError: for ``module``, which takes a module and not a folder.
    """
    import transformers

    if task not in _CLASSES:
        raise UsageError(
            f"task {task!r} is for modules in Python, not for files",
            fix=f"choose one of {', '.join(_CLASSES)}",
        )
    return getattr(transformers, _CLASSES[task])


def model_class(task: str, config: Any) -> Any:
    """The class of transformers that ``config`` is loaded as for ``task``.

    Where it has several, the one that the configuration names, or else the first.
    """
    found = auto_class(task)._model_mapping[type(config)]
    if not isinstance(found, (tuple, list)):
        return found
    named = getattr(config, "architectures", None) or ()
    return next((one for one in found if one.__name__ in named), found[0])


def supports(task: str, config: Any) -> bool:
    """Whether transformers has a class of this kind of model for ``task``."""
    return type(config) in auto_class(task)._model_mapping
