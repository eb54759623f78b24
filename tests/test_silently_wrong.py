"""What other tools get wrong without a word, each by value against brute force (or by hand), or refused by name."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from quantity_checks import dense_factors
from torch import Tensor, nn
from zoo import REFUSED
from zoo.parts import Apply, Mean, leaf

import layerwise as lw
from layerwise import errors

pytestmark = pytest.mark.usefixtures("float64")

Loss = Callable[[Tensor], Tensor]


def _observe(model: Any, loss: Callable[[], Tensor], *quantities: lw.Quantity) -> Any:
    with lw.observe(model, *quantities) as seen:
        loss().backward()
    return seen


def _exact(model: nn.Module, run: Callable[[], Tensor], loss_of: Loss, terms_of: Loss) -> Any:
    """Gradients of each sample, norms, moments and the GGN's diagonal are those of brute force; the results."""
    params = oracle.parameters(model)
    grads = oracle.per_sample_grad(params, lambda: terms_of(run()))
    want = {
        "per_sample_grad": grads, "squared_norm": oracle.squared_norm(grads), "variance": oracle.variance(grads),
        "second_moment": oracle.second_moment(grads), "diag_ggn": oracle.diag_ggn(params, run, loss_of),
    }  # fmt: skip
    quantities = lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(), lw.DiagGGN()
    seen = _observe(model, lambda: loss_of(run()), *quantities)
    for name, values in want.items():
        oracle.assert_close(dict(getattr(seen, name)), values)
    return seen


def _classes(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    """The same under the mean cross entropy of one label a sample."""
    return _exact(
        model, lambda: model(x), lambda z: F.cross_entropy(z, y),
        lambda z: F.cross_entropy(z, y, reduction="none") / len(y),
    )  # fmt: skip


def _factors(model: nn.Module, x: Tensor, y: Tensor, sharing: str = "expand") -> None:
    """KFLR's factors of every layer are those of brute force."""
    loss_of = lambda z: F.cross_entropy(z, y)  # noqa: E731
    want = oracle.kfac_factors(model, lambda: model(x), loss_of, sharing=sharing, every=True)
    got = dense_factors(_observe(model, lambda: loss_of(model(x)), lw.KFLR(sharing)).kflr)
    for i in (0, 1):
        oracle.assert_close({n: f[i] for n, f in got.items()}, {n: f[i] for n, f in want.items()})


def _labels(n: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, (n,))


# BackPACK ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_targets_in_second_order(reduction: str) -> None:
    """Elsewhere the GGN's diagonal is 0.7 to 4.8 times the truth."""
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    y = torch.tensor([0, -100, 2, -100, -100, 1])
    loss_of = lambda z: F.cross_entropy(z, y, reduction=reduction)  # noqa: E731
    count = 3 if reduction == "mean" else 1
    _exact(model, lambda: model(x), loss_of, lambda z: F.cross_entropy(z, y, reduction="none") / count)
    seen = _observe(model, lambda: loss_of(model(x)), lw.KFLR(), lw.DiagHessian())
    want = oracle.kfac_factors(model, lambda: model(x), loss_of)
    oracle.assert_close({n: seen.kflr.blocks[n].B for n in want}, {n: b for n, (_, b) in want.items()})
    params = oracle.parameters(model)
    oracle.assert_close(dict(seen.diag_hessian), oracle.diag_hessian(params, lambda: loss_of(model(x))))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_circular_padding(dims: int) -> None:
    """Elsewhere, Opacus and asdl too, the input is unfolded with zeros around it."""
    conv = getattr(nn, f"Conv{dims}d")(2, 3, 3, padding=1, padding_mode="circular")
    model = nn.Sequential(conv, nn.Tanh(), Mean(*range(2, 2 + dims)))
    x, y = torch.randn(3, 2, *(4, 3, 3)[:dims]), _labels(3)
    _classes(model, x, y)
    _factors(model, x, y)


def test_norms_of_gradients_of_grouped_convolutions() -> None:
    """Elsewhere 87 % off."""
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.GroupNorm(3, 6), Mean(-1, -2), nn.Linear(6, 3))
    x, y = torch.randn(4, 4, 4, 3), _labels(4)
    seen = _classes(model, x, y)
    each = seen.per_sample_grad["0.weight"].flatten(1).square().sum(1)
    oracle.assert_close(seen.squared_norm["0.weight"], each)
    _factors(model, x, y)


