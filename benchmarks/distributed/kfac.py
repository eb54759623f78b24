"""Step time and memory of K-FAC over ranks: `python -m benchmarks.distributed kfac`.

    python -m benchmarks.distributed kfac [--ranks 2] [--repeats 7] [--batch 1000] [--json FILE]

MNIST's deep autoencoder (784-1000-500-250-30 and back, random pixels), a batch of 1000 in all, one thread a rank, gloo
on one machine. Arms: one process on the whole batch, and `--ranks` processes on a part each with share="inverses" and
share="updates"; a plain step, one that measures factors, and one that inverts them, too. All arms live in the same
processes and take turns, in alternating order; while the single process runs, the others wait.
CPU: the most of any rank's CPU time, what a step takes on a machine with a core for each. Wall: of rank 0, which counts
waiting, also for other programs. Lower quartiles. Memory: what `opt.preconditioner.costs()` says, and the peak of
resident memory over three steps above what the process held before the model was made (each arm in processes of its
own; Linux only). "every 10 and 100": the mean step with factors every 10 and inverses every 100 steps.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

import layerwise as lw
from benchmarks import autoencoder, probe
from benchmarks.distributed._processes import headline, together
from benchmarks.probe import Peak, conditions, lower_quartile

__all__ = ["main"]

RESULT = probe.RESULTS / "distributed_kfac.json"
SHARES = ("inverses", "updates")
ALONE = "one process"
NEVER = 10**9
PERIODS = {"plain": (NEVER, NEVER), "factors": (1, NEVER), "factors and inverses": (1, 1)}
BETWEEN = 3  # a number of steps at which nothing is due but what has period 1

Arm = Callable[[str], None]


def arm_of(name: str, rank: int, size: int, batch: int) -> Arm:
    """Steps of one arm on this rank's part of the batch; one step is done."""
    x = torch.rand(batch, autoencoder.SIZES[0], generator=torch.Generator().manual_seed(0))
    parallel = None
    if name != ALONE:
        x = x.tensor_split(size)[rank].clone()
        parallel = lw.optim.DataParallel(share=name, reduction="mean")  # type: ignore[arg-type]
    model = autoencoder.deep_autoencoder(0)
    opt = lw.optim.KFAC(model, parallel=parallel)

    def step(kind: str) -> None:
        pre = opt.preconditioner
        pre.update_factors_every, pre.update_inverses_every = PERIODS[kind]
        opt.step(lambda: autoencoder.reconstruction_loss(model, x))
        pre.steps = BETWEEN

    step("plain")  # the first one measures and inverts, whatever the periods
    step.costs = opt.preconditioner.costs  # type: ignore[attr-defined]
    return step


def timed(rank: int, size: int, batch: int, repeats: int) -> dict[str, Any]:
    """On each rank: seconds of CPU and of the clock for each arm and kind of step, and what the blocks cost."""
    names = [ALONE, *SHARES] if rank == 0 else list(SHARES)
    arms = {name: arm_of(name, rank, size, batch) for name in names if name != ALONE}
    if rank == 0:
        arms[ALONE] = arm_of(ALONE, 0, 1, batch)
    runs = [(name, kind) for name in (ALONE, *SHARES) for kind in PERIODS]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {run: [] for run in runs}
    for repeat in range(repeats + 1):
        for name, kind in runs[:: 1 if repeat % 2 else -1]:
            dist.barrier()
            cpu, clock = time.process_time(), time.perf_counter()
            if name in arms:
                arms[name](kind)
            if repeat:  # the first one warms up
                found[name, kind].append((time.process_time() - cpu, time.perf_counter() - clock))
    quartiles = {
        f"{name}, {kind}": [lower_quartile([pair[i] for pair in pairs]) for i in (0, 1)]
        for (name, kind), pairs in found.items()
    }
    costs = {name: [vars(cost) for cost in arms[name].costs()] for name in arms}  # type: ignore[attr-defined]
    return {"seconds": quartiles, "costs": costs}


def peak(rank: int, size: int, batch: int, name: str) -> float:
    """Megabytes of three steps, the first of which measures and inverts all there is."""
    gc.collect()
    held = Peak()
    step = arm_of(name, rank, size, batch)
    for kind in ("factors and inverses", "plain"):
        step(kind)
    return held.mb()


def amortised(seconds: Mapping[str, float]) -> float:
    """The mean step with factors every 10 and inverses every 100 steps."""
    return 0.9 * seconds["plain"] + 0.09 * seconds["factors"] + 0.01 * seconds["factors and inverses"]


def summary(found: list[dict[str, Any]], memory: Mapping[str, list[float]]) -> dict[str, Any]:
    """By arm: seconds of each kind of step, their ratios to one process, and memory of each rank."""
    arms: dict[str, Any] = {}
    for name in (ALONE, *SHARES):
        each = found[:1] if name == ALONE else found
        cpu = {kind: max(one["seconds"][f"{name}, {kind}"][0] for one in each) for kind in PERIODS}
        wall = {kind: found[0]["seconds"][f"{name}, {kind}"][1] for kind in PERIODS}
        cpu["every 10 and 100"], wall["every 10 and 100"] = amortised(cpu), amortised(wall)
        arms[name] = {"cpu_s": cpu, "wall_s": wall, "peak_mb": memory[name], "ranks": found[0]["costs"][name]}
    for arm in arms.values():
        for clock in ("cpu_s", "wall_s"):
            base = arms[ALONE][clock]
            arm[clock.replace("_s", "_over_one_process")] = {kind: arm[clock][kind] / base[kind] for kind in base}
    return arms


def report(arms: Mapping[str, Any]) -> str:
    """Markdown: CPU milliseconds of each kind of step with the ratio to one process, and megabytes of each rank."""
    kinds = [*PERIODS, "every 10 and 100"]
    head = ["arm", *(f"{kind}, ms (ratio)" for kind in kinds), "wall ratio", "factors + inverses, MB", "peak, MB"]
    rows = []
    for name, arm in arms.items():
        cells = [f"{1e3 * arm['cpu_s'][k]:.0f} ({arm['cpu_over_one_process'][k]:.2f})" for k in kinds]
        held = ", ".join(f"{r['factor_bytes'] / 1e6:.0f} + {r['inverse_bytes'] / 1e6:.0f}" for r in arm["ranks"])
        peaks = ", ".join(f"{mb:.0f}" for mb in arm["peak_mb"])
        wall = arm["wall_over_one_process"]["every 10 and 100"]
        rows.append([name, *cells, f"{wall:.2f}", held, peaks])
    return probe.table(head, rows)


def main(argv: list[str] | None = None) -> None:
    made = probe.parser("benchmarks.distributed kfac", __doc__, ranks=2, repeats=7, batch=1000, json=RESULT)
    options = probe.parsed(made, argv)
    memory = {name: together(options.ranks, peak, options.batch, name) for name in SHARES}
    memory[ALONE] = together(1, peak, options.batch, ALONE)
    under = conditions(ranks=options.ranks, repeats=options.repeats, batch=options.batch)
    found = together(options.ranks, timed, options.batch, options.repeats)
    result = {**under, "arms": summary(found, memory)}
    print(headline(under))
    print(report(result["arms"]))
    probe.write(options.json, result)


if __name__ == "__main__":
    main()
