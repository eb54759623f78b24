"""The model zoo: tiny models with data and losses on which every quantity meets the oracle.

    for problem, loss in cases():
        case = Case(problem, loss).make(seed=0)
        case.loss()                       # the loss as a user writes it
        case.params, case.terms, case.logits, case.loss_of, case.terms_of   # for the oracle

To add a model: a decorated builder in `layers`, `convolutions`, `weights`, `programs` or `sequence`. It then
meets every table test.
"""

from __future__ import annotations

from collections.abc import Collection

from .convolutions import CONVOLUTIONS
from .layers import LAYERS
from .losses import LOSSES, Loss
from .problem import Case, Functional, Instance, Problem
from .programs import PROGRAMS
from .refused import REFUSED, Refused
from .sequence import SEQUENCE
from .weights import WEIGHTS

__all__ = [
    "LOSSES",
    "PROBLEMS",
    "REFUSED",
    "Case",
    "Functional",
    "Instance",
    "Loss",
    "Problem",
    "Refused",
    "case",
    "cases",
]

PROBLEMS = {problem.name: problem for problem in (*LAYERS, *CONVOLUTIONS, *WEIGHTS, *PROGRAMS, *SEQUENCE)}
assert len(PROBLEMS) == len(LAYERS + CONVOLUTIONS + WEIGHTS + PROGRAMS + SEQUENCE), "two models of the zoo share a name"


def cases(exclude: Collection[str] = (), first_loss_only: bool = False, special: bool = False) -> list[Case]:
    """Every (problem, loss) pair, but those of problems with a tag in `exclude`.

    special: also models that round, which meet the oracle up to their own `rel`, or mix their samples.

    For pytest: `@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)`.
    """
    return [
        Case(problem, LOSSES[name])
        for problem in PROBLEMS.values()
        if problem.tags.isdisjoint(exclude) and (special or not problem.special)
        for name in problem.losses[: 1 if first_loss_only else None]
    ]


def case(problem: str, loss: str | None = None) -> Case:
    """The case of a problem and a loss by name (default: the problem's first loss)."""
    return Case(PROBLEMS[problem], LOSSES[loss or PROBLEMS[problem].losses[0]])
