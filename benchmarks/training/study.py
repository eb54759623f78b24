"""The studies: which methods are run on which problems, and by which rules. A problem belongs to one study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .altmin.plan import METHODS_OF as ALTMIN
from .curvature.plan import METHODS_OF as CURVATURE
from .locoprop.plan import METHODS_OF as LOCOPROP
from .methods import METHODS
from .problems import PROBLEMS

__all__ = ["STUDIES", "Study", "study_of"]


@dataclass(frozen=True)
class Study:
    """Problems, the methods on each, and what the problems share.

    chosen_by: what the best trial has least of: "train_loss", or, on problems with classes, "accuracy", of which it has
    most, on rows held out of the training rows. tune_epochs, final_epochs: where a problem has none of its own.
    Budget in core-hours.
    """

    name: str
    title: str
    methods: Mapping[str, tuple[str, ...]]
    chosen_by: Literal["train_loss", "accuracy"]
    trials: Path
    results: Path
    tune_epochs: int = 3
    final_epochs: int = 20
    tune_seed: int = 100  # a seed that no final run has
    final_seeds: tuple[int, ...] = (0, 1, 2)
    budget: float = 6.0

    @property
    def families(self) -> frozenset[str]:
        """The families of the problems."""
        return frozenset(PROBLEMS[p].family for p in self.methods)

    def cut(self, problem: str) -> tuple[str, ...]:
        """Methods that have trials for a problem, and for which the budget has no room."""
        family = PROBLEMS[problem].family
        return tuple(m for m in METHODS if m not in self.methods[problem] and family in METHODS[m].spaces)


_HERE = Path(__file__).parent
STUDIES: dict[str, Study] = {
    s.name: s
    for s in (
        Study("locoprop", "Training benchmark", LOCOPROP, "train_loss", _HERE / "trials.json", _HERE / "results",
              budget=7.0),
        Study("altmin", "Online alternating minimization", ALTMIN, "accuracy", _HERE / "trials_altmin.json",
              _HERE / "results" / "altmin", tune_epochs=1, final_epochs=5,
              budget=6.5),
        Study("second-order", "Second-order optimizers on DeepOBS's problems", CURVATURE, "accuracy",
              _HERE / "trials_second_order.json", _HERE / "results" / "second_order", tune_epochs=1,
              final_seeds=(0, 1, 2, 3, 4)),
    )
}  # fmt: skip


def study_of(problem: str) -> Study:
    """The study that a problem belongs to."""
    return next(s for s in STUDIES.values() if problem in s.methods)
