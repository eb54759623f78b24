"""A character GPT in two stages, without a backward pass over both: `python -m benchmarks.distributed gpt`.

    python -m benchmarks.distributed gpt [--size small|10M] [--repeats 20] [--segment 10] [--microbatches 8]
        [--hidden 0] [--folder runs/gpt] [--json FILE]

tinyshakespeare, next character; two processes of one thread each, gloo on one machine; half of the blocks in each.
1F1B: plain AdamW on the net's loss, by `torch.distributed.pipelining.Schedule1F1B`. Local losses: each stage by AdamW
on a loss of its own, the lower one's through a linear head, or one behind `--hidden` units beside the identity;
activations pass up, nothing passes down. The same initial weights, batches and rates. Both live in the same two
processes and take turns of `--segment` steps, after which the loss on held-out text is measured, off the clock.
The first turn warms up, and counts for no speed. Wall clock of the slower rank; idle: the part of it in which a rank
computed nothing, by its thread's CPU time (so on a machine with other work it has that work's share, too). On free
cores: by the CPU seconds of the busier rank, and for 1F1B the bubbles of its schedule, (ranks - 1) / microbatches of
them; messages take no time in it. After each turn everything is kept in `--folder`, and the same command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import data, probe
from benchmarks.distributed._gpt_stages import ARMS, Arm, Shape, stage_of, validation
from benchmarks.distributed._processes import headline, together
from benchmarks.probe import conditions
from layerwise.distributed import load, save

RANKS = 2
SIZES = {
    "small": Shape(width=128, heads=4, blocks=4, length=64, symbols=65, windows=32),
    "10M": Shape(width=384, heads=6, blocks=6, length=128, symbols=65, windows=16),
}
Rows = dict[str, list[dict[str, Any]]]  # by arm, one for each turn; seconds and idle ones add up


@dataclass(frozen=True)
class Plan:
    """A run: how many turns of how many steps, on how many held-out windows it is judged, and where it is kept."""

    shape: Shape
    repeats: int
    segment: int
    held_out: int
    folder: str
    json: Path | None
    under: Mapping[str, Any] | None = None


class Sent(TorchDispatchMode):
    """Counts the bytes of activations and gradients that go to another rank."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.send.default:
            self.bytes += sum(t.nbytes for t in args[0] if t.is_floating_point())
        return func(*args, **(kwargs or {}))


