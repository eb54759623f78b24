"""Random programs of every family of layers: exact, or a typed error where plain torch has no answer either."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
from hypothesis import Phase, given, settings
from random_kinds import KINDS
from random_layouts import INGREDIENTS, Layout, layouts
from random_nets import FAMILIES, Program, programs
from random_programs import WORDS, main, outcome, outcomes
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

FEW, MANY = 30, 500  # examples of every family, in `make test` and in `make test-all`


def _run(family: str, examples: int, phases: tuple[Phase, ...] = tuple(Phase)) -> None:
    @settings(max_examples=examples, phases=phases)
    @given(programs(family))
    def check(program: Program) -> None:
        outcome(program)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_random_programs(family: str) -> None:
    _run(family, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_random_programs(family: str) -> None:
    _run(family, MANY)


# Samples that are any set of rows ---------------------------------------------------------------


def _lay(ingredient: str, examples: int, seed: int) -> None:
    """No value is wrong; refusals are for the few programs that do not tell their samples apart, and say nothing."""
    found = outcomes(ingredient, examples, seed)
    assert not found.wrong, "\n".join([str(dict(found.counts)), *found.wrong[:3]])
    assert found.counts["exact"] >= 0.7 * sum(found.counts.values()), found.counts


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_random_layouts(ingredient: str, seed: int) -> None:
    _lay(ingredient, FEW, seed)


@pytest.mark.slow
@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_many_random_layouts(ingredient: str, seed: int) -> None:
    _lay(ingredient, MANY, seed)


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_the_terms_of_a_random_layout_sum_to_its_loss(ingredient: str) -> None:
    """Brute force alone: the gradients of the terms sum to that of the loss."""

    @settings(max_examples=20)
    @given(layouts(ingredient))
    def check(program: Layout) -> None:
        params = oracle.parameters(program.model)
        if not params or not program.runs():
            return
        grads = oracle.per_sample_grad(params, program.terms)
        assert all(len(g) == program.n for g in grads.values())
        rel = 1e-4 if program.single else 1e-10
        whole = oracle.gradient(params, program.loss)
        peak = max(float(g.abs().max()) for g in grads.values())
        for name, g in grads.items():
            assert float((g.sum(0) - whole[name]).abs().max()) <= rel * max(peak, 1e-6)

    check()


# What users write between the layers ------------------------------------------------------------


def _kind(kind: str, examples: int, seed: int) -> None:
    found = outcomes(kind, examples, seed)
    assert not found.wrong, "\n".join([str(dict(found.counts)), *found.wrong[:3]])
    assert found.counts["exact"] + found.counts["in part"] >= 0.2 * found.counts.total(), found.counts


@pytest.mark.parametrize("kind", KINDS)
def test_random_kinds(kind: str, seed: int) -> None:
    _kind(kind, 3, seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_random_kinds(kind: str, seed: int) -> None:
    _kind(kind, 100, seed + 1)


def test_the_command_says_what_came_and_how_to_repeat_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = oracle.per_sample_grad
    assert main("--ingredients known own --count 2 --seed 5".split()) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in (*WORDS, "known", "own", "all", "the next seed is 6"))
    monkeypatch.setattr(oracle, "per_sample_grad", lambda *a: {k: 2 * g for k, g in right(*a).items()})
    assert main("--ingredients known --count 6 --seed 5".split()) == 1
    repeat = next(line for line in capsys.readouterr().out.splitlines() if "--only" in line)
    assert main(repeat.split()) == 1
    monkeypatch.setattr(oracle, "per_sample_grad", right)
    assert main(repeat.split()) == 0


# That the comparison can fail -------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [lambda g: g.flip(0), lambda g: 1.001 * g, lambda g: g.roll(1, -1)])
def test_a_wrong_gradient_is_found(wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    right = oracle.per_sample_grad
    monkeypatch.setattr(oracle, "per_sample_grad", lambda *a: {k: wrong(g) for k, g in right(*a).items()})
    with pytest.raises(AssertionError):
        _run("linear", FEW, (Phase.generate,))
