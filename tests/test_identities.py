"""Identities that need no oracle, over the zoo: sums, splits, permutations, microbatches, piecewise linear nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from quantity_checks import dense_factors
from torch import Tensor, nn
from zoo import Case, Instance, cases
from zoo import case as zoo_case

import layerwise as lw

pytestmark = pytest.mark.usefixtures("float64")

CASES = cases(first_loss_only=True)
BY_CASE = one_in(2, case=CASES)
# Losses of which a part of the batch has the same terms up to the weight of the part: not several calls of a batch.
MODELS = [
    "mlp_tanh", "features_equal_samples", "conv2d", "conv_circular", "conv_transpose2d", "embedding_pool", "group_norm",
    "batch_norm2d_eval", "prelu_channels", "bilinear", "layer_scale", "class_token", "tied_embedding", "reused", "lora",
    "weight_norm", "functional", "residual", "frozen_subset", "checkpointed", "dict_output", "loss_inside",
    "multihead_attention", "transformer_pre_norm", "lstm_stacked_both_ways", "gru", "cells", "seq_first_recurrent",
]  # fmt: skip
BY_MODEL = pytest.mark.parametrize("name", MODELS)


def _rows(value: Any, index: Tensor) -> Any:
    return tuple(_rows(v, index) for v in value) if isinstance(value, tuple) else value[index]


def _part(instance: Instance, index: Tensor) -> Instance:
    """The same model with some of the samples."""
    return replace(instance, x=_rows(instance.x, index), y=_rows(instance.y, index))


def _observe(parts: Sequence[Instance], *quantities: lw.Quantity, weights: Sequence[float] = (1.0,)) -> Any:
    """weights: of the parts' losses in the loss that is observed."""
    for p in parts[0].params.values():
        p.grad = None
    with lw.observe(parts[0].subject, *quantities) as seen:
        for part, weight in zip(parts, weights, strict=True):
            (part.loss() * weight).backward()
    return seen


def _quantities() -> list[lw.Quantity]:
    return [
        lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(), lw.DiagGGN(),
        lw.DiagGGN(per_sample=True), lw.Sketch(2, torch.Generator().manual_seed(0)),
    ]  # fmt: skip


def _tensors(seen: Any, quantities: Sequence[lw.Quantity]) -> dict[str, Tensor]:
    return {f"{i} {name}": v for i, q in enumerate(quantities) for name, v in seen[q].items()}


@BY_CASE
def test_sums_over_samples_and_the_variance(case: Case) -> None:
    """Σ g_n = .grad, bitwise the plain backward pass's (but for composites); V = E[g²] − E[g]²; sums of diagonals."""
    instance = case.make(seed=2)
    instance.loss().backward()
    plain = {name: p.grad for name, p in instance.params.items() if p.grad is not None}
    each, square, norms, moment, spread = (
        lw.PerSampleGrad(), lw.DiagGGN(per_sample=True), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance(),
    )  # fmt: skip
    dots, whole = lw.PairwiseDot(), lw.DiagGGN()
    seen = _observe([instance], each, square, norms, moment, spread, dots, whole)
    oracle.assert_close(dict(seen.grad), plain, rel=1e-12)
    n = instance.n
    oracle.assert_close({k: g.sum(0) for k, g in seen[each].items()}, plain)
    oracle.assert_close({k: g.square().sum(0) for k, g in seen[each].items()}, dict(seen[moment]))
    oracle.assert_close({k: d.sum(0) for k, d in seen[square].items()}, dict(seen[whole]))
    oracle.assert_close({k: d.diagonal() for k, d in seen[dots].items()}, dict(seen[norms]))
    for name, value in seen[spread].items():
        want = seen[moment][name] / n - (plain[name] / n) ** 2
        assert float((value - want).abs().max()) <= 1e-12 * max(1e-12, float(seen[moment][name].max()) / n)
        assert float(value.min()) >= 0


