"""Several backward passes in one observation: the loss is the sum of theirs, as `.grad` is the sum of their gradients.

One row for each idiom of gradient accumulation (the table in docs/conventions.md), against brute force on the terms'
weights, which are worked out here by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors

pytestmark = pytest.mark.usefixtures("float64")
N, T, C = 8, 3, 3
EVEN, UNEVEN = (4, 4), (1, 5, 2)


def net() -> nn.Sequential:
    """Logits `[N, C, T]`: one loss term a position."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, C, 1))


def batch(ignored: bool) -> tuple[Tensor, Tensor]:
    """Inputs and targets; with ignored ones, parts of equally many samples have different numbers of terms."""
    gen = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 2, T + 1, generator=gen), torch.randint(C, (N, T), generator=gen)
    if ignored:
        y[torch.rand(N, T, generator=gen) < 0.3] = -100
        y[:, 0] = torch.arange(N) % C
    return x, y


class Part(NamedTuple):
    """A part of the batch: its logits and targets, the counted terms of the whole, and the sizes of all parts."""

    z: Tensor
    y: Tensor
    tokens: int
    sizes: Sequence[int]


class Idiom(NamedTuple):
    """What is called on each part, and the weight of each of its terms in the sum of all losses.

    backward: runs the backward pass of a part. weight: of each term that counts, from the part's samples, its counted
    terms, those of the whole, and the number of parts. mean: whether the library takes the losses for means.
    """

    backward: Callable[[Part], Any]
    weight: Callable[[int, int, int, int], float]
    mean: bool = True
    sizes: Sequence[int] = EVEN


def row_weights(shape: torch.Size) -> Tensor:
    """Weights of the user's own for each term, the same for equal shapes."""
    return torch.linspace(0.2, 1.7, shape.numel()).view(shape)


def mean(p: Part) -> Tensor:
    return F.cross_entropy(p.z, p.y)


def total(p: Part) -> Tensor:
    return F.cross_entropy(p.z, p.y, reduction="sum")


IDIOMS: dict[str, Idiom] = {
    "mean / K": Idiom(lambda p: (mean(p) / len(p.sizes)).backward(), lambda n, t, tokens, k: 1 / (k * t)),
    "mean / K, unequal parts": Idiom(
        lambda p: (mean(p) / len(p.sizes)).backward(), lambda n, t, tokens, k: 1 / (k * t), sizes=UNEVEN
    ),
    "mean times share of samples": Idiom(
        lambda p: (mean(p) * (len(p.y) / N)).backward(), lambda n, t, tokens, k: n / (N * t), sizes=UNEVEN
    ),
    "mean times share of terms": Idiom(
        lambda p: (mean(p) * (int((p.y >= 0).sum()) / p.tokens)).backward(),
        lambda n, t, tokens, k: 1 / tokens,
        sizes=UNEVEN,
    ),
    "plain mean": Idiom(lambda p: mean(p).backward(), lambda n, t, tokens, k: 1 / t),
    "plain mean, unequal parts": Idiom(
        lambda p: mean(p).backward(), lambda n, t, tokens, k: 1 / t, sizes=UNEVEN
    ),
    "sum": Idiom(lambda p: total(p).backward(), lambda n, t, tokens, k: 1.0, False, UNEVEN),
    "sum / tokens": Idiom(
        lambda p: (total(p) / p.tokens).backward(), lambda n, t, tokens, k: 1 / tokens, False, UNEVEN
    ),
    "gradient=": Idiom(
        lambda p: mean(p).backward(gradient=torch.tensor(1 / len(p.sizes))), lambda n, t, tokens, k: 1 / (k * t)
    ),
    "gradient= of terms": Idiom(
        lambda p: F.cross_entropy(p.z, p.y, reduction="none").backward(gradient=torch.full(p.y.shape, 0.3)),
        lambda n, t, tokens, k: 0.3,
        False,
        UNEVEN,
    ),
    "autograd.backward": Idiom(
        lambda p: torch.autograd.backward([mean(p)], [torch.tensor(0.5)]), lambda n, t, tokens, k: 0.5 / t
    ),
}  # fmt: skip


