"""A character GPT of one million parameters: AdamW, Muon and LocoProp before Muon, by seconds and by tokens.

    python -m benchmarks.training.locoprop.character_gpt [--out benchmarks/results/character_gpt.json]

Declared beforehand: three rates a method on seed 0, for the same seconds of processor time on one thread (steps
alone); the rate with the least validation loss at the end again on seeds 1 and 2. Validation loss is of the first
windows of the held-out text, and measured along the way, off the clock. Prints its budget first. Runs in the file are
not run again.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from benchmarks import data
from benchmarks.training.locoprop.combinations import LOCAL, Muon, batches, before, chosen, plain, run_missing
from benchmarks.training.locoprop.problems import Characters, next_character
from benchmarks.training.summaries import interval

__all__ = ["METHODS", "RATES", "at_tokens", "main", "run", "summary"]

SECONDS, EVERY, SEEDS = 40.0, 8.0, (0, 1, 2)
WIDTH, HEADS, BLOCKS, CONTEXT, BATCH, HELD_OUT = 128, 4, 5, 128, 16, 200
Step = Callable[[Callable[[], Tensor]], Tensor]
# The study's settings of LocoProp on the smaller transformer, with γ for this number of tokens a batch (6,400 there).
_LOCAL: dict[str, Any] = {**LOCAL, "gamma": LOCAL["gamma"] * BATCH * CONTEXT / 6400}
RATES: dict[str, tuple[float, ...]] = {
    "adamw": (1e-3, 3e-3, 1e-2), "muon": (0.01, 0.03, 0.1), "locoprop-m": (2.8e-4, 5.7e-4, 1.1e-3),
    "locoprop-m > muon": (0.01, 0.03, 0.1),
}  # fmt: skip
METHODS: dict[str, Callable[[nn.Module, float], Step]] = {
    "adamw": lambda m, lr: plain(
        torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    ),
    "muon": lambda m, lr: plain(Muon(m, lr, momentum=0.95)),
    "locoprop-m": lambda m, lr: lw.LocoProp(m, **{**_LOCAL, "lr": lr}).step,
    "locoprop-m > muon": lambda m, lr: before(lw.LocoProp(m, **_LOCAL, write="grad"), Muon(m, lr, momentum=0.95)),
}


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Characters(65, WIDTH, HEADS, BLOCKS, CONTEXT)


def _windows(text: Tensor) -> Tensor:
    return text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)


@torch.no_grad()
def _held_out(model: nn.Module, x: Tensor, y: Tensor) -> float:
    parts = [
        F.cross_entropy(model(a).flatten(0, 1), b.flatten()) for a, b in zip(x.split(50), y.split(50), strict=True)
    ]
    return float(torch.stack(parts).mean())


def run(method: str, rate: float, seed: int) -> dict[str, Any]:
    """Train for the seconds; the validation loss along the way, `[seconds, tokens, loss]`."""
    text = data.load("tinyshakespeare")
    x, y = _windows(text.x_train), _windows(text.y_train)
    held = _windows(text.x_test)[:HELD_OUT], _windows(text.y_test)[:HELD_OUT]
    model = _model(seed)
    step, spent, count = METHODS[method](model, rate), 0.0, 0
    curve = [[0.0, 0, round(_held_out(model, *held), 4)]]
    for index in batches(len(x), BATCH, seed):
        start = time.process_time()
        step(partial(next_character, model, x[index], y[index]))
        spent, count = spent + time.process_time() - start, count + 1
        if spent >= EVERY * len(curve) or spent >= SECONDS:
            curve.append([round(spent, 2), count * BATCH * CONTEXT, round(_held_out(model, *held), 4)])
        if spent >= SECONDS:
            break
    size = sum(p.numel() for p in model.parameters())
    return {"method": method, "rate": rate, "seed": seed, "parameters": size, "steps": count, "curve": curve}


def _end(row: dict[str, Any]) -> float:
    return float(row["curve"][-1][-1])


def at_tokens(row: dict[str, Any], tokens: float) -> float:
    """The loss of a run after some tokens, on the line between the measurements around them; NaN beyond the last."""
    for (_, start, earlier), (_, end, after) in pairwise(row["curve"]):
        if start <= tokens <= end:
            return float(earlier + (after - earlier) * (tokens - start) / (end - start))
    return math.nan


def summary(found: Sequence[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """The most tokens that every chosen run has seen, and for each method means over seeds, the ends with intervals.

    Keys: method, rate, runs, steps, tokens, losses (after each eighth second), end (interval), at tokens (interval).
    """
    methods = chosen(found, _end)
    common = min(row["curve"][-1][1] for rows in methods.values() for row in rows)

    def line(method: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        ends = interval([_end(row) for row in rows])
        losses = [
            sum(at[-1] for at in same) / len(rows)
            for same in zip(*(row["curve"] for row in rows), strict=True)
        ][1:]  # fmt: skip
        return {
            "method": method, "rate": rows[0]["rate"], "runs": len(rows), "losses": losses, "end": ends,
            "steps": sum(row["steps"] for row in rows) / len(rows),
            "at tokens": interval([at_tokens(row, common) for row in rows]),
        }  # fmt: skip

    return common, [line(*each) for each in methods.items()]


def main(out: Path) -> None:
    """Run what the file lacks."""
    run_missing(out, RATES, SEEDS, SECONDS, run, _end)


if __name__ == "__main__":
    main(Path(sys.argv[2] if sys.argv[1:2] == ["--out"] else "benchmarks/results/character_gpt.json"))
