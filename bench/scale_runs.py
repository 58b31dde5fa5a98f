"""What the processes of ``scale.py`` do: steps, memory, balance of a random decoder.

:func:`run` starts some of them, one thread each, and each runs one function of these.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

LAYERS, ROWS, LENGTH, STEPS, MICROBATCHES = 12, 4, 64, 9, 8


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


def save(folder: Path, width: int, words: int) -> int:
    """Writes a random decoder; bytes of its parameters."""
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
    save_bundle(program, folder, force=True)
    return sum(t.nbytes for _, t in program.tensors())


def step(folder: Path, mesh: str, schedule: str) -> float:
    """Median seconds of a step."""
    engine, batch, world, _ = made(folder, mesh, schedule)
    times = []
    for _ in range(STEPS + 2):
        world.any(False)  # all of them begin together
        begin = time.perf_counter()
        engine.gradients([batch] * MICROBATCHES)
        times.append(time.perf_counter() - begin)
    world.any(False)
    world.leave()
    return sorted(times[2:])[STEPS // 2]


def stage_times(
    folder: Path, count: int, latency: float, link: float
) -> list[tuple[float, float, float, float]]:
    """Forward, backward, weights and send of each stage, measured while others do the same."""
    from dataclasses import replace

    from ftc.graph.bundle import load_bundle
    from ftc.graph.cut import cut
    from ftc.graph.stage_plan import stage_costs
    from ftc.graph.training_cost import DEVICES

    here = replace(DEVICES["here"], latency=latency, link=link)
    program, sizes = staged(load_bundle(folder), count), {"batch": ROWS, "sequence": LENGTH}
    times = [cost.time_on(here) for cost in stage_costs(program, cut(program), sizes, here)]
    return [(time_of.forward, time_of.backward, time_of.weights, time_of.send) for time_of in times]


def staged(program: Any, count: int) -> Any:
    """The program with stages."""
    from ftc.passes.partition import Partition

    return Partition(stages=count, shape=f"batch={ROWS},sequence={LENGTH}")(program).program


def message() -> tuple[float, float]:
    """Seconds until a small message is at the other process, and bytes a second of large ones."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    for size in (1, 1 << 20):
        x, times = torch.zeros(size), []
        for _ in range(40):
            begin = time.perf_counter()
            for sends in (rank == 0, rank == 1):  # there and back
                dist.send(x, 1 - rank) if sends else dist.recv(x, 1 - rank)
            times.append((time.perf_counter() - begin) / 2)
        found.append(sorted(times)[len(times) // 2])
    dist.destroy_process_group()
    return found[0], 4 * (1 << 20) / max(found[1] - found[0], 1e-9)


def peak(folder: Path, mesh: str) -> tuple[int, int]:
    """Bytes of the largest resident size in a few steps of AdamW, and private ones before them."""
    import torch

    from ftc.runtime.memory import peak_memory, release

    private = private_bytes()
    engine, batch, world, _ = made(folder, mesh, "1f1b")
    release()
    loaded = private_bytes() - private
    optimizer = torch.optim.AdamW(engine.parameters().values(), fused=True)
    for _ in range(3):
        engine.gradients([batch] * (2 if "pp" in mesh else 1))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    world.leave()
    return peak_memory(), loaded


def private_bytes() -> int:
    """Resident bytes of this process that are no pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def made(folder: Path, mesh: str, schedule: str) -> tuple[Any, Any, Any, Any]:
    """This process's engine, a batch, the processes, and the program."""
    import torch

    from ftc.graph.bundle import load_bundle
    from ftc.runtime.training.config import TrainConfig
    from ftc.runtime.training.engines import Mesh, World
    from ftc.runtime.training.engines.join import make_engine
    from ftc.runtime.training.modules import owned
    from ftc.runtime.training.objectives import Batch, Scene, parse_objective

    config = TrainConfig(mesh=mesh, pipeline=schedule)
    world = World(Mesh.parse(mesh), torch.device("cpu"), 120)
    program = load_bundle(folder)
    if world.mesh.pp > 1:
        program = staged(program, world.mesh.pp)
    torch.manual_seed(world.data_rank)
    program = owned(program) if mesh.startswith("dp") else program.clone()
    ids = torch.randint(2, 1000, (ROWS, LENGTH))
    batch = Batch({"input_ids": ids}, {"tokens": ids}, {"loss": float(ids.numel())}, ROWS, LENGTH)
    scene: Any = Scene(program, None)  # type: ignore[arg-type]
    return (
        make_engine(program, parse_objective("clm"), scene, config, world), batch, world, program,
    )  # fmt: skip


def balance() -> list[dict[str, Any]]:
    """Largest stage beside the mean, of 4 and 8, planned by the roofline and by measuring."""
    import torch
    from torch import nn

    from ftc.graph.capture import capture_module
    from ftc.graph.cut import cut
    from ftc.graph.stage_plan import stage_costs
    from ftc.graph.training_cost import DEVICES
    from ftc.passes.partition import Partition

    class Decoder(nn.Module):
        """24 layers of attention and feed-forward whose inner widths differ up to sixteenfold."""

        def __init__(self, width: int = 192, words: int = 1000) -> None:
            super().__init__()
            inner = [(1, 16, 4, 2, 12, 8)[i % 6] * width // 2 for i in range(24)]
            self.embed = nn.Embedding(words, width)
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(48))
            self.joined = nn.ModuleList(nn.Linear(width, 3 * width) for _ in inner)
            self.out = nn.ModuleList(nn.Linear(width, width) for _ in inner)
            self.up = nn.ModuleList(nn.Linear(width, n) for n in inner)
            self.down = nn.ModuleList(nn.Linear(n, width) for n in inner)
            self.head = nn.Linear(width, words)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            rows, length, width = x.shape
            for i in range(24):
                parts = self.joined[i](self.norms[2 * i](x)).view(rows, length, 3, 4, width // 4)
                q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
                read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + self.out[i](read.transpose(1, 2).reshape(rows, length, width))
                inner = nn.functional.gelu(self.up[i](self.norms[2 * i + 1](x)))
                x = x + self.down[i](inner)
            return self.head(x)

    dims = {"ids": {0: "batch", 1: "sequence"}}
    program = capture_module(Decoder(), {"ids": torch.randint(0, 1000, (2, 6))}, dynamic=dims,
                             ranges={"ids": 1000})  # fmt: skip
    found = []
    sizes = {"batch": 8, "sequence": LENGTH}
    for device in ("cpu", "here"):
        for count in (4, 8):
            shape = f"batch=8,sequence={LENGTH}"
            after = Partition(stages=count, shape=shape, device=device)(program).program
            stages = cut(after)
            said = [c.seconds for c in stage_costs(after, stages, sizes, DEVICES[device])]
            took = stage_seconds(stages, torch.randint(0, 1000, (8, LENGTH)))
            found.append({"device": device, "stages": count, "seconds": took,
                          "measured": max(took) * count / sum(took),
                          "said": max(said) * count / sum(said)})  # fmt: skip
    return found


def stage_seconds(stages: Any, ids: Any, rounds: int = 20) -> list[float]:
    """Seconds of each stage, forward and backward with a loss, the least of some rounds."""
    import torch

    best = [[float("inf"), float("inf")] for _ in stages]
    for _ in range(rounds):
        passed: Any = ()
        runs = []
        for i, stage in enumerate(stages):
            received = tuple(each.detach().requires_grad_() for each in passed)
            begin = time.perf_counter()
            values = stage.module(*([ids] if stage.inputs else []), *received)
            if not stage.sent:
                flat, words = values[0].flatten(0, 1), ids.flatten()
                values = (torch.nn.functional.cross_entropy(flat, words),)
            best[i][0] = min(best[i][0], time.perf_counter() - begin)
            passed = values[: len(stage.sent)]
            runs.append((values, received))
        gradients: Any = [torch.ones(())]
        for i, (values, received) in reversed([*enumerate(runs)]):
            begin = time.perf_counter()
            torch.autograd.backward(values, gradients)
            best[i][1] = min(best[i][1], time.perf_counter() - begin)
            gradients = [each.grad for each in received]
    return [sum(each) for each in best]
