"""`parameters=`: quantities of chosen parameters are those with the others frozen, and nothing else is done."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.tape.uses import Use

N = 5


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


QUANTITIES: list[Callable[[], Any]] = [
    lambda: lw.PerSampleGrad(), lambda: lw.Variance(), lambda: lw.SquaredNorm(), lambda: lw.PairwiseDot(),
    lambda: lw.ClippedGrad(0.1), lambda: lw.NoiseScale(), lambda: lw.Sketch(3, seeded()), lambda: lw.DiagGGN(),
    lambda: lw.DiagGGN(1, seeded()), lambda: lw.SqrtGGN(), lambda: lw.DiagHessian(), lambda: lw.KFAC(1, seeded()),
    lambda: lw.KFLR(joint=True), lambda: lw.KFRA(),
]  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(),
        nn.Linear(6, 4),
    )  # fmt: skip
    return model.double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, 2, 4, 4, dtype=torch.float64), torch.randint(4, (N,))


def tensors(result: Any) -> dict[str, Tensor]:
    """The tensors of any result by name."""
    if isinstance(result, lw.Kronecker):
        return {f"{k}/{i}": t for k, ts in result.factors.items() for i, t in enumerate(ts)}
    if not hasattr(result, "items"):
        return {"": result}
    total = {"total": result.total} if isinstance(result, lw.NoiseScale) else {}
    return {**result} | total


def observed(model: nn.Module, quantity: Any, **options: Any) -> tuple[Any, Any]:
    x, y = batch()
    with lw.observe(model, quantity, samples=N, **options) as seen:
        F.cross_entropy(model(x), y).backward()
    return seen[quantity], seen.grad


@pytest.mark.parametrize("make", QUANTITIES, ids=lambda make: repr(make()))
@pytest.mark.parametrize("asked", [["5"], ["3", "7.bias"]], ids=str)
def test_quantities_are_those_of_the_model_whose_other_parameters_are_frozen(
    make: Callable[[], Any], asked: list[str]
) -> None:
    model, frozen = net(), net()
    names = [n for n, _ in model.named_parameters() if any(n == a or n.startswith(a + ".") for a in asked)]
    chain = isinstance(make(), lw.KFRA)
    for name, p in frozen.named_parameters():
        p.requires_grad_(name in names or chain)  # a chain needs its links
    found, gradient = observed(model, make(), parameters=asked)
    expected, _ = observed(frozen, make())
    mine, its = tensors(found), tensors(expected)
    if chain:
        its = {k: v for k, v in its.items() if k.split("/")[0] in names}
    assert set(mine) == set(its) and mine
    for key, value in its.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-10, atol=1e-14)
    assert set(gradient) == set(names)
    for name, p in model.named_parameters():
        assert p.grad is not None  # the user's own backward pass is whole
        if name in names:
            torch.testing.assert_close(gradient[name], p.grad)


def test_a_derived_weight_reaches_the_asked_one_of_its_parameters_alone() -> None:
    model = net()
    parametrizations.weight_norm(model[3])
    whole, _ = observed(model, lw.PerSampleGrad())
    name = "3.parametrizations.weight.original1"
    some, _ = observed(model, lw.PerSampleGrad(), parameters=name)
    assert list(some) == [name]
    torch.testing.assert_close(some[name], whole[name])


def test_accumulate_gives_the_same_and_leaves_grad_alone() -> None:
    model = net()
    x, y = batch()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    whole = lw.accumulate(model, F.cross_entropy, batches, lw.Variance(), lw.KFLR())
    some = lw.accumulate(model, F.cross_entropy, batches, lw.Variance(), lw.KFLR(), parameters="7")
    assert list(some.variance) == list(some.grad) == ["7.weight", "7.bias"]
    for name, value in some.variance.items():
        torch.testing.assert_close(value, whole.variance[name], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(some.grad[name], whole.grad[name], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(some.kflr.factors["7.weight"], whole.kflr.factors["7.weight"])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "make", [lw.DiagHessian, lambda: lw.EKFAC(None), lw.NoiseScale], ids=["hessian", "ekfac", "noise"]
)
@pytest.mark.parametrize("derived", [False, True])
def test_accumulate_is_that_of_the_model_whose_other_parameters_are_frozen(
    make: Callable[[], Any], derived: bool
) -> None:
    model = net()
    if derived:
        parametrizations.weight_norm(model[5])
    frozen = copy.deepcopy(model)
    for name, p in frozen.named_parameters():
        p.requires_grad_(name.startswith("5.") or name == "7.bias")
    x, y = batch()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    one, other = make(), make()
    found = lw.accumulate(model, F.cross_entropy, batches, one, parameters=["5", "7.bias"])[one]
    expected = lw.accumulate(frozen, F.cross_entropy, batches, other)[other]
    if isinstance(expected, lw.EigenKronecker):
        found, expected = ({name: op.to_dense(name) for name in op.names()} for op in (found, expected))
    mine, its = tensors(found), tensors(expected)
    assert set(mine) == set(its) and len(its) >= 3
    for key, value in its.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-9, atol=1e-14)


# -- what is not done ------------------------------------------------------------------------------------------------


def operations(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counted:
        run()
    return int(counted.get_total_flops())


def big() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 3))
    return model, torch.randn(4, 8, 64), torch.randint(3, (4, 8))


def loss_of(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def test_gradients_of_other_parameters_are_not_formed() -> None:
    model, x, y = big()

    def run(*quantities: Any, **options: Any) -> int:
        def step() -> None:
            with lw.observe(model, *quantities, **options):
                loss_of(model(x), y).backward()

        return operations(step)

    run(lw.PerSampleGrad())  # layouts are known from now on
    none = run(parameters="4")
    rows = 2 * 4 * 8 * 96 * 3
    assert run(lw.PerSampleGrad(), parameters="4") - none == rows
    assert run(lw.PerSampleGrad()) - none == rows + 2 * 4 * 8 * (64 * 96 + 96 * 96)
    # a root is sent down to the asked layer, and no further
    assert run(lw.KFLR(), parameters="4") < none + 3 * 2 * 4 * 8 * (96 * 96 + 3 * 96) < run(lw.KFLR())


def test_accumulate_computes_no_gradient_of_other_parameters() -> None:
    model, x, y = big()

    def run(**options: Any) -> int:
        return operations(lambda: lw.accumulate(model, loss_of, [(x, y)], lw.SquaredNorm(), **options))

    run(), run(parameters="4")
    forward = 2 * 32 * (64 * 96 + 96 * 96 + 96 * 3)
    assert run(parameters="4.weight") < forward + 4 * 2 * 32 * 96 * 3
    assert run() > 2 * forward


@pytest.mark.parametrize("released", [True, False])
def test_inputs_of_other_parameters_are_let_go_before_the_backward_pass(
    released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(6, 11), nn.ReLU(), nn.Linear(11, 7), nn.ReLU(), nn.Linear(7, 3))
    if not released:  # the check sees them then
        monkeypatch.setattr(Use, "release", lambda use: None)
    alive: list[int] = []

    def count(g: Tensor) -> None:
        alive.append(sum(isinstance(t, Tensor) and t.shape == (5, 11) for t in gc.get_objects()))

    model[0].weight.register_hook(count)
    with lw.observe(model, lw.SquaredNorm(), parameters="4"):
        F.cross_entropy(model(torch.randn(5, 6)), torch.arange(5) % 3).backward()
    assert (alive == [0]) is released


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["9", ["0", "nothing.*"], [], [3], "weight"])
def test_a_pattern_that_matches_nothing_is_refused(wrong: Any) -> None:
    model = net()
    with pytest.raises(BadInput, match="parameters: "):
        lw.observe(model, lw.Variance(), parameters=wrong)
    with pytest.raises(BadInput, match="parameters: "):
        lw.accumulate(model, F.cross_entropy, [batch()], lw.Variance(), parameters=wrong)
    with pytest.raises(BadInput, match="parameters: "):
        lw.attribution.Influence(model, F.cross_entropy, wrong)


def test_frozen_parameters_cannot_be_asked_for() -> None:
    model = net()
    model[0].requires_grad_(False)
    with pytest.raises(BadInput, match="'0' matches no parameter"):
        lw.observe(model, lw.Variance(), parameters="0")
