"""The padding token of a model that classifies a text by its last token.

A decoder with a classifier reads the state of the last token that is no padding,
so it has to know which token is. A configuration that names none stops the
model at batches of more than one text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ftc.graph.errors import CaptureError, SourceError

from .tokenizer import tokenizer


def take_padding(model: nn.Module, assets: Path, error: CaptureError) -> tuple[str, ...]:
    """Gives a model that stopped for want of a padding token that of its tokenizer.

    Args:
        model: whose configuration names none.
        assets: where its tokenizer is.
        error: why it did not trace.

    Returns:
        A note, after which the model can be tried again; none when it stopped for another reason.

    Raises:
        SourceError: when there is no tokenizer, or that has no padding token either.
    """
    config: Any = getattr(model, "config", None)
    if "padding token" not in error.what or getattr(config, "pad_token_id", 0) is not None:
        return ()
    found = tokenizer(assets)
    number = getattr(found, "pad_token_id", None)
    if number is None:
        raise SourceError(
            f"{type(model).__name__} reads the last token that is no padding, and neither "
            "config.json nor a tokenizer says which token is padding",
            where=str(assets),
            fix='add "pad_token_id" to config.json: the number of the token that fills short '
            "texts; models without one of their own use their end-of-text token",
        ) from error
    config.pad_token_id = number
    return (
        f"padding is token {number}, {found.pad_token}, as the tokenizer says: "
        "config.json names none",
    )
