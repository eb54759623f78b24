"""Quantities of the per-sample gradients beyond moments, against the oracle, and `accumulate` against one batch."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from torch import Tensor, nn
from zoo import Case, cases

import layerwise as lw
from layerwise import errors
from layerwise.gradient import parameter as gradients
from layerwise.quantities import (
    ClippedGrad,
    DiagGGN,
    FisherDiag,
    NoiseScale,
    PairwiseDot,
    PerSampleGrad,
    SecondMoment,
    Sketch,
    SquaredNorm,
    Variance,
)
from layerwise.rows import contract
from layerwise.rows import project as projection
from layerwise.rows.base import Rows
from layerwise.rows.layout import MatrixLayout
from layerwise.rows.project import TensorSketch

pytestmark = pytest.mark.usefixtures("float64")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@one_in(3, case=cases(first_loss_only=True))
def test_curvature_of_each_sample(case: Case) -> None:
    """Sampled GGN diagonals of each sample sum to those of the same draws; the table test has the exact ones."""
    instance = case.make(seed=0)
    sampled = [DiagGGN(5, _generator(), per_sample=True), DiagGGN(5, _generator())]
    with lw.observe(instance.subject, *sampled) as seen:
        instance.loss().backward()
    sums = {name: g.sum(0) for name, g in seen[sampled[0]].items()}
    oracle.assert_close(sums, dict(seen[sampled[1]]))


# The true Fisher ---------------------------------------------------------------------------------


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _with_finite(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[Mapping, Mapping]:
    """Both without their infinities, which must be in the same places."""
    for name, w in want.items():
        assert torch.equal(got[name].isinf(), w.isinf()), name
    return tuple({k: v.masked_fill(v.isinf(), 0.0) for k, v in x.items()} for x in (got, want))


def _batch(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = _generator(1)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_true_fisher_is_the_mean_over_the_models_labels(reduction: str) -> None:
    """Against the expectation by enumeration of all labels, one sample at a time."""
    model, (x, y) = _net(), _batch()
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x:
        logp = F.log_softmax(model(row), 0)
        for c in range(3):
            grads = torch.autograd.grad(logp[c], list(model.parameters()), retain_graph=True)
            for name, g in zip(want, grads, strict=True):
                want[name] += logp[c].detach().exp() * g**2 / (len(x) if reduction == "mean" else 1)
    draws = 4000
    with lw.observe(model, FisherDiag("model", draws, _generator()), DiagGGN()) as seen:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    oracle.assert_close(dict(seen.diag_ggn), want)
    for name, w in want.items():
        assert float((seen.fisher_diag[name] - w).norm() / w.norm()) < 3 / draws**0.5


def test_the_true_fisher_shares_its_labels_with_the_sampled_ggn() -> None:
    model, (x, y) = _net(), _batch()
    with lw.observe(model, FisherDiag(draws=2, generator=_generator())) as one:
        F.cross_entropy(model(x), y).backward()
    with lw.observe(model, DiagGGN(2, _generator())) as other:
        F.cross_entropy(model(x), y).backward()
    oracle.assert_close(dict(one.fisher_diag), dict(other.diag_ggn), rel=1e-14)


def test_no_true_fisher_without_a_likelihood() -> None:
    model, (x, _) = _net(), _batch()
    y = torch.zeros(len(x), 3)
    with pytest.raises(errors.Undefined, match=r"huber_loss.*labels=.data"), lw.observe(model, FisherDiag()):
        F.huber_loss(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    with lw.observe(model, FisherDiag("data"), SecondMoment()) as seen:
        F.huber_loss(model(x), y).backward()
    want = {name: len(x) * m for name, m in seen.second_moment.items()}
    oracle.assert_close(dict(seen.fisher_diag), want)


# Noise -------------------------------------------------------------------------------------------


def test_the_noise_scale_is_one_number_for_all_scalings() -> None:
    model, (x, y) = _net(), _batch()
    found = []
    for scale in ("loss", "sample"):
        for factor, reduction in ((1, "mean"), (1, "sum"), (10, "mean")):
            cheap = NoiseScale(snr=False)
            with lw.observe(model, NoiseScale(), scale=scale) as seen, lw.observe(model, cheap) as other:
                (factor * F.cross_entropy(model(x), y, reduction=reduction)).backward()
            oracle.assert_close(other[cheap].total, seen.noise_scale.total)
            found.append(seen.noise_scale)
            with pytest.raises(errors.Undefined, match="snr=True"):
                _ = other[cheap].snr
    for noise in found[1:]:
        oracle.assert_close(noise.total, found[0].total)
        oracle.assert_close(*_with_finite(noise, found[0]))
        oracle.assert_close(dict(noise.snr), dict(found[0].snr))


def test_the_noise_estimates_are_unbiased() -> None:
    """Over all pairs of a population of samples: the mean estimate is that of the whole population."""
    model, (x, y) = _net(), _batch(6)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    noise, signal = 0.0, 0.0
    for pair in pairs:
        with lw.observe(model, NoiseScale()) as seen:
            F.cross_entropy(model(x[list(pair)]), y[list(pair)]).backward()
        noise += float(seen.noise_scale.noise.total) / len(pairs)
        signal += float(seen.noise_scale.signal.total) / len(pairs)
    with lw.observe(model, NoiseScale()) as whole:
        F.cross_entropy(model(x), y).backward()
    assert noise == pytest.approx(float(whole.noise_scale.noise.total), rel=1e-10)
    assert signal == pytest.approx(float(whole.noise_scale.signal.total), rel=1e-8)


def test_one_sample_has_no_noise_scale() -> None:
    model, (x, y) = _net(), _batch()
    with lw.observe(model, NoiseScale()) as seen:
        F.cross_entropy(model(x[:1]), y[:1]).backward()
        with pytest.raises(errors.Undefined, match="N = 1"):
            _ = seen.noise_scale
        F.cross_entropy(model(x[1:2]), y[1:2]).backward()
    assert float(seen.noise_scale.noise.total) > 0


def test_samples_that_agree_and_gradients_of_zero() -> None:
    model = nn.Linear(2, 1)
    x = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    with lw.observe(model, NoiseScale()) as seen:
        F.mse_loss(model(x), torch.zeros(4, 1), reduction="sum").backward()
    snr = seen.noise_scale.snr["weight"]
    assert float(snr[0, 1]) == 0 and float(snr[0, 0]) > 1e12
    assert abs(float(seen.noise_scale["weight"])) < 1e-12


# Clipping ----------------------------------------------------------------------------------------


def test_norms_no_larger_than_the_clip_leave_the_gradient() -> None:
    model, (x, y) = _net(), _batch()
    with lw.observe(model, ClippedGrad(1e6)) as seen:
        F.cross_entropy(model(x), y).backward()
    oracle.assert_close(dict(seen.clipped_grad), dict(seen.grad), rel=1e-12)


def test_a_sample_without_gradient_is_not_divided_by_zero() -> None:
    model, (x, y) = _net(), _batch()
    y[2] = -100
    with lw.observe(model, ClippedGrad(0.01), PerSampleGrad()) as seen:
        F.cross_entropy(model(x), y).backward()
    want, norms = oracle.clipped_grad(dict(seen.per_sample_grad), 0.01)
    assert float(norms[2]) == 0
    oracle.assert_close(dict(seen.clipped_grad), want)


@pytest.mark.parametrize(("reduction", "scale"), [("sum", "loss"), ("sum", "sample"), ("mean", "loss")])
def test_clipping_over_several_backward_passes(reduction: str, scale: str) -> None:
    model, (x, y) = _net(), _batch()
    counts = torch.tensor([3] * 3 + [4] * 4) if reduction == "mean" else 1
    grads = oracle.per_sample_grad(
        oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none") / counts
    )
    max_norm = float(oracle.total(oracle.squared_norm(grads)).sqrt().median()) * 1.01
    want, norms = oracle.clipped_grad(grads, max_norm)
    assert bool((norms > max_norm).any()) and bool((norms < max_norm).any())
    with lw.observe(model, ClippedGrad(max_norm), scale=scale) as parts:
        for here in (slice(0, 3), slice(3, 7)):
            F.cross_entropy(model(x[here]), y[here], reduction=reduction).backward()
    oracle.assert_close(dict(parts.clipped_grad), want, rel=1e-12)
    oracle.assert_close(parts.clipped_grad.norms, norms, rel=1e-12)


def test_clipping_that_depends_on_later_batches_is_refused() -> None:
    model, (x, y) = _net(), _batch()
    with lw.observe(model, ClippedGrad(1.0), scale="sample") as seen:
        F.cross_entropy(model(x), y).backward()
        before = {name: g.clone() for name, g in seen.clipped_grad.items()}
        grads = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(errors.Undefined, match="samples still to come"):
            F.cross_entropy(model(x), y).backward()
    assert all(torch.equal(seen.clipped_grad[name], g) for name, g in before.items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_clipping_in_pooled_batches() -> None:
    """Of N g_n, which no other batch changes, where every sample has as many terms."""
    model, (x, y) = _net(), _batch()
    batches = list(zip(x.split(3), y.split(3), strict=True))
    with lw.observe(model, ClippedGrad(1.0), scale="sample") as whole:
        F.cross_entropy(model(x), y).backward()
    assert bool((whole.clipped_grad.norms > 1).any()) and bool((whole.clipped_grad.norms < 1).any())
    pooled = lw.accumulate(model, F.cross_entropy, batches, ClippedGrad(1.0), scale="sample")
    oracle.assert_close(dict(pooled.clipped_grad), dict(whole.clipped_grad), rel=1e-12)
    oracle.assert_close(pooled.clipped_grad.norms, whole.clipped_grad.norms, rel=1e-12)
    with pytest.raises(errors.Undefined, match='in the others; use scale="sample"'):
        lw.accumulate(model, F.cross_entropy, batches, ClippedGrad(1.0))
    y[0] = -100
    with pytest.raises(errors.Undefined, match="loss terms a sample"):
        lw.accumulate(model, F.cross_entropy, batches, ClippedGrad(1.0), scale="sample")


def test_clipping_holds_no_per_sample_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = _net(), _batch()
    monkeypatch.setattr(contract, "per_sample", lambda *a, **k: pytest.fail("[N,P] was asked for"))
    with lw.observe(model, ClippedGrad(0.1), SquaredNorm(), Sketch(4), NoiseScale()) as seen:
        F.cross_entropy(model(x), y).backward()
    assert float(seen.clipped_grad.norms.max()) > 0


def test_the_gradient_of_some_parameters_is_clipped_by_its_own_norm() -> None:
    model, (x, y) = _net(), _batch()
    weight = model[2].weight
    with lw.observe(model, ClippedGrad(0.05), PerSampleGrad()) as seen:
        F.cross_entropy(model(x), y).backward(inputs=[weight])
    assert set(seen.clipped_grad) == {"2.weight"}
    want, norms = oracle.clipped_grad({"2.weight": seen.per_sample_grad["2.weight"]}, 0.05)
    oracle.assert_close(dict(seen.clipped_grad), want)
    oracle.assert_close(seen.clipped_grad.norms, norms)


@pytest.mark.filterwarnings("ignore")
def test_a_norm_that_is_not_finite() -> None:
    model, x = _net().float(), _batch()[0].float()
    x[1] *= 1e30
    with pytest.raises(errors.NonFinite, match="sample 1"), lw.observe(model, ClippedGrad(1.0)):
        F.mse_loss(model[0](x), torch.zeros(len(x), 5), reduction="sum").mul(1e-25).backward()
    assert all(p.grad is None for p in model.parameters())


# Two stages, in general ---------------------------------------------------------------------------


class Share(lw.Quantity):
    """Each parameter's gradient over the norm of all of them: needs all before any."""

    revisits = True
    powers = (0,)

    def compute(self, gradient: Any) -> tuple[Tensor, ...]:
        return (gradient.total()[0].square().sum(),)

    def survey(self, values: Any, batch: Any) -> Any:
        return torch.stack([v[0] for v in values.values()]).sum().sqrt()

    def revisit(self, gradient: Any, survey: Any) -> tuple[Tensor, ...]:
        return (gradient.total()[0] / survey,)