def weights_of(idiom: Idiom, y: Tensor) -> Tensor:
    """`[N, T]`: the weight of each term in the loss, zero where the target is ignored."""
    tokens, parts = int((y >= 0).sum()), y.split(list(idiom.sizes))
    each = [
        torch.full(part.shape, idiom.weight(len(part), int((part >= 0).sum()), tokens, len(parts))) for part in parts
    ]
    return torch.cat(each) * (y >= 0)


def run(idiom: Idiom, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The backward passes of all parts."""
    tokens = int((y >= 0).sum())
    for part, target in zip(x.split(list(idiom.sizes)), y.split(list(idiom.sizes)), strict=True):
        idiom.backward(Part(model(part), target, tokens, idiom.sizes))


def weighted_terms(y: Tensor, weights: Tensor, z: Tensor) -> Tensor:
    """`[N]`: each sample's terms of the loss."""
    return (F.cross_entropy(z, y, reduction="none") * weights).sum(1)


def weighted_loss(y: Tensor, weights: Tensor, z: Tensor) -> Tensor:
    return weighted_terms(y, weights, z).sum()


class Problem(NamedTuple):
    """An idiom with all that its oracles need."""

    idiom: Idiom
    model: nn.Module
    x: Tensor
    y: Tensor
    weights: Tensor

    @property
    def params(self) -> dict[str, Tensor]:
        return oracle.parameters(self.model)

    def grads(self) -> dict[str, Tensor]:
        return oracle.per_sample_grad(self.params, lambda: weighted_terms(self.y, self.weights, self.model(self.x)))

    def logits(self) -> Tensor:
        return self.model(self.x)

    def loss_of(self) -> Callable[[Tensor], Tensor]:
        return partial(weighted_loss, self.y, self.weights)

    def watch(self, *quantities: lw.Quantity, **how: Any) -> lw.Seen:
        with lw.observe(self.model, *quantities, **how) as seen:
            run(self.idiom, self.model, self.x, self.y)
        return seen


def problem(name: str, ignored: bool = True) -> Problem:
    x, y = batch(ignored)
    return Problem(IDIOMS[name], net(), x, y, weights_of(IDIOMS[name], y))


@pytest.mark.parametrize("name", IDIOMS)
def test_the_gradients_of_the_samples_sum_to_the_gradient(name: str) -> None:
    """`seen.grad` is bitwise `.grad`, which autograd summed."""
    p = problem(name)
    seen = p.watch(lw.PerSampleGrad())
    grads = p.grads()
    for key, parameter in p.params.items():
        assert torch.equal(seen.grad[key], parameter.grad)
        oracle.assert_close(seen.per_sample_grad[key].sum(0), parameter.grad, rel=1e-12)
    oracle.assert_close(dict(seen.per_sample_grad), grads)


@pytest.mark.parametrize("name", IDIOMS)
def test_quantities_of_the_gradient(name: str) -> None:
    p = problem(name)
    grads = p.grads()
    clip = float(oracle.total(oracle.squared_norm(grads)).sqrt().median()) * 1.01
    seen = p.watch(
        lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(), lw.NoiseScale(), lw.FisherDiag("data"), lw.ClippedGrad(clip)
    )
    oracle.assert_close(dict(seen.squared_norm), oracle.squared_norm(grads))
    oracle.assert_close(dict(seen.second_moment), oracle.second_moment(grads))
    oracle.assert_close(dict(seen.variance), oracle.variance(grads))
    want, norms = oracle.clipped_grad(grads, clip)
    assert bool((norms > clip).any()) and bool((norms < clip).any())
    oracle.assert_close(dict(seen.clipped_grad), want)
    oracle.assert_close(seen.clipped_grad.norms, norms)
    factor = N if p.idiom.mean else 1
    noise = oracle.noise_scale(grads, factor)
    for what, values in noise.items():
        oracle.assert_close(dict(getattr(seen.noise_scale, what)), values)
    fisher = {key: factor * m for key, m in oracle.second_moment(grads).items()}
    oracle.assert_close(dict(seen.fisher_diag), fisher)


@pytest.mark.parametrize("name", [name for name, idiom in IDIOMS.items() if "of terms" not in name])
def test_scale_sample(name: str) -> None:
    """N g_n of a mean, N all samples of the observation: their mean is `.grad`. g_n of a sum."""
    p = problem(name)
    seen = p.watch(lw.PerSampleGrad(), lw.Variance(), lw.SecondMoment(), scale="sample")
    factor = N if p.idiom.mean else 1
    grads = {key: factor * g for key, g in p.grads().items()}
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    oracle.assert_close(dict(seen.variance), oracle.variance(grads))
    oracle.assert_close(dict(seen.second_moment), {key: m / N for key, m in oracle.second_moment(grads).items()})
    if p.idiom.mean:
        for key, g in seen.per_sample_grad.items():
            oracle.assert_close(g.mean(0), p.params[key].grad)


@pytest.mark.parametrize("name", IDIOMS)
def test_curvature(name: str) -> None:
    p = problem(name)
    seen = p.watch(lw.DiagGGN(), lw.DiagHessian(), lw.SqrtGGN())
    oracle.assert_close(dict(seen.diag_ggn), oracle.diag_ggn(p.params, p.logits, p.loss_of()))
    hessian = oracle.diag_hessian(p.params, lambda: p.loss_of()(p.logits()))
    oracle.assert_close(dict(seen.diag_hessian), hessian)
    roots = torch.cat([s.flatten(0, 1).flatten(1) for s in seen.sqrt_ggn.values()], 1)
    oracle.assert_close(roots.T @ roots, oracle.ggn(p.params, p.logits, p.loss_of()))


@pytest.mark.parametrize("options", [{}, {"sharing": "reduce"}, {"joint": True}], ids=repr)
@pytest.mark.parametrize("name", IDIOMS)
def test_kronecker_factors(name: str, options: dict[str, Any]) -> None:
    """A is the mean over all rows, as it does not depend on the loss; B is that of the sum of the losses."""
    p = problem(name, ignored=False)
    seen = p.watch(lw.KFLR(**options))
    want = oracle.kfac_factors(p.model, p.logits, p.loss_of(), **options)
    for key, (a, b) in want.items():
        oracle.assert_close(seen.kflr.factors[key][0], a)
        oracle.assert_close(seen.kflr.factors[key][1], b)


@pytest.mark.parametrize("name", IDIOMS)
def test_ekfac_has_the_exact_diagonal_in_the_basis_of_all_passes(name: str) -> None:
    p = problem(name, ignored=False)
    seen = p.watch(lw.EKFAC(None), lw.KFLR())
    ggn, start = oracle.ggn(p.params, p.logits, p.loss_of()), 0
    for key, parameter in p.params.items():
        eigen, factors = seen.ekfac.blocks[key], seen.kflr.factors[key]
        for q, factor in zip((eigen.basis_in, eigen.basis_out)[-len(factors) :], factors, strict=True):
            rotated = q.mT @ factor @ q
            oracle.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), rel=1e-10)
        block = ggn[start : start + parameter.numel(), start : start + parameter.numel()]
        start += parameter.numel()
        rows = eigen.rotate(torch.eye(parameter.numel()).view(-1, *eigen.size)).flatten(1).T
        oracle.assert_close(eigen.spectrum.flatten(), (rows @ block @ rows.T).diagonal())


