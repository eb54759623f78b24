"""Every number on `docs/devices.md` as the pretend device counts it, so that the page cannot grow stale.

Run by `test_devices.py` beside `device_checks.py`, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device_checks import (
    DEFERRED,
    FEW,
    FUSED,
    OPTIMIZERS,
    WAITS,
    WIDE,
    X,
    Y,
    deep,
    observed,
    plain,
    stepped,
    transformer,
)
from device_compare import APART
from pretend_device import DEVICE, counted
from torch import Tensor, nn
from torch.fx import GraphModule

import layerwise as lw
from benchmarks.device import BATCHES, NETS, QUANTITIES, SECONDS
from benchmarks.speed.compiled import operations
from layerwise.optim import Curvature

PAGE = " ".join((Path(__file__).resolve().parents[1] / "docs" / "devices.md").read_text(encoding="utf-8").split())
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def says(text: str) -> None:
    assert text in PAGE, f"docs/devices.md does not say: {text}"


def test_what_was_run() -> None:
    says(f"{NUMBERS[len(FEW)]} models have every quantity of the table")
    says(f"the other models that run on it {NUMBERS[len(WIDE)]} quantities")
    says(f"{NUMBERS[len(APART)]} make tensors on the CPU in their forward pass, and {NUMBERS[len(FUSED)]} call fused")
    says(f"takes at most about {SECONDS / 60:.0f} minutes")
    says(f"the costs of {NUMBERS[len(QUANTITIES)]} quantities in {NUMBERS[len(NETS)]} nets at batches of "
         f"{min(BATCHES)} to {max(BATCHES)}")  # fmt: skip


def test_waits_of_observations() -> None:
    waits = {name: observed(3, make).synchronisations for name, (make, _) in WAITS.items()}
    assert waits == {name: most for name, (_, most) in WAITS.items()}
    assert not any(observed(3, make, "defer").synchronisations for make, _ in WAITS.values())
    says('| `KFAC`, `KFLR`, `EKFAC` | 1; 0 with `rows="all"`, or `on_nonfinite="defer"` |')
    says('| `KFRA`, `DiagHessian` | 1; 0 with `on_nonfinite="defer"` |')
    says("| other first-order quantities, `ClippedGrad`, `DiagGGN`, sampled or not | 0 |")
    says("| `DiagHessian` of samples | 0 |")


def test_launches_of_norms() -> None:
    three, six = (observed(layers, lw.SquaredNorm) for layers in (3, 6))
    each = (six.launches - three.launches) // 3
    says(f"| `SquaredNorm` | {three.synchronisations} | {three.launches - 3 * each}, and {each} for each use |")


def test_operations_of_graphs() -> None:
    found: list[int] = []

    def backend(graph: GraphModule, inputs: Any) -> Any:
        found.append(operations(graph))
        return graph

    model, loss = deep(3)
    for compile in (backend, backend, False):
        with counted() as count, lw.observe(model, lw.SquaredNorm(), compile=compile):
            loss().backward()
    says(f"(the pretend device counts {sum(found)} for the norms of a chain of three layers)")
    assert len(found) == 6
    with counted() as compiled, lw.observe(model, lw.SquaredNorm(), compile=backend):
        loss().backward()
    assert (compiled.launches, compiled.synchronisations) == (count.launches + 6, 0)  # clones for copies on write


def shapes(count: int, joint: bool = True) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A chain whose layers have so many shapes, two of each, before a last one."""
    torch.manual_seed(0)
    sizes = [6, *(size for n in range(count) for size in (7 + n, 7 + n, 7 + n))]
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(sizes[-1], 3)).double().to(DEVICE)
    x, y = X.to(DEVICE), Y.to(DEVICE)
    return model, lambda: F.cross_entropy(model(x), y)


def launches(make: Callable[[nn.Module], Any], count: int) -> tuple[int, int]:
    """The launches of the fourth step beyond the gradient's, and the number of shapes of layers."""
    model, loss = shapes(count)
    optimizer = make(model)
    for _ in range(4):
        with counted() as found:
            optimizer.step(loss)
    return found.launches - plain(model, loss), len({p.shape for p in model.parameters() if p.dim() > 1})