def test_a_second_stage_sees_every_parameter_after_all_of_them() -> None:
    model, (x, y) = _net(), _batch()
    with lw.observe(model, Share(), SecondMoment()) as seen:
        F.cross_entropy(model(x), y).backward()
    norm = torch.cat([g.reshape(-1) for g in seen.grad.values()]).norm()
    oracle.assert_close(dict(seen.share), {name: g / norm for name, g in seen.grad.items()})


# Dots --------------------------------------------------------------------------------------------


def test_dots_between_batches_are_refused() -> None:
    model, (x, y) = _net(), _batch()
    with lw.observe(model, PairwiseDot()) as seen:
        F.cross_entropy(model(x), y).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(errors.Undefined, match="7 samples and 3 more"):
            F.cross_entropy(model(x[:3]), y[:3]).backward()
    assert seen.pairwise_dot.total.shape == (7, 7)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_chunks_of_samples_without_common_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight used by a row form and through a derived tensor, two samples at a time."""
    monkeypatch.setattr("layerwise.gradient.parameter._CHUNK", 25)
    weight = nn.Parameter(torch.randn(3, 4, generator=_generator()))
    x, y = _batch()
    logits = lambda: F.linear(x, weight) + F.linear(x, weight.tanh())  # noqa: E731
    sketch = Sketch(3, _generator())
    with lw.observe({"w": weight}, PairwiseDot(), ClippedGrad(0.1), sketch, DiagGGN(per_sample=True)) as seen:
        F.cross_entropy(logits(), y).backward()
    params = {"w": weight}
    grads = oracle.per_sample_grad(params, lambda: F.cross_entropy(logits(), y, reduction="none") / 7)
    oracle.assert_close(dict(seen.pairwise_dot), oracle.pairwise_dot(grads))
    oracle.assert_close(dict(seen.clipped_grad), oracle.clipped_grad(grads, 0.1)[0])
    oracle.assert_close(dict(seen.sketch), oracle.sketch(grads, {"w": sketch.matrix("w", (3, 4), x)}))
    terms = lambda z: F.cross_entropy(z, y, reduction="none") / 7  # noqa: E731
    oracle.assert_close(dict(seen.diag_ggn), oracle.diag_ggn(params, logits, terms, per_sample=True))


# Sketches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float", "index", "none", "scale", "turned"])
@pytest.mark.parametrize("t", [1, 3, 40])
def test_sketches_of_rows(kind: str, t: int) -> None:
    """Every form of rows, on both sides of the cost rule, against the dense gradients."""
    n, k, o, i = (4, 6, 1, 1) if kind == "scale" else (4, 2 if kind in ("float", "none") else 1, 5, 7)
    i = 1 if kind == "none" else i
    g = torch.randn(2, n, t, k, o, generator=_generator(1))
    a = torch.randn(n, t, k, i, generator=_generator(2))
    inputs = {"index": torch.randint(i, (n, t), generator=_generator(3)), "none": None}.get(kind, a)
    rows, shape = Rows(inputs, g, i), (i, o) if kind == "turned" else (k * o, i)
    layout = MatrixLayout.whole(shape, (k, o, i), (0, 2, 1) if kind == "turned" else None)
    dense = layout.fold(contract.per_sample(rows)).flatten(2)
    for dim in (1, 2, 9, 300):
        sketch = TensorSketch.drawn("w", shape, dim, 5, g.device)
        want = dense @ sketch.matrix(g).T
        got = sketch.of_rows(rows, layout)
        assert got is not None
        oracle.assert_close(got, want, rel=1e-11)
        oracle.assert_close(sketch.of_gradients(dense), want, rel=1e-11)


def test_sketches_of_few_positions_are_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two forms give the same numbers, and each is taken."""
    a, g = torch.randn(3, 2, 1, 200, generator=_generator()), torch.randn(1, 3, 2, 1, 100, generator=_generator(1))
    sketch, layout = TensorSketch.drawn("w", (100, 200), 64, 0, g.device), MatrixLayout.whole((100, 200), (1, 100, 200))
    with monkeypatch.context() as patch:
        patch.setattr(projection, "chunks", lambda rows: pytest.fail("formed a gradient"))
        fast = sketch.of_rows(Rows(a, g, 200), layout)
    monkeypatch.setattr(projection, "convolution_is_cheaper", lambda *sizes: False)
    slow = sketch.of_rows(Rows(a, g, 200), layout)
    assert fast is not None and slow is not None
    oracle.assert_close(fast, slow, rel=1e-11)


