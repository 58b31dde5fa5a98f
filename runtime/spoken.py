"""What it takes to go on with texts, of a program or of what a bundle's head says of one.

To generate, nothing else is asked: a bundle with ``model.onnx`` is opened without its graph,
its other weights and torch. The tensors of a folded prompt are read alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftc.graph.bundle.arrays import read_arrays
from ftc.graph.bundle.head import WEIGHTS, check_files, read_head
from ftc.graph.cache_inputs import Array, Names, TokenInput, is_state, misfit
from ftc.graph.errors import BundleError, UsageError
from ftc.graph.sources.tokenizer import ASSETS, tokenizer

from .tokens import IDS, NO_SCORES, made_of_text, per_token, token_rows

if TYPE_CHECKING:
    from ftc.graph.program import Program

Arrays = Mapping[str, Array]

TEXT_TASKS = ("feature-extraction", "masked-lm", "pretraining", "causal-lm",
              "sequence-classification", "token-classification")  # fmt: skip
_TRAINED = (("config.json", "max_position_embeddings"),
            ("tokenizer_config.json", "model_max_length"))  # fmt: skip
_ANY = 10**9  # what transformers writes for no limit is more


class Spoken:
    """What generation has to know.

    Args:
        signature: as a bundle's head has it.
        tensors: reads the program's tensors of these names.
        assets: where the tokenizer's files are.
        kind: the tokenizer's class, where it is known.

    Attributes:
        task: of the program.
        assets: as given.
        inputs, outputs: element types and sizes by name.
        input_names, output_names: the same names.
        cached: whether it takes the keys and values of earlier tokens.
    """

    def __init__(
        self, signature: Mapping[str, Any], tensors: Callable[[Sequence[str]], Arrays],
        assets: Path | None, kind: str | None = None,
    ) -> None:  # fmt: skip
        self._signature, self._tensors, self._kind = signature, tensors, kind
        self.assets = assets
        self.task = str(signature["task"])
        self.inputs, self.outputs = (
            {str(s["name"]): (str(s["dtype"]), tuple(s["shape"])) for s in signature[specs]}
            for specs in ("inputs", "outputs")
        )
        self.input_names, self.output_names = tuple(self.inputs), tuple(self.outputs)
        self.cached = any(map(is_state, self.input_names))

    @classmethod
    def of(cls, program: Program) -> Spoken:
        """That of a program."""
        from ftc.graph.bundle.signature_json import encode_signature

        def arrays(names: Sequence[str]) -> Arrays:
            return {name: program.tensor(name).detach().cpu().numpy() for name in names}

        return cls(encode_signature(program.signature), arrays, program.assets)

    @classmethod
    def read(cls, folder: Path, model: str) -> Spoken:
        """That of the bundle ``folder``, whose ``model`` is going to run.

        Raises:
            BundleError: for a file that is read and is not as it was written, or a head that
                no bundle has.
        """
        head = read_head(folder)
        try:
            stored = head["signature"]
            start = stored.get("start", {})
            check_files(folder, head["files"], {model, *ASSETS, *([WEIGHTS] if start else [])})
            kind = head.get("tokenizer")
            made = cls(stored, lambda names: read_arrays(folder, names), folder,
                       kind if isinstance(kind, str) else None)  # fmt: skip
            made._check()
        except BundleError as error:
            raise BundleError(error.what, where=error.where or str(folder), fix=error.fix) from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BundleError(
                f"{folder} is malformed: {type(error).__name__}: {error}",
                fix="make the bundle again",
            ) from None
        return made

    def _check(self) -> None:
        """Raises what :meth:`read` has to say of numbers and tensors that cannot be."""
        kinds = {self._signature["start"][name]: (array.dtype.name, array.shape)
                 for name, array in self._start.items()}  # fmt: skip
        if self._start and (odd := misfit(self._signature, kinds)):
            raise BundleError(f"signature.start: no run can begin behind what it has for {odd}")
        for spec in self._signature["inputs"]:
            low, high = spec.get("low", 0), spec.get("high", 2)
            if not (type(low) is int and type(high) is int and -(2**63) <= low < high < 2**63):
                raise ValueError(f"{spec['name']} has values from {low!r} to {high!r}")
        for number in (self.known, self.most):
            if number is not None and not (type(number) is int and number > 0):
                raise ValueError(f"{number!r} is no number of tokens")

    @cached_property
    def _start(self) -> Arrays:
        """What every text begins behind, by input."""
        start = self._signature.get("start", {})
        found = self._tensors(list(start.values())) if start else {}
        return {name: found[tensor] for name, tensor in start.items()}

    @property
    def scores(self) -> str:
        """The output that holds scores of the vocabulary for each token, or for the last.

        Raises:
            UsageError: when there is none.
        """
        if self.cached:
            return self.output_names[0]
        _, shape = self.inputs[self.input_names[0]]
        outputs = {name: sizes for name, (_, sizes) in self.outputs.items()}
        return per_token(shape, outputs, NO_SCORES)

    @cached_property
    def token_inputs(self) -> tuple[TokenInput, ...]:
        """The inputs that follow from tokens, in calling order."""
        return tuple(
            TokenInput(spec["name"], spec["dtype"], spec.get("role", "value"), spec.get("low", 0))
            for spec in self._signature["inputs"]
            if not is_state(spec["name"])
        )

    @property
    def most(self) -> int | None:
        """How many tokens a run and those before it read at most."""
        first = self._signature["inputs"][0]
        dim = str(first["shape"][1]) if len(first["shape"]) > 1 else ""
        limits: dict[str, int] = self._signature["limits"]
        return limits.get(Names.total(dim) if self.cached else dim)

    @property
    def known(self) -> int | None:
        """How many tokens the model's table has; None for a program without one."""
        high: dict[str, int] = {spec["name"]: spec["high"] for spec in self._signature["inputs"]}
        return high.get(IDS)

    @property
    def limit(self) -> int | None:
        """How many tokens of a text, old and new, a program reads at most; None: any number.

        Those of a folded prompt do not count.
        """
        return None if self.most is None else self.most - len(self.prompt)

    @cached_property
    def prompt(self) -> tuple[int, ...]:
        """Ids of a folded prompt; none where there is no prompt."""
        ids = self._start.get(self.input_names[0])
        return () if ids is None else tuple(ids[0].tolist())

    def past(self, batch: int) -> dict[str, Array]:
        """The prompt's keys and values ``[batch, kv_heads, length, dim]``, without a copy."""
        held = {name: array for name, array in self._start.items() if is_state(name)}
        return {n: np.broadcast_to(a, (batch, *a.shape[1:])) for n, a in held.items()}

    @cached_property
    def tokenizer(self) -> Any:
        """Of transformers.

        Raises:
            UsageError: when the program takes no text, or came without one.
        """
        roles = ((spec["name"], spec.get("role", "")) for spec in self._signature["inputs"])
        if not made_of_text(roles):
            raise UsageError(
                f"this program takes {', '.join(self.input_names)}, not text",
                fix="give tensors: --input FILE.npz or --input FILE.safetensors",
            )
        found = tokenizer(self.assets, self._kind)
        if found is None:
            raise UsageError(
                "this program came without a tokenizer",
                fix="put tokenizer.json beside the model's config.json and compile again, "
                "or give tensors: --input FILE.npz",
            )
        return found

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that are to go on.

        Raises:
            UsageError: for one that leaves no room for another token, or has none.
        """
        rows = token_rows(self.tokenizer, texts, known=self.known or 0)
        for row in rows:
            for limit in (self.limit, self.made_for):
                check_room(len(row), limit)
        return rows

    @cached_property
    def made_for(self) -> int | None:
        """How many tokens the model was trained to read, where its files say so.

        A program with rotary positions computes any number; what it says is worth little then.
        """
        for name, key in _TRAINED:
            stored = asset(self.assets, name)
            number = stored.get(key) if isinstance(stored, dict) else None
            if type(number) is int and 0 < number < _ANY:
                return number
        return None

    def special(self, texts: Sequence[str]) -> frozenset[int]:
        """Those special tokens, which no text shows, that ``texts`` name."""
        added: Mapping[int, Any] = getattr(self.tokenizer, "added_tokens_decoder", {})
        return frozenset(n for n, t in added.items() if t.special and str(t) in texts)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text: the tokenizer's, and those of ``generation_config.json``."""
        config = asset(self.assets, "generation_config.json")
        named: Any = config.get("eos_token_id") if isinstance(config, dict) else None
        listed = named if isinstance(named, list) else [named]
        return frozenset(n for n in [*listed, self.tokenizer.eos_token_id] if isinstance(n, int))


def check_room(length: int, limit: int | None) -> None:
    """Raises UsageError where a text of so many tokens leaves no room for another."""
    if limit is not None and length >= limit:
        raise UsageError(
            f"the text has {length:,} tokens, and the program takes {limit:,}, new ones included",
            fix=f"give a text of fewer than {limit:,} tokens",
        )


def check_text_task(task: str) -> None:
    """Raises UsageError where text cannot be asked of a program of this task."""
    if task not in TEXT_TASKS:
        raise UsageError(
            f"a program of task {task!r} does not take text",
            fix="give tensors: --input FILE.npz or --input FILE.safetensors",
        )


def asset(assets: Path | None, name: str) -> Any:
    """What a JSON file of the model says; None where it came without such a file.

    Raises:
        UsageError: when it is no JSON.
    """
    if assets is None or not (assets / name).is_file():
        return None
    try:
        return json.loads((assets / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{assets / name} is not valid JSON: {error}", fix="correct it") from None
