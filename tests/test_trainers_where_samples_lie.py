"""One step of every trainer on programs whose samples are any set of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from grids import one_in
from scattered_checks import ScatteredTruth, allows, no_root, truth_of
from torch import Tensor, nn
from zoo.scattered import MIXED, SCATTERED, Scattered, ScatteredInstance

import layerwise as lw
from layerwise import errors, local

TRAINED = [program for program in SCATTERED if program.dtype == torch.float64]
UNTOLD = [program for program in TRAINED if program.instance().samples is None and not program.own]
# Written the regular way, the same rows in the same layers: nothing is padded, and no row goes to two experts.
SAME_ROWS = {
    "attribute_first", "flat_attribute_first", "position_ids", "argument_first", "closure_first",
    "as_many_positions_as_samples", "chunks", "uneven_split", "slices", "loop_over_groups", "unbound",
    "every_other_row", "a_loss_for_each_chunk", "chunks_of_sequences", "masked_logits", "masked_select",
    "nonzero", "active_rows", "index_select", "pairs_in_two_calls", "losses_of_rows", "stacked",
    "comprehension", "loop_inside",
}  # fmt: skip
REGULAR = [program for program in SCATTERED if program.name in SAME_ROWS]
# Each layer called once, and its activation right behind it: so a layer has the same transfer function, and a code.
SAME_LAYERS = [program for program in REGULAR if program.kind in (1, 3, 6)]
# One loss call on logits of the same shape: the same draws.
SAME_DRAWS = [program for program in REGULAR if program.kind in (1, 2, 7) and program.reduction is not None]


def by_program(programs: list[Scattered]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", programs, ids=lambda program: program.id)


def _stepped(
    made: ScatteredInstance, optimizer: Any, loss: Callable[[], Tensor] | None = None, **said: Any
) -> dict[str, Tensor]:
    """By how much one step moved every parameter."""
    before = {name: p.detach().clone() for name, p in made.params.items()}
    optimizer.step(loss or made.loss, **said)
    assert optimizer.skipped == 0
    moved = {name: p.detach() - before[name] for name, p in made.params.items()}
    assert any(bool(m.any()) for m in moved.values())
    return moved


def _or_asks(program: Scattered, step: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """What the step moved; None where the user would have to say what a sample is, and the error says so."""
    try:
        return step()
    except errors.LayerwiseError as error:
        if program.may_refuse is not None and allows(program.may_refuse, error):
            return None
        if program.instance().samples is None:
            raise
        assert "samples=" in str(error)
        return None


def test_the_programs_are_wide_enough() -> None:
    assert len(REGULAR) == len(SAME_ROWS) and all(program.regular for program in REGULAR)
    assert {program.kind for program in REGULAR} >= {1, 2, 3, 6, 7} and len(SAME_DRAWS) >= 10


# K-FAC ------------------------------------------------------------------------------------------

RATE, DAMPING = 0.1, 0.05


def _kfac(model: nn.Module, kind: str, **more: Any) -> lw.optim.KFAC:
    return lw.optim.KFAC(
        model, kind=kind, lr=RATE, momentum=0.0, kl_clip=None, damping=DAMPING, joint=False,
        on_nonfinite="raise", **more,
    )  # fmt: skip


def _by_hand(truth: ScatteredTruth) -> dict[str, Tensor]:
    """-lr (B ⊗ A + λI)⁻¹ g for each parameter with rows, as dense matrices."""
    values, vectors = torch.linalg.eigh(truth.loss_hessian)
    found = {}
    for name, (a, b) in truth.row_factors("expand", (vectors * values.clamp(min=0).sqrt()).T).items():
        table = isinstance(truth.instance.model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        g = truth.grads[name].sum(0)
        g = g.T if table else g  # a table is [rows, features], and features are its outputs
        damped = torch.kron(b[0], a[0]) + DAMPING * torch.eye(g.numel(), dtype=g.dtype)
        step = -RATE * torch.linalg.solve(damped, g.flatten()).view_as(g)
        found[name] = step.T if table else step
    return found


@one_in(2, program=[p for p in TRAINED if not (p.own and no_root(truth_of(p)))])
def test_a_step_of_kfac_by_hand(program: Scattered) -> None:
    """Of the parameters with rows; others have the diagonal of the GGN from the draws in its place."""
    made = program.instance()
    optimizer = _kfac(made.model, "kflr", damping_form="eigen")
    got = _or_asks(program, lambda: _stepped(made, optimizer))
    if got is not None:
        want = _by_hand(truth_of(program))
        assert want
        assert all(optimizer.describe()[name].startswith("kflr") for name in want)
        oracle.assert_close({name: got[name] for name in want}, want, 1e-9)


def _recorded(made: ScatteredInstance, optimizer: Any, parts: int = 1) -> dict[str, Tensor]:
    """By how much a step from recorded passes moved every parameter; the loss is that of equal parts."""
    before = {name: p.detach().clone() for name, p in made.params.items()}
    for _ in range(parts):
        with optimizer.watch(samples=made.data.number):
            (made.loss() / parts).backward()
    optimizer.step()
    assert optimizer.skipped == 0
    return {name: p.detach() - before[name] for name, p in made.params.items()}


@by_program([p for p in TRAINED if p.instance().samples is not None and not (p.own and no_root(truth_of(p)))])
def test_a_step_of_kfac_with_what_the_user_says(program: Scattered) -> None:
    """`step(closure, samples=)`, `watch(samples=)`, also of half the loss twice, and a preconditioner's."""
    want = _by_hand(truth_of(program))
    made = [program.instance() for _ in range(4)]
    make = lambda one: _kfac(one.model, "kflr", damping_form="eigen")  # noqa: E731
    pre = lw.optim.Preconditioner(
        made[2].model, "kflr", damping=DAMPING, joint=False, damping_form="eigen", on_nonfinite="raise"
    )
    try:
        found = [
            _stepped(made[0], make(made[0]), samples=made[0].data.number),
            _recorded(made[1], make(made[1])),
            _recorded(made[3], make(made[3]), parts=2),
        ]
        with pre.watch(samples=made[2].data.number):
            made[2].loss().backward()
    except errors.LayerwiseError as error:
        assert program.may_refuse is not None and allows(program.may_refuse, error)
        return
    assert pre.step()
    found.append({name: -RATE * p.grad for name, p in made[2].params.items() if p.grad is not None})
    for got in found:
        oracle.assert_close({name: got[name] for name in want}, want, 1e-9)