@one_in(3, name=MODELS, sizes=[(1, 2), (2, 1), (1, 1, 1)])
def test_a_batch_in_parts(name: str, sizes: tuple[int, ...]) -> None:
    """Splitting changes nothing, whatever the parts' sizes, where each part's loss is weighed by its share."""
    instance = zoo_case(name).make(seed=1)
    first = _part(instance, torch.arange(sum(sizes)).clamp(max=instance.n - 1))
    rows = torch.arange(sum(sizes)).split(sizes)
    parts = [_part(first, index) for index in rows]
    shares = [
        float((first.terms()[index].sum() / part.loss()).detach()) for index, part in zip(rows, parts, strict=True)
    ]
    quantities = _quantities()
    whole, many = _observe([first], *quantities), _observe(parts, *quantities, weights=shares)
    oracle.assert_close(_tensors(many, quantities), _tensors(whole, quantities))
    oracle.assert_close(dict(many.grad), dict(whole.grad))


@BY_MODEL
def test_a_batch_in_another_order(name: str) -> None:
    """Results by sample are permuted, sums are what they were."""
    instance = zoo_case(name).make(seed=1)
    order = torch.randperm(instance.n, generator=torch.Generator().manual_seed(4)).roll(1)
    quantities = [*_quantities(), lw.PairwiseDot()]
    one, other = _observe([instance], *quantities), _observe([_part(instance, order)], *quantities)
    for q in quantities:
        by_sample = isinstance(q, lw.PerSampleGrad | lw.SquaredNorm | lw.Sketch) or getattr(q, "per_sample", False)
        want = {k: v[order] if by_sample else v for k, v in one[q].items()}
        if isinstance(q, lw.PairwiseDot):
            want = {k: v[order][:, order] for k, v in want.items()}
        oracle.assert_close(dict(other[q]), want)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_microbatches_of_any_size_agree(size: int) -> None:
    """Streaming seven samples through `accumulate`, and through one context."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(7, 2, 4), torch.randint(3, (7,))
    makes: list[Callable[[], lw.Quantity]] = [
        lw.SecondMoment, lw.Variance, lw.DiagGGN, lw.DiagHessian, lw.NoiseScale, lw.SquaredNorm,
    ]  # fmt: skip
    loader = list(zip(x.split(size), y.split(size), strict=True))
    streamed = lw.accumulate(model, F.cross_entropy, loader, *(make() for make in makes), lw.KFLR())
    with lw.observe(model, *(make() for make in makes), lw.KFLR()) as whole:
        F.cross_entropy(model(x), y).backward()
    for make in makes:
        name = make().name
        oracle.assert_close(dict(getattr(streamed, name)), dict(getattr(whole, name)), rel=1e-9)
    got, want = dense_factors(streamed.kflr), dense_factors(whole.kflr)
    for i in (0, 1):
        oracle.assert_close({k: f[i] for k, f in got.items()}, {k: f[i] for k, f in want.items()})


PIECEWISE = ["mlp_relu", "mlp_inplace", "conv2d_depthwise", "batch_norm1d_eval", "linear_alone", "dropout_eval"]


@pytest.mark.parametrize("name", PIECEWISE)
def test_the_ggn_is_the_hessian_of_piecewise_linear_nets_in_each_layer(name: str) -> None:
    """Within the block of a parameter the outputs are linear; between blocks, and for products of two, they are not."""
    instance = zoo_case(name).make()
    blocks = [kind(instance.subject, instance.loss, blocks="parameter").to_dense() for kind in (lw.GGN, lw.Hessian)]
    oracle.assert_close(blocks[0], blocks[1])
    seen = _observe([instance], lw.DiagGGN(), lw.DiagHessian())
    oracle.assert_close(dict(seen.diag_ggn), dict(seen.diag_hessian))


def test_the_ggn_is_the_hessian_of_a_linear_model() -> None:
    instance = zoo_case("linear_alone").make()
    ggn, hessian = (kind(instance.subject, instance.loss).to_dense() for kind in (lw.GGN, lw.Hessian))
    oracle.assert_close(ggn, hessian)
    whole = _observe([instance], lw.KFLR(joint=True)).kflr
    oracle.assert_close(whole.to_dense("weight"), hessian)  # under squared error the factors are exact too
