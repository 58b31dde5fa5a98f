"""Several processes on this machine that talk over gloo, forked from a server: cheap ones."""

from __future__ import annotations

import multiprocessing
import os
import queue as queues
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).parents[1])
_PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.pipelining", "ftc.graph.bundle",
            "ftc.runtime.training.engines"]  # fmt: skip


def spread(
    count: int, function: Callable[..., Any], *arguments: Any, dies: int | None = None
) -> list[Any]:
    """What ``function(*arguments)`` returns in each of ``count`` processes, by rank.

    Args:
        count: processes.
        function: is called in each.
        arguments: of it.
        dies: the rank that ends without a word; its place in the result is None.

    Raises:
        AssertionError: with the traceback of a process that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    if _ROOT not in sys.path:  # which the processes get: they import functions of tests by name
        sys.path.append(_ROOT)
    port, queue = _free_port(), context.Queue()
    started = [
        context.Process(target=_work, args=(rank, count, port, queue, function, arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in range(count - (dies is not None)):
            rank, result, error = _next(queue, started, dies)
            assert error is None, f"rank {rank}: {error}"
            found[rank] = result
    finally:
        for process in started:
            process.join(5 if len(found) >= count - (dies is not None) else 0)
            process.kill()
    return [found.get(rank) for rank in range(count)]


def _next(queue: Any, started: list[Any], dies: int | None) -> Any:
    """The next result; not awaited from a process that ended without one."""
    while True:
        ended = [i for i, each in enumerate(started) if each.exitcode and i != dies]
        try:
            return queue.get(timeout=1)
        except queues.Empty:
            assert not ended, f"ranks {ended} died"


def _work(rank: int, count: int, port: int, queue: Any, function: Any, arguments: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    import torch

    torch.set_num_threads(1)
    try:
        queue.put((rank, function(*arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
