"""Layerwise beside BackPACK in one process: CPU time of (gradient + quantity) / gradient, one thread, interleaved.

    python -m benchmarks.peers [--repeats 15] [--batch N] [--json]

BackPACK is no dependency: install it beside, with `pip install --no-deps backpack-for-pytorch unfoldNd einops`. Every
repeat runs the plain gradient, ours and theirs once, forwards and backwards in turn; figures are lower quartiles over
the plain gradient's. Values of deterministic quantities are compared first: the scaling is the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw

from .overhead import MODELS
from .timing import interleaved

RESULTS = Path(__file__).parent / "results" / "peers.json"

# label -> (ours, the name of BackPACK's extension, its field, whether the values must agree)
PAIRS: dict[str, tuple[Callable[[], lw.Quantity], str, str, bool]] = {
    "per-sample gradient": (lw.PerSampleGrad, "BatchGrad", "grad_batch", True),
    "norms": (lw.SquaredNorm, "BatchL2Grad", "batch_l2", True),
    "second moment": (lw.SecondMoment, "SumGradSquared", "sum_grad_squared", True),
    "variance": (lw.Variance, "Variance", "variance", True),
    "GGN diagonal, 1 sample": (lambda: lw.DiagGGN(samples=1), "DiagGGNMC", "diag_ggn_mc", False),
    "GGN diagonal, exact": (lw.DiagGGN, "DiagGGNExact", "diag_ggn_exact", True),
    "K-FAC, 1 sample": (lambda: lw.KFAC(samples=1), "KFAC", "kfac", False),
    "KFLR": (lw.KFLR, "KFLR", "kflr", False),
    "KFRA": (lw.KFRA, "KFRA", "kfra", False),
}
ONLY = {"KFRA": "mlp"}  # the block of the convolutions' outputs would take 10 GB


def _step(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    for p in model.parameters():
        p.grad = None
    loss(model(x), y).backward()


def compare(name: str, batch: int | None, repeats: int) -> dict[str, Any]:
    """Ratios by quantity: ours, theirs, and the largest relative difference of the values where it is defined."""
    import backpack
    from backpack import extensions

    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    if batch is not None:
        x, y = torch.randn(batch, *x.shape[1:]), torch.randint(10, (batch,))
    theirs, criterion = backpack.extend(_copy(model)), backpack.extend(nn.CrossEntropyLoss())

    def ours_run(make: Callable[[], lw.Quantity]) -> Any:
        q = make()
        with lw.observe(model, q) as seen:
            _step(model, F.cross_entropy, x, y)
        return seen[q]

    def their_run(extension: str) -> None:
        with backpack.backpack(getattr(extensions, extension)()):
            _step(theirs, criterion, x, y)

    found: dict[str, Any] = {}
    for label, (make, extension, field, exact) in PAIRS.items():
        if ONLY.get(label, name) != name:
            continue
        difference = None
        runs = {
            "plain": lambda: _step(model, F.cross_entropy, x, y),
            "ours": lambda make=make: ours_run(make),  # type: ignore[misc]
            "theirs": lambda extension=extension: their_run(extension),  # type: ignore[misc]
        }
        mine = ours_run(make)
        their_run(extension)
        if exact:
            pairs = [(mine[n], getattr(p, field)) for n, p in theirs.named_parameters()]
            difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
        del mine
        low = interleaved(runs, repeats)
        found[label] = {"ours": low["ours"] / low["plain"], "theirs": low["theirs"] / low["plain"]}
        found[label]["values differ by"] = difference
        for p in theirs.parameters():
            if hasattr(p, field):
                delattr(p, field)
        d = "" if difference is None else f"{difference:12.1e}"
        print(f"{name:6}{label:26}{found[label]['ours']:10.2f}{found[label]['theirs']:10.2f}{d}", flush=True)
    return found


def _copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare on every model, print a table, and keep it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, help="another batch size than 128 (mlp) and 32 (3c3d)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(arguments)
    if find_spec("backpack") is None:
        print("BackPACK is not installed: pip install --no-deps backpack-for-pytorch unfoldNd einops", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    print(f"{'':32}{'ours':>10}{'BackPACK':>10}{'difference':>12}")
    found = {name: compare(name, options.batch, options.repeats) for name in options.models}
    if options.json:
        header = {
            "machine": platform.processor() or platform.machine(),
            "versions": {
                "torch": torch.__version__,
                "layerwise": lw.__version__,
                "backpack": version("backpack-for-pytorch"),
            },
            "threads": 1,
            "batch": options.batch or {"mlp": 128, "3c3d": 32},
            "repeats": options.repeats,
            "statistic": "(gradient + quantity) / gradient, lower quartile of CPU time, interleaved",
        }
        RESULTS.write_text(json.dumps({"header": header, "ratios": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