@pytest.mark.parametrize("make", [lw.KFAC, partial(lw.FisherDiag, "model"), lw.DiagGGN], ids=["KFAC", "Fisher", "GGN"])
@pytest.mark.parametrize("name", IDIOMS)
def test_drawn_curvature_is_the_sum_of_that_of_the_passes(name: str, make: Callable[..., lw.Quantity]) -> None:
    p = problem(name, ignored=False)
    seen = p.watch(quantity := make(draws=2, generator=torch.Generator().manual_seed(0)))
    generator, parts = torch.Generator().manual_seed(0), []
    tokens, sizes = int((p.y >= 0).sum()), list(p.idiom.sizes)
    for x, y in zip(p.x.split(sizes), p.y.split(sizes), strict=True):
        with lw.observe(p.model, one := make(draws=2, generator=generator)) as each:
            p.idiom.backward(Part(p.model(x), y, tokens, sizes))
        parts.append(each[one])
    for key in p.params:
        if make is lw.KFAC:
            oracle.assert_close(seen[quantity].factors[key][-1], sum(part.factors[key][-1] for part in parts))
        else:
            oracle.assert_close(seen[quantity][key], sum(part[key] for part in parts))


# -- losses that differ between the passes ------------------------------------------------------------------------


def test_a_mean_and_a_sum_add_up() -> None:
    """Also means over other mixes of terms: whatever was differentiated, the loss is the sum."""
    model, (x, y) = net(), batch(True)
    with lw.observe(model, lw.PerSampleGrad(), lw.DiagGGN()) as seen:
        F.cross_entropy(model(x[:3]), y[:3]).backward()
        F.cross_entropy(model(x[3:5]), y[3:5], reduction="sum").backward()
        z = model(x[5:])
        (F.cross_entropy(z, y[5:]) + 0.5 * F.mse_loss(z, torch.zeros_like(z))).backward()

    def terms() -> Tensor:
        z = model(x)
        each = F.cross_entropy(z, y, reduction="none").sum(1)
        counts = [int((part >= 0).sum()) for part in (y[:3], y[5:])]
        squares = 0.5 * z[5:].square().flatten(1).sum(1) / z[5:].numel()
        return torch.cat([each[:3] / counts[0], each[3:5], each[5:] / counts[1] + squares])

    params = oracle.parameters(model)
    oracle.assert_close(dict(seen.per_sample_grad), oracle.per_sample_grad(params, terms))
    for key, parameter in params.items():
        assert torch.equal(seen.grad[key], parameter.grad)

    def ggn(start: int, stop: int, loss_of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return oracle.diag_ggn(params, lambda: model(x[start:stop]), loss_of)

    parts = [
        ggn(0, 3, lambda z: F.cross_entropy(z, y[:3])),
        ggn(3, 5, lambda z: F.cross_entropy(z, y[3:5], reduction="sum")),
        ggn(5, N, lambda z: F.cross_entropy(z, y[5:]) + 0.5 * F.mse_loss(z, torch.zeros_like(z))),
    ]
    oracle.assert_close(dict(seen.diag_ggn), {key: sum(part[key] for part in parts) for key in params})


@pytest.mark.parametrize(
    ("quantity", "scale"), [(lw.SecondMoment(), "sample"), (lw.FisherDiag("data"), "loss")], ids=["scale", "Fisher"]
)
def test_what_needs_one_reduction_is_refused_for_two(quantity: lw.Quantity, scale: str) -> None:
    model, (x, y) = net(), batch(False)
    with lw.observe(model, quantity, scale=scale) as seen:
        F.cross_entropy(model(x), y).backward()
        before = [p.grad.clone() for p in model.parameters()]
        value = {key: v.clone() for key, v in seen[quantity].items()}
        with pytest.raises(errors.Undefined, match="a mean and"):
            F.cross_entropy(model(x), y, reduction="sum").backward()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(seen[quantity][key], v) for key, v in value.items())


