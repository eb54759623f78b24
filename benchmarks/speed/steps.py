"""Steps of each optimizer beside an earlier revision's: times interleaved in one process.

    python -m benchmarks.speed.steps --against 96a2164
    python -m benchmarks.speed.steps --against HEAD~1 --problem mnist-2x100 --arms "AltMin (Adam)" --repeats 500

Whole steps of the problems of `benchmarks.speed.step_cost`, each revision with a model of its own from the same seed. A
ratio of 1.03 says that a step takes 3 % more CPU time now than then. It is of two steps that follow each other, whose
order alternates: the second step of a revision in a row finds its tensors in the cache, so that the ratio is the
geometric mean of the medians over even and odd repeats. Noise is how far it lies apart in the two halves of the run.
Parameters after the same steps are compared to the bit.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
import time
from pathlib import Path
from statistics import geometric_mean, median
from types import ModuleType
from typing import Any

import torch

import layerwise as lw
from benchmarks import probe
from benchmarks.speed.against import THEN, load
from benchmarks.speed.step_cost import PROBLEMS, ours

_WARM_UP = 5


def compared(problem: str, name: str, then: ModuleType, repeats: int) -> dict[str, Any]:
    """The ratio of two revisions' steps by one optimizer, its noise, the seconds now, and whether values are equal."""
    given = PROBLEMS[problem]
    x = torch.rand(given.shape, generator=torch.Generator().manual_seed(0))
    models = [given.make(0) for _ in range(2)]
    optimizers = [ours(library)[name](model) for library, model in zip((then, lw), models, strict=True)]

    def step(which: int) -> float:
        torch.manual_seed(0)
        start = time.process_time()
        optimizers[which].step(lambda: given.loss(models[which], x))  # type: ignore[arg-type, return-value]
        return time.process_time() - start

    for _ in range(_WARM_UP):
        step(0), step(1)
    same = all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    gc.collect()
    gc.disable()  # a collection would fall on one of the two
    seconds: list[tuple[float, float]] = []
    for repeat in range(repeats):
        found = {which: step(which) for which in ((0, 1) if repeat % 2 == 0 else (1, 0))}
        seconds.append((found[0], found[1]))
    gc.enable()
    ratios = [now / old for old, now in seconds]
    half = repeats // 4 * 2
    noise = abs(balanced(ratios[:half]) - balanced(ratios[half:])) / 2
    low = probe.lower_quartile([now for _, now in seconds])
    return {
        "problem": problem,
        "optimizer": name,
        "ratio": balanced(ratios),
        "noise": noise,
        "seconds": low,
        "same": same,
    }


def balanced(ratios: list[float]) -> float:
    """The geometric mean of the medians over even and odd places."""
    return geometric_mean([median(ratios[::2]), median(ratios[1::2])])


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = probe.parser("benchmarks.speed.steps", __doc__ or "", threads=1, repeats=200, json=None)
    parser.add_argument("--against", required=True, help="a commit, branch or tag of this repository")
    parser.add_argument("--problem", nargs="+", choices=list(PROBLEMS), default=["digits", "mnist-2x100"])
    parser.add_argument("--arms", nargs="+", choices=list(ours(lw)), metavar="NAME", help="default: all")
    options = probe.parsed(parser, argv)
    under = probe.conditions(against=options.against, threads=options.threads, repeats=options.repeats)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        load(options.against, Path(folder))
        then = importlib.import_module(THEN)
        for problem in options.problem:
            for name in options.arms or PROBLEMS[problem].arms:
                found.append(compared(problem, name, then, options.repeats))
                print("{problem}, {optimizer}: {ratio:.3f} ±{noise:.3f}".format(**found[-1]), flush=True)
    rows = [[f"{c['problem']}: {c['optimizer']}", f"{1e3 * c['seconds']:.2f}", f"{c['ratio']:.3f}",
             f"{c['noise']:.3f}", "yes" if c["same"] else "no"] for c in found]  # fmt: skip
    print(probe.table(["step", "ms now", f"now / {options.against}", "noise", "same values"], rows))
    if options.json is not None:
        probe.write(options.json, {"conditions": under, "steps": found})


if __name__ == "__main__":
    main()
