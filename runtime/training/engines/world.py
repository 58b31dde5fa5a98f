"""The processes of a run: who they are, how they add numbers, and what happens when one dies.

Processes are started by torchrun (or anything that sets ``RANK``, ``WORLD_SIZE``,
``MASTER_ADDR`` and ``MASTER_PORT``). Every wait for another process ends after a
timeout, with an error that says what to do.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ftc.graph import placement
from ftc.graph.errors import FtcError, UsageError, WriteError
from ftc.graph.placement import Placement
from ftc.graph.words import plural

from .mesh import Mesh
from .rendezvous import meet

AXES = ("pp", "dp", "fsdp", "tp")
_BEFORE = ("torch.distributed.nn.functional", "torch.distributed.optim")
"""Modules with default arguments that are the group which is there when they are imported: of a
run that has begun they would hold it, and its threads, until the process ends."""
_ROUNDS = 8  # of collecting, at most; two or three find nothing more


class LostProcess(WriteError):
    """Another process of the run died, or did not answer within the timeout."""


def is_main() -> bool:
    """Whether this process writes files and talks: the first of those that were started."""
    return os.environ.get("RANK", "0") == "0"


class Alone:
    """A run of one process."""

    rank, data_rank, data_size, main, mesh = 0, 0, 1, True, Mesh()

    def leave(self) -> None:
        """Nobody to leave."""

    def watched(self) -> AbstractContextManager[None]:
        """Nobody to lose."""
        return nullcontext()

    def first(self, make: Callable[[], Any]) -> Any:
        """Runs ``make``."""
        return make()


class World:
    """The processes of a run, joined.

    Args:
        mesh: how they are arranged; ranks count along its last axis first.
        device: of this process.
        timeout: seconds to wait for another process.

    Attributes:
        rank: of this process among all.
        process: its number where those that share a program (``tp``) count as one.
        data_rank, data_size: among those that see different rows.
        speaks: whether it is the first of those that have parts of the same stages.
        main: whether this process writes files and talks.

    Raises:
        UsageError: when another number of processes was started than the mesh has.
    """

    def __init__(self, mesh: Mesh, device: torch.device, timeout: float = 600.0) -> None:
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != mesh.size:
            other = [f"--mesh dp={started}"] if started > 1 else []
            again = [f"torchrun --nproc-per-node {mesh.size} …"] if mesh.size > 1 else []
            raise UsageError(
                f"the mesh {mesh} has {plural(mesh.size, 'process', 'processes')}, "
                f"and {plural(started, 'was', 'were')} started", fix=" or ".join(other + again),
            )  # fmt: skip
        for name in _BEFORE:
            import_module(name)
        self.mesh, self.device = mesh, device
        backend = "nccl" if device.type == "cuda" else "gloo"
        with self.watched():
            store, rank, size = meet(timeout)
            wait = timedelta(seconds=timeout)
            dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=size)
            self.devices = dist.device_mesh.init_device_mesh(
                device.type, mesh.shape, mesh_dim_names=AXES
            )
            self._data = self.devices["dp", "fsdp"]._flatten("data")
        self.rank = dist.get_rank()
        self.process, self.main = self.rank // mesh.tp, self.rank == 0
        self.data_rank, self.data_size = self._data.get_local_rank(), mesh.dp * mesh.fsdp

        self.speaks = self.data_rank == self.place("tp") == 0

    def leave(self) -> None:
        """Ends the connection; without waiting for anybody.

        The threads of a group end when nothing holds it, at the latest before the interpreter
        ends. One that drops a tensor after that aborts the process (pytorch issue 190489).
        """
        placement.place(Placement())
        dist.destroy_process_group()
        del self.devices, self._data
        if "torch.distributed.tensor" in sys.modules:
            from torch.distributed.tensor import debug

            debug._clear_sharding_prop_cache()  # whose entries hold the mesh
        atexit.register(let_go)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes along one axis: ``pp``, ``dp``, ``fsdp``, ``tp`` or ``data``."""
        return self._data.get_group() if axis == "data" else self.devices[axis].get_group()

    def place(self, axis: str) -> int:
        """This process's place along one axis."""
        return self.devices[axis].get_local_rank()

    def peer(self, axis: str, place: int) -> int:
        """The rank of the process at ``place`` along an axis through this one."""
        return dist.get_global_rank(self.group(axis), place)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the end of another process into an error for people.

        Raises:
            LostProcess: then.
        """
        try:
            yield
        except FtcError:
            raise
        except (dist.DistError, RuntimeError) as error:
            if not _is_lost(error):
                raise
            said = str(error).strip().partition("\n")[0].rpartition("] ")[2]
            raise LostProcess(
                "a process of the run died or did not answer", where=said[:160],
                fix="read its log, then the same call with --resume goes on after the last "
                "checkpoint",
            ) from error  # fmt: skip

    def add(self, numbers: Mapping[str, float], axis: str | None = None) -> dict[str, float]:
        """Sums of numbers over processes that have the same keys.

        Args:
            numbers: of this process.
            axis: along which; by default all processes, each of a ``tp`` group counting as one.
        """
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(values, group=self.group(axis) if axis else None)
        if axis is None:
            values /= self.mesh.tp
        return dict(zip(numbers, values.tolist(), strict=True))

    def merge(self, counts: Mapping[str, float]) -> Counter[str]:
        """Sums of numbers whose keys may differ, over all processes, a ``tp`` group as one."""
        total = Counter[str]()
        for each in self.each(dict(counts)):
            total.update(each)
        return total

    def each(self, value: Any) -> list[Any]:
        """What each process has, by number; the first of each ``tp`` group speaks for it."""
        found: list[Any] = [None] * self.mesh.size
        dist.all_gather_object(found, value)
        return found[:: self.mesh.tp]

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value.item())

    def first(self, make: Callable[[], Any]) -> Any:
        """Runs ``make`` on the main process, then tells the others: they fail where it fails.

        Raises:
            FtcError: that ``make`` raised, everywhere.
        """
        error: FtcError | None = None
        made = None
        if self.main:
            try:
                made = make()
            except FtcError as found:
                error = found
        said: list[Any] = [(type(error), error.what, error.where, error.fix) if error else None]
        dist.broadcast_object_list(said)
        if said[0] is not None:
            kind, what, where, fix = said[0]
            raise kind(what, where=where, fix=fix)
        return made


def let_go() -> None:
    """Ends the threads of groups that only cycles hold: engines, and parts of weights in them."""
    for _ in range(_ROUNDS):  # a tensor that C++ holds too survives the first time
        if not gc.collect():
            break


def add_gradients(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sums gradients over a group, in place, in one message for each dtype."""
    for dtype in dict.fromkeys(each.dtype for each in gradients):
        alike = [each for each in gradients if each.dtype == dtype]
        flat = torch.cat([each.reshape(-1) for each in alike])
        dist.all_reduce(flat, group=group)
        for each, summed in zip(alike, flat.split([e.numel() for e in alike]), strict=True):
            each.copy_(summed.view_as(each))


def gather(tensors: Mapping[str, Tensor], world: World, axis: str) -> dict[str, Tensor]:
    """Tensors of all processes along an axis, on the first of them; the first one's come first.

    Args:
        tensors: of this process, by name.
        world: the processes.
        axis: along which.
    """
    found, here = dict(tensors), world.place(axis)
    for place in range(1, dist.get_world_size(world.group(axis))):
        if here == place:
            types = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
            dist.send_object_list([types], world.peer(axis, 0))
            for tensor in tensors.values():
                dist.send(tensor.to(world.device).contiguous(), world.peer(axis, 0))
        elif here == 0:
            said: list[Any] = [None]
            dist.recv_object_list(said, world.peer(axis, place))
            for name, (shape, dtype) in said[0].items():
                tensor = torch.empty(shape, dtype=dtype, device=world.device)
                dist.recv(tensor, world.peer(axis, place))
                found.setdefault(name, tensor)
    return found


def _is_lost(error: Exception) -> bool:
    """Whether an error of torch.distributed means that another process is not there."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in (
        "connection closed", "connection reset", "timed out", "timeout", "broken pipe",
        "socket", "nccl", "gloo",
    ))  # fmt: skip