def test_a_loss_of_no_known_reduction_adds_up() -> None:
    """Whether it is a mean matters for no sum; each pass has its own likelihood."""
    model, (x, y) = net(), batch(False)

    def own(z: Tensor, y: Tensor) -> Tensor:
        return (torch.logsumexp(z, 1) - z.gather(1, y[:, None])[:, 0]).mean()

    with lw.observe(model, lw.SecondMoment(), lw.DiagGGN()) as seen:
        for part, target in zip(x.split(4), y.split(4), strict=True):
            (own(model(part), target) / 2).backward()
    with lw.observe(model, lw.SecondMoment(), lw.DiagGGN()) as whole:
        F.cross_entropy(model(x), y).backward()
    oracle.assert_close(dict(seen.second_moment), dict(whole.second_moment))
    oracle.assert_close(dict(seen.diag_ggn), dict(whole.diag_ggn))


# -- clipping --------------------------------------------------------------------------------------------------


def test_private_clipping_in_parts() -> None:
    """C / N under scale="loss" is C under scale="sample" of the whole batch, which several passes refuse."""
    model, (x, y) = net(), batch(False)
    with lw.observe(model, lw.ClippedGrad(1.0), scale="sample") as whole:
        F.cross_entropy(model(x), y).backward()
    norms = whole.clipped_grad.norms
    assert bool((norms > 1).any()) and bool((norms < 1).any())
    with lw.observe(model, lw.ClippedGrad(1.0 / N)) as parts:
        for part, target in zip(x.split(4), y.split(4), strict=True):
            (F.cross_entropy(model(part), target) / 2).backward()
    oracle.assert_close(dict(parts.clipped_grad), dict(whole.clipped_grad))
    oracle.assert_close(parts.clipped_grad.norms * N, norms)
    with lw.observe(model, lw.ClippedGrad(1.0), scale="sample"):
        F.cross_entropy(model(x[:4]), y[:4]).backward()
        with pytest.raises(errors.Undefined, match="still to come"):
            F.cross_entropy(model(x[4:]), y[4:]).backward()


