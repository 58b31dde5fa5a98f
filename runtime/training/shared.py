"""A program that one process of a run makes and all of them map from the disk."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ftc.graph.bundle import load_bundle, save_bundle
from ftc.graph.program import Program
from ftc.runtime.memory import release

from .data.table import cache_folder
from .engines import Alone, World
from .modules import owned


def shared(make: Callable[[], Program], world: World | Alone) -> Program:
    """What ``make`` makes on the main process, here on every one.

    Several processes map one file beside the tokens in the cache, which goes once all have.
    The assets are those of what was made.

    Raises:
        FtcError: that ``make`` raised, everywhere; WriteError where the cache has no room.
    """
    if world.mesh.size == 1:
        return make()
    folder = cache_folder().with_name("programs") / world.each(secrets.token_hex(8))[0]

    def save() -> Path | None:
        made = make()
        save_bundle(made, folder)
        return made.assets

    try:
        assets = world.each(world.first(save))[0]
        release()  # what it was made from
        program = replace(load_bundle(folder), assets=assets)
        world.any(False)  # all of them have it
    finally:
        if world.main:
            shutil.rmtree(folder, ignore_errors=True)
    return program


def prove_cut(program: Program, world: World | Alone) -> bool:
    """Runs a program whole and cut, if the mesh cuts it: one process does, for all of them."""
    if world.mesh.tp == 1:
        return False
    from .engines.arrange import prove

    prove(program, world.mesh.tp)
    return True


def proven(make: Callable[[], Program], world: World | Alone) -> Program:
    """A program to be changed, that is kept nowhere."""

    def prepare() -> Program:
        prove_cut(program := make(), world)
        return program

    return owned(shared(prepare, world))