@by_program([p for p in TRAINED if p.instance().samples is not None])
def test_a_target_per_sample_of_recorded_passes(program: Scattered) -> None:
    per_sample = local.GradientStep(0.5, per="sample")
    made, same = program.instance(), program.instance()
    want = _or_asks(program, lambda: _stepped(
        made, _locoprop(made.model, "squared", target=per_sample), samples=made.data.number
    ))  # fmt: skip
    if want is not None:
        oracle.assert_close(_recorded(same, _locoprop(same.model, "squared", target=per_sample)), want, 1e-12)


def test_what_is_said_of_recorded_passes_is_said_to_watch() -> None:
    program = next(p for p in TRAINED if p.instance().samples is not None)
    for make in (lambda m: lw.optim.KFAC(m), lambda m: lw.LocoProp(m)):
        made = program.instance()
        optimizer = make(made.model)
        with optimizer.watch():
            made.loss().backward()
        with pytest.raises(errors.BadInput, match=r"watch\(samples="):
            optimizer.step(samples=made.n)
        with pytest.raises(errors.BadInput, match="whole number"), optimizer.watch(samples=0):
            pass


@one_in(2, program=SAME_DRAWS, kind=["kfac", "ekfac"])
def test_a_step_of_kfac_and_ekfac_is_that_of_the_regular_form(program: Scattered, kind: str) -> None:
    made, regular = program.instance(), program.in_regular_form()
    got = _stepped(made, _kfac(made.model, kind))
    want = _stepped(regular, _kfac(regular.model, kind), regular.regular_loss)
    oracle.assert_close(got, want, 1e-9)


