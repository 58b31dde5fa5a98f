"""Several processes on this machine over gloo: peak memory of DDP and FSDP2, and a pipeline's step.

    python bench/scale.py --memory           peak resident size of each process, 2 processes
    python bench/scale.py --steps            seconds of a step of each schedule, 2 and 4 processes

The model is a random decoder. Four processes on fewer than four cores share them:
a step then takes what its work takes, and the schedule does not show.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYERS, ROWS, LENGTH, STEPS = 12, 4, 64, 4


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--memory", action="store_true", help="peak memory of DDP and FSDP2")
    parser.add_argument("--steps", action="store_true", help="seconds of a step of a pipeline")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "program"
        if asked.memory:
            run(1, save, folder, 720, 8000)
            peaks = {mesh: max(run(2, peak, folder, mesh)) for mesh in ("dp=2", "fsdp=2")}
            for mesh, size in peaks.items():
                print(f"{mesh:8} peak {size / 1e6:7.0f} MB  {size / peaks['dp=2']:.2f} of DDP's")
        if asked.steps:
            run(1, save, folder, 256, 2000)
            for mesh, schedule in (("pp=1", "1f1b"), ("pp=2", "gpipe"), ("pp=2", "1f1b"),
                                   ("pp=4", "gpipe"), ("pp=4", "1f1b")):  # fmt: skip
                seconds = max(run(int(mesh[3:]), step, folder, mesh, schedule))
                print(f"{mesh} {schedule:6} {seconds:.3f} s a step of 8 microbatches")


def save(folder: Path, width: int, words: int) -> None:
    """Writes a random decoder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ftc.graph.bundle import save_bundle
    from ftc.graph.sources import capture

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=8, intermediate_size=3 * width, use_cache=False))  # fmt: skip
    ids, dims = torch.ones(2, 6, dtype=torch.long), {0: "batch", 1: "sequence"}
    program = capture(model, task="causal-lm", examples={"input_ids": ids},
                      dynamic={"input_ids": dims}, ranges={"input_ids": words})  # fmt: skip
    size = sum(t.nbytes for _, t in program.tensors())
    print(f"{size / 2**20:.0f} MiB of parameters, {LAYERS} layers", flush=True)
    save_bundle(program, folder, force=True)


def step(folder: Path, mesh: str, schedule: str) -> float:
    """Median seconds of a step of eight microbatches."""
    engine, batch, world = made(folder, mesh, schedule)
    times = []
    for _ in range(STEPS + 2):
        begin = time.perf_counter()
        engine.gradients([batch] * 8)
        times.append(time.perf_counter() - begin)
        for parameter in engine.parameters().values():
            parameter.grad = None
    world.leave()
    return sorted(times[2:])[STEPS // 2]


def peak(folder: Path, mesh: str) -> int:
    """Bytes of the largest resident size in a few steps of AdamW."""
    import resource

    import torch

    engine, batch, world = made(folder, mesh, "1f1b")
    optimizer = torch.optim.AdamW(engine.parameters().values(), fused=True)
    for _ in range(3):
        engine.gradients([batch])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    world.leave()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def made(folder: Path, mesh: str, schedule: str) -> Any:
    """This process's engine, a batch, and the processes."""
    import torch

    from ftc.graph.bundle import load_bundle
    from ftc.passes.pipeline import Pipeline
    from ftc.runtime.training.config import TrainConfig
    from ftc.runtime.training.engines import Mesh
    from ftc.runtime.training.engines.join import make_engine
    from ftc.runtime.training.engines.world import World
    from ftc.runtime.training.modules import owned
    from ftc.runtime.training.objectives import Batch, Scene, parse_objective

    config = TrainConfig(mesh=mesh, pipeline=schedule)
    world = World(Mesh.parse(mesh), torch.device("cpu"), 120)
    program = load_bundle(folder)
    if world.mesh.pp > 1:
        program = Pipeline.parse(f"partition{{stages={world.mesh.pp}}}").run(program).program
    program = program.clone() if world.mesh.fsdp > 1 or world.mesh.pp > 1 else owned(program)
    ids = torch.randint(2, 1000, (ROWS, LENGTH))
    batch = Batch({"input_ids": ids}, {"tokens": ids}, {"loss": float(ids.numel())}, ROWS, LENGTH)
    scene: Any = Scene(program, None)  # type: ignore[arg-type]
    return make_engine(program, parse_objective("clm"), scene, config, world), batch, world


def run(count: int, function: Any, *arguments: Any) -> list[Any]:
    """What a function returns in each of several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    started = [
        context.Process(target=work, args=(queue, rank, count, port, function, arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
        if process.exitcode:
            sys.exit(f"a process ended with {process.exitcode}")
    return [queue.get() for _ in started]


def work(queue: Any, rank: int, count: int, port: int, function: Any, arguments: Any) -> None:
    """One process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    import torch

    torch.set_num_threads(1)
    queue.put(function(*arguments))


if __name__ == "__main__":
    main()
