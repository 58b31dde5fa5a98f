"""Giving memory back between steps that each replace most of a model's weights; how much it was."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


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


def hand_back_at_once() -> None:
    """Has large tensors handed to the system when they are freed, where the C library is glibc.

    By itself it keeps what was freed in pieces of up to 32 MB. Layers that are gathered and
    dropped again and again leave it more than they ever need at a time.
    """
    if sys.platform == "linux":
        option = getattr(ctypes.CDLL(None), "mallopt", None)
        if option is not None:
            option(_MMAP_THRESHOLD, 1 << 18)
            option(_TRIM_THRESHOLD, 1 << 20)


def trim() -> None:
    """Hands memory that was freed in small pieces to the system, where the C library is glibc.

    It keeps what was freed in pieces of a few megabytes, which the next step's large
    tensors cannot use (SmolLM2, between two passes: 1,443 MB held for 548 live).
    """
    if sys.platform == "linux":
        trimmer = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libcs have none
        if trimmer is not None:
            trimmer(0)


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    import resource  # not on every system

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