def _newton(model: nn.Module) -> lw.optim.DiagNewton:
    """With the exact diagonal: labels drawn for other rows would be others."""
    return lw.optim.DiagNewton(model, lr=RATE, damping=DAMPING, draws=None)


@by_program([p for p in REGULAR if not p.own])
def test_a_step_with_the_ggn_diagonal_is_that_of_the_regular_form(program: Scattered) -> None:
    made, regular = program.instance(), program.in_regular_form()
    got = _stepped(made, _newton(made.model))
    want = _stepped(regular, _newton(regular.model), regular.regular_loss)
    oracle.assert_close(got, want, 1e-9)


# LocoProp ---------------------------------------------------------------------------------------


def _locoprop(model: nn.Module, loss: str, **more: Any) -> lw.LocoProp:
    return lw.LocoProp(model, loss=loss, lr=1e-3, steps=3, rows="all", on_nonfinite="raise", **more)


@one_in(2, program=UNTOLD, loss=["matching", "squared"])
def test_a_target_per_sample_is_one_with_n_times_gamma(program: Scattered, loss: str) -> None:
    """`GradientStep(γ, per="sample")` is `GradientStep(γ N)`, with the N that brute force knows."""
    made, same = program.instance(), program.instance()
    per_sample = local.GradientStep(0.5, per="sample")
    got = _or_asks(program, lambda: _stepped(made, _locoprop(made.model, loss, target=per_sample)))
    if got is not None:
        plain = local.GradientStep(0.5 * same.n)
        oracle.assert_close(got, _stepped(same, _locoprop(same.model, loss, target=plain)), 1e-12)


@one_in(2, program=TRAINED, said=["count", "numbers"])
def test_a_target_per_sample_with_what_the_user_says(program: Scattered, said: str) -> None:
    """`samples=` decides N on every program, also where nothing else does; a loss need not be known."""
    made, same = program.instance(), program.instance()
    samples = made.n if said == "count" else made.data.number
    per_sample, plain = local.GradientStep(0.5, per="sample"), local.GradientStep(0.5 * same.n)
    got = _or_asks(
        program, lambda: _stepped(made, _locoprop(made.model, "squared", target=per_sample), samples=samples)
    )
    if got is not None:
        oracle.assert_close(got, _stepped(same, _locoprop(same.model, "squared", target=plain)), 1e-12)


def _check_locoprop(program: Scattered, loss: str) -> None:
    made, regular = program.instance(), program.in_regular_form()
    target = local.GradientStep(1.0, per="sample")
    got = _stepped(made, _locoprop(made.model, loss, target=target))
    want = _stepped(regular, _locoprop(regular.model, loss, target=target), regular.regular_loss)
    oracle.assert_close(got, want, 1e-9)


# A table of positions is a layer with a target of its own where they are data, and a derived tensor as a buffer.
LAYERS_ALIKE = [
    program for program in REGULAR
    if program.name not in ("attribute_first", "flat_attribute_first", "closure_first", "as_many_positions_as_samples")
]  # fmt: skip


@by_program(LAYERS_ALIKE)
def test_a_step_of_locoprop_is_that_of_the_regular_form(program: Scattered) -> None:
    _check_locoprop(program, "squared")


@by_program([program for program in LAYERS_ALIKE if program in SAME_LAYERS])
def test_a_step_of_locoprop_with_matching_losses_is_that_of_the_regular_form(program: Scattered) -> None:
    _check_locoprop(program, "matching")


# AltMin -----------------------------------------------------------------------------------------


def _altmin(model: nn.Module, **more: Any) -> lw.AltMin:
    return lw.AltMin(model, weights="sgd", lr=1e-2, steps=2, rows="all", on_nonfinite="raise", **more)