def test_a_layout_whose_elements_do_not_factor_has_no_sketch_of_rows() -> None:
    places = torch.tensor([[[0, 3], [2, 1]]])
    rows = Rows(torch.randn(3, 2, 1, 2), torch.randn(1, 3, 2, 1, 2), 2)
    sketch = TensorSketch.drawn("w", (2, 2), 5, 0, rows.g.device)
    assert sketch.of_rows(rows, MatrixLayout.at((2, 2), places)) is None


def test_sketches_keep_inner_products_on_average() -> None:
    """Within four standard deviations of the documented bound; each element goes to one place with one sign."""
    model, (x, y) = _net(), _batch()
    dim = 300
    sketch = Sketch(dim, _generator())
    with lw.observe(model, sketch, PairwiseDot()) as seen:
        F.cross_entropy(model(x), y).backward()
    for got, dots in [
        (seen.sketch.total, seen.pairwise_dot.total),
        *((s, seen.pairwise_dot[k]) for k, s in seen.sketch.items()),
    ]:
        squares = dots.diagonal()
        bound = (8 * squares[:, None] * squares / dim).sqrt()
        assert bool(((got @ got.T - dots).abs() <= 4 * bound).all())
    matrix = sketch.matrix("0.weight", (5, 4), x).flatten(1)
    oracle.assert_close(matrix.abs().sum(0), torch.ones(20, dtype=x.dtype))
    assert set(matrix.unique().tolist()) == {-1.0, 0.0, 1.0}


