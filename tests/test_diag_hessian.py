"""The Hessian diagonal: exact on every model of the zoo, per sample, sampled, over batches, and its refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from support_page import table_cases
from torch import Tensor, nn
from zoo import Case, cases
from zoo import case as zoo_case

import layerwise as lw
from layerwise import errors
from layerwise.quantities.hessian import diag_hessian

pytestmark = pytest.mark.usefixtures("float64")

# test_matrix.py compares those of the table: the diagonal, and of each sample some elements, and the sum over samples.
TABLE = table_cases()
CASES = [
    c for c in cases(exclude=("bag",))
    if c not in TABLE and c.loss.name not in ("ce_module", "mse_scaled", "ce_user_mean")
]  # fmt: skip
FEW = 500  # products of the oracle for every sample


def _products(case: Case) -> int:
    instance = case.make(seed=0)
    return instance.n * sum(p.numel() for p in instance.params.values())


SMALL = [c for c in cases(exclude=("bag",), first_loss_only=True) if _products(c) <= FEW]


def _observed(subject: Any, loss: Callable[[], Tensor], *quantities: lw.Quantity) -> Any:
    with lw.observe(subject, *quantities) as seen:
        loss().backward()
    return seen


@one_in(3, case=CASES)
def test_diagonals_equal_the_oracle(case: Case) -> None:
    instance = case.make(seed=0)
    with oracle.plain_operations():
        want = oracle.diag_hessian(instance.params, instance.loss)
    seen = _observed(instance.subject, instance.loss, lw.DiagHessian())
    oracle.assert_close(dict(seen.diag_hessian), {name: want[name] for name in seen.grad})


def _by_element(tape: Any, graph: Any, layout: Any, names: Sequence[str]) -> tuple[list[Any], list[str]]:
    """The plan that uses no columns of outputs."""
    return [], list(names)


@pytest.mark.parametrize(
    "name", ["mlp_tanh", "conv2d", "conv2d_depthwise", "embedding_pool", "group_norm", "reused", "attention", "chunked"]
)
def test_both_ways_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = zoo_case(name).make(seed=1)
    for per_sample in (False, True):
        quantity = lw.DiagHessian(per_sample=per_sample)
        by_output = _observed(instance.subject, instance.loss, quantity).diag_hessian
        with monkeypatch.context() as patch:
            patch.setattr(diag_hessian, "plan", _by_element)
            by_element = _observed(instance.subject, instance.loss, quantity).diag_hessian
        oracle.assert_close(dict(by_output), dict(by_element))


@one_in(3, case=SMALL)
def test_every_element_of_every_sample(case: Case) -> None:
    instance = case.make(seed=0)
    seen = _observed(instance.subject, instance.loss, lw.DiagHessian(per_sample=True))
    with oracle.plain_operations():
        rows = [oracle.diag_hessian(instance.params, lambda n=n: instance.terms()[n]) for n in range(instance.n)]
    want = {name: torch.stack([row[name] for row in rows]) for name in seen.grad}
    oracle.assert_close(dict(seen.diag_hessian), want)


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))


def _batch(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_parts_by_their_share_are_the_whole(reduction: str, per_sample: bool) -> None:
    model, (x, y) = _mlp(), _batch()
    whole = _observed(
        model, lambda: F.cross_entropy(model(x), y, reduction=reduction), lw.DiagHessian(per_sample=per_sample)
    )
    with lw.observe(model, lw.DiagHessian(per_sample=per_sample)) as parts:
        for xb, yb in zip(x.split((3, 5)), y.split((3, 5)), strict=True):
            loss = F.cross_entropy(model(xb), yb, reduction=reduction)
            (loss * (len(yb) / 8) if reduction == "mean" else loss).backward()
    oracle.assert_close(dict(parts.diag_hessian), dict(whole.diag_hessian))


def test_the_gradient_is_what_it_would_have_been() -> None:
    model, plain, (x, y) = _mlp(), _mlp(), _batch()
    F.cross_entropy(plain(x), y).backward()
    seen = _observed(model, lambda: F.cross_entropy(model(x), y), lw.DiagHessian(), lw.DiagGGN(), lw.PerSampleGrad())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for name, g in seen.per_sample_grad.items():
        oracle.assert_close(g.sum(0), seen.grad[name])
    last = oracle.diag_hessian(oracle.parameters(model), lambda: F.cross_entropy(model(x), y))
    oracle.assert_close(dict(seen.diag_hessian), last)
    oracle.assert_close(seen.diag_ggn["2.weight"], last["2.weight"])  # no activation above it


def test_samples_that_meet_in_a_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))
    x, y = _batch()
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    oracle.assert_close(
        dict(_observed(model, loss, lw.DiagHessian()).diag_hessian),
        oracle.diag_hessian(oracle.parameters(model), loss),
    )
    with pytest.raises(errors.SamplesMixed):
        _observed(model, loss, lw.DiagHessian(per_sample=True))


def test_embedding_bag_has_an_exact_diagonal_though_torch_cannot_differentiate_it_twice() -> None:
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(5, 3, mode="sum"), nn.Linear(3, 2)
    x, y = torch.tensor([[0, 1, 1], [2, 3, 0]]), torch.tensor([0, 1])
    model = nn.ModuleDict({"bag": bag, "head": head})
    want = oracle.diag_hessian(
        oracle.parameters(model), lambda: F.cross_entropy(head(F.embedding(x, bag.weight).sum(1).tanh()), y)
    )
    got = _observed(model, lambda: F.cross_entropy(head(bag(x).tanh()), y), lw.DiagHessian())
    oracle.assert_close(dict(got.diag_hessian), want)


# Sampled ----------------------------------------------------------------------------------------


def test_the_mean_over_all_signs_is_exact() -> None:
    """Two parameters of five elements in all: 2^5 draws are every outcome once."""
    torch.manual_seed(0)
    p = {"a": torch.randn(3, requires_grad=True), "b": torch.randn(2, requires_grad=True)}
    x, y = torch.randn(6, 3), torch.randn(6, 2)

    def loss() -> Tensor:
        return F.mse_loss(torch.tanh(x * p["a"])[:, :2] * p["b"] + (x * p["a"])[:, 1:].sin(), y)

    exact = _observed(p, loss, lw.DiagHessian()).diag_hessian
    oracle.assert_close(dict(exact), oracle.diag_hessian(p, loss))
    outcomes = list(itertools.product((-1.0, 1.0), repeat=5))
    draws = iter([torch.tensor(part) for signs in outcomes for part in (signs[:3], signs[3:])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diag_hessian, "_signs", lambda parameter, generator: next(draws))
        sampled = _observed(p, loss, lw.DiagHessian(draws=len(outcomes))).diag_hessian
    oracle.assert_close(dict(sampled), dict(exact))


def test_draws_are_fixed_by_a_generator_and_approach_the_diagonal() -> None:
    model, (x, y) = _mlp(), _batch()
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731

    def draw(k: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return _observed(model, loss, lw.DiagHessian(draws=k, generator=generator)).diag_hessian

    one, same, other = draw(2, 0), draw(2, 0), draw(2, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    exact = oracle.hessian(oracle.parameters(model), loss)
    got = torch.cat([v.flatten() for v in draw(400, 0).values()])
    variance = (exact.square().sum(1) - exact.diag().square()) / 400
    assert bool(((got - exact.diag()).abs() <= 5 * variance.sqrt() + 1e-12).all())


# Refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "cost"),
    [(nn.Sigmoid(), 2), (nn.Softmax(-1), 2 + 5)],  # of the root; and, below what is not elementwise, of the outputs
    ids=["columns", "products"],
)
def test_the_cost_is_predicted_before_it_is_paid(act: nn.Module, cost: int) -> None:
    model, (x, y) = _mlp(), _batch()
    model[1] = act
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    _observed(model, loss, lw.DiagHessian(max_products=cost))
    model.zero_grad()
    with pytest.raises(errors.Undefined, match=rf"takes {cost} columns or products.*draws=k"):
        _observed(model, loss, lw.DiagHessian(max_products=cost - 1))
    assert all(p.grad is None for p in model.parameters())
    _observed(model, loss, lw.DiagHessian(max_products=None))


@pytest.mark.parametrize("options", [{"draws": 0}, {"draws": 2, "per_sample": True}, {"max_products": 0}], ids=str)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(errors.BadInput):
        lw.DiagHessian(**options)


def test_operations_without_a_second_derivative_are_refused() -> None:
    model, (x, y) = _mlp(), _batch()

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * ctx.saved_tensors[0].exp()

    for quantity in (lw.DiagHessian(), lw.DiagHessian(draws=1)):
        with pytest.raises(errors.Undefined, match="twice"):
            _observed(model, lambda: F.cross_entropy(Once.apply(model(x)), y), quantity)
    assert all(p.grad is None for p in model.parameters())
