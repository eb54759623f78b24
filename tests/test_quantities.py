"""The table test: every quantity on every model of the zoo with every loss, against the oracle."""

from __future__ import annotations

import pytest
import torch

import oracle
from layerwise import errors
from layerwise.observe import observe
from layerwise.quantities import DiagGGN, PerSampleGrad, SecondMoment, SquaredNorm, Variance
from zoo import REFUSED, Case, Refused, cases

SINGLE_SAMPLE_SCALE = ("ce_mean", "mse_mean", "bce_mean")


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
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
    with observe(
        instance.subject, PerSampleGrad(), SquaredNorm(), SecondMoment(), Variance(), DiagGGN()
    ) as seen:
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


@pytest.mark.parametrize("refused", REFUSED, ids=lambda r: r.name)
def test_what_has_no_exact_answer_is_refused(refused: Refused) -> None:
    model = refused.build(seed=0)
    x, y = refused.batch(seed=0)
    with pytest.raises(getattr(errors, refused.error)):
        with observe(model, SecondMoment(), DiagGGN()):
            refused.loss(model, x, y).backward()
    assert all(p.grad is None for p in model.parameters())