WORST = {  # the bound is met where rows and columns repeat
    "ones": (torch.ones(6, 5), torch.ones(6, 5)),
    "one row": (torch.eye(6)[:, :1] * torch.ones(5), torch.eye(6)[:, :1] * torch.ones(5)),
    "normal": (torch.randn(6, 5, generator=_generator(1)), torch.randn(6, 5, generator=_generator(2))),
    "diagonal": (torch.eye(5), torch.eye(5)),
}


@pytest.mark.parametrize("name", WORST)
def test_the_error_of_sketched_products_is_as_stated(name: str) -> None:
    """Over 2000 seeds: the mean of the products is exact, and their variance at most 8 |x|² |y|² / dim."""
    x, y = (t.double() for t in WORST[name])
    dim, runs = 8, 2000
    errors_ = torch.empty(runs, dtype=torch.float64)
    for seed in range(runs):
        sketch = TensorSketch.drawn("w", x.shape, dim, seed, x.device)
        sx, sy = sketch.of_gradients(torch.stack([x, y]).flatten(1)[None])[0]
        errors_[seed] = sx @ sy - (x * y).sum()
    variance = float(errors_.square().mean())
    scale = float(x.square().sum() * y.square().sum())
    assert abs(float(errors_.mean())) < 4 * (variance / runs) ** 0.5
    assert 0.5 * scale / dim < variance < 8 * scale / dim


