"""CPU time and peak memory of a training step with each of our optimizers, against torch's Adam and RMSProp.

    python -m benchmarks.speed.step_cost [--threads 1] [--repeats 15] [--problem mnist|digits|mnist-2x100|3c3d|all]
                                   [--arms NAME ...] [--json FILE]

Whole steps: forward, backward and update. Two autoencoders: the deep one of MNIST (random pixels, batch 1000,
784-1000-500-250-30 and back) and the small one of scikit-learn's digits (random pixels, batch 100,
64-128-64-16 and back), where the calls cost more than the arithmetic; a classifier of MNIST
(784-100-100-10, batch 200), for alternating minimization; and DeepOBS's 3C3D (batch 128), for second-order methods.
Nothing is learnt from random pixels; only the time counts. Arms are interleaved in alternating order, a figure is the
lower quartile.
Memory is that of training: the peak of resident memory over three steps, above what the process held before the model
was made, so with weights, gradients and state; each arm in a process of its own (Linux only). RMSProp and Adam run in
torch's loop over tensors and in its `foreach` form; the faster RMSProp is the one to compare with, and for the
classifiers the faster Adam. "KFAC, every 10 and 100" is the mean step with factors every 10 and inverses every 100
steps, from the costs of the three kinds of steps, and "LocoProp-M, whitened every 10" that of its two kinds.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import layerwise as lw
from benchmarks import autoencoder, probe
from benchmarks.training.altmin.nets import dense
from benchmarks.training.curvature.nets import c3d3
from layerwise.demo import digits

Step = Callable[[], Any]
Build = Callable[[nn.Module], torch.optim.Optimizer]

NEVER = 10**9  # steps: beyond the first


def _rmsprop(foreach: bool) -> Build:
    return lambda model: torch.optim.RMSprop(model.parameters(), 5e-4, momentum=0.9, foreach=foreach)


def _adam(fused: bool) -> Build:
    return lambda model: torch.optim.Adam(model.parameters(), 1e-3, fused=fused)


TORCHS: dict[str, Build] = {
    "Adam": _adam(False),
    "Adam (fused)": _adam(True),
    "RMSProp": _rmsprop(False),
    "RMSProp (foreach)": _rmsprop(True),
}


def ours(library: ModuleType) -> dict[str, Build]:
    """The optimizers of the library, or of an earlier revision of it."""
    optim = library.optim

    def kfac(factors: int, inverses: int) -> Build:
        return lambda model: optim.KFAC(model, update_factors_every=factors, update_inverses_every=inverses)

    return {
        "LocoProp-M": library.LocoProp,
        "LocoProp-M, all rows": lambda model: library.LocoProp(model, rows="all"),
        "LocoProp-M, whitened": lambda model: library.LocoProp(model, regularizer=library.local.Whitening()),
        "LocoProp-M, whitened, no mean due": lambda model: library.LocoProp(
            model, regularizer=library.local.Whitening(every=NEVER)
        ),
        "LocoProp-S": lambda model: library.LocoProp(model, loss="squared"),
        "LocoProp-S, all rows": lambda model: library.LocoProp(model, loss="squared", rows="all"),
        "AltMin (Adam)": library.AltMin,
        "AltMin (SGD)": lambda model: library.AltMin(model, weights="sgd", lr=1e-3),
        "AltMin (memory)": lambda model: library.AltMin(model, weights="memory"),
        "AltMin (sweep)": lambda model: library.AltMin(model, codes="sweep"),
        "KFAC, no factors due": kfac(NEVER, NEVER),
        "KFAC, new factors": kfac(1, NEVER),
        "KFAC, new factors and inverses": kfac(1, 1),
        "DiagNewton, new diagonal": lambda model: optim.DiagNewton(model, update_every=1),
    }


OURS = ours(lw)
ALTMIN = [name for name in OURS if name.startswith("AltMin")]
SECOND_ORDER = [name for name in OURS if name.startswith(("KFAC", "DiagNewton"))]
OTHERS = [name for name in OURS if name != "AltMin (memory)"]  # whose codes take a column for every output


class Problem(NamedTuple):
    """A net by seed, the shape of a batch, the loss, whose faster form to compare with, and the arms by default."""

    make: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[nn.Module, Tensor], Tensor]
    base: str
    arms: list[str]


def class_loss(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10)


_LOSS = autoencoder.reconstruction_loss
PROBLEMS = {
    "mnist": Problem(autoencoder.deep_autoencoder, (1000, autoencoder.SIZES[0]), _LOSS, "RMSProp", OTHERS),
    "digits": Problem(digits.autoencoder, (100, digits.SIZES[0]), _LOSS, "RMSProp", OTHERS),
    "mnist-2x100": Problem(lambda seed: dense(784, 100, 100, 10)(seed, {}), (200, 784), class_loss, "Adam", ALTMIN),
    "3c3d": Problem(lambda seed: c3d3()(seed, {}), (128, 3, 32, 32), class_loss, "Adam", SECOND_ORDER),
}


def ordinary(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def arm_of(problem: str, name: str) -> Step:
    """A step of one optimizer, with a model of its own."""
    given = PROBLEMS[problem]
    x, model = torch.rand(given.shape, generator=torch.Generator().manual_seed(0)), given.make(0)
    if name in TORCHS:
        return ordinary(lambda: given.loss(model, x), TORCHS[name](model))
    optimizer = OURS[name](model)
    return lambda: optimizer.step(lambda: given.loss(model, x))  # type: ignore[arg-type, return-value]


def peaks(problem: str, names: Sequence[str], threads: int) -> dict[str, float]:
    """Peak memory of training, in MB (10⁶ bytes), by arm; NaN where the kernel keeps none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.speed.step_cost"])
    found = {}
    for name in names:
        with context.Pool(1) as pool:
            found[name] = pool.apply(_peak, (problem, name, threads))
    return found


