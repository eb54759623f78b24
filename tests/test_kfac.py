"""Sampled quantities against what they estimate: KFAC's factors and the sampled GGN diagonal."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import case
from zoo.parts import Apply, Mean

from layerwise.observation.observe import observe
from layerwise.quantities import KFAC, DiagGGN, Variance

pytestmark = pytest.mark.usefixtures("float64")

DRAWS = 400  # draws in one pull
REPEATS = 25  # so 10⁴ draws, and 25 means of which the error is estimated


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _near(means: Tensor, want: Tensor) -> None:
    """The mean of `means` `[R, ...]` lies within 4 standard errors of `want`, and is not noise alone."""
    error = means.std(0) / len(means) ** 0.5
    slack = 1e-12 * want.abs().max()
    assert ((means.mean(0) - want).abs() <= 4 * error + slack).all()
    assert error.max() <= 0.2 * want.abs().max() + slack


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (4, 3)),
    "linear_sequence": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Mean(1), nn.Linear(4, 3)), (3, 4, 3)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2, stride=(2, 1), groups=2), nn.Tanh(), Mean(-1, -2), nn.Linear(4, 3)),
        (3, 2, 4, 3),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2, dilation=2, padding=1, padding_mode="circular"), Mean(-1)),
        (3, 2, 5),
    ),
    "reused": (
        lambda: Apply(lambda m, x: m.a(m.b(m.b(x).tanh()).tanh()), a=nn.Linear(3, 3), b=nn.Linear(3, 3)),
        (4, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_kfac_estimates_the_exact_factors(name: str, scale: float) -> None:
    make, shape = MODELS[name]
    model, x, y = make(), torch.randn(shape), torch.randint(3, shape[:1])

    def loss_of(z: Tensor) -> Tensor:
        return scale * F.cross_entropy(z, y)

    want = oracle.kfac_factors(model, lambda: model(x), loss_of)
    kfac = KFAC(draws=DRAWS, generator=_generator())
    found = []
    for _ in range(REPEATS if scale == 1 else 5):
        with observe(model, kfac) as seen:
            loss_of(model(x)).backward()
        found.append(seen.kfac.factors)
    for weight, (a, b) in want.items():
        oracle.assert_close(found[0][weight][0], a)
        _near(torch.stack([f[weight][1] for f in found]), b)
    for bias in (n for n in found[0] if n.endswith("bias")):  # the same cotangents, no input factor
        weight = bias.replace("bias", "weight")
        assert len(found[0][bias]) == 1
        if found[0][weight][1].shape[0] == 1:
            oracle.assert_close(found[0][bias][0], found[0][weight][1])


@pytest.mark.parametrize("loss", ["mse_mean", "mse_sum"])
def test_kfac_of_squared_error(loss: str) -> None:
    instance = case("linear_alone", loss).make()
    want = oracle.kfac_factors(instance.model, instance.logits, instance.loss_of)
    kfac, found = KFAC(draws=DRAWS, generator=_generator()), []
    for _ in range(REPEATS):
        with observe(instance.subject, kfac) as seen:
            instance.loss().backward()
        found.append(seen.kfac.factors["weight"])
    oracle.assert_close(found[0][0], want["weight"][0])
    _near(torch.stack([f[1] for f in found]), want["weight"][1])


@pytest.mark.parametrize("problem", ["mlp_relu", "tokens_class_second", "seq_first_flat_square", "two_heads"])
def test_sampled_diagonal_estimates_the_exact_one(problem: str) -> None:
    instance = case(problem).make()
    sampled, exact = DiagGGN(draws=DRAWS // 4, generator=_generator()), DiagGGN()
    found = []
    for _ in range(REPEATS):
        with observe(instance.subject, sampled, exact) as seen:
            instance.loss().backward()
        found.append(dict(seen[sampled]))
    for name, want in seen[exact].items():
        _near(torch.stack([f[name] for f in found]), want)


@pytest.mark.parametrize("make", [lambda g: KFAC(3, g), lambda g: DiagGGN(3, g)])
def test_the_same_seed_gives_the_same_bits(make: Callable) -> None:
    instance = case("mlp_tanh").make()

    def run(seed: int | None) -> list[Tensor]:
        quantity = make(None if seed is None else _generator(seed))
        with observe(instance.subject, quantity) as seen:
            instance.loss().backward()
        result = seen[quantity]
        values = result.factors.values() if isinstance(quantity, KFAC) else [result.values()]
        return [t for value in values for t in value]

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    assert same(run(0), run(0))
    assert not same(run(0), run(1))
    torch.manual_seed(5)
    one = run(None)
    torch.manual_seed(5)
    assert same(one, run(None))


def test_an_own_generator_leaves_the_global_one_alone() -> None:
    instance = case("mlp_tanh").make()
    before = torch.get_rng_state()
    with observe(instance.subject, KFAC(3, _generator()), DiagGGN(2, _generator()), Variance()):
        instance.loss().backward()
    assert torch.equal(torch.get_rng_state(), before)


# Layouts ----------------------------------------------------------------------------------------


def _factors(model: nn.Module, run: Callable[[], Tensor], y: Tensor) -> dict:
    with observe(model, KFAC(8, _generator())) as seen:
        F.cross_entropy(run(), y).backward()
    return seen.kfac


def test_a_transposed_weight_has_the_factors_of_its_own_matrix() -> None:
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    w = torch.randn(4, 3)
    rows = nn.ParameterDict({"w": nn.Parameter(w.clone())})
    columns = nn.ParameterDict({"w": nn.Parameter(w.t().clone())})
    one = _factors(rows, lambda: F.linear(x, rows["w"]), y)
    two = _factors(columns, lambda: F.linear(x, columns["w"].t()), y)
    three = _factors(columns, lambda: x @ columns["w"], y)
    v = torch.randn(4, 3)
    want = (one @ {"w": v})["w"]
    for other in (two, three):
        oracle.assert_close((other @ {"w": v.t()})["w"].t(), want)


def test_products_outlive_the_batch() -> None:
    """The operator's maps work after everything else is gone, for every layout."""
    instance = case("functional_conv").make()
    with observe(instance.subject, KFAC(2, _generator())) as seen:
        instance.loss().backward()
    kfac, shapes = seen.kfac, {k: p.shape for k, p in instance.params.items()}
    del instance, seen
    out = kfac.inverse(damping=1e-2) @ {k: torch.randn(s) for k, s in shapes.items()}
    assert {k: v.shape for k, v in out.items()} == shapes


def test_kfac_needs_no_samples() -> None:
    """Batch norm in training mixes samples, which Kronecker factors do not mind."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    with observe(model, KFAC(2)) as seen:
        F.cross_entropy(model(x), y).backward()
    assert set(seen.kfac.factors) == dict(model.named_parameters()).keys()


def test_shared_draws_and_one_batch_of_columns() -> None:
    """Two quantities with one generator draw their labels once."""
    instance = case("mlp_tanh").make()
    generator = _generator()
    with observe(instance.subject, KFAC(2, generator), DiagGGN(2, generator)) as both:
        instance.loss().backward()
    with observe(instance.subject, KFAC(2, _generator())) as one:
        instance.loss().backward()
    for name, factors in one.kfac.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(factors, both.kfac.factors[name], strict=True))