# -- accumulate, which pools ---------------------------------------------------------------------------------


def test_accumulate_pools_the_means_of_its_batches() -> None:
    """The mean over all terms, whatever the sizes: so its loss_fn divides by no number of batches."""
    (x, y), model = batch(True), net()
    batches = list(zip(x.split(list(UNEVEN)), y.split(list(UNEVEN)), strict=True))
    with lw.observe(model, lw.SecondMoment(), lw.DiagGGN()) as whole:
        F.cross_entropy(model(x), y).backward()
    pooled = lw.accumulate(model, F.cross_entropy, batches, lw.SecondMoment(), lw.DiagGGN())
    halves = lw.accumulate(model, lambda z, y: F.cross_entropy(z, y) / 2, batches, lw.SecondMoment(), lw.DiagGGN())
    tokens = int((y >= 0).sum())

    def counted(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum") / tokens

    counted_tokens = lw.accumulate(model, counted, batches, lw.SecondMoment(), lw.DiagGGN())
    for seen, factor in ((pooled, 1.0), (halves, 0.5), (counted_tokens, 1.0)):
        oracle.assert_close(dict(seen.grad), {key: factor * g for key, g in whole.grad.items()})
        moments = {key: factor**2 * m for key, m in whole.second_moment.items()}
        oracle.assert_close(dict(seen.second_moment), moments)
        oracle.assert_close(dict(seen.diag_ggn), {key: factor * d for key, d in whole.diag_ggn.items()})


# -- steps with curvature ----------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "kflr": {"kind": "kflr"},
    "kflr reduce": {"kind": "kflr", "sharing": "reduce"},
    "kflr joint": {"kind": "kflr", "joint": True},
    "foof": {"kind": "foof"},
    "diag-ggn": {"kind": "diag-ggn", "draws": None},
    "diag-hessian": {"kind": "diag-hessian", "draws": None},
}
# The sum of the losses of each of these is the mean over the whole batch, times a factor.
WHOLE = {"mean / K": 1.0, "mean times share of terms": 1.0, "plain mean": 2.0, "sum / tokens": 1.0, "sum": 1.0 * N * T}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WHOLE)
def test_a_preconditioned_step_of_parts_is_that_of_the_whole(name: str, kind: str) -> None:
    parts, whole = problem(name, ignored=False), problem(name, ignored=False)
    for p, backward in (
        (parts, lambda: run(parts.idiom, parts.model, parts.x, parts.y)),
        (whole, lambda: (WHOLE[name] * F.cross_entropy(whole.logits(), whole.y)).backward()),
    ):
        pre = lw.optim.Preconditioner(p.model, **KINDS[kind], damping=1e-3)
        with pre.watch():
            backward()
        pre.step()
    for key, parameter in parts.params.items():
        oracle.assert_close(parameter.grad, whole.params[key].grad)


