"""More rows than float16 can count, and far more than bfloat16 can: quantities as in float64, from the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadInput

LOW = pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
ROWS = 70_001  # float16 ends at 65,504; bfloat16 adds 1 to nothing above 256


class Net(nn.Module):
    """A table, a map with a bias and a scale: an index, floats and constants as inputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(3, 3), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(3))
        with torch.no_grad():
            self.table.weight.add_(1)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x) * self.scale)


X = torch.arange(ROWS) % 3
Y = (X > 0).long()
IGNORED = Y.masked_fill(torch.arange(ROWS) % 7 == 0, -100)


def loss_of(model: nn.Module, y: Tensor, positions: bool) -> Tensor:
    """A sum over rows, each a sample, or all in two samples."""
    x = X[:-1].view(2, -1) if positions else X
    z = model(x).flatten(0, -2)
    return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), y[: x.numel()], reduction="sum") / 1000


def brute(model: Net, y: Tensor, positions: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """KFLR's factors A and B of `out` and `table` by their definition: rows by rows, in float64."""
    x, y = (X[:-1], y[:-1]) if positions else (X, y)
    x, kept = x[y >= 0], (y >= 0).sum()
    h = model.table.weight[x] * model.scale
    p = model.out(h).softmax(-1)
    hessian = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / 1000
    w, one_hot = model.out.weight, F.one_hot(x, 3).double()
    inner = w * model.scale
    return {
        "out.weight": (h.T @ h / kept, hessian.sum(0)),
        "table.weight": (one_hot.sum(0) / kept, torch.einsum("oi,nop,pj->ij", inner, hessian, inner)),
    }


@LOW
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("y", [Y, IGNORED], ids=["all", "some ignored"])
def test_kronecker_factors(low: torch.dtype, positions: bool, y: Tensor) -> None:
    """Counts, sums and means of rows: within half a unit of the type's last place, since cotangents come in it."""
    model = Net(low)
    with lw.observe(model, lw.KFLR(), lw.EKFAC(None)) as seen:
        loss_of(model, y, positions).backward()
    with torch.no_grad():
        want = brute(Net(low).double(), y, positions)
    for name, (A, B) in want.items():
        block = seen.kflr.blocks[name]
        for found, exact in ((block.A[0], A), (block.B[0], B)):
            assert found.dtype == torch.float32
            assert (found - exact).norm() <= 0.5 * torch.finfo(low).eps * exact.norm(), name
    assert all(torch.isfinite(b.spectrum).all() for b in seen.ekfac.blocks.values())


QUANTITIES: dict[str, Callable[[], lw.Quantity]] = {
    "SecondMoment": lw.SecondMoment, "DiagGGN": lw.DiagGGN, "FisherDiag": lambda: lw.FisherDiag("data"),
    "Variance": lw.Variance, "NoiseScale": lw.NoiseScale, "DiagHessian": lw.DiagHessian,
}  # fmt: skip
OF_GRAD = ("Variance", "NoiseScale")  # read the mean off `.grad`, which for a table torch sums in the table's own type


def observed(model: Net, make: Callable[[], lw.Quantity], reduction: str, batches: int) -> dict[str, Tensor]:
    """A quantity of all rows, by `accumulate`."""
    data = list(zip(X.tensor_split(batches), Y.tensor_split(batches), strict=True))

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), y, reduction=reduction)

    seen = lw.accumulate(model, loss_fn, data, quantity := make())
    result: Any = seen[quantity]
    found = {n: result.noise[n] if hasattr(result, "noise") else result[n] for n in result}
    return found | {f"grad {n}": g for n, g in seen.grad.items()}


@cache
def exactly(low: torch.dtype, name: str, reduction: str) -> dict[str, Tensor]:
    return observed(Net(low).double(), QUANTITIES[name], reduction, 1)


@pytest.mark.thinned(3)
@LOW
@pytest.mark.parametrize(("batches", "reduction"), [(1, "sum"), (300, "mean")])
@pytest.mark.parametrize("name", QUANTITIES)
def test_sums_over_many_batches(low: torch.dtype, batches: int, reduction: str, name: str) -> None:
    """Within two units of the last place, however many: what were half's running sums ceased to grow at 256.

    A variance is a difference of a second moment and a square, and has that share of the moment as its error.
    """
    found = observed(Net(low), QUANTITIES[name], reduction, batches)
    want, moment = (exactly(low, n, reduction) for n in (name, "SecondMoment"))
    for key, exact in want.items():
        if "table" in key and (name in OF_GRAD or "grad" in key):
            continue
        size = moment[key] / ROWS if name == "Variance" and "grad" not in key else exact
        assert (found[key].double() - exact).norm() <= 2 * torch.finfo(low).eps * size.norm(), key


def test_types_that_sums_cannot_be_held_in_are_refused() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.int32, "float32"):
        with pytest.raises(BadInput, match=r"torch\.float32 or torch\.float64; got"):
            lw.observe(nn.Linear(2, 2), lw.SecondMoment(), dtype=dtype)  # type: ignore[arg-type]
