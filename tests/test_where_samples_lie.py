"""Programs whose samples are any set of rows: what is said, and is not said, and batches that follow one another."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from grids import one_in
from scattered_checks import allows, reference, truth_of
from zoo.scattered import KINDS, MIXED, SCATTERED, Scattered

import layerwise as lw
from layerwise import errors


def by_program(programs: list[Scattered]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", programs, ids=lambda program: program.id)


# The programs themselves, by brute force alone --------------------------------------------------


def test_there_are_enough_programs() -> None:
    assert len(SCATTERED) >= 36
    for kind in KINDS:
        assert sum(program.kind == kind for program in SCATTERED + MIXED) >= 3


@by_program(SCATTERED + MIXED)
def test_the_gradients_of_a_loop_over_samples_sum_to_that_of_the_loss(program: Scattered) -> None:
    each, whole = reference(program)
    rel = max(program.rel, 1e-12)
    oracle.assert_close({name: g.sum(0) for name, g in each.items()}, whole, rel)
    oracle.assert_close(each, truth_of(program).grads, rel)
    assert all(len(g) == program.instance().n for g in each.values())


@by_program(SCATTERED)
def test_a_row_is_of_one_sample_or_of_a_constant(program: Scattered) -> None:
    """A layer has rows of samples, or reads a constant, from which every sample takes."""
    truth = truth_of(program)
    assert truth.calls
    for name, calls in truth.calls.items():
        for *_, owners in calls:
            assert bool(owners.any()), name
            assert truth.shared(name) or bool((owners.sum(0) <= 1).all())
    assert not truth.owners.any() or bool(truth.owners.any(1).all())


@by_program(MIXED)
def test_samples_are_mixed_in_truth(program: Scattered) -> None:
    """Some row, or a number that the loss receives, answers to several samples, though the batch depends on it."""
    truth = truth_of(program)
    several = [truth.shared(name) for name in truth.calls]
    assert any(several) or bool((truth.owners.sum(0) > 1).any())


@by_program([program for program in SCATTERED if program.regular is not None])
def test_the_regular_form_is_the_same_loss(program: Scattered) -> None:
    made, regular = program.instance(), program.in_regular_form()
    oracle.assert_close(regular.regular_loss(), made.loss(), 1e-12)
    oracle.assert_close(
        oracle.gradient(regular.params, regular.regular_loss), oracle.gradient(made.params, made.loss), 1e-12
    )


# What the user says, and does not say -----------------------------------------------------------


def _each(program: Scattered, samples: int | torch.Tensor | None) -> dict[str, torch.Tensor]:
    made = program.instance()
    with lw.observe(made.model, lw.PerSampleGrad(), samples=samples) as seen:
        made.loss().backward()
    return dict(seen.per_sample_grad)


@by_program(SCATTERED)
def test_the_number_of_every_term_may_always_be_said(program: Scattered) -> None:
    """`samples=` with the sample of each loss term gives what the program gives by itself."""
    try:
        got = _each(program, program.instance().data.number)
    except errors.LayerwiseError as error:
        if program.may_refuse is None or not allows(program.may_refuse, error):
            raise
        return
    oracle.assert_close(got, truth_of(program).grads, program.rel)


ONE_ROW = {"packed_in_one_row", "attention_packed_in_one_row"}  # a batch of one, as far as anything but the user says


@by_program([p for p in SCATTERED if p.instance().samples is not None and p.name not in ONE_ROW])
def test_nothing_said_is_right_or_asks(program: Scattered) -> None:
    """Without `samples=` a program that needs it is exact all the same, or the error says what to do."""
    try:
        got = _each(program, None)
    except errors.LayerwiseError as error:
        assert "samples=" in str(error), error
        return
    if program.name != "sorted_for_the_head":  # two orders of the same samples: that of the batch, or of the loss
        oracle.assert_close(got, truth_of(program).grads, program.rel)


@by_program([program for program in SCATTERED if program.kind in (4, 6) and program.may_refuse is None])
def test_numbers_that_are_not_so_are_refused(program: Scattered) -> None:
    """Terms of one sample said to be of several that share rows, or numbers of no such loss: nothing has changed."""
    made = program.instance()
    number = made.data.number
    terms = len(program.elements(made.logits(), made.data))
    for wrong in (number[:-1], number.to(torch.float64), torch.cat([number, number[:1]])):
        with pytest.raises(errors.BadInput, match="samples"), lw.observe(made.model, lw.SquaredNorm(), samples=wrong):
            made.loss().backward()
        assert all(p.grad is None for p in made.params.values())
    if terms > made.n:  # a sample's terms told apart, which depend on the same rows
        with pytest.raises(errors.SamplesMixed), lw.observe(made.model, lw.SquaredNorm(), samples=torch.arange(terms)):
            made.loss().backward()
        assert all(p.grad is None for p in made.params.values())


@by_program([program for program in SCATTERED if program.kind in (2, 3, 4) and program.may_refuse is None])
def test_a_count_that_is_not_so_is_refused(program: Scattered) -> None:
    """One sample more than there are: the error repeats what was said."""
    made = program.instance()
    said = made.n + 1
    with pytest.raises(errors.LayerwiseError, match=f"{said}"), lw.observe(made.model, lw.SquaredNorm(), samples=said):
        made.loss().backward()
    assert all(p.grad is None for p in made.params.values())


# Several batches --------------------------------------------------------------------------------

UNITED = [p for p in SCATTERED if p.reduction is not None and p.may_refuse is None and not p.own]


@one_in(2, program=UNITED)
def test_accumulated_batches_are_their_union(program: Scattered) -> None:
    """Two batches, whose routes and lengths may differ: a mean runs over both."""
    one = program.instance(0)
    two = replace(one, data=program.instance(1).data)
    share = 1.0 if program.reduction == "sum" else 0.5
    parts = [oracle.per_sample_grad(one.params, made.terms) for made in (one, two)]
    grads = {name: share * torch.cat([part[name] for part in parts]) for name in one.params}
    quantities = lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance()
    seen = lw.accumulate(
        one.model, lambda data: replace(one, data=data).loss(), [one.data, two.data], *quantities, samples=one.samples
    )
    oracle.assert_close(dict(seen.per_sample_grad), grads, program.rel)
    oracle.assert_close(dict(seen.squared_norm), oracle.squared_norm(grads), program.rel)
    oracle.assert_close(dict(seen.second_moment), oracle.second_moment(grads), program.rel)
    oracle.assert_close(dict(seen.variance), oracle.variance(grads), program.rel)


@by_program([program for program in SCATTERED if program.kind in (3, 5, 8)])
def test_the_layout_of_one_batch_is_not_that_of_the_next(program: Scattered) -> None:
    """The same model sees batches whose masks and routes differ: what was measured of one is not taken for another."""
    model = program.instance(0).model
    for seed in (0, 1, 2, 0):
        made = replace(program.instance(0), model=model, data=program.instance(seed).data)
        want = oracle.per_sample_grad(made.params, made.terms)
        model.zero_grad()
        with lw.observe(model, lw.PerSampleGrad(), samples=made.samples) as seen:
            made.loss().backward()
        oracle.assert_close(dict(seen.per_sample_grad), want, program.rel)