def test_tied_parameters() -> None:
    """Gradients of all uses are added before they are squared."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    _classes(model, torch.randn(5, 4), _labels(5))


def test_a_second_backward_adds() -> None:
    """Elsewhere it overwrites what the first one left."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), _labels(6)
    quantities = lw.SecondMoment(), lw.DiagGGN(), lw.PerSampleGrad()
    with lw.observe(model, *quantities) as seen:
        for rows in (slice(0, 2), slice(2, 6)):
            F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
    whole = _observe(model, lambda: F.cross_entropy(model(x), y, reduction="sum"), *quantities)
    for q in quantities:
        oracle.assert_close(dict(seen[q]), dict(whole[q]))
        assert all(float(v.abs().max()) > 0 for v in seen[q].values())


@pytest.mark.parametrize(
    ("quantity", "power"),
    [(lw.DiagGGN(), 1), (lw.DiagHessian(), 1), (lw.PerSampleGrad(), 1), (lw.SecondMoment(), 2), (lw.Variance(), 2)],
    ids=repr,
)
def test_ten_times_the_loss(quantity: lw.Quantity, power: int) -> None:
    """Elsewhere the GGN does not change."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), _labels(6)
    one = _observe(model, lambda: F.cross_entropy(model(x), y), quantity)[quantity]
    ten = _observe(model, lambda: 10 * F.cross_entropy(model(x), y), quantity)[quantity]
    oracle.assert_close(dict(ten), {name: 10**power * v for name, v in one.items()})


def test_ten_times_the_loss_in_kronecker_factors() -> None:
    """Ten times the output factor, the input factor as it was."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), _labels(6)
    one, ten = (
        dense_factors(_observe(model, lambda c=c: c * F.cross_entropy(model(x), y), lw.KFLR()).kflr) for c in (1, 10)
    )
    oracle.assert_close({n: b for n, (_, b) in ten.items()}, {n: 10 * b for n, (_, b) in one.items()})
    oracle.assert_close({n: a for n, (a, _) in ten.items()}, {n: a for n, (a, _) in one.items()})


@pytest.mark.filterwarnings("ignore::layerwise.errors.SlowPath")
def test_one_quantity_used_for_hundreds_of_steps_behind_an_unknown_call() -> None:
    """Elsewhere results are kept by memory address, and 114 of 400 steps were wrong."""
    model = Apply(
        lambda m, x: m.head(torch.pairwise_distance(m.inner(x).tanh()[:, None], m.centres)),
        inner=nn.Linear(4, 4), centres=leaf(5, 4), head=nn.Linear(5, 3),
    )  # fmt: skip
    params = oracle.parameters(model)
    each, moment = lw.PerSampleGrad(), lw.SecondMoment()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(300):
        n = 2 + step % 3
        x, y = torch.randn(n, 4), _labels(n)
        want = oracle.per_sample_grad(params, lambda x=x, y=y: F.cross_entropy(model(x), y, reduction="none") / len(y))
        opt.zero_grad()
        seen = _observe(model, lambda x=x, y=y: F.cross_entropy(model(x), y), each, moment)
        oracle.assert_close(dict(seen[each]), want)
        oracle.assert_close(dict(seen[moment]), oracle.second_moment(want))
        opt.step()


