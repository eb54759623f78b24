"""Random programs of every family of layers: exact, or a typed error where plain torch has no answer either."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
from hypothesis import Phase, given, settings
from random_programs import FAMILIES, TORCHS_OWN, Program, programs
from torch import Tensor

from layerwise import errors
from layerwise.observation.observe import observe
from layerwise.quantities import KFAC, DiagGGN, PerSampleGrad, SecondMoment, SquaredNorm, Variance

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

FEW, MANY = 100, 500  # examples of every family, in `make test` and in `make test-all`


def _check(program: Program) -> None:
    valid = program.n > 0 and program.runs()
    params = program.model.parameters()
    quantities = [PerSampleGrad(), SquaredNorm(), SecondMoment(), Variance(), DiagGGN(), KFAC()]
    try:
        with observe(program.model, *quantities) as seen:
            loss = program.loss()
            if loss.requires_grad:
                loss.backward()
    except errors.AmbiguousSamples:
        assert all(p.grad is None for p in params)
        return
    except errors.LayerwiseError as error:
        assert not valid, f"refused, though plain torch runs it: {error}"
        assert all(p.grad is None for p in params)
        return
    except TORCHS_OWN:
        assert not program.runs()  # torch's own error of a call without parameters (a padding, a pooling)
        return
    if valid:
        _compare(program, seen)


def _compare(program: Program, seen: object) -> None:
    """Errors are relative to the largest value of all parameters: a bias before a norm is 0 in truth, noise in fact."""
    rel = 2e-4 if program.single else 1e-10
    params = oracle.parameters(program.model)
    grads = oracle.per_sample_grad(params, program.terms)
    used = set(seen.grad)
    want = {
        "per_sample_grad": grads, "squared_norm": oracle.squared_norm(grads),
        "second_moment": oracle.second_moment(grads), "variance": oracle.variance(grads),
        "diag_ggn": oracle.diag_ggn(params, program.logits, program.loss_of),
    }  # fmt: skip
    for name, values in want.items():
        got = getattr(seen, name)
        assert set(got) == used
        of = want["second_moment"] if name == "variance" else values  # a difference of numbers of this size
        peak = max((float(of[k].abs().max()) for k in used), default=0.0) / (program.n if name == "variance" else 1)
        for k in used:
            assert got[k].shape == values[k].shape
            assert float((got[k] - values[k]).abs().max()) <= rel * max(peak, 1e-6), (name, k)


def _run(family: str, examples: int, phases: tuple[Phase, ...] = tuple(Phase)) -> None:
    @settings(max_examples=examples, phases=phases)
    @given(programs(family))
    def check(program: Program) -> None:
        _check(program)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_random_programs(family: str) -> None:
    _run(family, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_programs(family: str) -> None:
    _run(family, MANY)


# That the comparison can fail -------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [lambda g: g.flip(0), lambda g: 1.001 * g, lambda g: g.roll(1, -1)])
def test_a_wrong_gradient_is_found(wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    right = oracle.per_sample_grad
    monkeypatch.setattr(oracle, "per_sample_grad", lambda *a: {k: wrong(g) for k, g in right(*a).items()})
    with pytest.raises(AssertionError):
        _run("linear", FEW, (Phase.generate,))
