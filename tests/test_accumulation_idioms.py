"""Several backward passes in one observation: the loss is their sum, as the user wrote it, and g_n sum to `.grad`."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.parts import Apply

import layerwise as lw

pytestmark = pytest.mark.usefixtures("float64")

Part = Callable[[Tensor, Tensor, int, int], Tensor]  # logits `[M,C]`, labels, how many parts, all labels that count

EQUAL, UNEQUAL, SINGLE = (2, 2, 2), (1, 3, 2), (1,) * 6
# Each as its users write it, with the sizes of its parts.
IDIOMS: dict[str, tuple[Part, tuple[int, ...]]] = {
    "loss_over_k": (lambda z, y, k, _: F.cross_entropy(z, y) / k, EQUAL),
    "loss_over_k_of_unequal_parts": (lambda z, y, k, _: F.cross_entropy(z, y) / k, UNEQUAL),
    "loss_over_k_one_by_one": (lambda z, y, k, _: F.cross_entropy(z, y) / k, SINGLE),
    "loss_times_one_over_k": (lambda z, y, k, _: (1 / k) * F.cross_entropy(z, y), EQUAL),
    "sums": (lambda z, y, *_: F.cross_entropy(z, y, reduction="sum"), UNEQUAL),
    "sums_over_the_number_of_items": (lambda z, y, _, all_: F.cross_entropy(z, y, reduction="sum") / all_, UNEQUAL),
    "means_weighted_by_their_items": (lambda z, y, _, all_: F.cross_entropy(z, y) * (y >= 0).sum() / all_, UNEQUAL),
    "users_mean_over_k": (lambda z, y, k, _: F.cross_entropy(z, y, reduction="none").mean() / k, EQUAL),
    "squared_error_over_k": (lambda z, y, k, _: F.mse_loss(z[:, 0], y.to(z)) / k, EQUAL),
}


def _model() -> nn.Module:
    return Apply(lambda m, x: m.head(m.inner(x).tanh()), inner=nn.Linear(4, 5), head=nn.Linear(5, 3))


def _rows(ignored: bool) -> tuple[Tensor, Tensor]:
    """Six samples; or six sequences of three tokens, where some labels do not count."""
    if not ignored:
        return torch.randn(6, 4), torch.randint(3, (6,))
    y = torch.randint(3, (6, 3))
    y[0, 1:], y[2, 0], y[4, :2], y[5, 1] = -100, -100, -100, -100
    return torch.randn(6, 3, 4), y


class _Idiom:
    """One way to accumulate, on one kind of rows."""

    def __init__(self, name: str, ignored: bool) -> None:
        self.part, self.sizes = IDIOMS[name]
        self.model, (self.x, self.y) = _model(), _rows(ignored)
        self.params = oracle.parameters(self.model)

    def losses(self) -> list[Callable[[], Tensor]]:
        """What `backward` is called on, one after the other."""
        count = int((self.y >= 0).sum())

        def loss(x: Tensor, y: Tensor) -> Tensor:
            return self.part(self.model(x).reshape(-1, 3), y.flatten(), len(self.sizes), count)

        pieces = zip(self.x.split(self.sizes), self.y.split(self.sizes), strict=True)
        return [lambda x=x, y=y: loss(x, y) for x, y in pieces]

    def whole(self) -> Tensor:
        """The user's loss."""
        return sum(loss() for loss in self.losses())

    def terms(self) -> Tensor:
        """`[N]`: of each sample its part's loss, less that of the others: the derivative in its own logits alone."""
        z = self.model(self.x)
        free = z.detach().requires_grad_()
        start, found = 0, []
        count = int((self.y >= 0).sum())
        for size in self.sizes:
            rows, y = free[start : start + size].reshape(-1, 3), self.y[start : start + size].flatten()
            (g,) = torch.autograd.grad(self.part(rows, y, len(self.sizes), count), free)
            found.append(g[start : start + size])
            start += size
        return (torch.cat(found) * z).flatten(1).sum(1)


IGNORE_NO_LABEL = {"squared_error_over_k", "users_mean_over_k"}
BY_IDIOM = pytest.mark.parametrize(
    ("name", "ignored"),
    [(name, ignored) for name in IDIOMS for ignored in (False, True) if not (ignored and name in IGNORE_NO_LABEL)],
    ids=lambda value: {False: "rows", True: "tokens"}.get(value, value),
)


@BY_IDIOM
def test_the_gradients_of_all_passes_sum_to_grad(name: str, ignored: bool) -> None:
    idiom = _Idiom(name, ignored)
    grads = oracle.per_sample_grad(idiom.params, idiom.terms)
    quantities = lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance()
    with lw.observe(idiom.model, *quantities) as seen:
        for loss in idiom.losses():
            loss().backward()
    whole = {n: p.grad for n, p in idiom.params.items()}
    oracle.assert_close({n: g.sum(0) for n, g in grads.items()}, whole, 1e-12)  # brute force itself
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    oracle.assert_close(dict(seen.squared_norm), oracle.squared_norm(grads))
    oracle.assert_close(dict(seen.second_moment), oracle.second_moment(grads))
    oracle.assert_close(dict(seen.variance), oracle.variance(grads))


@BY_IDIOM
def test_the_curvature_of_all_passes_is_that_of_their_sum(name: str, ignored: bool) -> None:
    """The Hessian of the loss is a sum over its passes, so its diagonals are."""
    idiom = _Idiom(name, ignored)
    exact, hessian = lw.DiagGGN(), lw.DiagHessian()
    with lw.observe(idiom.model, exact, hessian) as seen:
        for loss in idiom.losses():
            loss().backward()
    oracle.assert_close(dict(seen[hessian]), oracle.diag_hessian(idiom.params, idiom.whole))
    sizes, count = idiom.sizes, int((idiom.y >= 0).sum())

    def loss_of(z: Tensor) -> Tensor:
        pieces = zip(z.split(sizes), idiom.y.split(sizes), strict=True)
        return sum(idiom.part(part.reshape(-1, 3), y.flatten(), len(sizes), count) for part, y in pieces)

    want = oracle.diag_ggn(idiom.params, lambda: idiom.model(idiom.x), loss_of)
    oracle.assert_close(dict(seen[exact]), want)


@BY_IDIOM
def test_a_step_of_kfac_is_that_of_the_whole_loss(name: str, ignored: bool) -> None:
    """The passes of one watch are one loss: the step is that of their sum in one pass."""
    parts, whole = _Idiom(name, ignored), _Idiom(name, ignored)
    whole.model.load_state_dict(parts.model.state_dict())
    whole.x, whole.y = parts.x, parts.y
    moved = []
    for idiom, losses in ((parts, parts.losses()), (whole, [whole.whole])):
        pre = lw.optim.Preconditioner(idiom.model, kind="kflr", damping=0.05, damping_form="eigen")
        with pre.watch():
            for loss in losses:
                loss().backward()
        pre.step()
        moved.append({n: p.grad for n, p in idiom.params.items()})
    oracle.assert_close(moved[0], moved[1], 1e-9)
