"""`Memory` as LocoProp's solver: running moments of a layer's inputs, kept from batch to batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise.errors import BadInput


def _net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def _batches(count: int) -> list[tuple[Tensor, Tensor]]:
    make = torch.Generator().manual_seed(4)
    return [
        (torch.randn(6, 4, generator=make, dtype=torch.float64), torch.randn(6, 2, generator=make, dtype=torch.float64))
        for _ in range(count)
    ]


def _step(net: nn.Module, opt: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    opt.step(lambda: F.mse_loss(net(x), y))  # type: ignore[arg-type, return-value]


def test_steps_equal_the_formula_over_all_batches() -> None:
    net, gamma, rate = _net(), 0.7, 0.5
    opt = lw.LocoProp(net, gamma=gamma, lr=rate, solver=lw.local.Memory(forget=0.0, gain=1.0, every=1, ridge=2.0))
    layers = [net[0], net[2]]  # type: ignore[index]
    inputs: list[list[Tensor]] = [[], []]
    for x, y in _batches(3):
        hidden = layers[0](x)
        outputs = [hidden, layers[1](hidden.tanh())]
        pulls = torch.autograd.grad(F.mse_loss(outputs[1], y), outputs)
        expected = []
        for layer, seen, a, g in zip(layers, inputs, (x, hidden.tanh()), pulls, strict=True):
            seen.append(torch.cat([a.detach(), torch.ones(6, 1, dtype=torch.float64)], 1))
            rows = torch.cat(seen)
            moments = rows.T @ rows / len(rows)
            damped = moments + 2.0 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
            weight = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
            expected.append(weight - rate * gamma * g.T @ seen[-1] / len(rows) @ torch.linalg.inv(damped))
        _step(net, opt, (x, y))
        for layer, wanted in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer.weight.detach(), wanted[:, :-1], rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(layer.bias.detach(), wanted[:, -1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("order", ["together", "input_to_output"])
def test_saved_loaded_and_copied_it_goes_on_bitwise(order: str) -> None:
    batches, solver = _batches(6), lw.local.Memory(forget=0.2, every=3)
    net = _net()
    opt = lw.LocoProp(net, solver=solver, order=order)  # type: ignore[arg-type]
    for batch in batches[:3]:
        _step(net, opt, batch)
    copied, copied_opt = copy.deepcopy((net, opt))
    loaded = copy.deepcopy(net)
    loaded_opt = lw.LocoProp(loaded, solver=solver, order=order)  # type: ignore[arg-type]
    loaded_opt.load_state_dict(opt.state_dict())
    for batch in batches[3:]:
        for m, o in ((net, opt), (copied, copied_opt), (loaded, loaded_opt)):
            _step(m, o, batch)
    for other in (copied, loaded):
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_a_skipped_batch_leaves_the_moments_as_they_were() -> None:
    net = _net()
    opt = lw.LocoProp(net, solver=lw.local.Memory())
    good, (x, y) = _batches(2)
    _step(net, opt, good)
    before = copy.deepcopy((list(net.parameters()), opt.state_dict()["state"]))
    _step(net, opt, (x, y * float("inf")))
    assert opt.skipped == 1
    after = list(net.parameters()), opt.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_moments_of_another_size_are_refused() -> None:
    net = _net()
    opt = lw.LocoProp(net, solver=lw.local.Memory())
    _step(net, opt, _batches(1)[0])
    saved = opt.state_dict()
    number = next(iter(saved["state"]))
    saved["state"][number] = {**saved["state"][number], "A": torch.ones(1, 9, 9, dtype=torch.float64)}
    with pytest.raises(BadInput, match="moments A"):
        lw.LocoProp(_net(), solver=lw.local.Memory()).load_state_dict(saved)


@pytest.mark.parametrize("solver", [lw.local.Memory(), lw.local.ProximalSolve(eta=0.1)], ids=["memory", "proximal"])
def test_the_state_of_a_matching_loss_is_refused_by_solvers_of_the_squared_one(solver: lw.local.Solver) -> None:
    """Its settings would come along, and every later step would be refused."""
    net = _net()
    theirs, ours = lw.LocoProp(net), lw.LocoProp(net, solver=solver)
    _step(net, theirs, _batches(1)[0])
    with pytest.raises(BadInput, match="solves the squared loss"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["loss"] == "squared" and not ours.state
    _step(net, ours, _batches(1)[0])


def test_a_memory_starts_anew_from_the_state_of_local_steps() -> None:
    """And what it then saves is its own alone, so that it loads."""
    net, batches = _net(), _batches(3)
    theirs = lw.LocoProp(net, preset="S")
    _step(net, theirs, batches[0])
    solver = lw.local.Memory()
    ours = lw.LocoProp(net, solver=solver)
    ours.load_state_dict(theirs.state_dict())
    for batch in batches[1:]:
        _step(net, ours, batch)
    lw.LocoProp(_net(), solver=solver).load_state_dict(ours.state_dict())
    assert set(ours.state[net[0].weight]) == {"A", "rows", "steps", "inverse", "inverted"}  # type: ignore[index]


def test_local_steps_refuse_an_optimizer_that_runs_a_closure() -> None:
    with pytest.raises(BadInput, match="runs a closure"):
        lw.local.LocalSteps(optimizer=torch.optim.LBFGS)