def windows(text: Tensor, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random windows of a text, and the symbols that follow."""
    starts = torch.randint(len(text) - length, (count, 1), generator=torch.Generator().manual_seed(seed))
    rows = text[starts + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


def measured(rank: int, size: int, plan: Plan, text: Tensor, held_out: Tensor) -> dict[str, Any]:
    """All turns that the folder lacks; rows by arm, and bytes sent in a step by each rank."""
    shape = plan.shape
    judged = (pair.split(shape.windows) for pair in windows(held_out, plan.held_out, shape.length, seed=-1))
    held = list(zip(*judged, strict=True))
    arms = {name: make(shape, rank, size, stage_of(shape, rank, size)) for name, make in ARMS.items()}
    known: dict[str, dict[str, list[Any]]] = {}
    for name, arm in arms.items():
        arm.steps, found = load(Path(plan.folder, name), arm.model, arm.optimizer)
        known[name] = found or {"sent": [], "rows": [_judged(arm, held, 0.0, [0.0] * size)]}
    result = {part: {name: found[part] for name, found in known.items()} for part in ("rows", "sent")}
    done = min(arm.steps for arm in arms.values()) // plan.segment
    for turn in range(done, plan.repeats):
        for name, arm in list(arms.items())[:: 1 if turn % 2 == 0 else -1]:
            if arm.steps == turn * plan.segment:  # not where a run ended between the arms of a turn
                _turn(arm, plan.segment, text, held, known[name])
                save(Path(plan.folder, name), arm.steps, arm.model, arm.optimizer, extra=known[name], keep=1)
        if rank == 0 and plan.json is not None:
            probe.write(plan.json, {**(plan.under or {}), "repeats": turn + 1, "shape": asdict(shape), **result})
            print({name: found["rows"][-1] for name, found in known.items()}, flush=True)
    return result


def _turn(
    arm: Arm, steps: int, text: Tensor, held: Sequence[tuple[Tensor, Tensor]], known: dict[str, list[Any]]
) -> None:
    """Some steps, and a row of them; in an arm's first turn what is sent is counted."""
    shape, before = arm.shape, known["rows"][-1]
    batches = [windows(text, shape.windows, shape.length, n) for n in range(arm.steps, arm.steps + steps)]
    with nullcontext() if known["sent"] else Sent() as counted:
        seconds, busy = _timed(arm, batches)
    if counted is not None:
        known["sent"][:] = [n // steps for n in _gathered(counted.bytes, arm.size)]
    idle = [old + seconds - own for old, own in zip(before["idle"], _gathered(busy, arm.size), strict=True)]
    known["rows"].append(_judged(arm, held, before["seconds"] + seconds, idle))


def _timed(arm: Arm, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Seconds on the clock until all ranks are done, and seconds that this rank computed."""
    dist.barrier()
    start, busy = time.perf_counter(), time.thread_time()
    arm.run(batches)
    busy = time.thread_time() - busy
    dist.barrier()
    return time.perf_counter() - start, busy


def _gathered(value: Any, size: int) -> list[Any]:
    found: list[Any] = [None] * size
    dist.all_gather_object(found, value)
    return found


def _judged(arm: Arm, held: Sequence[tuple[Tensor, Tensor]], seconds: float, idle: list[float]) -> dict[str, Any]:
    loss = validation(arm.stage, arm.rank, arm.size, held, arm.shape.width)
    return {"steps": arm.steps, "seconds": _gathered(seconds, arm.size)[0], "idle": idle, "validation": loss}


def report(result: Mapping[str, Any]) -> str:
    """Markdown: speed, idle time and bytes of both ways; then their losses by token, with the seconds."""
    shape, rows = result["shape"], result["rows"]
    tokens, ratio = shape["windows"] * shape["length"], _steady(rows)
    lines, free = [], dict[str, float]()
    for name, found in rows.items():
        first, last = found[min(1, len(found) - 2)], found[-1]
        seconds = last["seconds"] - first["seconds"]
        idle = [(b - a) / seconds for a, b in zip(first["idle"], last["idle"], strict=True)]
        free[name] = seconds * (1 - min(idle)) / (last["steps"] - first["steps"])
        if name == "1F1B":
            free[name] *= 1 + (RANKS - 1) / shape["microbatches"]
        lines.append([
            name, f"{tokens * (last['steps'] - first['steps']) / seconds:.0f}", f"{ratio[name]:.2f}",
            f"{next(iter(free.values())) / free[name]:.2f}",
            ", ".join(f"{100 * part:.0f} %" for part in idle),
            ", ".join(f"{n / 1e6:.2f}" for n in result["sent"][name]),
        ])  # fmt: skip
    head = ["", "tokens a second", "ratio", "ratio on free cores", "idle, by rank", "sent a step, by rank, MB"]
    return f"{probe.table(head, lines)}\n\n{_losses(rows, tokens)}"


def _steady(rows: Rows) -> dict[str, float]:
    """Speeds over the first arm's: medians of the ratios of neighbouring turns."""
    after = {name: found[min(1, len(found) - 2) :] for name, found in rows.items()}
    turns = {name: [b["seconds"] - a["seconds"] for a, b in pairwise(found)] for name, found in after.items()}
    base = next(iter(turns.values()))
    each = {name: sorted(b / s for b, s in zip(base, own, strict=False)) for name, own in turns.items()}
    return {name: found[len(found) // 2] for name, found in each.items()}


def _losses(rows: Rows, tokens: int) -> str:
    base, other = rows
    pairs = list(zip(rows[base], rows[other], strict=False))
    shown = sorted({round(n * (len(pairs) - 1) / 8) for n in range(9)})
    head = ["tokens", f"loss, {base}", f"loss, {other}", "difference", f"seconds, {base}", f"seconds, {other}"]
    lines = [
        [f"{a['steps'] * tokens:,}", f"{a['validation']:.3f}", f"{b['validation']:.3f}",
         f"{100 * (b['validation'] / a['validation'] - 1):+.1f} %", f"{a['seconds']:.0f}", f"{b['seconds']:.0f}"]
        for a, b in (pairs[n] for n in shown)
    ]  # fmt: skip
    return probe.table(head, lines)


def main(argv: list[str] | None = None) -> None:
    made = probe.parser("benchmarks.distributed gpt", __doc__, repeats=20, segment=10, microbatches=8, hidden=0,
                        held_out=64, folder=Path("runs/gpt"), json=None)  # fmt: skip
    made.add_argument("--size", choices=list(SIZES), default="10M")
    options = probe.parsed(made, argv)
    chosen = {"microbatches": options.microbatches, "hidden": options.hidden}
    shape = replace(SIZES[options.size], **chosen)
    d = data.load("tinyshakespeare")
    under = conditions(ranks=RANKS, repeats=options.repeats, segment=options.segment, size=options.size)
    kind = f"{options.size}-hidden" if options.hidden else options.size
    out = options.json or probe.RESULTS / f"distributed_gpt_{kind}.json"
    folder = Path(options.folder, f"{kind}{options.hidden or ''}-{options.microbatches}-{options.segment}")
    plan = Plan(shape, options.repeats, options.segment, options.held_out, str(folder), out, under)
    found = together(RANKS, measured, plan, d.x_train, d.x_test)[0]
    print(headline(under))
    print(report({"shape": asdict(shape), **found}))


if __name__ == "__main__":
    main()
