"""Giving memory back between steps that each replace most of a model's weights."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """No garbage collection but :func:`release`; also a decorator.

    Tracing and rewriting make millions of objects that stay, and the collector
    looks at them again and again: a tenth of the processor time of a capture. What
    was there before, half a million objects of imported modules, is not looked at
    even then.
    """
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def release() -> None:
    """Frees programs nobody holds any more, and hands their memory to the system.

    Graphs are cycles, so their weights wait for a collection.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Hands memory that was freed in small pieces to the system, where the C library is glibc.

    It keeps what was freed in pieces of a few megabytes, which the next step's large
    tensors cannot use (SmolLM2, between two passes: 1,443 MB held for 548 live).
    """
    if sys.platform == "linux":
        trimmer = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libcs have none
        if trimmer is not None:
            trimmer(0)
