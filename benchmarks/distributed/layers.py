"""Layers over ranks, and a model in stages: `python -m benchmarks.distributed layers`.

    python -m benchmarks.distributed layers [--ranks 2] [--repeats 9] [--batch 1000] [--methods LocoProp ...]
        [--stages 1 2 4] [--json FILE]

MNIST's deep autoencoder (784-1000-500-250-30 and back, random pixels), batches of 1000, one thread a rank, gloo on one
machine. LocoProp with ten local steps on a tenth of the rows (default) and on all rows (published), AltMin with Adam
and with a memory. One process against `--ranks` processes that own layers: all live in the same processes and take
turns; while the one process steps, the others wait.
solve: the local solves; share: the messages with the new weights, and waiting for them; step: all, with the forward
and backward pass that every rank repeats. Wall clock, lower quartiles, of the slowest rank. "on free cores" is the most
of any rank's CPU time for solving and sharing, which other programs do not lengthen; beside one process's.
Stages: AltMin's pipeline (sweep, Adam), each rank's parameters and optimizer state in MB, the peak of resident memory
over three steps above what the process held before (Linux), and the step's time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from benchmarks import probe
from benchmarks.autoencoder import SIZES, deep_autoencoder, reconstruction_loss
from benchmarks.distributed._processes import headline, together
from benchmarks.probe import Peak, conditions, lower_quartile
from layerwise.ranks.group import Ranks

RESULT = probe.RESULTS / "distributed_layers.json"
ARMS: dict[str, Callable[..., Any]] = {
    "LocoProp": lambda model, parallel: lw.LocoProp(model, parallel=parallel),
    "LocoProp, all rows": lambda model, parallel: lw.LocoProp(model, preset="published-M", parallel=parallel),
    "AltMin, Adam": lambda model, parallel: lw.AltMin(model, parallel=parallel),
    "AltMin, sweep": lambda model, parallel: lw.AltMin(model, codes="sweep", parallel=parallel),
    "AltMin, memory": lambda model, parallel: lw.AltMin(
        model, weights="memory", codes="jacobi", lr=0.1, parallel=parallel
    ),
}
Seconds = dict[str, list[float]]


class Timed:
    """Steps of an optimizer, with the seconds of each part: on the clock, and of CPU for solving and sharing."""

    def __init__(self, arm: str, parallel: bool, batch: int) -> None:
        self.model = deep_autoencoder(0)
        self.optimizer: Any = ARMS[arm](self.model, parallel or None)
        self.x = torch.rand(batch, SIZES[0], generator=torch.Generator().manual_seed(0))
        self.seconds: Seconds = {"solve": [], "share": [], "step": [], "cpu": [], "cpu solve": []}
        self._solve = self._whole = self._cpu = self._busy = 0.0
        executor = self.optimizer._executor
        home = executor._home if parallel else executor
        self._watch(home, "_solve", "_solve", "_busy")
        self._watch(executor, "run", "_whole", "_cpu")

    def _watch(self, what: Any, method: str, clock: str, cpu: str) -> None:
        act = getattr(what, method)

        def timed(*args: Any) -> None:
            start, busy = time.perf_counter(), time.process_time()
            act(*args)
            setattr(self, clock, getattr(self, clock) + time.perf_counter() - start)
            setattr(self, cpu, getattr(self, cpu) + time.process_time() - busy)

        setattr(what, method, timed)

    def step(self) -> None:
        self._solve = self._whole = self._cpu = self._busy = 0.0
        start = time.perf_counter()
        self.optimizer.step(lambda: reconstruction_loss(self.model, self.x))
        found = {"solve": self._solve, "share": self._whole - self._solve, "cpu": self._cpu, "cpu solve": self._busy}
        for name, seconds in {**found, "step": time.perf_counter() - start}.items():
            self.seconds[name].append(seconds)


def owned(rank: int, size: int, arm: str, batch: int, repeats: int) -> dict[str, Any]:
    """One process and all ranks in turn; lower quartiles, and whether both ended with the same bits."""
    shared = Timed(arm, True, batch)
    alone = Timed(arm, False, batch) if rank == 0 else None
    for _ in range(repeats + 1):  # the first step is not counted
        dist.barrier()
        if alone is not None:
            alone.step()
        dist.barrier()
        shared.step()
    found: dict[str, Any] = {"ranks": quartiles(shared.seconds)}
    if alone is not None:
        found["one"] = quartiles(alone.seconds)
        pairs = zip(alone.model.parameters(), shared.model.parameters(), strict=True)
        found["same bits"] = all(torch.equal(p, q) for p, q in pairs)
    return found


def quartiles(seconds: Seconds) -> dict[str, float]:
    return {name: lower_quartile(values[1:]) for name, values in seconds.items()}


def rows_of(methods: list[str], size: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each method."""
    rows = []
    for arm in methods:
        found = together(size, owned, arm, batch, repeats)
        one, ranks = found[0]["one"], [each["ranks"] for each in found]
        most = {part: max(rank[part] for rank in ranks) for part in one}
        both = max(rank["solve"] + rank["share"] for rank in ranks)
        rows.append({
            "method": arm, "one process": one, "ranks": most, "same bits": found[0]["same bits"],
            "speed of solves": one["solve"] / both, "speed of solves on free cores": one["cpu"] / most["cpu"],
            "speed of steps": one["step"] / most["step"],
        })  # fmt: skip
    return rows


