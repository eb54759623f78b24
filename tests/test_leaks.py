"""A thousand steps leave nothing: no tensor, no memory, no hook, no mode; also where the body raises."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.parts import Apply

import layerwise as lw
from layerwise import errors

pytestmark = pytest.mark.usefixtures("float64", "one_arena")

STEPS, WARM = 1000, 150
STATM = Path("/proc/self/statm")
PAGE = 4096

needs_statm = pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc")


def _model() -> nn.Module:
    """Of several kinds of uses: a convolution, a norm, a derived and a tied weight, recurrent parts."""
    torch.manual_seed(0)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.norm(m.conv(x).tanh()).transpose(1, 2)
        return m.head(F.linear(m.cell(h)[0].mean(1), m.tied * m.tied.abs().mean()))

    return Apply(
        forward, conv=nn.Conv1d(2, 4, 2), norm=nn.GroupNorm(2, 4), cell=nn.GRU(4, 4, batch_first=True),
        tied=nn.Parameter(torch.randn(4, 4)), head=nn.Linear(4, 3),
    )  # fmt: skip


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _first_order() -> list[lw.Quantity]:
    return [
        lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(), lw.PairwiseDot(), lw.NoiseScale(),
        lw.ClippedGrad(1.0), lw.Sketch(2), lw.DiagGGN(1),
    ]  # fmt: skip


def _curvature() -> list[lw.Quantity]:
    return [lw.DiagGGN(), lw.SqrtGGN(), lw.KFAC(), lw.KFLR(), lw.EKFAC(), lw.DiagHessian(), lw.FisherDiag()]


def _step(model: nn.Module, x: Tensor, y: Tensor, quantities: list[lw.Quantity], how: str) -> None:
    """One step of training; `how` says where it fails."""
    model.zero_grad()
    with lw.observe(model, *quantities) as seen:
        z = model(x if how != "nan" else x * float("nan"))
        if how == "before":
            raise ZeroDivisionError
        F.cross_entropy(z, y).backward()
        if how == "after":
            raise ZeroDivisionError
    for q in quantities:
        result = seen[q]
        if isinstance(result, lw.ByParameter):
            sum(v.sum() for v in result.values())


def _steps(model: nn.Module, count: int, quantities: list[lw.Quantity], hows: tuple[str, ...], shape: tuple) -> None:
    x, y = torch.randn(shape), torch.randint(3, shape[:1])
    for i in range(count):
        how = hows[i % len(hows)]
        try:
            _step(model, x, y, quantities, how)
        except (ZeroDivisionError, errors.NonFinite):
            assert how != "well"
        else:
            assert how == "well"


def _live() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def _resident() -> int:
    gc.collect()
    return int(STATM.read_text().split()[1]) * PAGE


def _hooks(model: nn.Module) -> list[object]:
    """Hooks and attributes of modules and parameters."""
    found: list[object] = []
    for module in model.modules():
        found.append({k: len(v) if isinstance(v, dict) else type(v) for k, v in vars(module).items()})
    for p in model.parameters():
        found.append((dict(vars(p)), p._backward_hooks, p._post_accumulate_grad_hooks))
    return found


def _check(
    model: nn.Module, make: Callable[[], list[lw.Quantity]], hows: tuple[str, ...], shape: tuple, steps: int
) -> None:
    quantities, marks = make(), _hooks(model)
    nodes = [torch.autograd.graph.get_gradient_edge(p).node for p in model.parameters()]
    _steps(model, WARM, quantities, hows, shape)
    tensors, memory = _live(), _resident()
    _steps(model, steps, quantities, hows, shape)
    assert _live() == tensors
    assert _resident() - memory < 2**20
    assert _hooks(model) == marks
    assert not torch.overrides._get_current_function_mode_stack()
    calls: list[object] = []
    for node in nodes:  # a hook of ours would run here too, and fail outside its context
        node.register_prehook(lambda g: calls.append(g))
    model.zero_grad()
    F.cross_entropy(model(torch.randn(shape)), torch.randint(3, shape[:1])).backward()
    assert len(calls) == len(nodes)


HOWS = pytest.mark.parametrize("hows", [("well",), ("well", "before", "after", "nan")], ids=["well", "raising"])


@needs_statm
@HOWS
@pytest.mark.parametrize("steps", [150, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_a_thousand_steps_of_a_small_net(hows: tuple[str, ...], steps: int) -> None:
    quantities = lambda: [lw.SecondMoment(), lw.Variance(), lw.PerSampleGrad(), lw.DiagGGN(), lw.KFAC()]  # noqa: E731
    _check(_mlp(), quantities, hows, (6, 4), steps)


@pytest.mark.slow
@needs_statm
@HOWS
@pytest.mark.parametrize("make", [_first_order, _curvature], ids=["first_order", "curvature"])
def test_a_thousand_steps_of_everything(make: Callable[[], list[lw.Quantity]], hows: tuple[str, ...]) -> None:
    quantities = make
    if make is _curvature:  # derived weights have no Kronecker factors; the net of plain layers has them all
        _check(_mlp(), quantities, hows, (6, 4), STEPS)
    else:
        _check(_model(), quantities, hows, (4, 2, 5), STEPS)


def test_results_of_operators_and_streams_leave_no_tensor() -> None:
    model, x, y = _mlp(), torch.randn(6, 4), torch.randint(3, (6,))

    def once() -> None:
        v = torch.randn(sum(p.numel() for p in model.parameters()))
        closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
        lw.GGN(model, closure) @ v
        lw.Hessian(model, closure) @ v
        lw.accumulate(model, F.cross_entropy, [(x, y)] * 2, lw.Variance(), lw.KFLR())

    for _ in range(5):
        once()
    before = _live()
    for _ in range(50):
        once()
    assert _live() == before
