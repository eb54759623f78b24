"""Weights assembled by writes in place, and batches made of them: every quantity is that of brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from program_checks import check_mse
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from zoo.parts import leaf

import layerwise as lw

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::layerwise.errors.SlowPath"),
]

Named = dict[str, Tensor]
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _triangle(p: Named, x: Tensor) -> Tensor:
    U = torch.zeros(3, 3)
    i, j = torch.triu_indices(3, 3, 1)
    U[i, j] = p["u"]
    U[range(3), range(3)] = F.softplus(p["d"])
    return U


def _lower_upper(p: Named, x: Tensor) -> Tensor:
    lower, upper = x.new_zeros(3, 3), x.new_zeros(3, 3)
    lower[torch.tril_indices(3, 3, -1).unbind()] = p["l"]
    upper[torch.triu_indices(3, 3, 1).unbind()] = p["u"]
    lower[range(3), range(3)] = 1.0
    upper.diagonal().copy_(F.softplus(p["d"]) + 1e-3)
    return lower @ upper


def _skew(p: Named, x: Tensor) -> Tensor:
    """The orthogonal adapter: Cayley's map of a skew-symmetric matrix, for each of two blocks."""
    rows, cols = torch.triu_indices(3, 3, 1)
    q = torch.zeros(1, 3, 3)
    q[:, rows, cols] = p["u"][None]
    q = q - q.mT
    return torch.linalg.solve(torch.eye(3) + q, torch.eye(3) - q)[0]


def _masked(p: Named, x: Tensor) -> Tensor:
    U = torch.ones(3, 3)
    U[torch.eye(3, dtype=torch.bool)] = p["d"]
    U.masked_fill_(torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0]]).bool(), 0.5)
    return U.mul_(p["u"]).tanh_()


def _through_views(p: Named, x: Tensor) -> Tensor:
    U = torch.zeros(3, 3)
    row, flat = U[0], U.view(9)
    flat[1:4] = p["u"]
    U[2].add_(p["d"])
    U[0] += 1.0
    return U.T + row.exp()


def _scattered(p: Named, x: Tensor) -> Tensor:
    U = torch.zeros(9)
    U.scatter_(0, torch.tensor([0, 4, 8]), p["d"]).index_add_(0, torch.tensor([1, 1, 5]), p["u"])
    return U.view(3, 3)


def _kernel(p: Named, x: Tensor) -> Tensor:
    k = torch.stack([p["d"], p["u"], p["d"] * p["u"]])
    k[0, 1] = 0.0
    k[1] *= p["u"].exp()
    return k


WEIGHTS: dict[str, Callable[[Named, Tensor], Tensor]] = {
    "triangle": _triangle, "lower_upper": _lower_upper, "skew": _skew, "masked": _masked,
    "through_views": _through_views, "scattered": _scattered, "kernel": _kernel,
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_assembled_in_place(name: str) -> None:
    """N is said: what the functional model was called with is not known, and masks and indices are its own tensors."""
    params, weight = {"u": leaf(3), "d": leaf(3), "l": leaf(3), "w": leaf(3, 2)}, WEIGHTS[name]
    check_mse(params, lambda: (X @ weight(params, X)).tanh() @ params["w"], samples=len(X))


def _before_and_after(p: Named) -> Tensor:
    """One matrix used before and after a write onto it."""
    U = torch.zeros(3, 3)
    U[range(3), range(3)] = p["d"]
    U[0] = p["u"]
    before = X @ U.T
    U[0] = p["l"] * U[2].clone()
    return before + X @ U


def _bias_in_between(p: Named) -> Tensor:
    b = torch.zeros(3)
    b[:2] = p["d"][:2]
    first = X + b
    b += p["u"]
    second = first + b.tanh()
    b.zero_()[1] = p["l"][1]
    return second + b


def _data_onto_derived(p: Named) -> Tensor:
    """Data written onto copies of a learned row, as where tokens are masked."""
    h = p["u"].expand(4, 3).clone()
    h[:, 1:] = X[:, 1:] * p["d"][1:]
    return h


def _data_onto_used(p: Named) -> Tensor:
    h = p["u"].expand(4, 3).clone()
    first = X * h
    h += X
    h[:, 0].mul_(p["d"][0])
    return first.tanh() * h


def _gated(p: Named) -> Tensor:
    h = p["u"].outer(p["d"]).flatten()[:4].clone()
    h.mul_(X[:, 0])
    return h[:, None] * X


CALLS: dict[str, Callable[[Named], Tensor]] = {
    "before_and_after": _before_and_after, "bias_in_between": _bias_in_between,
    "data_onto_derived": _data_onto_derived, "data_onto_used": _data_onto_used, "gated": _gated,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_writes_between_the_uses_of_a_derived_tensor(name: str) -> None:
    params, run = {"u": leaf(3), "d": leaf(3), "l": leaf(3), "w": leaf(3, 2)}, CALLS[name]
    check_mse(params, lambda: run(params).tanh() @ params["w"])


@pytest.mark.parametrize("kind", ["cayley", "matrix_exp", "householder"])
def test_orthogonal_parametrizations(kind: str) -> None:
    model = nn.Sequential(orthogonal(nn.Linear(3, 3), orthogonal_map=kind), nn.Tanh(), nn.Linear(3, 2))
    check_mse(model, lambda: model(X))


class _Triangular(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.d, self.last = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x @ _triangle({"u": self.u, "d": self.d}, x)).tanh())


class _Twin(_Triangular):
    """The same matrix without a write."""

    def forward(self, x: Tensor) -> Tensor:
        unit = torch.eye(9).view(9, 3, 3)
        upper = sum(self.u[k] * unit[place] for k, place in enumerate((1, 2, 5)))
        return self.last((x @ (upper + torch.diag(F.softplus(self.d)))).tanh())


@pytest.mark.parametrize("optimizer", [lw.LocoProp, lw.optim.KFAC, lw.optim.DiagNewton])
def test_steps_with_an_assembled_weight_are_those_of_the_same_matrix_without(optimizer: Any) -> None:
    one, other = _Triangular(), _Twin()
    other.load_state_dict(one.state_dict())
    y = torch.randn(4, 2)
    for model in (one, other):
        torch.manual_seed(1)
        opt = optimizer(model, lr=0.1)
        for _ in range(2):
            opt.step(lambda model=model: F.mse_loss(model(X), y))
    oracle.assert_close(dict(one.named_parameters()), dict(other.named_parameters()))


def test_no_gradient_flows_through_writes_that_torch_does_not_record() -> None:
    params = {"u": leaf(3), "d": leaf(3)}

    def run() -> Tensor:
        b = torch.zeros(3)
        with torch.no_grad():
            b += params["u"]
        return (X + b) * params["d"]

    with lw.observe(params, lw.SquaredNorm()) as seen:
        run().square().sum().backward()
    assert set(seen.squared_norm) == {"d"}


def test_slices_of_one_weight_that_overlap() -> None:
    """Used as a whole before, too: gradients of slices are added where they lie, in no one else's memory."""
    params = {"w": leaf(6, 3), "b": leaf(6), "v": leaf(4, 2)}

    def logits() -> Tensor:
        w, b = params["w"], params["b"]
        each = [F.linear(X, w[start:stop], b[start:stop]).tanh() for start, stop in ((0, 4), (2, 6), (1, 5))]
        return (each[0] * each[1] + each[2] + F.linear(X, w).sin()[:, 2:] + (X.sum(1, keepdim=True) * b[2:])) @ params[
            "v"
        ]

    check_mse(params, logits)
