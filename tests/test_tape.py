"""The tape: what it takes for parameters, data and constants."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from layerwise import errors
from layerwise.observation.observe import observe
from layerwise.quantities import KFAC, DiagGGN, PerSampleGrad, SecondMoment, Variance
from layerwise.tape.tape import Tape

# What the tape sees ---------------------------------------------------------------------------------


def _record(model: nn.Module, run: Callable[[], object]) -> Tape:
    tape = Tape(model)
    with tape:
        run()
    return tape


def test_values_are_those_of_the_plain_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    with Tape(model):
        out = model(x)
    assert torch.equal(out, model(x))


def test_each_use_is_seen_once_with_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tape = _record(model, lambda: model(model(torch.randn(3, 4))))
    assert [use.names for use in tape.uses] == [["0.bias", "0.weight"], ["2.bias", "2.weight"]] * 2
    assert [use.index for use in tape.uses] == [0, 1, 2, 3]


def test_no_use_under_no_grad_nor_of_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)

    def run() -> None:
        with torch.no_grad():
            model(torch.randn(3, 4))
        model(torch.randn(3, 4))

    assert [use.names for use in _record(model, run).uses] == [["1.bias", "1.weight"]]


def test_fused_optimizers_leave_the_parameters_their_names() -> None:
    """Torch's foreach calls return lists of the parameters that they change."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt = torch.optim.Adam(model.parameters(), foreach=True)

    def run() -> None:
        opt.step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        model(torch.randn(3, 4))

    assert [use.names for use in _record(model, run).uses] == [["0.bias", "0.weight"], ["1.bias", "1.weight"]]


@pytest.mark.parametrize(
    "make",
    [
        lambda X: X[torch.randperm(20)[:6]],
        lambda X: X[torch.randperm(20)[:6]].mul(2).sub(X.mean(0)).div(X.std(0)),
        lambda X: (X[:6] - X.mean(0)) / X.std(0),
        lambda X: X.mean(0) - X[:6],
        lambda X: X.mean(0, keepdim=True) - X[:6],
        lambda X: torch.stack([X[i] for i in range(6)]),
        lambda X: torch.stack(list(X[:6].unbind())).clone(),
        lambda X: next(iter(DataLoader(TensorDataset(X, X), batch_size=6, shuffle=True)))[0],
        lambda X: X.view(20, 2, 2)[:6].flatten(1),
        lambda X: X.float()[3:9].to(torch.float64).contiguous(),
        lambda X: torch.cat([X[:3], X[10:13]]),
        lambda X: F.dropout(X[:6], 0.5) + 0.1 * torch.randn(6, 4),
        lambda X: 0.1 * torch.randn(6, 4) + X[:6],
        lambda X: torch.where(X[:6] > 0, X[:6], torch.zeros(())),
        lambda X: torch.tensor(X[:6].tolist(), dtype=X.dtype),
        lambda X: torch.from_numpy(X[:6].numpy()),
        lambda X: X[:6].to(memory_format=torch.contiguous_format).requires_grad_(),
    ],
)
def test_loading_is_not_the_model(make: Callable[[Tensor], Tensor]) -> None:
    X = torch.randn(20, 4, dtype=torch.float64)
    model = nn.Linear(4, 3).double()
    y = torch.randint(3, (6,))
    with observe(model, PerSampleGrad()) as seen:
        x = make(X)
        F.cross_entropy(model(x), y).backward()
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none") / 6)
    oracle.assert_close(dict(seen.per_sample_grad), want)


def test_checkpointing_inside_a_compiled_and_frozen_net() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[2].weight.requires_grad_(False)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))

    def logits() -> Tensor:
        return model[3:](checkpoint(model[:3], x, use_reentrant=False))

    grads = oracle.per_sample_grad(oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none") / 5)
    with observe(model, PerSampleGrad(), Variance(), DiagGGN(), KFAC(2)) as seen:
        F.cross_entropy(logits(), y).backward()
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    oracle.assert_close(dict(seen.variance), oracle.variance(grads))
    ggn = oracle.diag_ggn(oracle.parameters(model), lambda: model(x), lambda z: F.cross_entropy(z, y))
    oracle.assert_close(dict(seen.diag_ggn), ggn)


def test_the_users_own_gradients_pass() -> None:
    """torch.autograd.grad inside the context neither counts nor fails."""
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    with observe(model, SecondMoment()) as seen:
        loss = F.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        with pytest.raises(errors.NoBackward):
            _ = seen.second_moment
        loss.backward()
    oracle.assert_close(dict(seen.grad), {"weight": grads[0], "bias": grads[1]})


def test_hooks_on_activations_see_the_users_backward_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    calls: list[Tensor] = []
    with observe(model, SecondMoment(), DiagGGN(), KFAC()):
        h = model[0](x)
        h.register_hook(calls.append)
        F.cross_entropy(model[2](h.tanh()), y).backward()
    assert [tuple(g.shape) for g in calls] == [(5, 4)]