def test_two_parameters_are_sketched_independently() -> None:
    model, (x, y) = _net(), _batch()
    with lw.observe(model, Sketch(2**20, _generator()), PairwiseDot()) as seen:  # nearly nothing meets
        F.cross_entropy(model(x), y).backward()
    products = seen.sketch.total @ seen.sketch.total.T
    assert float((products - seen.pairwise_dot.total).abs().max()) < 0.02 * float(seen.pairwise_dot.total.max())


def test_a_vector_is_projected_as_the_samples_are() -> None:
    model, (x, y) = _net(), _batch()
    sketch = Sketch(6, _generator(2))
    with lw.observe(model, sketch, PerSampleGrad()) as seen:
        F.cross_entropy(model(x), y).backward()
    for n in range(len(x)):
        found = sketch.project({name: g[n] for name, g in seen.per_sample_grad.items()})
        for name, value in found.items():
            oracle.assert_close(value, seen.sketch[name][n])
            matrix = sketch.matrix(name, seen.per_sample_grad[name].shape[1:], x)
            oracle.assert_close(value, matrix.flatten(1) @ seen.per_sample_grad[name][n].flatten())
        oracle.assert_close(found.total, seen.sketch.total[n])


def test_one_seed_is_one_projection() -> None:
    model, (x, y) = _net(), _batch()
    sketch = Sketch(5, _generator(3))

    def run(q: Sketch, *batches: slice) -> Tensor:
        with lw.observe(model, q) as seen:
            for here in batches:
                F.cross_entropy(model(x[here]), y[here], reduction="sum").backward()
        return seen[q].total

    whole = run(sketch, slice(0, 7))
    oracle.assert_close(run(sketch, slice(0, 3), slice(3, 7)), whole, rel=1e-12)
    oracle.assert_close(run(Sketch(5, _generator(3)), slice(0, 7)), whole, rel=1e-12)
    assert not torch.allclose(run(Sketch(5, _generator(4)), slice(0, 7)), whole)
    same = Sketch(5, _generator(3))
    assert not torch.equal(same.matrix("a", (4,), x), same.matrix("b", (4,), x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClippedGrad(0),
        lambda: ClippedGrad(-1.0),
        lambda: ClippedGrad("1"),  # type: ignore[arg-type]
        lambda: ClippedGrad(float("nan")),
        lambda: Sketch(0),
        lambda: Sketch(None),  # type: ignore[arg-type]
        lambda: FisherDiag("true"),
        lambda: FisherDiag(draws=0),
        lambda: FisherDiag(draws=None),  # type: ignore[arg-type]
        lambda: DiagGGN(0, per_sample=True),
    ],
)
def test_wrong_arguments(make: Any) -> None:
    with pytest.raises(errors.BadInput):
        make()


