"""Several processes on this machine over gloo: memory, timelines and balance, measured.

    python bench/scale.py --memory     peak resident size of a process of each mesh, 2 processes
    python bench/scale.py --timeline   seconds of a step beside the simulated ones, 2, 4 processes
    python bench/scale.py --balance    stages of 24 uneven layers: largest beside the mean

Without one of them all are run; ``--json FILE`` and ``--png FILE`` keep what was found.
Every process has one thread. What a timeline is simulated from is measured first: the seconds of
each stage by as many processes at once as compute in the run, or as there are cores, and what a
message takes between two. Processes that share cores are simulated so (``simulate(cores=…)``).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from scale_runs import MICROBATCHES, balance, message, peak, run, save, stage_times, step

MESHES = ("dp=1", "dp=2", "fsdp=2", "tp=2", "pp=2")
PIPELINES = ((2, "gpipe"), (2, "1f1b"), (2, "zero-bubble"), (4, "gpipe"), (4, "1f1b"))


def main() -> None:
    """Prints a table for each part."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for part in ("memory", "timeline", "balance"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    asked = parser.parse_args()
    every = not (asked.memory or asked.timeline or asked.balance)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "program"
        if asked.memory or every:
            found["memory"] = memory(folder)
        if asked.timeline or every:
            found["timeline"] = timeline(folder)
        if asked.balance or every:
            found["balance"] = run(1, balance)[0]
            for each in found["balance"]:
                print("{device:5} {stages} stages: largest {measured:.3f} of the mean, "
                      "said {said:.3f}".format(**each))  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if asked.png:
        draw(found, asked.png)


def memory(folder: Path) -> dict[str, Any]:
    """Peak resident megabytes of the largest process of each mesh, and what its weights take."""
    size = run(1, save, folder, 720, 8000)[0]
    found: dict[str, Any] = {"parameters": size / 2**20}
    for mesh in MESHES:
        ranks = run(int(mesh[-1]), peak, folder, mesh)
        found[mesh] = max(each for each, _ in ranks) / 1e6
        found[f"{mesh} loaded"] = max(loaded for _, loaded in ranks) / 1e6
        print(f"{mesh:8} peak {found[mesh]:6.0f} MB, {found[mesh] / found['dp=1']:.2f} of one "
              f"process; {found[f'{mesh} loaded']:6.0f} MB once loaded, "
              f"{size / 2**20:.0f} MiB of parameters", flush=True)  # fmt: skip
    return found


def timeline(folder: Path) -> list[dict[str, Any]]:
    """Measured and simulated seconds of a step of each pipeline."""
    run(1, save, folder, 256, 2000)
    from ftc.graph.timeline import StageTime, simulate

    cores = len(os.sched_getaffinity(0))
    latency, link = run(2, message)[0]
    print(f"{cores} cores; a message takes {latency * 1e6:.0f} us and 1 s for {link / 1e9:.2f} GB")
    found = []
    for count, schedule in PIPELINES:
        each = run(min(count, cores), stage_times, folder, count, latency, link)
        times = [StageTime(*(sum(x) / len(each) for x in zip(*of_stage, strict=True)))
                 for of_stage in zip(*each, strict=True)]  # fmt: skip
        said = simulate(schedule, times, MICROBATCHES, cores=cores).seconds
        measured = max(run(count, step, folder, f"pp={count}", schedule))
        found.append({"processes": count, "schedule": schedule, "measured": measured,
                      "simulated": said, "cores": cores, "latency": latency,
                      "link": link})  # fmt: skip
        print(f"pp={count} {schedule:12} measured {measured:.3f} s, simulated {said:.3f} s: "
              f"{said / measured - 1:+.0%}", flush=True)  # fmt: skip
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """What was found as bars."""
    from ftc.runtime.pictures import check_picture, figure_class, save_picture

    check_picture(path)
    figure = figure_class()(figsize=(4 * len(found), 3.2), layout="constrained")
    for axes, (part, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(),
                                  strict=True):  # fmt: skip
        if part == "memory":
            axes.bar(MESHES, [rows[mesh] for mesh in MESHES])
            axes.set_title(f"peak MB, {rows['parameters']:.0f} MiB of parameters")
            continue
        names = [f"{r['processes']} {r['schedule']}" if part == "timeline" else
                 f"{r['stages']} {r['device']}" for r in rows]  # fmt: skip
        other = "simulated" if part == "timeline" else "said"
        for shift, key in ((-0.2, "measured"), (0.2, other)):
            axes.bar([i + shift for i in range(len(rows))], [r[key] for r in rows], 0.4, label=key)
        axes.set_xticks(range(len(rows)), names, rotation=45, ha="right")
        axes.set_title("seconds of a step" if part == "timeline" else "largest stage of the mean")
        axes.legend()
    save_picture(figure, path)


if __name__ == "__main__":
    main()
