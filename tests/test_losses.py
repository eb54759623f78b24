"""Likelihoods against autograd's own gradient and Hessian of the torch call, in float64."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from layerwise import losses
from layerwise.errors import BadInput, NonFinite, Undefined, UnknownLoss
from layerwise.losses import Likelihood, bind, check, is_loss, likelihood, scale_to_union, sides_of

REDUCTIONS = ("mean", "sum", "none")
TOLERANCE = 1e-12


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=rng(seed), dtype=torch.float64) + 0.3


def indices(shape: tuple[int, ...], classes: int, seed: int = 2) -> Tensor:
    return torch.randint(classes, shape, generator=rng(seed))


def close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    error = (got - want).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance * max(want.abs().max().item() if want.numel() else 0.0, 1.0), error


def brute(call: Callable[[Tensor], Tensor], z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [*S] and Hessian [S, S] of `Σ c ℓ(z)`, one double backward per element."""
    x = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((c * call(x)).sum(), x, create_graph=True)
    rows = []
    for g in gradient.flatten():
        row = torch.autograd.grad(g, x, retain_graph=True, allow_unused=True)[0] if g.requires_grad else None
        rows.append(torch.zeros_like(z) if row is None else row)
    return gradient.detach(), torch.stack(rows).reshape(z.numel(), z.numel())


def terms_of(lik: Likelihood) -> list[Tensor]:
    """One mask `[*S]` per loss term."""
    shape = list(lik.logits.shape)
    if lik.class_axis is None:
        return list(torch.eye(lik.logits.numel(), dtype=torch.bool).reshape(-1, *shape))
    del shape[lik.class_axis]
    count = math.prod(shape)
    masks = torch.eye(count, dtype=torch.bool).reshape(count, *shape)
    return [m.unsqueeze(lik.class_axis).expand(lik.logits.shape) for m in masks]


def squared(lik: Likelihood, columns: Tensor) -> Tensor:
    """`Σ s sᵀ` over columns and terms `[S, S]`, each term's column separated from the others."""
    parts = [torch.where(mask, s, 0.0).flatten() for s in columns for mask in terms_of(lik)]
    size = lik.logits.numel()
    stacked = torch.stack(parts) if parts else columns.new_zeros(0, size)
    return stacked.T @ stacked


