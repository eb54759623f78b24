"""Sampled quantities: their mean is what they estimate, and a seed fixes every bit."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from quantity_checks import dense_factors
from torch import Tensor
from zoo import Instance, case

import layerwise as lw
from layerwise.losses import softmax

pytestmark = pytest.mark.usefixtures("float64")

FEW, MANY = 10**3, 10**4  # draws, in `make test` and in `make test-all`
RUNS = 25  # of which the error of the mean is estimated

Make = Callable[[int, torch.Generator | None], lw.Quantity]

SAMPLED: dict[str, tuple[Make, str]] = {  # and what its mean is
    "DiagGGN": (lambda k, g: lw.DiagGGN(k, g), "diag_ggn"),
    "DiagGGN per sample": (lambda k, g: lw.DiagGGN(k, g, per_sample=True), "diag_ggn_each"),
    "FisherDiag": (lambda k, g: lw.FisherDiag("model", k, g), "diag_ggn"),
    "SqrtGGN": (lambda k, g: lw.SqrtGGN(k, g), "ggn"),
    "DiagHessian": (lambda k, g: lw.DiagHessian(draws=k, generator=g), "diag_hessian"),
    "KFAC": (lambda k, g: lw.KFAC(k, g), "factors"),
    "KFAC reduce": (lambda k, g: lw.KFAC(k, g, "reduce"), "reduced"),
}
UNBIASED = [
    ("mlp_tanh", "ce_mean"), ("mlp_relu", "bce_pos_weight"), ("mlp_relu", "poisson_nll"), ("mlp_relu", "huber_mean"),
    ("linear_alone", "mse_mean"), ("conv1d", "ce_mean"), ("tokens_class_second", "ce_ignore"), ("reused", "ce_mean"),
]  # fmt: skip


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _observe(instance: Instance, quantity: lw.Quantity) -> Any:
    with lw.observe(instance.subject, quantity) as seen:
        instance.loss().backward()
    return seen[quantity]


def _tensors(result: Any, name: str) -> dict[str, Tensor]:
    """A result as tensors that are linear in the drawn products."""
    if isinstance(result, lw.Kronecker):
        return {f"{k} {i}": factor for k, pair in dense_factors(result).items() for i, factor in enumerate(pair)}
    if name == "SqrtGGN":
        s = torch.cat([v.flatten(2) for v in result.values()], -1).flatten(0, 1)
        return {"ggn": s.T @ s}
    return dict(result)


def _exact(instance: Instance, kind: str) -> dict[str, Tensor]:
    params = instance.params
    if kind == "diag_hessian":
        return oracle.diag_hessian(params, instance.loss)
    if kind == "ggn":
        return {"ggn": oracle.ggn(params, instance.logits, instance.loss_of)}
    if kind.startswith("diag_ggn"):
        each = kind == "diag_ggn_each"
        return oracle.diag_ggn(
            params, instance.logits, instance.terms_of if each else instance.loss_of, per_sample=each
        )
    sharing = "reduce" if kind == "reduced" else "expand"
    pairs = oracle.kfac_factors(instance.model, instance.logits, instance.loss_of, sharing=sharing, every=True)
    return {f"{k} {i}": factor for k, pair in pairs.items() for i, factor in enumerate(pair)}


def _mean_is_exact(name: str, problem: str, loss: str, draws: int, errors: int) -> None:
    """Within some standard errors of brute force, for every element, and not by errors as large as the values."""
    make, kind = SAMPLED[name]
    instance, generator = case(problem, loss).make(), _generator()
    want = _exact(instance, kind)
    found = [_tensors(_observe(instance, make(draws // RUNS, generator)), name) for _ in range(RUNS)]
    for key, value in want.items():
        runs = torch.stack([f[key] for f in found])
        error = runs.std(0) / RUNS**0.5
        slack = 1e-12 * max(float(v.abs().max()) for v in want.values())
        assert bool(((runs.mean(0) - value).abs() <= errors * error + slack).all()), key
        if kind != "diag_hessian":  # whose off-diagonal noise may be as large as the diagonal
            assert float(error.max()) <= 0.25 * float(value.abs().max()) + slack, key


PAIRS = [
    (i + j, (n, *c))
    for i, n in enumerate(SAMPLED)
    for j, c in enumerate(UNBIASED)
    if (n, c[1]) != ("FisherDiag", "huber_mean")  # no likelihood
]


def by_pair(pairs: list[tuple[str, str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "problem", "loss"), pairs, ids=lambda value: value)


@pytest.mark.thinned(2)
@by_pair([pair for diagonal, pair in PAIRS if diagonal % 2 == 0])
def test_the_mean_of_a_thousand_draws(name: str, problem: str, loss: str) -> None:
    _mean_is_exact(name, problem, loss, FEW, 5)  # of some thousand elements a few lie beyond 4


@pytest.mark.slow
@by_pair([pair for _, pair in PAIRS])
def test_the_mean_of_ten_thousand_draws(name: str, problem: str, loss: str) -> None:
    _mean_is_exact(name, problem, loss, MANY, 4)


def test_the_mean_of_sketched_products() -> None:
    """E ⟨Sg, Sh⟩ = ⟨g, h⟩ over 10^4 projections, in 25 runs of 400."""
    instance = case("mlp_tanh").make()
    dots = oracle.pairwise_dot(oracle.per_sample_grad(instance.params, instance.terms))
    found: dict[str, list[Tensor]] = {name: [] for name in dots}
    for seed in range(RUNS):
        for name, s in _observe(instance, lw.Sketch(MANY // RUNS, _generator(seed))).items():
            found[name].append(s @ s.T)
    for name, want in dots.items():
        runs = torch.stack(found[name])
        assert bool(((runs.mean(0) - want).abs() <= 4 * runs.std(0) / RUNS**0.5 + 1e-12).all())


# Seeds ------------------------------------------------------------------------------------------

DRAWN: dict[str, Make] = {
    **{name: make for name, (make, _) in SAMPLED.items()},
    "EKFAC": lambda k, g: lw.EKFAC(k, g),
    "Sketch": lambda k, g: lw.Sketch(k, g),
}


def _bits(name: str, generator: torch.Generator | None, problem: str = "conv1d") -> list[Tensor]:
    result = _observe(case(problem).make(), DRAWN[name](3, generator))
    if isinstance(result, lw.EigenKronecker):
        return [result.to_dense(key) for key in result.blocks]
    return list(_tensors(result, name).values())


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    one = _bits(name, _generator(1))
    assert _same(one, _bits(name, _generator(1)))
    assert not _same(one, _bits(name, _generator(2)))


@pytest.mark.parametrize("name", DRAWN)
def test_an_own_generator_leaves_the_global_one_alone(name: str) -> None:
    state = torch.get_rng_state()
    one = _bits(name, _generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(7)  # nor does the global one reach the draws
    assert _same(one, _bits(name, _generator(1)))


@pytest.mark.parametrize("name", DRAWN)
def test_without_a_generator_the_global_seed_decides(name: str) -> None:
    torch.manual_seed(5)
    one = _bits(name, None)
    other = _bits(name, None)
    torch.manual_seed(5)
    assert _same(one, _bits(name, None))
    assert not _same(one, other)


OLD_WORD: dict[str, Callable[..., Any]] = {
    "DiagGGN": lw.DiagGGN, "FisherDiag": lw.FisherDiag, "SqrtGGN": lw.SqrtGGN, "DiagHessian": lw.DiagHessian,
    "KFAC": lw.KFAC, "EKFAC": lw.EKFAC, "curvature": lw.monitor.curvature,
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_WORD)
def test_draws_still_go_by_their_old_word_with_a_warning(name: str) -> None:
    make = OLD_WORD[name]
    with pytest.warns(lw.errors.Renamed, match=rf"{name}\(draws=\) now") as said:
        old = make(samples=3)
    assert said[0].filename == __file__
    if name != "curvature":
        assert repr(old) == repr(make(draws=3)) and old.draws == 3
    with pytest.raises(TypeError, match="both draws= and samples="):
        make(samples=3, draws=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sample'"):
        make(sample=3)
    assert "draws" in inspect.signature(make).parameters and "samples" not in inspect.signature(make).parameters


def test_all_warnings_of_the_library_are_silenced_by_their_base() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lw.errors.LayerwiseWarning)
        for kind in (lw.errors.CutShort, lw.errors.LeftOut, lw.errors.Renamed, lw.errors.SlowPath,
                     lw.errors.SquaredInstead):  # fmt: skip
            warnings.warn("said", kind, stacklevel=1)
        lw.KFAC(samples=1)  # type: ignore[call-arg]
    assert issubclass(lw.errors.Renamed, FutureWarning)  # which Python shows to all


@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("draws", [1, 3])
def test_classes_are_drawn_with_their_probabilities(classes: int, draws: int) -> None:
    """Pearson's statistic of classes expected 5 times and more, and none of probability zero."""
    p = torch.randn(classes, generator=torch.Generator().manual_seed(classes)).mul(2).softmax(0)
    if classes > 2:
        p[[0, classes // 2, -1]] = 0
    rows = p.div(p.sum()).expand(60_000 // draws, -1)
    found = softmax._drawn(rows, draws, torch.Generator().manual_seed(1))
    assert found.shape == (len(rows), draws)
    counts, expected = torch.bincount(found.flatten(), minlength=classes), 60_000 * rows[0]
    assert counts[rows[0] == 0].sum() == 0
    often = expected >= 5
    statistic = ((counts - expected).square() / expected)[often].sum()
    freedom = max(1, int(often.sum()) - 1)
    assert statistic <= freedom + 5 * (2 * freedom) ** 0.5


def test_draws_differ_by_row_and_repeat_by_seed() -> None:
    p = torch.eye(7, 300).repeat_interleave(2, 0).add(1e-3)
    first, again, other = (softmax._drawn(p, 2, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    sure = softmax._drawn(torch.eye(300), 4, None)
    assert torch.equal(sure, torch.arange(300)[:, None].expand(300, 4))
