"""How many threads run a program, in torch and in onnxruntime.

Torch is told where it is there: a program that onnxruntime runs may not need it at all.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ftc.graph.errors import UsageError

_asked: int | None = None


def set_threads(threads: int | None) -> None:
    """Uses this many threads in torch, and from now on as the default of onnxruntime.

    Raises:
        UsageError: for a number that makes no sense.
    """
    global _asked
    if threads is None:
        return
    if not 1 <= threads <= 4 * (os.cpu_count() or 1):
        cores = os.cpu_count() or 1
        raise UsageError(
            f"--threads {threads}: this machine has {cores} cores",
            fix=f"--threads {cores}, or any number from 1 to {4 * cores}",
        )
    _asked = threads
    tell_torch()


def tell_torch() -> None:
    """Has torch, once it is imported, use the threads that were asked for before it was."""
    global _asked
    torch: Any = sys.modules.get("torch")
    if torch is not None and _asked is not None:
        torch.set_num_threads(_asked)
        _asked = None  # from now on it is torch that knows


def thread_count() -> int:
    """How many threads are used: those asked for, or one for each processor, as torch does."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        tell_torch()
        return int(torch.get_num_threads())
    if _asked is not None:
        return _asked
    set_outside = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if set_outside.isdigit() and int(set_outside):
        return int(set_outside)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
