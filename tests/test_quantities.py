"""The table test: every quantity on every model of the zoo with every loss, against the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from grids import one_in
from torch import Tensor
from zoo import REFUSED, Case, Functional, Instance, Refused, cases

from layerwise import errors
from layerwise.observation.observe import observe
from layerwise.quantities import DiagGGN, PerSampleGrad, SecondMoment, SquaredNorm, Variance

MEANS = ("ce_mean", "mse_mean", "bce_mean")


@one_in(3, case=cases())
def test_quantities_equal_the_oracle(case: Case) -> None:
    instance = case.make(seed=0)
    grads = oracle.per_sample_grad(instance.params, instance.terms)
    want = {
        "per_sample_grad": grads,
        "squared_norm": oracle.squared_norm(grads),
        "second_moment": oracle.second_moment(grads),
        "variance": oracle.variance(grads),
        "diag_ggn": oracle.diag_ggn(instance.params, instance.logits, instance.loss_of),
    }
    with observe(instance.subject, PerSampleGrad(), SquaredNorm(), SecondMoment(), Variance(), DiagGGN()) as seen:
        loss = instance.loss()
        loss.backward()
    used = {name for name, p in instance.params.items() if p.grad is not None}
    for name, values in want.items():
        got = getattr(seen, name)
        assert set(got) == used
        oracle.assert_close(dict(got), {k: v for k, v in values.items() if k in used}, rel=1e-10)
    oracle.assert_close(seen.squared_norm.total, oracle.total(want["squared_norm"]), rel=1e-10)
    gradient = oracle.gradient(instance.params, instance.loss)
    oracle.assert_close(dict(seen.grad), {k: v for k, v in gradient.items() if k in used}, rel=1e-12)
    for name in used:
        assert torch.equal(instance.params[name].grad, seen.grad[name])


@one_in(2, case=[c for c in cases(first_loss_only=True) if c.loss.name in MEANS])
def test_scale_sample_of_mean_losses(case: Case) -> None:
    instance = case.make(seed=1)
    grads = oracle.per_sample_grad(instance.params, instance.terms)
    with observe(instance.subject, SecondMoment(), Variance(), scale="sample") as seen:
        instance.loss().backward()
    names = set(seen.grad)
    for name in ("second_moment", "variance"):
        want = getattr(oracle, name)(grads, scale="sample")
        oracle.assert_close(dict(getattr(seen, name)), {k: v for k, v in want.items() if k in names})


def _single(x: Any) -> Any:
    """Tensors of floats in float32, in tuples too."""
    if isinstance(x, tuple):
        return tuple(_single(part) for part in x)
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _in_single(instance: Instance) -> tuple[Instance, Instance]:
    """The instance in float32, and in float64 at the same numbers."""
    x, y, model = _single(instance.x), _single(instance.y), instance.model
    back = lambda v: tuple(map(back, v)) if isinstance(v, tuple) else v.double() if v.is_floating_point() else v  # noqa: E731
    with torch.no_grad():
        if isinstance(model, Functional):
            for p in model.params.values():
                p.copy_(p.float())
            single = Functional(model.params, model.forward)
            single.params = {k: p.detach().float().requires_grad_(p.requires_grad) for k, p in model.params.items()}
        else:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.copy_(tensor.float() if tensor.is_floating_point() else tensor)
            single = replace(instance).problem.build(0).float()
    return replace(instance, model=single, x=x, y=y), replace(instance, x=back(x), y=back(y))


def _assert_near(got: Mapping[str, Tensor], want: Mapping[str, Tensor], rel: float) -> None:
    """Largest error over largest value, of all parameters together."""
    peak = max(float(w.abs().max()) for w in want.values())
    for name, w in want.items():
        assert got[name].shape == w.shape
        assert float((got[name].double() - w).abs().max()) <= rel * peak, name


@one_in(2, case=cases(first_loss_only=True))
def test_single_precision(case: Case) -> None:
    single, double = _in_single(case.make(seed=0))
    grads = oracle.per_sample_grad(double.params, double.terms)
    with observe(single.subject, PerSampleGrad(), SquaredNorm(), SecondMoment(), Variance(), DiagGGN()) as seen:
        single.loss().backward()
    used = set(seen.grad)
    assert all(v.dtype == torch.float32 for v in seen.variance.values())
    wants = {
        "per_sample_grad": grads,
        "squared_norm": oracle.squared_norm(grads),
        "second_moment": oracle.second_moment(grads),
        "diag_ggn": oracle.diag_ggn(double.params, double.logits, double.loss_of),
    }
    for name, want in wants.items():
        _assert_near(getattr(seen, name), {k: v for k, v in want.items() if k in used}, 1e-5)
    scale = max(float(v.max()) for v in wants["second_moment"].values()) / len(next(iter(grads.values())))
    for name, want in oracle.variance(grads).items():
        if name in used:  # the difference of two numbers of this scale
            assert float((seen.variance[name].double() - want).abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("refused", REFUSED, ids=lambda r: r.name)
def test_what_has_no_exact_answer_is_refused(refused: Refused) -> None:
    model = refused.build(seed=0)
    x, y = refused.batch(seed=0)
    with pytest.raises(getattr(errors, refused.error)) as caught, observe(model, SecondMoment(), DiagGGN()):
        refused.loss(model, x, y).backward()
    assert all(p.grad is None for p in model.parameters())
    if refused.error in ("UncoveredUse", "SamplesMixed", "Undefined", "UnsupportedCall"):
        hidden = refused.name == "reentrant_checkpoint"  # whose parameters are in no graph; it names the cause instead
        names = ["use_reentrant=False"] if hidden else [name for name, _ in model.named_parameters()]
        assert any(name in str(caught.value) for name in names)
