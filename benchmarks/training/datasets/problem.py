"""Benchopt's data sets: the problems, each with its data and the shape of its model."""

from __future__ import annotations

from typing import Any

from benchopt import BaseDataset

from benchmarks.training.problems import PROBLEMS


class Dataset(BaseDataset):
    """One of PROBLEMS, on its first rows."""

    name = "problem"
    parameters = {  # noqa: RUF012
        "problem": list(PROBLEMS), "rows": [0], "shape": [""], "validation": [False],  # 0: the problem's own number
    }  # fmt: skip

    def get_data(self) -> dict[str, Any]:
        """What the objective gets."""
        problem = PROBLEMS[self.problem]
        rows = self.rows or problem.rows - (problem.validation if self.validation else 0)
        split = problem.split(rows, self.validation)
        return {"problem": self.problem, "shape": self.shape, "split": split, "validation": self.validation}
