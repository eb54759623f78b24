"""What trainers take for the number of samples of a loss of the user's own, and what the advice of refusals leads to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.errors import AmbiguousSamples

Loss = Callable[[nn.Module], Tensor]


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def _rows(n: int) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _pair(model: nn.Module) -> Tensor:
    reward = model(_rows(2)).squeeze(-1)
    return -F.logsigmoid(reward[0] - reward[1])


def _pair_and_known(model: nn.Module) -> Tensor:
    reward = model(_rows(2)).squeeze(-1)
    return F.mse_loss(reward, torch.ones_like(reward)) - F.logsigmoid(reward[0] - reward[1])


def _triplet(model: nn.Module) -> Tensor:
    z = model(_rows(3)).squeeze(-1)
    return F.relu(5 + z[0] - z[1] - z[2])


def _whole_batch_pooled(model: nn.Module) -> Tensor:
    return (model(_rows(5)).mean(0) - 1).square().sum()


def _known_of_a_pair(model: nn.Module) -> Tensor:
    reward = model(_rows(2)).squeeze(-1)
    return F.mse_loss(reward[0] - reward[1], reward.new_ones(()))


ONE_SAMPLE = [_pair, _pair_and_known, _triplet, _whole_batch_pooled]


def _moved(model: nn.Module, step: Callable[[nn.Module], object]) -> list[Tensor]:
    before = [p.detach().clone() for p in model.parameters()]
    step(model)
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    assert any(bool(m.any()) for m in moved)
    return moved


def _locoprop(per: str, loss: Loss, samples: int | None) -> list[Tensor]:
    target = local.GradientStep(0.5, per=per)
    return _moved(_model(), lambda m: lw.LocoProp(m, target=target).step(lambda: loss(m), samples=samples))


@pytest.mark.parametrize("loss", ONE_SAMPLE)
def test_a_target_per_sample_of_one_sample_of_several_rows(loss: Loss) -> None:
    """Untold it is not taken for as many samples as rows; told, γN is γ."""
    with pytest.raises(AmbiguousSamples, match="samples=N"):
        _locoprop("sample", loss, None)
    want = _locoprop("batch", loss, None)
    for got, its in zip(_locoprop("sample", loss, 1), want, strict=True):
        torch.testing.assert_close(got, its, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", ONE_SAMPLE)
def test_codes_of_one_sample_of_several_rows(loss: Loss) -> None:
    with pytest.raises(AmbiguousSamples, match="samples=N"):
        lw.AltMin(model := _model()).step(lambda: loss(model))
    _moved(_model(), lambda m: lw.AltMin(m).step(lambda: loss(m), samples=1))


def test_a_known_loss_of_one_number_is_of_one_sample() -> None:
    want = _locoprop("batch", _known_of_a_pair, None)
    for got, its in zip(_locoprop("sample", _known_of_a_pair, None), want, strict=True):
        torch.testing.assert_close(got, its, rtol=1e-10, atol=1e-13)


def test_samples_that_meet_below_a_loss_of_ones_own_are_still_its_terms() -> None:
    """Batch norm in training mode: no per-sample gradients, but five terms, as in a known loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = _rows(5), torch.ones(5, 1, dtype=torch.float64)
    moved = []
    for loss in (lambda: (model(x) - y).square().mean(), lambda: F.mse_loss(model(x), y)):
        model.load_state_dict(state)
        target = local.GradientStep(0.5, per="sample")
        moved.append(_moved(model, lambda m, f=loss: lw.LocoProp(m, target=target).step(f)))
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
