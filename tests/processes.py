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
_PRELOAD = [
    "torch", "torch.distributed.fsdp", "torch.distributed.pipelining", "transformers",
    "ftc.graph.bundle", "ftc.runtime.training.run", "ftc.runtime.training.engines",
]  # fmt: skip
CONTEXT: Any = multiprocessing.get_context("forkserver")
"""All tests of a process share its server: that imports once what any of them needs."""
CONTEXT.set_forkserver_preload(_PRELOAD)


def process(function: Callable[..., Any], *arguments: Any, fresh: bool = False) -> Any:
    """A process that calls ``function``, with the environment of this one as it is now.

    Args:
        function: what it calls.
        arguments: of it.
        fresh: one that has imported nothing.
    """
    if _ROOT not in sys.path:  # which the processes get: they import functions of tests by name
        sys.path.append(_ROOT)
    context: Any = multiprocessing.get_context("spawn") if fresh else CONTEXT
    return context.Process(target=_call, args=(dict(os.environ), function, arguments))


def _call(environment: dict[str, str], function: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.clear()  # that of whoever started the server
    os.environ.update(environment)
    function(*arguments)


def spread(
    count: int, function: Callable[..., Any], *arguments: Any, dies: int | None = None,
    fresh: bool = False,
) -> list[Any]:  # fmt: skip
    """What ``function(*arguments)`` returns in each of ``count`` processes, by rank.

    Args:
        count: processes.
        function: is called in each.
        arguments: of it.
        dies: the rank that ends without a word; its place in the result is None.
        fresh: they have imported nothing.

    Raises:
        AssertionError: with the traceback of a process that failed.
    """
    port, queue = _free_port(), CONTEXT.Queue()
    started = [process(_work, rank, count, port, queue, function, arguments, fresh=fresh)
               for rank in range(count)]  # fmt: skip
    for each in started:
        each.start()
    found: dict[int, Any] = {}
    try:
        for _ in range(count - (dies is not None)):
            rank, result, error = _next(queue, started, dies)
            assert error is None, f"rank {rank}: {error}"
            found[rank] = result
    finally:
        for each in started:
            each.join(5 if len(found) >= count - (dies is not None) else 0)
            each.kill()
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
