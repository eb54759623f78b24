"""CPU times of several programs, measured side by side: these machines are shared and noisy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["interleaved", "lower_quartile"]


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, float]:
    """Lower quartile of each run's seconds of CPU time; every repeat takes all of them, in alternating order.

    What a run returns is let go after the clock has stopped.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            start = time.process_time()
            kept = runs[name]()
            seconds[name].append(time.process_time() - start)
            del kept
    return {name: lower_quartile(times) for name, times in seconds.items()}


def lower_quartile(values: Sequence[float]) -> float:
    """The value below which a quarter lies: what a shared machine lengthens least, without being the luckiest."""
    return sorted(values)[len(values) // 4]
