"""Running averages of the curvature of an expert that some batches send no rows to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

RATE = 0.8
KINDS = ["kfac", "kflr", "ekfac", "foof"]


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, to_b: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        out[~to_b] = self.a(x[~to_b])
        out[to_b] = self.b(x[to_b])
        return out


def _batches(chosen: list[list[int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    masks = [torch.isin(torch.arange(6), torch.tensor(rows)) for rows in chosen]
    return [(torch.randn(6, 4).double(), mask, torch.randint(3, (6,))) for mask in masks]


def _watched(kind: str, batches: list[tuple[Tensor, Tensor, Tensor]], **more: bool) -> lw.optim.Preconditioner:
    torch.manual_seed(1)
    model = Routed().double()
    pre = lw.optim.Preconditioner(
        model,
        kind,
        damping=0.1,
        factor_decay=RATE,
        on_nonfinite="raise",
        update_factors_every=1,
        update_inverses_every=1,
        **more,
    )
    for x, to_b, y in batches:
        model.zero_grad()
        with pre.watch():
            F.cross_entropy(model(x, to_b), y).backward()
        pre.step()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    return pre


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_rows_leaves_the_average(kind: str) -> None:
    """First none, then three rows, none, two: the average over the two batches that have rows."""
    batches = _batches([[], [0, 1, 4], [], [2, 3]])
    held = _watched(kind, batches, joint=False).blocks.averages["b.weight"]
    assert held.batches == 2
    (x, to_x, _), (z, to_z, _) = batches[1], batches[3]
    first, second = x[to_x].T @ x[to_x] / 3, z[to_z].T @ z[to_z] / 2
    want = (RATE * (1 - RATE) * first + (1 - RATE) * second) / (1 - RATE**2)
    torch.testing.assert_close(held.block.A[0], want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("joint", [False, True])
def test_all_of_a_block_is_left(kind: str, joint: bool) -> None:
    """Both factors, and the second moments of EKFAC; those of the other expert go on."""
    batches = _batches([[0, 1, 4], []])
    one, both = (_watched(kind, batches[:n], joint=joint).blocks.averages for n in (1, 2))
    for name in (key for key in one if key.startswith("b.")):
        torch.testing.assert_close(both[name].block.A, one[name].block.A, rtol=0, atol=0)
        torch.testing.assert_close(both[name].block.B, one[name].block.B, rtol=0, atol=0)
        if kind == "ekfac":
            torch.testing.assert_close(both[name].eigen.spectrum, one[name].eigen.spectrum, rtol=1e-10, atol=1e-14)
    assert both["a.weight"].batches == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_never_had_rows_has_its_plain_gradient(kind: str) -> None:
    pre = _watched(kind, _batches([[], []]))
    assert "b.weight" not in pre.blocks.averages and "a.weight" in pre.blocks.averages
    assert pre.describe()["b.weight"] == "plain gradient"


def test_a_factor_of_padding_alone_is_none() -> None:
    """Rows that no term counts are no rows: `head` is read by ignored terms only in the second batch."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(4, 3), "two": nn.Linear(4, 3)}).double()
    pre = lw.optim.Preconditioner(model, "kflr", damping=0.1, factor_decay=RATE, update_factors_every=1, joint=False)
    x = torch.randn(2, 5, 4).double()
    for i, labels in enumerate((torch.tensor([0, 1, -100, 2, 1]), torch.full((5,), -100))):
        with pre.watch():
            loss = F.cross_entropy(model["one"](x[i]), torch.ones(5, dtype=torch.long))
            (loss + F.cross_entropy(model["two"](x[i]), labels, reduction="sum")).backward()
        pre.step()
    held = pre.blocks.averages["two.weight"]
    real = x[0][[0, 1, 3, 4]]
    torch.testing.assert_close(held.block.A[0], real.T @ real / 4, rtol=1e-10, atol=0)