EVERY = [
    lw.PerSampleGrad(), lw.SecondMoment(), lw.Variance(), lw.ClippedGrad(1.0), lw.DiagGGN(), lw.DiagGGN(1),
    lw.KFAC(), lw.KFLR(), lw.DiagHessian(), lw.SqrtGGN(),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("quantity", [*EVERY, lw.EKFAC(), lw.PairwiseDot(), lw.NoiseScale(), lw.Sketch(2)], ids=repr)
def test_a_batch_that_is_not_finite_is_an_error(quantity: lw.Quantity, kind: str) -> None:
    """NaN in the loss; or an infinite input behind a saturated tanh: the loss is finite and its gradient is not."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), _labels(6)
    x[3, 1] = float("nan") if kind == "loss" else float("inf")
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    assert bool(loss().isfinite()) == (kind == "gradient")
    with pytest.raises(errors.NonFinite) as caught:
        _observe(model, loss, quantity)
    assert kind == "loss" or "0.weight" in str(caught.value) or "sample 3" in str(caught.value)
    assert all(p.grad is None for p in model.parameters())


def _distances() -> nn.Module:
    return Apply(
        lambda m, x: m.head(torch.pairwise_distance(x[:, None], m.centres)), centres=leaf(5, 4), head=nn.Linear(5, 3)
    )


def test_an_unknown_layer_is_exact_and_says_that_it_is_slow() -> None:
    """Elsewhere there is a warning in place of the result."""
    model = _distances()
    with pytest.warns(errors.SlowPath, match=r"of centres\b") as caught:
        _classes(model, torch.randn(4, 4), _labels(4))
    assert all(Path(w.filename).parent == Path(__file__).parent for w in caught)  # it points at the caller's line


# asdl -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_linear_layers_of_three_dimensional_inputs(sharing: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Mean(1), nn.Linear(5, 3))
    x, y = torch.randn(3, 4, 4), _labels(3)
    _classes(model, x, y)
    _factors(model, x, y, sharing)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_embeddings(sharing: str) -> None:
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), Mean(1), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.tensor([[0, 2, 2], [1, 1, 5], [4, 0, 3]]), _labels(3)
    seen = _classes(model, x, y)
    assert not seen.second_moment["0.weight"][0].any()  # the padding's
    _factors(model, x, y, sharing)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_reused_layers(sharing: str) -> None:
    inner = nn.Linear(4, 4)
    model = nn.Sequential(inner, nn.Tanh(), inner, nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(5, 4), _labels(5)
    _classes(model, x, y)
    _factors(model, x, y, sharing)


# The scaling of Kronecker factors, by hand --------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 10.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_of_a_linear_layer_under_squared_error(reduction: str, factor: float) -> None:
    """A = XᵀX/N. The Hessian of each sample's term is 2c/(N·O)·1 for a mean, 2c·1 for a sum; B is its sum over n."""
    n, o, model = 6, 3, nn.Linear(4, 3)
    x, y = torch.randn(n, 4), torch.randn(n, o)
    kflr = _observe(model, lambda: factor * F.mse_loss(model(x), y, reduction=reduction), lw.KFLR()).kflr
    b = 2 * factor * torch.eye(o) * (1 / o if reduction == "mean" else n)
    oracle.assert_close(kflr.factors["weight"][0][0], x.T @ x / n)
    oracle.assert_close(kflr.factors["weight"][1][0], b)
    oracle.assert_close(kflr.factors["bias"][0][0], b)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_of_a_linear_layer_under_cross_entropy(reduction: str) -> None:
    """B = sum over n of w (diag p − ppᵀ), w = 1/N or 1."""
    n, model = 6, nn.Linear(4, 3)
    x, y = torch.randn(n, 4), _labels(n)
    kflr = _observe(model, lambda: F.cross_entropy(model(x), y, reduction=reduction), lw.KFLR()).kflr
    p = model(x).detach().softmax(1)
    b = (torch.diag(p.sum(0)) - p.T @ p) * (1 / n if reduction == "mean" else 1)
    oracle.assert_close(kflr.factors["weight"][0][0], x.T @ x / n)
    oracle.assert_close(kflr.factors["weight"][1][0], b)


def test_factors_of_positions_under_both_conventions() -> None:
    """Expand: A = mean over n, t, B = sum of ssᵀ over n, t. Reduce: means and sums over t first. Here s_t = s/T."""
    n, t, model = 5, 4, nn.Sequential(nn.Linear(4, 3), Mean(1))
    x, y = torch.randn(n, t, 4), torch.randn(n, 3)
    expand, reduce = lw.KFLR(), lw.KFLR("reduce")
    seen = _observe(model, lambda: F.mse_loss(model(x), y), expand, reduce)
    a, b = seen[expand].factors["0.weight"]
    oracle.assert_close(a[0], x.flatten(0, 1).T @ x.flatten(0, 1) / (n * t))
    oracle.assert_close(b[0], 2 / 3 * torch.eye(3) / t)
    a, b = seen[reduce].factors["0.weight"]
    oracle.assert_close(a[0], x.mean(1).T @ x.mean(1) / n)
    oracle.assert_close(b[0], 2 / 3 * torch.eye(3))


def test_factors_of_a_convolution_are_those_of_a_linear_layer_on_its_windows() -> None:
    conv, x, y = nn.Conv1d(2, 3, 2), torch.randn(4, 2, 5), torch.randn(4, 3, 4)
    a, b = _observe(conv, lambda: F.mse_loss(conv(x), y), lw.KFLR()).kflr.factors["weight"]
    windows = x.unfold(2, 2, 1).permute(0, 2, 1, 3).reshape(16, 4)  # [N·T, channels·kernel]
    oracle.assert_close(a[0], windows.T @ windows / 16)
    oracle.assert_close(b[0], 16 * 2 / 48 * torch.eye(3))


def test_one_draw_of_kfac_has_the_scale_of_the_loss() -> None:
    """B of one draw is the sum over n of ssᵀ with s = (p − e_ŷ)/sqrt(N): its trace from the labels drawn."""
    n, model = 6, nn.Linear(4, 3)
    x, y = torch.randn(n, 4), _labels(n)
    seen = _observe(model, lambda: F.cross_entropy(model(x), y), lw.KFAC(1, torch.Generator().manual_seed(0)))
    b = seen.kfac.factors["weight"][1][0]
    p = model(x).detach().softmax(1)
    candidates = torch.eye(3)[None] - p[:, None]  # [N, label, C]
    choices = torch.cartesian_prod(*[torch.arange(3)] * n)
    found = [sum(torch.outer(candidates[i, c], candidates[i, c]) for i, c in enumerate(row)) / n for row in choices]
    assert min(float((b - f).abs().max()) for f in found) < 1e-14


# Every tool that looks at modules ---------------------------------------------------------------


def _half_scripted() -> tuple[nn.Module, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script says that it is deprecated
        inner = nn.Linear(4, 4)
        block = torch.jit.script(nn.Sequential(inner, nn.Tanh()))
    model = Apply(lambda m, x: m.head(m.block(x) + m.inner(x)), inner=inner, head=nn.Linear(4, 3))
    model.block = block
    return model, "inner.weight"


def _half_in_a_function(name: str) -> tuple[nn.Module, str]:
    return next(r for r in REFUSED if r.name == name).build(), "w"


@pytest.mark.parametrize("quantity", EVERY, ids=repr)
@pytest.mark.parametrize(
    "make",
    [_half_scripted, lambda: _half_in_a_function("half_covered"), lambda: _half_in_a_function("half_covered_chain")],
    ids=["scripted", "function", "function_chain"],
)
def test_a_parameter_of_which_one_use_is_hidden(make: Callable[[], tuple[nn.Module, str]], quantity: Any) -> None:
    """Once in a known layer, once in a scripted block or a custom autograd.Function."""
    model, name = make()
    x, y = torch.randn(4, 4), _labels(4)
    with pytest.raises(errors.UncoveredUse, match=name):
        _observe(model, lambda: F.cross_entropy(model(x), y), quantity)
    assert all(p.grad is None for p in model.parameters())


# What a prototype of this library got wrong -------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_time_first_with_as_many_steps_as_samples(n: int, t: int) -> None:
    """Guessing the samples' axis from sizes was 130 % off at T = N."""
    inner, head = nn.Linear(2, 3), nn.Linear(3, 3)
    mixing = torch.randn(t, t).tril()
    model = Apply(lambda m, x: torch.einsum("st,tnh->snh", mixing, m.inner(x.transpose(0, 1)).tanh()),
        inner=inner, head=head,
    )  # fmt: skip
    x, y = torch.randn(n, t, 2), _labels(n)
    run = lambda: head(model(x).mean(0))  # noqa: E731
    _exact(model, run, lambda z: F.cross_entropy(z, y), lambda z: F.cross_entropy(z, y, reduction="none") / n)


def test_as_many_outputs_as_samples() -> None:
    """170 % off."""
    n = 4
    model = nn.Sequential(nn.Linear(n, n), nn.Tanh(), nn.Linear(n, n))
    x, y = torch.randn(n, n), _labels(n, n)
    _classes(model, x, y)
    _factors(model, x, y)


def test_observe_inside_observe() -> None:
    """Node hooks fire on every backward pass through a node: each context counts once."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), _labels(6)
    outer, inner, wanted = lw.SecondMoment(), lw.SecondMoment(), lw.SecondMoment()
    want = dict(_observe(model, lambda: F.cross_entropy(model(x), y), wanted)[wanted])
    with lw.observe(model, outer, lw.DiagGGN()) as a, lw.observe(model, inner, lw.KFAC()) as b:
        F.cross_entropy(model(x), y).backward()
    oracle.assert_close(dict(a[outer]), want)
    oracle.assert_close(dict(b[inner]), want)


def test_results_are_freed_at_once() -> None:
    """One reference cycle turned per-sample gradients from 8 into 251 times the gradient."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), _labels(6)
    quantities = [
        lw.PerSampleGrad(), lw.SecondMoment(), lw.Variance(), lw.ClippedGrad(1.0), lw.DiagGGN(), lw.SqrtGGN(),
        lw.KFAC(), lw.EKFAC(None), lw.DiagHessian(), lw.PairwiseDot(), lw.NoiseScale(),
    ]  # fmt: skip
    gc.collect()
    gc.disable()
    try:
        seen = _observe(model, lambda: F.cross_entropy(model(x), y), *quantities)
        refs = [weakref.ref(seen)]
        for q in quantities:
            result = seen[q]
            refs.append(weakref.ref(result))
            if isinstance(result, lw.ByParameter):
                refs += [weakref.ref(v) for v in result.values()]
        del seen, result
        assert [ref() for ref in refs] == [None] * len(refs)
    finally:
        gc.enable()


def test_a_compiled_model_with_an_activation_in_place() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    compiled = torch.compile(model, backend="eager")
    x, y = torch.randn(6, 4), _labels(6)
    for _ in range(2):  # compiled inside, and before
        _exact(
            model, lambda: compiled(x), lambda z: F.cross_entropy(z, y),
            lambda z: F.cross_entropy(z, y, reduction="none") / len(y),
        )  # fmt: skip
        compiled(x)


def test_second_derivatives_of_group_norm() -> None:
    """Torch's batched double backward of it is wrong (2.13)."""
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), Mean(-1), nn.Linear(4, 3))
    x, y = torch.randn(3, 2, 5), _labels(3)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    params = oracle.parameters(model)
    want = oracle.hessian(params, closure)
    seen = _observe(model, closure, lw.DiagHessian(), lw.SqrtGGN())
    oracle.assert_close(torch.cat([v.flatten() for v in seen.diag_hessian.values()]), want.diagonal())
    oracle.assert_close(lw.Hessian(model, closure) @ torch.eye(len(want)), want)
    ggn = oracle.ggn(params, lambda: model(x), lambda z: F.cross_entropy(z, y))
    root = torch.cat([seen.sqrt_ggn[name].flatten(2) for name in params], -1).flatten(0, 1)
    oracle.assert_close(root.T @ root, ggn)
    oracle.assert_close(lw.GGN(model, closure) @ torch.eye(len(want)), ggn)


class Parts(lw.Quantity):
    """A quantity of the user's own, which gives out what it is handed."""

    concatenate, powers = True, (1,)

    def compute(self, gradient: Any) -> tuple[Tensor, ...]:
        return (gradient.per_sample()[0],)


@pytest.mark.parametrize("each", [lw.PerSampleGrad(), Parts()], ids=lambda each: type(each).__name__)
def test_results_of_a_single_sample_are_not_the_gradient_itself(each: lw.Quantity) -> None:
    """Autograd keeps the cotangent of an expanded leaf as its `.grad`, and a second backward pass adds to it."""
    model = Apply(lambda m, x: (x + m.token.expand(len(x), -1)).tanh().sum(), token=nn.Parameter(torch.randn(1, 3)))
    first, second = torch.randn(1, 3), torch.randn(2, 3)
    seen = _observe(model, lambda: lw.as_loss(lambda z: z, reduction="sum")(model(first)), each)
    value, before = seen[each]["token"], seen[each]["token"].clone()
    model(second).backward()
    assert torch.equal(value, before)
    assert not torch.equal(model.token.grad, before[0])
