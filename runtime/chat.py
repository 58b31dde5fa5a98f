"""A conversation: the model's own template around what each side says.

Every answer goes on from what was read before (:class:`~ftc.runtime.decoder.Decoder`), so
of a long conversation only the last question is computed.
"""

from __future__ import annotations

from collections.abc import Iterator

from ftc.graph.errors import UsageError

from .continuation import Asked, Pace, pieces
from .decoder import Decoder
from .engine import Engine
from .spoken import check_text_task
from .tokens import IDS


class Chat:
    """One conversation with one program.

    Args:
        engine: runs a program that generates.
        asked: how answers are made.

    Attributes:
        messages: ``{"role", "content"}`` of each turn so far.

    Raises:
        UsageError: for a program that does not generate, or whose tokenizer has no template.
    """

    def __init__(self, engine: Engine, asked: Asked) -> None:
        spoken = engine.spoken
        check_text_task(spoken.task)
        if spoken.task != "causal-lm":
            raise UsageError(
                f"a program of task {spoken.task!r} does not answer",
                fix="compile a language model with --task generate",
            )
        self._tokenizer = spoken.tokenizer
        if not self._tokenizer.chat_template:
            raise UsageError(
                "the tokenizer has no chat template: the model was not made to converse",
                fix='ftc run OUT --text "..." continues a text',
            )
        self._decoder, self._asked = Decoder(engine), asked
        self.messages: list[dict[str, str]] = []

    def say(self, text: str, pace: Pace | None = None) -> Iterator[str]:
        """Pieces of the answer to ``text``; what came of it is kept, also when it is left early.

        Raises:
            UsageError: when the conversation leaves no room for an answer.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True
        )
        ids = self._tokenizer(prompt, add_special_tokens=False)[IDS]
        said: list[str] = []
        try:
            for (piece,) in pieces(self._decoder, [ids], self._asked, pace, apart=True):
                said.append(piece)
                yield piece
        finally:
            if said:
                answer = {"role": "assistant", "content": "".join(said)}
                self.messages = [*asked, answer]
