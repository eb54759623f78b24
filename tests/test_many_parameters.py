"""Quantities of many small parameters whose calls are alike: computed at once, and those of each parameter alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise.gradient.parameter import ParameterGradient
from layerwise.rows import contract

COUNT = 20


class _Scales(nn.Module):
    """Vectors, each times the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ParameterList([torch.randn(6) for _ in range(COUNT)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(x * p).tanh().sum(1) for p in self.each], 1)


class _Deep(nn.Module):
    """Small layers one after another, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6, bias=i % 2 == 0) for i in range(COUNT)])
        self.norms = nn.ModuleList([nn.LayerNorm(6) for _ in range(COUNT)])

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(torch.tanh(layer(x)) + x)
        return self.layers[3](x)


class _Wide(nn.Module):
    """Grouped convolutions beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(4, 4, 3, padding=1, groups=2) for _ in range(COUNT)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).tanh().sum((1, 2)) for layer in self.layers], 1)


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "scales": (_Scales, (5, 6)),
    "linear and norm": (_Deep, (5, 6)),
    "linear and norm, positions": (_Deep, (5, 3, 6)),
    "convolutions": (_Wide, (5, 4, 7)),
}


def _made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = PROGRAMS[name]
    return make().to(dtype), torch.randn(*shape, dtype=dtype)


def _each(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The gradients sample by sample, by a backward pass for each."""
    torch.manual_seed(0)
    target = torch.randn_like(model(x))
    rows = []
    for n in range(len(x)):
        loss = F.mse_loss(model(x[n : n + 1]), target[n : n + 1], reduction="sum")
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    return {key: torch.stack(g) for (key, _), g in zip(model.named_parameters(), zip(*rows, strict=True), strict=True)}


def _observed(model: nn.Module, x: Tensor, *quantities: lw.Quantity, **given: object) -> lw.Seen:
    """As a second batch of one layout is, which plans serve."""
    torch.manual_seed(0)
    target = torch.randn_like(model(x))
    for _ in range(2):
        model.zero_grad()
        with lw.observe(model, *quantities, **given) as seen:  # type: ignore[arg-type]
            F.mse_loss(model(x), target, reduction="sum").backward()
    return seen


@pytest.mark.parametrize("name", PROGRAMS)
def test_quantities_of_many_small_parameters_are_those_of_each(name: str) -> None:
    model, x = _made(name)
    truth = _each(model, x)
    seen = _observed(model, x, lw.SquaredNorm(), lw.PerSampleGrad(), lw.SecondMoment(), lw.Variance())
    for key, g in truth.items():
        room = {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close(seen.per_sample_grad[key], g, **room)
        torch.testing.assert_close(seen.squared_norm[key], g.square().flatten(1).sum(1), **room)
        torch.testing.assert_close(seen.second_moment[key], g.square().sum(0), **room)
        torch.testing.assert_close(seen.variance[key], g.var(0, unbiased=False), **room)
        torch.testing.assert_close(seen.grad[key], g.sum(0), **room)


@pytest.mark.parametrize("name", ["scales", "linear and norm"])
def test_many_parameters_alike_take_few_contractions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _made(name)
    taken, whole = [], contract.squared_norm

    def counted(*args: object, **given: object) -> Tensor:
        taken.append(args)
        return whole(*args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(contract, "squared_norm", counted)
    _observed(model, x, lw.SquaredNorm())
    before = len(taken)
    _observed(model, x, lw.SquaredNorm())
    assert len(taken) - before <= 2 * 6  # two passes, and six layouts at most


def test_only_what_is_asked_for_is_in_a_stack() -> None:
    model, x = _made("linear and norm")
    truth = _each(model, x)
    asked = ["layers.2.weight", "layers.4.bias", "norms", "layers.6", "layers.8.weight"]
    seen = _observed(model, x, lw.SquaredNorm(), parameters=asked)
    names = [key for key in truth if key in asked or key.startswith(("norms.", "layers.6."))]
    assert sorted(seen.squared_norm) == sorted(names)
    for key in names:
        torch.testing.assert_close(seen.squared_norm[key], truth[key].square().flatten(1).sum(1))


def test_sums_of_half_precision_are_held_in_float32() -> None:
    model, x = _made("scales", torch.bfloat16)
    seen = _observed(model, x, lw.SecondMoment(), lw.SquaredNorm())
    assert {value.dtype for value in (*seen.second_moment.values(), *seen.squared_norm.values())} == {torch.float32}


class _Largest(lw.SecondMoment):
    """Of a parameter as a whole."""

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        moment = gradient.second_moment()
        return (moment / moment.max(),)


class _Mean(lw.PerSampleGrad):
    """Of all samples of a parameter."""

    concatenate = False

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        return (gradient.rows()[0].mean(0),)


class _ByName(lw.SquaredNorm):
    """With a factor for each name."""

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        return (gradient.squared_norm()[0] * len(gradient.name),)


class _Doubled:
    """Changes what a quantity computes, beside it."""

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        (moment,) = super().compute(gradient)  # type: ignore[misc]
        return (moment - moment.mean(),)


class _Centred(_Doubled, lw.Variance):
    """A quantity whose `compute` comes from a class that is none."""


class _Renamed(lw.SquaredNorm):
    """Computes what its base does."""


OWN: dict[type[lw.Quantity], Callable[[str, Tensor], Tensor]] = {
    _Largest: lambda name, g: g.square().sum(0) / g.square().sum(0).max(),
    _Mean: lambda name, g: g.mean(0),
    _ByName: lambda name, g: g.square().flatten(1).sum(1) * len(name),
    _Renamed: lambda name, g: g.square().flatten(1).sum(1),
}


@pytest.mark.parametrize("name", ["scales", "linear and norm"])
def test_a_subclass_that_computes_something_else_computes_it_of_each_parameter(name: str) -> None:
    model, x = _made(name)
    truth = _each(model, x)
    for quantity, brute_force in OWN.items():
        found = _observed(model, x, asked := quantity(), lw.SquaredNorm())[asked]
        for key, g in truth.items():
            torch.testing.assert_close(found[key], brute_force(key, g), rtol=1e-10, atol=1e-12)
    assert _Renamed.rows_of_many == "samples" and _Centred.rows_of_many is None