def cotangent(call: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """A positive c that differs from 1 and, where it has elements, between them."""
    return uniform(*call(z).shape, seed=5) * 2.5


def agrees(func: Callable[..., Tensor], z: Tensor, *args: Any, **kwargs: Any) -> Likelihood:
    """Everything deterministic about the likelihood of `func(z, ...)` agrees with brute force."""

    def call(x: Tensor) -> Tensor:
        return func(x, *args, **kwargs)

    c = cotangent(call, z)
    bound = bind(func, (z, *args), kwargs)
    check(bound)
    lik = likelihood(bound, z, c)
    gradient, hessian = brute(call, z, c)
    close(lik.gradient(), gradient)
    root = lik.root()
    assert root.shape == (lik.columns, *z.shape)
    close(squared(lik, root), hessian)
    by_class = lik.class_root()
    assert by_class.shape == (1 if lik.class_axis is None else z.shape[lik.class_axis], *z.shape)
    close(squared(lik, by_class), hessian)
    eye = torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
    close(lik.hessian_product(eye).reshape(z.numel(), -1), hessian)
    close(likelihood(bound, z, -c).gradient(), -gradient)
    close(likelihood(bound, z, -c).hessian_product(eye).reshape(z.numel(), -1), -hessian)
    if bound.reduction == "mean":
        total = func(z, *args, **{**kwargs, "reduction": "sum"})
        assert lik.mean
        assert lik.terms * call(z).item() == pytest.approx(total.item(), rel=1e-12)
    else:
        assert not lik.mean
    return lik


CLASS_SHAPES = {
    "NC": (5, 4),
    "C": (4,),
    "NCd": (3, 4, 2),
    "NCde": (2, 3, 2, 2),
    "one row": (1, 3),
    "N1": (3, 1),
}


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    axis = 0 if len(shape) == 1 else 1
    return shape[:axis] + shape[axis + 1 :]


def classes_of(shape: tuple[int, ...]) -> int:
    return shape[0 if len(shape) == 1 else 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("ignore", [None, -100, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", CLASS_SHAPES.values(), ids=CLASS_SHAPES)
def test_cross_entropy_of_indices(
    shape: tuple[int, ...], reduction: str, weighted: bool, ignore: int | None, smoothing: float
) -> None:
    classes, target = classes_of(shape), indices(rows_of(shape), classes_of(shape))
    kwargs: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        kwargs["weight"] = uniform(classes)
    if ignore is not None:
        kwargs["ignore_index"] = ignore
        target.view(-1)[-1] = ignore  # a single row is ignored as a whole
        if target.numel() > 1:
            target.view(-1)[0] = 0
    if reduction == "mean" and ignore is not None and bool((target == ignore).all()):
        with pytest.raises(BadInput, match="ignore_index"):
            check(bind(F.cross_entropy, (normal(*shape), target), kwargs))
        with pytest.raises(BadInput, match="0/0"):
            likelihood(bind(F.cross_entropy, (normal(*shape), target), kwargs), normal(*shape), 1.0)
        return
    lik = agrees(F.cross_entropy, normal(*shape, scale=2.0), target, **kwargs)
    assert (lik.link, lik.class_axis, lik.columns) == ("softmax", 0 if len(shape) == 1 else 1, classes - 1)
    assert lik.canonical and not lik.elementwise


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", CLASS_SHAPES.values(), ids=CLASS_SHAPES)
def test_cross_entropy_of_probabilities(
    shape: tuple[int, ...], reduction: str, normalised: bool, weighted: bool, smoothing: float
) -> None:
    target = uniform(*shape, seed=7)
    if normalised:
        target = target.softmax(0 if len(shape) == 1 else 1)
    weight = uniform(classes_of(shape)) if weighted else None
    z = normal(*shape, scale=2.0)
    agrees(F.cross_entropy, z, target, weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("ignore", [-100, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5, 4), (4,), (3, 4, 2)])
def test_nll_of_log_softmax_is_cross_entropy(
    shape: tuple[int, ...], reduction: str, weighted: bool, ignore: int
) -> None:
    axis = 0 if len(shape) == 1 else 1
    target = indices(rows_of(shape), 4)
    if target.dim():
        target.view(-1)[0], target.view(-1)[1] = ignore, 2
    else:
        target.fill_(2)
    kwargs = {
        "reduction": reduction,
        "ignore_index": ignore,
        "weight": uniform(4) if weighted else None,
    }
    z = normal(*shape, scale=2.0)

    def call(x: Tensor) -> Tensor:
        return F.nll_loss(F.log_softmax(x, axis), target, **kwargs)

    c = cotangent(call, z)
    log_p = F.log_softmax(z, axis)
    bound = bind(F.nll_loss, (log_p, target), kwargs, log_softmax_input=z, log_softmax_dim=axis - z.dim())
    assert bound.log_softmax and bound.logits is z
    lik = likelihood(bound, z, c)
    gradient, hessian = brute(call, z, c)
    close(lik.gradient(), gradient)
    close(squared(lik, lik.root()), hessian)

    alone = bind(F.nll_loss, (log_p, target), kwargs)
    assert not alone.log_softmax and alone.logits is log_p
    first = likelihood(alone, log_p, c)
    close(first.gradient(), brute(lambda x: F.nll_loss(x, target, **kwargs), log_p, c)[0])
    assert first.terms == lik.terms and first.columns == 0 and first.class_axis == axis
    for ask in (first.root, lambda: first.sample(1, rng()), lambda: first.hessian_product(z)):
        with pytest.raises(Undefined, match="log_softmax"):
            ask()


def test_log_softmax_over_another_axis_or_under_another_loss_is_not_used() -> None:
    z, target = normal(4, 4), indices((4,), 4)
    log_p = F.log_softmax(z, 0)
    wrong = bind(F.nll_loss, (log_p, target), {}, log_softmax_input=z, log_softmax_dim=0)
    assert not wrong.log_softmax and wrong.logits is log_p
    with pytest.raises(Undefined):
        likelihood(wrong, log_p, 1.0).root()
    other = bind(F.mse_loss, (log_p, z), {}, log_softmax_input=z, log_softmax_dim=1)
    assert not other.log_softmax and other.logits is log_p


def test_cross_entropy_of_log_softmax_may_take_its_input() -> None:
    z, target = normal(4, 3), uniform(4, 3)
    log_p = F.log_softmax(z, 1)
    lik = likelihood(bind(F.cross_entropy, (log_p, target), {}, z, 1), z, torch.tensor(3.0))
    c = torch.tensor(3.0, dtype=torch.float64)
    gradient, hessian = brute(lambda x: F.cross_entropy(F.log_softmax(x, 1), target), z, c)
    close(lik.gradient(), gradient)
    close(squared(lik, lik.root()), hessian)


SHAPES = {"NC": (4, 3), "N": (5,), "scalar": (), "NCd": (2, 3, 2)}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mse(shape: tuple[int, ...], reduction: str, weighted: bool) -> None:
    weight = uniform(*shape) if weighted else None
    lik = agrees(F.mse_loss, normal(*shape), normal(*shape, seed=3), reduction=reduction, weight=weight)
    assert lik.elementwise and lik.canonical and lik.link == "identity" and lik.columns == 1


@pytest.mark.parametrize("positive", [None, "last", "all"])
@pytest.mark.parametrize("weighted", [None, "last", "all"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bce(shape: tuple[int, ...], reduction: str, soft: bool, weighted: str | None, positive: str | None) -> None:
    target = torch.rand(shape, generator=rng(4), dtype=torch.float64)
    sizes = {None: None, "last": shape[-1:], "all": shape}
    weight = None if weighted is None else uniform(*sizes[weighted])
    pos_weight = None if positive is None else uniform(*sizes[positive], seed=9) + 1
    lik = agrees(
        F.binary_cross_entropy_with_logits,
        normal(*shape, scale=2.0),
        target if soft else target.round(),
        weight,
        reduction=reduction,
        pos_weight=pos_weight,
    )
    assert lik.link == "sigmoid" and lik.canonical


@pytest.mark.parametrize("threshold", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_huber_and_smooth_l1(shape: tuple[int, ...], reduction: str, threshold: float) -> None:
    z, y = normal(*shape), normal(*shape, seed=3)
    agrees(F.huber_loss, z, y, reduction=reduction, delta=threshold)
    lik = agrees(F.smooth_l1_loss, z, y, reduction=reduction, beta=threshold)
    assert not lik.canonical


@pytest.mark.parametrize("weighted", [None, "last", "all"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bce_of_probabilities(shape: tuple[int, ...], reduction: str, weighted: str | None) -> None:
    p = torch.rand(shape, generator=rng(3), dtype=torch.float64) * 0.9 + 0.05
    target = torch.rand(shape, generator=rng(4), dtype=torch.float64)
    weight = {None: None, "last": uniform(*shape[-1:]), "all": uniform(*shape)}[weighted]

    def formula(p: Tensor) -> Tensor:  # torch's own second derivative is off by its guard against 0/0
        e = -(target * p.log() + (1 - target) * (1 - p).log()) * (1 if weight is None else weight)
        return {"mean": e.mean(), "sum": e.sum(), "none": e}[reduction]

    bound = bind(F.binary_cross_entropy, (p, target, weight), {"reduction": reduction})
    c = cotangent(formula, p)
    lik = likelihood(bound, p, c)
    gradient, hessian = brute(formula, p, c)
    close(lik.gradient(), gradient)
    close(squared(lik, lik.root()), hessian)
    close(lik.hessian_product(p), (hessian @ p.flatten()).view(shape))
    assert not lik.canonical and lik.link == "identity"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_soft_margin(shape: tuple[int, ...], reduction: str) -> None:
    for y in (normal(*shape, seed=3).sign(), normal(*shape, seed=3)):
        assert not agrees(F.soft_margin_loss, normal(*shape, scale=2.0), y, reduction=reduction).canonical


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weighted_huber(reduction: str) -> None:
    z, y, weight = normal(4, 3), normal(4, 3, seed=3), uniform(4, 3)
    # The mean of a weighted huber_loss divides by the number of elements, that of mse_loss by the weights.
    assert agrees(F.huber_loss, z, y, reduction=reduction, weight=weight).terms == 12


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("var", ["same", "row", "row kept", "channel", "number", "square row"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gaussian_nll(reduction: str, var: str, full: bool) -> None:
    shape = (3, 3) if var == "square row" else (4, 3, 2)
    var_shape = {
        "same": shape,
        "row": shape[:-1],
        "row kept": (4, 3, 1),
        "channel": (4, 1, 2),
        "square row": (3,),
    }
    v: Tensor | float = 0.7
    if var != "number":
        v = uniform(*var_shape[var])
        v.view(-1)[0] = 1e-9  # below eps, which takes its place
    agrees(
        F.gaussian_nll_loss,
        normal(*shape),
        normal(*shape, seed=3),
        v,
        reduction=reduction,
        full=full,
        eps=1e-2,
    )


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("log_input", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_poisson_nll(shape: tuple[int, ...], reduction: str, log_input: bool, full: bool) -> None:
    z = normal(*shape) if log_input else uniform(*shape)
    y = torch.poisson(uniform(*shape, seed=8) * 3, generator=rng())
    lik = agrees(F.poisson_nll_loss, z, y, log_input, full, reduction=reduction, eps=1e-3)
    assert lik.canonical == log_input and lik.link == ("exp" if log_input else "identity")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "func, extra", [(F.l1_loss, {}), (F.l1_loss, {"weight": True}), (F.smooth_l1_loss, {"beta": 0.0})]
)
def test_absolute_errors_have_a_gradient_alone(
    func: Callable[..., Tensor], extra: dict[str, Any], reduction: str
) -> None:
    z, y = normal(4, 3), normal(4, 3, seed=3)
    kwargs = {"reduction": reduction, **extra}
    if "weight" in extra:
        kwargs["weight"] = uniform(4, 3)
    c = cotangent(lambda x: func(x, y, **kwargs), z)
    lik = likelihood(bind(func, (z, y), kwargs), z, c)
    close(lik.gradient(), brute(lambda x: func(x, y, **kwargs), z, c)[0])
    for ask in (lik.root, lambda: lik.sample(2, rng()), lambda: lik.hessian_product(z)):
        with pytest.raises(Undefined, match=r"huber"):
            ask()


def test_root_columns_come_in_slices() -> None:
    z = normal(3, 6, 2)
    lik = likelihood(bind(F.cross_entropy, (z, indices((3, 2), 6)), {}), z, 1.0)
    whole = lik.root()
    for start, stop in itertools.combinations_with_replacement(range(7), 2):
        assert torch.equal(lik.root(start, stop), whole[start:stop])
    assert torch.equal(lik.root(2), whole[2:])
    z = normal(3, 6)
    lik = likelihood(bind(F.mse_loss, (z, z + 1), {}), z, 1.0)
    assert lik.root(1).shape == (0, 3, 6) and lik.root(0, 1).shape == (1, 3, 6)


def test_root_columns_are_orthogonal_to_the_null_direction() -> None:
    z = normal(5, 7, scale=3.0)
    root = likelihood(bind(F.cross_entropy, (z, indices((5,), 7)), {}), z, 1.0).root()
    close(root.sum(2), torch.zeros(6, 5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_root_keeps_relative_accuracy_where_the_model_is_sure(dtype: torch.dtype) -> None:
    """The Hessian of a saturated softmax is tiny; `p (1 - p)` computed as written would be zero."""
    z = torch.tensor([[30.0, 0.0, -3.0], [0.0, 40.0, 1.0], [-1.0, 0.5, 35.0]], dtype=dtype)
    lik = likelihood(bind(F.cross_entropy, (z, torch.tensor([0, 1, 2])), {"reduction": "sum"}), z, 1.0)
    root = lik.root().double()
    p = z.double().softmax(1)
    for row in range(3):
        want = -torch.outer(p[row], p[row])
        for i in range(3):
            want[i, i] = p[row, i] * (p[row].sum() - p[row, i] if p[row, i] < 0.5 else p[row][p[row] < 0.5].sum())
        got = root[:, row].T @ root[:, row]
        assert ((got - want).abs() / want.abs()).max() < 30 * torch.finfo(dtype).eps
    z = torch.tensor([40.0, -40.0], dtype=dtype)
    root = likelihood(bind(F.binary_cross_entropy_with_logits, (z, z * 0), {}), z, 2.0).root()
    torch.testing.assert_close(root[0], torch.exp(torch.full_like(z, -20.0)))


def test_masked_logits() -> None:
    z = normal(3, 4)
    z[:, 2] = -math.inf
    lik = likelihood(bind(F.cross_entropy, (z, torch.tensor([0, 1, 3])), {"reduction": "sum"}), z, 1.0)
    keep = [0, 1, 3]
    small = likelihood(
        bind(F.cross_entropy, (z[:, keep], torch.tensor([0, 1, 2])), {"reduction": "sum"}), z[:, keep], 1.0
    )
    close(lik.gradient()[:, keep], small.gradient())
    close(squared(lik, lik.root()), embed(squared(small, small.root()), keep, 3, 4))
    assert torch.isfinite(lik.sample(3, rng())).all()


def embed(block: Tensor, keep: list[int], rows: int, classes: int) -> Tensor:
    out = block.new_zeros(rows * classes, rows * classes)
    at = torch.tensor([r * classes + k for r in range(rows) for k in keep])
    out[at[:, None], at] = block
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_logits_dtype(dtype: torch.dtype) -> None:
    for func, target in ((F.cross_entropy, indices((4,), 3)), (F.mse_loss, normal(4, 3, seed=2).to(dtype))):
        z = normal(4, 3).to(dtype)
        lik = likelihood(bind(func, (z, target), {}), z, torch.tensor(2.0, dtype=dtype))
        exact = target.double() if target.is_floating_point() else target
        full = likelihood(bind(func, (z.double(), exact), {}), z.double(), 2.0)
        pairs = [(lik.gradient(), full.gradient()), (lik.root(), full.root())]
        pairs.append((lik.hessian_product(z), full.hessian_product(z.double())))
        for got, want in pairs:
            assert got.dtype == dtype
            # One rounding at the end, so that two roundings of the type bound the error.
            assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()
        assert lik.sample(2, rng()).dtype == dtype


# Sampling


def sampled_cases() -> dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]]:
    z, y = normal(2, 3), normal(2, 3, seed=3)
    bits = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    bce = F.binary_cross_entropy_with_logits
    return {
        "ce": (F.cross_entropy, (z, torch.tensor([0, 2])), {}),
        "ce unbatched": (F.cross_entropy, (z[0], torch.tensor(1)), {}),
        "ce pixels": (F.cross_entropy, (normal(2, 3, 2), indices((2, 2), 3)), {"reduction": "none"}),
        "ce weights": (
            F.cross_entropy,
            (z, torch.tensor([0, 2])),
            {"weight": uniform(3), "label_smoothing": 0.3, "reduction": "sum"},
        ),
        "ce ignore": (F.cross_entropy, (z, torch.tensor([-100, 2])), {}),
        "ce soft": (F.cross_entropy, (z, uniform(2, 3)), {"weight": uniform(3, seed=6)}),
        "mse": (F.mse_loss, (z, y), {}),
        "mse weights": (F.mse_loss, (z, y), {"weight": uniform(2, 3)}),
        "bce": (bce, (z, bits), {"pos_weight": uniform(3) + 1, "weight": uniform(3, seed=6)}),
        "huber": (F.huber_loss, (z, y), {"delta": 0.8, "reduction": "sum"}),
        "gaussian": (F.gaussian_nll_loss, (z, y, uniform(2, 3)), {"reduction": "none"}),
        "poisson": (F.poisson_nll_loss, (z, bits * 2), {}),
        "poisson rate": (F.poisson_nll_loss, (uniform(2, 3), bits * 2), {"log_input": False}),
    }


@pytest.mark.parametrize("name", sampled_cases())
def test_samples_have_the_hessian_as_second_moment(name: str) -> None:
    """All terms share a cotangent: the cross terms must vanish as well, between terms and between draws."""
    func, args, kwargs = sampled_cases()[name]
    z = args[0]

    def call(x: Tensor) -> Tensor:
        return func(x, *args[1:], **kwargs)

    c = cotangent(call, z)
    _, hessian = brute(call, z, c)
    lik = likelihood(bind(func, args, kwargs), z, c)
    draws = 10_000
    s = lik.sample(draws, rng(11)).flatten(1) * draws**0.5
    within(torch.einsum("vi,vj->vij", s, s), hessian)
    within(s, torch.zeros_like(hessian[0]))
    within(torch.einsum("vi,vj->vij", s[0::2], s[1::2]), torch.zeros_like(hessian))


@pytest.mark.parametrize("draws", [1, 2])
def test_few_draws_for_many_rows(draws: int) -> None:
    z = normal(1, 4).expand(10_000, 4)
    args = (z, indices((10_000,), 4))
    lik = likelihood(bind(F.cross_entropy, args, {"reduction": "sum"}), z, 1.0)
    generator = rng(11)
    s = lik.sample(draws, generator)
    p = z[0].softmax(0)
    within(torch.einsum("vni,vnj->nij", s, s), torch.diag(p) - torch.outer(p, p))
    assert not torch.equal(s, lik.sample(draws, generator))


def within(values: Tensor, mean: Tensor) -> None:
    """The mean over the first axis is within 4 standard errors of `mean`, and the test has power."""
    error = values.std(0) / values.shape[0] ** 0.5
    assert ((values.mean(0) - mean).abs() <= 4 * error + 1e-12).all()
    if mean.any():
        assert error.max() < 0.05 * mean.abs().max()


def test_draws_of_labels_are_the_models_own() -> None:
    z = normal(3, 4)
    lik = likelihood(bind(F.cross_entropy, (z, indices((3,), 4)), {"reduction": "sum"}), z, 1.0)
    s = lik.sample(5, rng()) * 5**0.5
    label = s.argmin(2)
    want = z.softmax(1).expand(5, -1, -1) - F.one_hot(label, 4)
    close(s, want)


def test_same_seed_same_bits() -> None:
    for func, args, kwargs in sampled_cases().values():
        lik = likelihood(
            bind(func, args, kwargs),
            args[0],
            cotangent(lambda z, f=func, a=args, k=kwargs: f(z, *a[1:], **k), args[0]),
        )
        first, second, other = (lik.sample(4, rng(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, second) and not torch.equal(first, other)
        state = torch.random.get_rng_state()
        lik.sample(1, rng())
        assert torch.equal(state, torch.random.get_rng_state())


# Arguments


def test_loss_calls_are_known_by_function() -> None:
    for name in ("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "huber_loss", "poisson_nll_loss"):
        assert is_loss(getattr(F, name))
    for func in (F.relu, torch.add, Tensor.mul, F.kl_div, Tensor.grad.__get__):
        assert not is_loss(func)
    assert losses.__all__


class Seen(TorchFunctionMode):
    """Binds every loss call as it arrives at a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[losses.LossCall, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_loss(func):
            call = bind(func, args, kwargs or {})
            assert sides_of(func, args, kwargs or {})[0] is call.logits
            self.calls.append((call, out))
        return out


MODULES: dict[str, tuple[nn.Module, Callable[[], tuple[Any, ...]]]] = {
    "CE": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1),
        lambda: (indices((4,), 3),),
    ),
    "NLL": (nn.NLLLoss(), lambda: (indices((4,), 3),)),
    "MSE": (nn.MSELoss(reduction="none"), lambda: (torch.zeros(4, 3),)),
    "BCE": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0, 1.0])), lambda: (torch.ones(4, 3),)),
    "Huber": (nn.HuberLoss(delta=0.5), lambda: (torch.zeros(4, 3),)),
    "SmoothL1": (nn.SmoothL1Loss(beta=0.5), lambda: (torch.zeros(4, 3),)),
    "L1": (nn.L1Loss(), lambda: (torch.zeros(4, 3),)),
    "Gaussian": (nn.GaussianNLLLoss(), lambda: (torch.zeros(4, 3), torch.ones(4, 3))),
    "Poisson": (nn.PoissonNLLLoss(), lambda: (torch.ones(4, 3),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_reach_a_mode_as_one_loss_call(name: str) -> None:
    module, rest = MODULES[name]
    z = normal(4, 3).float().requires_grad_()
    with Seen() as seen:
        out = module(z, *rest())
    ((call, value),) = seen.calls
    assert value is out and call.logits is z and not call.learned
    lik = likelihood(call, z.detach(), torch.ones_like(out))
    assert lik.gradient().shape == z.shape and not lik.gradient().requires_grad
    torch.testing.assert_close(lik.gradient(), torch.autograd.grad(out.sum(), z)[0])


def test_arguments_by_position_and_by_name_are_the_same() -> None:
    z, y, w = normal(4, 3), indices((4,), 3), uniform(3)
    one = bind(F.cross_entropy, (z, y, w, None, 2, None, "sum", 0.1), {})
    two = bind(
        F.cross_entropy,
        (),
        {"label_smoothing": 0.1, "reduction": "sum", "ignore_index": 2, "weight": w, "target": y, "input": z},
    )
    assert sides_of(F.cross_entropy, (), {"target": y, "input": z}) == (z, y)
    for call in (one, two):
        assert (call.reduction, call.options["ignore_index"], call.options["label_smoothing"]) == (
            "sum",
            2,
            0.1,
        )
        assert call.logits is z and torch.equal(call.options["weight"], w)
        assert set(call.options) == {"weight", "ignore_index", "label_smoothing"}
    assert "reduction='sum'" in str(one) and "(4, 3)" in str(one)


def test_every_argument_of_torch_is_known() -> None:
    """An argument that a new torch adds must be looked at before it is ignored."""
    known = {"input", "target", "weight", "size_average", "reduce", "reduction", "ignore_index"}
    known |= {"label_smoothing", "pos_weight", "delta", "beta", "var", "full", "eps", "log_input"}
    for func in (getattr(F, name) for name in dir(F)):
        if callable(func) and is_loss(func):
            assert set(inspect.signature(func).parameters) <= known


def test_exchanged_arguments_of_symmetric_losses() -> None:
    z, y, w = normal(4, 3).requires_grad_(), normal(4, 3, seed=3), uniform(4, 3)
    for func, kwargs in (
        (F.mse_loss, {"weight": w}),
        (F.huber_loss, {}),
        (F.smooth_l1_loss, {}),
        (F.l1_loss, {}),
    ):
        call = bind(func, (y, z), kwargs)
        assert call.logits is z and not call.learned and sides_of(func, (y, z), kwargs) == (z, y)
        want = torch.autograd.grad(func(y, z, **kwargs), z)[0]
        close(likelihood(call, z.detach(), 1.0).gradient(), want)
    assert bind(F.mse_loss, (y, y), {}).logits is y


def test_a_target_or_variance_that_learns_is_an_unknown_loss() -> None:
    z, y = normal(4, 3).requires_grad_(), normal(4, 3, seed=3).requires_grad_()
    v, w = uniform(4, 3).requires_grad_(), uniform(3).requires_grad_()
    for func, args, name in (
        (F.mse_loss, (z, y), "target"),
        (F.cross_entropy, (z, y), "target"),
        (F.gaussian_nll_loss, (z, y.detach(), v), "var"),
        (F.cross_entropy, (z, indices((4,), 3), w), "weight"),
    ):
        call = bind(func, args, {})
        assert not call.target.requires_grad
        with pytest.raises(UnknownLoss, match=f"{name} requires grad"):
            likelihood(call, z.detach(), 1.0)


Z = normal(4, 3)
BAD: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any], str]] = {
    "size_average": (F.mse_loss, (Z, Z), {"size_average": True}, "legacy"),
    "reduce": (F.cross_entropy, (Z, indices((4,), 3)), {"reduce": False}, "legacy"),
    "reduction": (F.mse_loss, (Z, Z), {"reduction": "average"}, "'average'"),
    "no such argument": (F.mse_loss, (Z, Z), {"delta": 1.0}, "delta"),
    "integer input": (F.mse_loss, (indices((3,), 4), normal(3)), {}, "int64"),
    "mse broadcast": (F.mse_loss, (Z, Z[:, :1]), {}, r"\(4, 1\)"),
    "poisson broadcast": (F.poisson_nll_loss, (Z, Z[0]), {}, r"\(3,\)"),
    "gaussian broadcast": (F.gaussian_nll_loss, (Z, Z[0], Z**2), {}, r"\(3,\)"),
    "mse weight": (F.mse_loss, (Z, Z), {"weight": uniform(3)}, "weight"),
    "bce weight": (F.binary_cross_entropy_with_logits, (Z, Z), {"weight": uniform(4)}, "weight"),
    "ce scalar": (F.cross_entropy, (Z[0, 0], Z[0, 0]), {}, "0-dimensional"),
    "ce rows": (F.cross_entropy, (Z, indices((3,), 3)), {}, r"\(4,\)"),
    "ce dtype": (F.cross_entropy, (Z, Z[:, 0]), {}, "float64"),
    "ce int32": (F.cross_entropy, (Z, indices((4,), 3).int()), {}, "int32"),
    "ce integer probabilities": (F.cross_entropy, (Z, indices((4, 3), 3)), {}, "probabilities"),
    "ce weight": (F.cross_entropy, (Z, indices((4,), 3), uniform(4)), {}, "3 classes"),
    "nll probabilities": (F.nll_loss, (Z, Z), {}, r"\(4,\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name: str) -> None:
    func, args, kwargs, message = BAD[name]
    with pytest.raises(BadInput, match=message) as caught:
        bind(func, args, kwargs)
    assert func.__name__ in str(caught.value)


@pytest.mark.parametrize("target", [[0, 1, 2, 3], [0, -1, 2, 1], [-100, 0, 7, 1]])
@pytest.mark.parametrize("func", [F.cross_entropy, F.nll_loss])
def test_class_indices_out_of_range_are_named(func: Callable[..., Tensor], target: list[int]) -> None:
    kept = [t for t in target if t != -100]
    with pytest.raises(BadInput, match=rf"\[{min(kept)}, {max(kept)}\].*3 classes"):
        check(bind(func, (Z, torch.tensor(target)), {}))
    check(bind(func, (Z, torch.tensor(target).clamp(0, 2)), {}))
    check(bind(func, (Z, torch.tensor([-100, 0, 1, 2])), {}))
    check(bind(func, (Z, torch.tensor([9, 0, 1, 2])), {"ignore_index": 9}))


def test_empty_batches_and_batches_without_a_counted_target() -> None:
    for func, args in ((F.cross_entropy, (Z[:0], indices((0,), 3))), (F.mse_loss, (Z[:0], Z[:0]))):
        with pytest.raises(BadInput, match="empty"):
            check(bind(func, args, {}))
    ignored = torch.full((4,), -100)
    with pytest.raises(BadInput, match="all 4 targets"):
        check(bind(F.cross_entropy, (Z, ignored), {}))
    call = bind(F.cross_entropy, (Z, ignored), {"reduction": "sum"})
    check(call)
    lik = likelihood(call, Z, 1.0)
    assert lik.terms == 0 and not lik.gradient().any() and not lik.root().any()
    with pytest.raises(BadInput, match="0/0"):
        likelihood(bind(F.mse_loss, (Z, Z), {"weight": torch.zeros_like(Z)}), Z, 1.0)


def test_shapes_of_logits_variance_and_c_are_checked() -> None:
    call = bind(F.mse_loss, (Z, Z), {"reduction": "none"})
    for logits, c, message in (
        (Z[0], torch.ones(4, 3), "logits"),
        (Z, 1.0, "c has shape"),
        (Z, Z[0], "c has"),
    ):
        with pytest.raises(BadInput, match=message):
            likelihood(call, logits, c)
    for var in (uniform(2), uniform(3), uniform(2, 4, 3), uniform(4, 2)):
        with pytest.raises(BadInput, match="var"):
            likelihood(bind(F.gaussian_nll_loss, (Z, Z, var), {}), Z, 1.0)
    pos = {"pos_weight": uniform(2, 4, 3)}
    with pytest.raises(BadInput, match="pos_weight"):
        likelihood(bind(F.binary_cross_entropy_with_logits, (Z, Z), pos), Z, 1.0)


def test_negative_weights_have_no_root() -> None:
    minus = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    bce = F.binary_cross_entropy_with_logits
    cases = [
        (bind(F.cross_entropy, (Z, indices((4,), 3)), {}), -1.0),
        (bind(F.cross_entropy, (Z, torch.tensor([0, 1, 2, 0])), {"weight": minus, "reduction": "sum"}), 1.0),
        (bind(F.mse_loss, (Z, Z), {"weight": Z, "reduction": "none"}), torch.ones(4, 3)),
        (bind(bce, (Z, torch.ones_like(Z)), {"pos_weight": minus}), 1.0),
        (bind(F.huber_loss, (Z, Z), {}), -0.1),
        (bind(F.poisson_nll_loss, (Z.abs(), -Z.abs()), {"log_input": False}), 1.0),
    ]
    for call, c in cases:
        lik = likelihood(call, Z, c)
        assert torch.isfinite(lik.gradient()).all() and torch.isfinite(lik.hessian_product(Z)).all()
        with pytest.raises(Undefined, match="negative"):
            lik.root()
        with pytest.raises(Undefined, match="negative"):
            lik.sample(1, rng())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_passes_nan_on(value: float) -> None:
    z = Z.clone()
    z[1, 1] = value
    cases = [
        (bind(F.cross_entropy, (z, indices((4,), 3)), {}), z, 1.0),
        (bind(F.poisson_nll_loss, (z, Z.abs()), {}), z, 1.0),
        (bind(F.mse_loss, (Z, Z), {}), Z, value),
        (bind(F.cross_entropy, (Z, indices((4,), 3)), {}), Z, value),
    ]
    if math.isnan(value):
        cases.append((bind(F.binary_cross_entropy_with_logits, (z, Z), {}), z, 1.0))
    for call, logits, c in cases:
        lik = likelihood(call, logits, c)
        with pytest.raises(NonFinite):
            lik.root()
        with pytest.raises(NonFinite):
            lik.sample(1, rng())


def test_sampling_needs_draws_and_takes_torchs_own_generator() -> None:
    lik = likelihood(bind(F.mse_loss, (Z, Z), {}), Z, 1.0)
    with pytest.raises(BadInput, match="0 draws"):
        lik.sample(0, rng())
    with pytest.raises(BadInput, match="generator"):
        lik.sample(1, 7)  # type: ignore[arg-type]
    torch.manual_seed(5)
    own = lik.sample(2)
    assert torch.equal(own, lik.sample(2, torch.Generator().manual_seed(5)))


# Batches


@pytest.mark.parametrize("case", ["plain", "weights", "ignore", "mse", "mse weights", "sum"])
def test_batches_scaled_to_their_union(case: str) -> None:
    z, y, w = normal(7, 3), indices((7,), 3), uniform(3)
    func, target, kwargs = F.cross_entropy, y, {}
    if case == "weights":
        kwargs = {"weight": w}
    elif case == "ignore":
        y[::3] = -100
    elif case == "sum":
        kwargs = {"reduction": "sum"}
    elif case.startswith("mse"):
        func, target = F.mse_loss, normal(7, 3, seed=3)

    def lik(part: slice) -> Likelihood:
        more = {"weight": uniform(7, 3)[part]} if case == "mse weights" else {}
        return likelihood(bind(func, (z[part], target[part]), {**kwargs, **more}), z[part], 1.0)

    parts = [lik(slice(0, 2)), lik(slice(2, 7))]
    scales = scale_to_union([p.terms for p in parts], parts[0].mean)
    joined = torch.cat([s * p.gradient() for s, p in zip(scales, parts, strict=True)])
    close(joined, lik(slice(0, 7)).gradient())


def test_a_union_without_terms_is_refused() -> None:
    with pytest.raises(BadInput, match="0/0"):
        scale_to_union([0.0, 0.0], True)
    assert scale_to_union([0.0, 0.0], False) == [1.0, 1.0]