def test_the_scale_of_the_sample() -> None:
    model, (x, y) = _net(), _batch()
    q = Sketch(3, _generator()), PairwiseDot()
    with lw.observe(model, *q) as loss:
        F.cross_entropy(model(x), y).backward()
    with lw.observe(model, *q, scale="sample") as sample:
        F.cross_entropy(model(x), y).backward()
    oracle.assert_close(dict(sample.sketch), {k: 7 * v for k, v in loss.sketch.items()})
    oracle.assert_close(sample.pairwise_dot.total, 49 * loss.pairwise_dot.total)


class _Widest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of any tensor that a call makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.most = max(self.most, out.numel())
        return out


def _normed() -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(20, 30))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(30, 3)), torch.randn(40, 20), torch.randint(3, (40,))


@pytest.mark.parametrize("scale", ["loss", "sample"])
def test_clipping_through_derived_weights_holds_no_per_sample_gradients(
    scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact, in chunks of a few samples: no tensor has N times the elements of the weight."""
    model, x, y = _normed()
    factor = 40.0 if scale == "sample" else 1.0
    grads = oracle.per_sample_grad(
        oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none") / 40
    )
    want, norms = oracle.clipped_grad(grads, 0.5 * factor / 40, factor)
    monkeypatch.setattr(gradients, "_CHUNK", 4 * 600)
    with _Widest() as widest, lw.observe(model, ClippedGrad(0.5 * factor / 40), SquaredNorm(), scale=scale) as seen:
        F.cross_entropy(model(x), y).backward()
    del widest
    oracle.assert_close(dict(seen.clipped_grad), want)
    oracle.assert_close(seen.clipped_grad.norms, norms)
    model.zero_grad()
    with _Widest() as widest, lw.observe(model, ClippedGrad(0.5)):
        F.cross_entropy(model(x), y).backward()
    assert widest.most <= 8 * 600


def test_clipping_through_derived_weights_refuses_hooks_that_change_gradients() -> None:
    model, x, y = _normed()
    with pytest.raises(errors.Undefined, match="hook"), lw.observe(model, ClippedGrad(0.5)):
        h = model[0](x)
        h.register_hook(lambda g: 3 * g)
        F.cross_entropy(model[2](h.tanh()), y).backward()
    assert all(p.grad is None for p in model.parameters())


# accumulate --------------------------------------------------------------------------------------


def _loader(x: Tensor, y: Tensor, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def _streamed(scale: str = "loss") -> list[lw.Quantity]:
    return [
        PerSampleGrad(), SquaredNorm(), SecondMoment(), Variance(), NoiseScale(), DiagGGN(), Sketch(4, _generator()),
        FisherDiag("data"), *([ClippedGrad(0.5)] if scale == "sample" else []),
    ]  # fmt: skip


@pytest.mark.parametrize("scale", ["loss", "sample"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("progress", [False, True])
def test_accumulate_equals_one_batch(scale: str, reduction: str, progress: bool) -> None:
    model, (x, y) = _net(), _batch(10)
    old = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters() if name != "2.bias"}
    for name, p in model.named_parameters():
        p.grad = old.get(name)
    loss_fn = lambda z, y: F.cross_entropy(z, y, reduction=reduction)  # noqa: E731
    seen = lw.accumulate(model, loss_fn, _loader(x, y), *_streamed(scale), scale=scale, progress=progress)
    for name, p in model.named_parameters():
        assert p.grad is old.get(name)
        assert p.grad is None or bool((p.grad == 3).all())
    with lw.observe(model, *_streamed(scale), scale=scale) as whole:
        loss_fn(model(x), y).backward()
    oracle.assert_close(dict(seen.grad), dict(whole.grad), rel=1e-12)
    for q in _streamed(scale):
        got, want = getattr(seen, q.name), getattr(whole, q.name)
        oracle.assert_close(*_with_finite(got, want), rel=1e-12)
        oracle.assert_close(*_with_finite({"": got.total}, {"": want.total}), rel=1e-12)
    oracle.assert_close(dict(seen.noise_scale.signal), dict(whole.noise_scale.signal), rel=1e-12)
    oracle.assert_close(dict(seen.noise_scale.snr), dict(whole.noise_scale.snr), rel=1e-12)


def test_accumulate_runs_any_batch_through_a_function_of_it() -> None:
    weight = nn.Parameter(torch.randn(3, 4, generator=_generator()))
    x, y = _batch()
    loader = [{"x": a, "y": b} for a, b in _loader(x, y)]
    run = lambda batch: F.cross_entropy(F.linear(batch["x"], weight), batch["y"])  # noqa: E731
    seen = lw.accumulate({"w": weight}, run, iter(loader), SecondMoment())
    with lw.observe({"w": weight}, SecondMoment()) as whole:
        run({"x": x, "y": y}).backward()
    oracle.assert_close(dict(seen.second_moment), dict(whole.second_moment), rel=1e-12)
    assert weight.grad is not None


def test_batches_that_a_loader_makes_of_constants_are_data() -> None:
    model = _net()
    x, y = torch.eye(4), torch.arange(4) % 3

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.eye(4), torch.arange(4) % 3

    seen = lw.accumulate(model, F.cross_entropy, loader(), SecondMoment())
    with lw.observe(model, SecondMoment()) as whole:
        F.cross_entropy(model(x), y).backward()
    oracle.assert_close(dict(seen.second_moment), dict(whole.second_moment), rel=1e-12)


def test_accumulate_restores_after_an_error() -> None:
    model, (x, y) = _net(), _batch()
    old = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), old, strict=True):
        p.grad = g
    with pytest.raises(errors.BadInput, match="no batch"):
        lw.accumulate(model, F.cross_entropy, [], Variance())
    with pytest.raises(errors.BadInput, match=r"shape \(3,\)"):
        lw.accumulate(model, lambda z, y: F.cross_entropy(z, y, reduction="none"), _loader(x, y), Variance())
    with pytest.raises(errors.Undefined):
        lw.accumulate(model, F.cross_entropy, _loader(x, y), PairwiseDot())
    for p, g in zip(model.parameters(), old, strict=True):
        assert p.grad is g and bool((g == 1).all())


def test_accumulate_keeps_no_batch_alive() -> None:
    model = _net()
    alive: list[weakref.ref[Tensor]] = []

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(5):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            x, y = _batch()
            alive.append(weakref.ref(x))
            yield x, y

    lw.accumulate(model, F.cross_entropy, loader(), Variance(), ClippedGrad(1.0), NoiseScale(), scale="sample")


@pytest.mark.parametrize("known", [True, False])
def test_progress_without_rich(known: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    real = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    model, (x, y) = _net(), _batch()
    loader = _loader(x, y)
    lw.accumulate(model, F.cross_entropy, loader if known else iter(loader), Variance(), progress=True)
    assert ("3 of 3" if known else "3 batches") in capsys.readouterr().err


def test_contractions_are_shared_between_quantities_but_not_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    x, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randint(4, (5,))
    calls: list[str] = []
    for name in ("second_moment", "squared_norm", "pairwise_dot"):
        real = getattr(contract, name)
        monkeypatch.setattr(contract, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])

    def observed(*quantities: lw.Quantity) -> list:
        with lw.observe(model, *quantities) as seen:
            F.cross_entropy(model(x), y).backward()
        return [seen[q] for q in quantities]

    six = (lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(), lw.NoiseScale(), lw.PairwiseDot(), lw.FisherDiag("data"))
    together = observed(*six)
    assert sorted(calls) == ["pairwise_dot"] * 4 + ["second_moment"] * 4, "once for each parameter; norms from the dots"
    for one, q in zip(together, six, strict=True):
        (alone,) = observed(q)
        for name in alone:
            torch.testing.assert_close(one[name], alone[name], rtol=1e-10, atol=1e-14)
    same = observed(lw.SecondMoment(), lw.SecondMoment(), lw.Variance())
    kept = same[1]["0.weight"].clone()
    same[0]["0.weight"].zero_()
    assert torch.equal(same[1]["0.weight"], kept), "writing to one result changes no other"