def steps(
    make: Callable[[nn.Module], Any], closure_of: Callable[[nn.Module], Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """The parameters after three steps."""
    model = net()
    opt = make(model)
    closure = closure_of(model)

    def fresh() -> Tensor:
        for p in model.parameters():
            p.grad = None
        return closure()

    for _ in range(3):
        opt.step(fresh)
    return {key: p.detach().clone() for key, p in model.named_parameters()}


def in_parts(name: str) -> Callable[[nn.Module], Callable[[], Tensor]]:
    """A closure of several backward passes; its loss is their sum."""
    x, y = batch(False)
    idiom, factor = IDIOMS[name], WHOLE[name]

    def closure_of(model: nn.Module) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            run(idiom, model, x, y)
            with torch.no_grad():
                return factor * F.cross_entropy(model(x), y)

        return closure

    return closure_of


def at_once(factor: float, backward: bool) -> Callable[[nn.Module], Callable[[], Tensor]]:
    """A closure of one pass over the whole batch, which may leave the backward pass to the optimizer."""
    x, y = batch(False)

    def closure_of(model: nn.Module) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = factor * F.cross_entropy(model(x), y)
            if backward:
                loss.backward()
            return loss

        return closure

    return closure_of


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "KFAC": lambda model: lw.optim.KFAC(model, kind="kflr", lr=0.1, update_factors_every=1, update_inverses_every=1),
    "DiagNewton": lambda model: lw.optim.DiagNewton(model, draws=None, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", WHOLE)
def test_a_closure_of_parts_makes_the_step_of_the_whole(name: str, optimizer: str) -> None:
    make = OPTIMIZERS[optimizer]
    got = steps(make, in_parts(name))
    for backward in (True, False):
        oracle.assert_close(got, steps(make, at_once(WHOLE[name], backward)), rel=1e-9)


def test_the_quadratic_model_of_a_closure_of_parts() -> None:
    """The closure returns the sum of the losses with their graph, from which the exact curvature comes."""

    def quadratic(model: nn.Module) -> Any:
        return lw.optim.KFAC(
            model, kind="kflr", step_size="quadratic", adapt_damping_every=1, update_factors_every=1,
            update_inverses_every=1,
        )  # fmt: skip

    def parts_of(model: nn.Module) -> Callable[[], Tensor]:
        x, y = batch(False)

        def closure() -> Tensor:
            losses = [F.cross_entropy(model(a), b) / 2 for a, b in zip(x.split(4), y.split(4), strict=True)]
            for loss in losses:
                loss.backward()
            return torch.stack(losses).sum()

        return closure

    oracle.assert_close(steps(quadratic, parts_of), steps(quadratic, at_once(1.0, True)), rel=1e-8)


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    return sum(float((after[key].detach() - value).norm()) for key, value in before.items())


def test_the_step_is_as_long_for_six_parts_as_for_one() -> None:
    """With K-FAC's drawn labels, and parts of one sample each: no power of K is left in the step."""
    x, y = batch(False)
    lengths = []
    for count in (1, 2, 4, 8):
        model = net()
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        opt = lw.optim.KFAC(model, draws=200, lr=0.1, damping=1e-6, kl_clip=None)

        def closure(model: nn.Module = model, count: int = count) -> Tensor:
            for a, b in zip(x.chunk(count), y.chunk(count), strict=True):
                (F.cross_entropy(model(a), b) / count).backward()
            return torch.zeros(())

        opt.step(closure)
        lengths.append(moved(before, dict(model.named_parameters())))
    assert max(lengths) < 1.25 * min(lengths), lengths