def _peak(problem: str, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    arm_of("digits", name)()  # what is loaded late
    gc.collect()
    peak = probe.Peak()
    step = arm_of(problem, name)
    for _ in range(3):
        step()
    return peak.mb()


MEANS: dict[str, dict[str, float]] = {  # a mean step, by the share of each kind of step
    "KFAC, every 10 and 100": {
        "KFAC, no factors due": 0.9, "KFAC, new factors": 0.09, "KFAC, new factors and inverses": 0.01,
    },
    "LocoProp-M, whitened every 10": {"LocoProp-M, whitened, no mean due": 0.9, "LocoProp-M, whitened": 0.1},
}  # fmt: skip


def amortised(seconds: dict[str, float]) -> dict[str, float]:
    """The mean steps of which every kind of step was measured."""
    return {
        mean: sum(share * seconds[kind] for kind, share in shares.items())
        for mean, shares in MEANS.items() if shares.keys() <= seconds.keys()
    }  # fmt: skip


def report(problem: str, seconds: dict[str, float], memory: dict[str, float]) -> str:
    """Markdown: times and memory, and their ratios to those of the faster form of torch's optimizer."""
    torchs = [name for name in seconds if name.startswith(PROBLEMS[problem].base)]
    base = min(torchs, key=lambda name: seconds[name])
    rows = []
    for arm, time in (seconds | amortised(seconds)).items():
        held, share = "-", "-"
        if arm in memory:
            held, share = f"{memory[arm]:.0f}", f"{memory[arm] / memory[base]:.2f}"
        rows.append([arm, f"{1e3 * time:.1f}", held, f"{time / seconds[base]:.2f}", share])
    return probe.table([f"{problem}: step", "ms", "MB", f"time / {base}", f"memory / {base}"], rows)


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = probe.parser("benchmarks.speed.step_cost", __doc__, threads=1, repeats=15, json=None)
    parser.add_argument("--problem", choices=[*PROBLEMS, "all"], default="all")
    parser.add_argument("--arms", nargs="+", choices=list(OURS), metavar="NAME",
                        help=f"beside torch's: {', '.join(OURS)}")  # fmt: skip
    options = probe.parsed(parser, argv)
    result: dict[str, Any] = {
        **probe.conditions(threads=options.threads, repeats=options.repeats), "seconds": {}, "megabytes": {},
    }  # fmt: skip
    print(f"threads {options.threads}, lower quartile of {options.repeats}, CPU time")
    for problem in PROBLEMS if options.problem == "all" else [options.problem]:
        names = [*TORCHS, *(options.arms or PROBLEMS[problem].arms)]
        memory = peaks(problem, names, options.threads)
        seconds = probe.interleaved({name: arm_of(problem, name) for name in names}, options.repeats, warm_up=2)
        result["seconds"][problem], result["megabytes"][problem] = seconds, memory
        print("\n" + report(problem, seconds, memory), flush=True)
    if options.json is not None:
        probe.write(options.json, result)


if __name__ == "__main__":
    main()
