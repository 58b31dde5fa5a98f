"""``package.module:factory``: a model that a function of the user's makes.

This imports and runs code, which the user has named for that purpose.
"""

from __future__ import annotations

import importlib
import os
import re
import sys

from torch import nn

from ftc.graph.capture import Examples
from ftc.graph.errors import FtcError, SourceError, nearest

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_factory(text: str) -> bool:
    """Whether ``text`` has the form ``package.module:factory``."""
    return _FACTORY.fullmatch(text) is not None


def call_factory(text: str) -> tuple[nn.Module, Examples | None]:
    """Imports and calls ``package.module:factory``; the working directory can be imported from.

    Returns:
        The module, and its example inputs where the factory returns some.

    Raises:
        SourceError: when there is no such factory, it raises, or it returns something else.
    """
    place, name = text.split(":")
    owner = _import(place, text)
    for part in name.split("."):
        if not hasattr(owner, part):
            raise SourceError(
                f"{place} has no {part!r}",
                fix=nearest(part, [n for n in vars(owner) if not n.startswith("_")]),
            )
        owner = getattr(owner, part)
    if not callable(owner):
        raise SourceError(f"{text} is not callable", fix="name a function that returns a module")
    try:
        made = owner()
    except FtcError:
        raise
    except Exception as error:
        raise _raised(text, error) from error
    module, examples = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise SourceError(
            f"{text} returned a {type(module).__name__}",
            fix="return an nn.Module, or (module, examples)",
        )
    return module, examples


def _import(place: str, text: str) -> object:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise SourceError(
            f"{text}: there is no module {error.name!r}",
            fix="install it, or run where it can be imported from",
        ) from error
    except Exception as error:
        raise _raised(f"importing {place}", error) from error
    finally:
        sys.path.remove(os.getcwd())


def _raised(what: str, error: Exception) -> SourceError:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else None
    return SourceError(
        f"{what} raised {type(error).__name__}: {error}",
        where=where,
        fix="correct it there; it is called without arguments",
    )