def stage_of(rank: int, size: int) -> nn.Module:
    """A stage of the autoencoder; the other stages never take memory."""
    with torch.device("meta"):
        layers: list[nn.Module] = []
        for i, o in pairwise(SIZES):
            layers += [nn.Linear(i, o), nn.Tanh()]
        model = nn.Sequential(*layers[:-1])
    stage = lw.distributed.split(model, size)[rank].to_empty(device="cpu")
    torch.manual_seed(0)
    for p in stage.parameters():
        nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)
    return stage


def staged(rank: int, size: int, batch: int, repeats: int) -> dict[str, Any]:
    """Memory and time of a stage."""
    layer = nn.Linear(4, 4)  # what the first step of anything loads is not counted
    lw.distributed.Pipeline(layer, group=Ranks.alone()).step(torch.rand(8, 4), lambda out: out.square().mean())
    x = torch.rand(batch, SIZES[0], generator=torch.Generator().manual_seed(0))
    gc.collect()
    dist.barrier()
    peak = Peak()
    stage = stage_of(rank, size)
    opt = lw.distributed.Pipeline(stage)

    def loss(out: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, x, reduction="sum") / len(x)

    seconds = []
    for count in range(3 + repeats):
        dist.barrier()
        start = time.perf_counter()
        opt.step(x if rank == 0 else None, loss if rank == size - 1 else None)
        seconds.append(time.perf_counter() - start)
        if count == 2:
            most = peak.mb()
    state = [t for own in opt.state.values() for t in own.values() if isinstance(t, Tensor)]
    return {
        "layers": [name for name, p in stage.named_parameters() if p.dim() > 1],
        "parameters, MB": sum(p.nbytes for p in stage.parameters()) / 1e6,
        "state, MB": sum(t.nbytes for t in state) / 1e6,
        "peak, MB": most,
        "step": lower_quartile(seconds[3:]),
    }


def report(rows: list[dict[str, Any]], stages: dict[str, list[dict[str, Any]]], size: int) -> str:
    lines = [
        f"| method | solve, one process | solve, {size} ranks | share | speed | on free cores | step | speed | bits |",
        "|---|" + "---:|" * 7 + "---|",
    ]
    for row in rows:
        one, ranks = row["one process"], row["ranks"]
        lines.append(
            f"| {row['method']} | {1e3 * one['solve']:.0f} ms | {1e3 * ranks['solve']:.0f} ms "
            f"| {1e3 * ranks['share']:.0f} ms | {row['speed of solves']:.2f} "
            f"| {row['speed of solves on free cores']:.2f} | {1e3 * one['step']:.0f} → {1e3 * ranks['step']:.0f} ms "
            f"| {row['speed of steps']:.2f} | {'same' if row['same bits'] else 'DIFFERENT'} |"
        )
    lines += ["", "| stages | parameters, MB | state, MB | peak, MB | step |", "|---:|---|---|---|---:|"]
    for count, parts in stages.items():
        cells = [", ".join(f"{part[key]:.1f}" for part in parts) for key in
                 ("parameters, MB", "state, MB", "peak, MB")]  # fmt: skip
        lines.append(f"| {count} | {' | '.join(cells)} | {1e3 * max(part['step'] for part in parts):.0f} ms |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = probe.parser("benchmarks.distributed layers", __doc__, ranks=2, repeats=9, batch=1000, json=RESULT)
    parser.add_argument("--methods", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 4])
    options = probe.parsed(parser, argv)
    under = conditions(ranks=options.ranks, repeats=options.repeats, batch=options.batch)
    rows = rows_of(options.methods, options.ranks, options.batch, options.repeats)
    stages = {str(n): together(n, staged, options.batch, options.repeats) for n in options.stages}
    result = {**under, "layers": rows, "stages": stages}
    print(headline(under))
    print(report(rows, stages, options.ranks))
    probe.write(options.json, result)


if __name__ == "__main__":
    main()
