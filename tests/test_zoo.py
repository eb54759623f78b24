"""What the zoo promises to the tests that use it."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from zoo import Case, Instance, Refused

CASES = zoo.cases()
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
FIRST_CASES = pytest.mark.parametrize("case", zoo.cases(first_loss_only=True), ids=lambda case: case.id)
EVERY_REFUSED = pytest.mark.parametrize("refused", zoo.REFUSED, ids=lambda refused: refused.name)


def tensors_of(x):
    return x if isinstance(x, tuple) else (x,)


def test_zoo_is_wide_enough():
    assert len(zoo.PROBLEMS) >= 80
    assert len(CASES) >= 180
    assert len({case.id for case in CASES}) == len(CASES)
    assert {case.loss.name for case in CASES} == set(zoo.LOSSES)


@FIRST_CASES
def test_problem_is_tiny_float64_and_the_same_for_the_same_seed(case: Case):
    state = torch.get_rng_state()
    one, two, other = case.make(1), case.make(1), case.make(2)
    assert torch.equal(state, torch.get_rng_state())
    assert sum(p.numel() for p in one.params.values()) <= 300
    assert one.n <= 5
    assert all(p.dtype == torch.float64 for p in one.params.values())
    for a, b, c in zip(one.params.values(), two.params.values(), other.params.values(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    for a, b in zip(tensors_of(one.x) + tensors_of(one.y), tensors_of(two.x) + tensors_of(two.y), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.loss(), two.loss())
    assert not torch.equal(one.loss(), other.loss())
    assert torch.equal(one.loss(), one.loss())


@EVERY_CASE
def test_terms_sum_to_the_loss(case: Case):
    made = case.make()
    terms = made.terms()
    assert terms.shape == (made.n,)
    oracle.assert_close(terms.sum(), made.loss(), 1e-12)


@EVERY_CASE
def test_term_depends_on_its_own_sample_alone(case: Case):
    """Other inputs for the other samples leave a term as it is: the layout of the terms is right."""
    made, other = case.make(0), case.make(0, batch_seed=1)
    terms = made.terms().detach()
    for n in range(made.n):
        mixed = []
        for x, z in zip(tensors_of(made.x), tensors_of(other.x), strict=True):
            z = z.clone()
            z[n] = x[n]
            mixed.append(z)
        x = tuple(mixed) if isinstance(made.x, tuple) else mixed[0]
        swapped = Instance(made.problem, made.spec, made.model, x, made.y).terms().detach()
        assert abs(float(swapped[n] - terms[n])) <= 1e-13 * max(1.0, abs(float(terms[n])))
        if made.n > 1:
            assert not torch.allclose(swapped, terms, rtol=1e-9)


@FIRST_CASES
def test_every_parameter_is_used_unless_tagged(case: Case):
    made = case.make()
    unused = made.params.keys() - oracle.used_names(made.params, made.loss)
    assert bool(unused) == ("unused_parameter" in made.problem.tags)
    frozen = [name for name, p in made.model.named_parameters() if not p.requires_grad]
    assert not any(name in made.params for name in frozen)


@EVERY_REFUSED
def test_refused_program_runs_in_plain_torch(refused: Refused):
    x, y = refused.batch()
    model = refused.build()
    loss = refused.loss(model, x, y)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.equal(loss, refused.loss(refused.build(), *refused.batch()))


MIXING = ("batch_norm_train", "contrastive", "batch_centred", "pairs_near", "pairs_far", "pairs_outer")


@pytest.mark.parametrize("name", MIXING)
def test_program_refused_for_mixing_does_mix(name: str):
    """Some loss row depends on another sample's input."""
    refused = next(r for r in zoo.REFUSED if r.name == name)
    assert refused.error == "SamplesMixed"
    x, y = refused.batch()
    x.requires_grad_()
    seen = []

    def keep(z, y):
        seen.append(z)
        return original(z, y)

    original, F.cross_entropy = F.cross_entropy, keep
    try:
        refused.loss(refused.build(), x, y)
    finally:
        F.cross_entropy = original
    touched = torch.stack(
        [torch.autograd.grad(row.square().sum(), x, retain_graph=True)[0].abs().sum(1) > 1e-12 for row in seen[0]]
    )
    assert not torch.equal(touched, torch.eye(len(touched), dtype=torch.bool))