def test_steps_of_kfac_between_its_periods() -> None:
    (few, a), (many, b) = (launches(lw.optim.KFAC, count) for count in (1, 3))
    each = (many - few) // (b - a)
    others = {}
    for kind in ("foof", "ekfac"):
        make = partial(lw.optim.KFAC, curvature=Curvature(kind))  # type: ignore[arg-type]
        others[kind] = (launches(make, 3)[0] - launches(make, 1)[0]) / (b - a)
    foof, ekfac = others["foof"], others["ekfac"]
    says(
        f"| 1 | {few - a * each}, and {each} for each shape of blocks (FOOF {foof:g}, EKFAC {ekfac:g}), whatever their"
    )
    assert stepped(3, lw.optim.KFAC).synchronisations == 1


def test_steps_in_the_periods_of_kfac() -> None:
    rows = {rows: {stepped(layers, partial(lw.optim.KFAC, rows=rows), steps).synchronisations  # type: ignore[arg-type]
                   for layers, steps in ((6, 6), (6, 5), (3, 5))} for rows in ("real", "all")}  # fmt: skip
    (real,), (every,) = rows["real"], rows["all"]
    says(f'that measures factors, or inverts them | {real}, whatever the number of blocks; {every} with `rows="all"` |')
    kinds: tuple[Any, ...] = ("foof", "ekfac")
    foof, ekfac = (stepped(3, partial(lw.optim.KFAC, curvature=Curvature(kind)), 5).synchronisations for kind in kinds)
    says(f"a chain of three layers waits {foof} times in FOOF, and {ekfac} in EKFAC")
    says(f"the step that inverts a chain of three layers takes {stepped(3, lw.optim.KFAC, 5).launches} launches")


def test_other_steps() -> None:
    for name in ("DiagNewton", "LocoProp", "AltMin", "AltMin sweep", "AltMin SGD", "AltMin memory", "LocoProp memory"):
        assert stepped(3, OPTIMIZERS[name]).synchronisations == 1
    says('a step of `AltMin`, also with `codes="sweep"` or `weights="sgd"`, of `AltMin(w')
    assert {stepped(3, lw.optim.DiagNewton, steps).synchronisations for steps in (5, 6)} == {1}
    says("a step of `DiagNewton`, whether it measures or not, of `LocoProp` | 1 |")


@pytest.mark.parametrize("layers", [3, 8])
def test_local_steps(layers: int) -> None:
    ten, twenty = (stepped(layers, lambda m, n=n: lw.LocoProp(m, steps=n), 3).launches for n in (10, 20))  # type: ignore[misc]
    says(f"at each local step: {(twenty - ten) / 10:.0f} for a chain of equal width")
    one, two = (stepped(1, lambda m, n=n: lw.LocoProp(m, steps=n), 3).launches for n in (10, 20))  # type: ignore[misc]
    says(f"So a chain of one shape takes {(two - one) / 10:.0f} at each local step")


def test_deferred_steps() -> None:
    more = {}
    for name in DEFERRED:
        each = []
        for layers in (3, 6):
            deferred = stepped(layers, partial(OPTIMIZERS[name], on_nonfinite="defer"))
            assert deferred.synchronisations == 0
            each.append(deferred.launches - stepped(layers, OPTIMIZERS[name]).launches)
        more[name] = each
    assert more["KFAC"] == more["DiagNewton"]
    few, many = more["KFAC"]
    least, most = more["LocoProp"]
    says(f"| 0 | {few} to {many} more, `LocoProp` {least} to {most} (3 and 6 layers) |")


def test_transformer_blocks() -> None:
    found = []
    for blocks in (2, 4):
        model, loss = transformer(blocks, False, DEVICE)
        optimizer = lw.optim.KFAC(model)
        for _ in range(4):
            with counted() as count:
                optimizer.step(loss)
        found.append(count.launches - plain(model, loss))
    assert found[0] == found[1]
    says("a step costs the same for four equal transformer blocks as for two")
