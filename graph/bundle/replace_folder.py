"""A folder appears whole or not at all, and replaces another in one step.

It is written under a temporary name beside its place, flushed to the disk, and
renamed. An existing folder is exchanged with the new one by one system call
(Linux: ``renameat2`` with ``RENAME_EXCHANGE``), so that at every moment one of
them stands there. Where there is no such call the old one is renamed aside
first; :func:`recover` brings it back if the process died in between.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_OLD = "-old"


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes ``path`` the folder that ``fill`` writes; replaces a folder that is there.

    Args:
        path: absolute. Its parent is made if need be.
        fill: writes into the folder it is given. What it raises is passed on,
            and ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f"{_prefix(path)}{os.getpid()}")
    temporary.mkdir()
    try:
        fill(temporary)
        _flush(temporary)
        _put(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _flush_entry(path.parent)


def recover(path: Path) -> None:
    """Puts the old folder back, where a process died between the two renames of a replacement."""
    if path.exists():
        return
    for aside in path.parent.glob(f".{glob.escape(path.name)}.ftc-*{_OLD}"):
        if aside.is_dir() and not _in_use(aside, path):
            aside.rename(path)
            return


def _put(new: Path, path: Path) -> None:
    """Renames ``new`` to ``path``; what stood there is left under the name ``new`` or is gone."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        aside = new.with_name(new.name + _OLD)
        path.rename(aside)
        try:
            new.rename(path)
        except OSError:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _prefix(path: Path) -> str:
    return f".{path.name}.ftc-{re.sub(r'[^A-Za-z0-9]', '_', socket.gethostname())}-"


def _remove_leftovers(path: Path) -> None:
    """Removes what dead processes of this machine left beside ``path``."""
    recover(path)
    for folder in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        if not _in_use(folder, path):
            shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path, path: Path) -> bool:
    """Whether a process of this machine that made ``folder`` beside ``path`` is alive."""
    pid = folder.name.removesuffix(_OLD).removeprefix(_prefix(path))
    return pid.isdigit() and _alive(int(pid))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(folder: Path) -> None:
    """Waits until the disk has every file of ``folder``."""
    for place, _, files in os.walk(folder):
        for name in files:
            _flush_entry(Path(place, name))
        _flush_entry(Path(place))


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