@by_program(UNTOLD)
def test_altmin_couples_with_the_number_of_samples(program: Scattered) -> None:
    """μ under a mean over N samples is μ/N under a sum, with the N that brute force knows."""
    made, same = program.instance(), program.instance()
    got = _or_asks(program, lambda: _stepped(made, _altmin(made.model, coupling=0.3, reduction="mean")))
    if got is not None:
        summed = _altmin(same.model, coupling=0.3 / same.n, reduction="sum")
        oracle.assert_close(got, _stepped(same, summed), 1e-9)


@pytest.mark.parametrize("codes", ["jacobi", "gauss-newton"])
@by_program([program for program in TRAINED if program.instance().samples is not None and not program.own])
def test_altmin_couples_with_what_the_user_says(program: Scattered, codes: Any) -> None:
    made, same = program.instance(), program.instance()
    more: dict[str, Any] = {"codes": codes}
    got = _or_asks(program, lambda: _stepped(
        made, _altmin(made.model, coupling=0.3, reduction="mean", **more), samples=made.data.number
    ))  # fmt: skip
    if got is not None:
        summed = _altmin(same.model, coupling=0.3 / same.n, reduction="sum", **more)
        oracle.assert_close(got, _stepped(same, summed, samples=same.data.number), 1e-9)


@pytest.mark.parametrize("codes", ["jacobi", "sweep", "gauss-newton"])
@by_program([program for program in SAME_LAYERS if program.kind == 3][:3])
def test_what_altmin_reads_may_be_said_to_it(program: Scattered, codes: Any) -> None:
    """The same step; another number is another step, or is refused where the samples are told apart."""

    def step(said: int | None) -> dict[str, Tensor]:
        made = program.instance()
        return _stepped(made, _altmin(made.model, coupling=0.3, codes=codes), samples=said)

    n, read = program.instance().n, step(None)
    oracle.assert_close(step(n), read, 1e-12)
    if codes == "gauss-newton":
        with pytest.raises(errors.LayerwiseError, match=f"{2 * n} samples"):
            step(2 * n)
    else:
        other = step(2 * n)
        assert any(not torch.equal(other[name], moved) for name, moved in read.items())


@pytest.mark.parametrize("make", [lambda m: lw.LocoProp(m), lambda m: lw.AltMin(m)], ids=["locoprop", "altmin"])
def test_what_is_no_number_of_samples_is_refused(make: Callable[[nn.Module], Any]) -> None:
    model, x = nn.Linear(2, 3), torch.ones(2, 2)
    before = model.weight.detach().clone()
    for wrong in (0, 2.0, torch.tensor([0.0, 1.0]), torch.tensor([-1, 0])):
        with pytest.raises(errors.BadInput, match="samples of"):
            make(model).step(lambda: model(x).square().sum(), samples=wrong)
    assert torch.equal(model.weight, before)


@by_program(SAME_LAYERS)
def test_a_step_of_altmin_is_that_of_the_regular_form(program: Scattered) -> None:
    made, regular = program.instance(), program.in_regular_form()
    got = _stepped(made, _altmin(made.model))
    oracle.assert_close(got, _stepped(regular, _altmin(regular.model), regular.regular_loss), 1e-9)


# Where samples are mixed ------------------------------------------------------------------------


@by_program(MIXED)
def test_a_target_per_sample_where_samples_are_mixed(program: Scattered) -> None:
    """N is the number of the loss's terms all the same; or the step is refused, and nothing has moved."""
    made, same = program.instance(), program.instance()
    per_sample = local.GradientStep(0.5, per="sample")
    before = {name: p.detach().clone() for name, p in made.params.items()}
    try:
        got = _stepped(made, _locoprop(made.model, "squared", target=per_sample))
    except errors.LayerwiseError as error:
        assert "sample" in str(error)
        oracle.assert_close({name: p.detach() for name, p in made.params.items()}, before)
        return
    oracle.assert_close(
        got, _stepped(same, _locoprop(same.model, "squared", target=local.GradientStep(0.5 * same.n))), 1e-12
    )
