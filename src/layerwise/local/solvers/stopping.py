"""How many local steps a layer takes: until one lowers its objective by less, for its cost, than a new batch would.

The decrease is measured by the trapezoidal rule along the steps, costs are multiply-adds that are counted, not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerwise.local.problem import LocalProblem
from layerwise.local.solvers.workspace import Workspace

__all__ = ["TRAFFIC", "Judge", "Stop", "cost_of_pass", "cost_of_step", "marginal_value"]

Stop = Callable[[Sequence[float], Sequence[float], float], bool]
TRAFFIC = 12  # an optimizer's passes over a weight and its state, in multiply-adds


def marginal_value(decreases: Sequence[float], costs: Sequence[float], outer: float) -> bool:
    """Whether a step lowers the objective by less, for its cost, than all since the batch began do for theirs.

        stop after step t where  d_t / c_t  <  (d_1 + … + d_t) / (C + c_1 + … + c_t)

    d: decreases of the objective, c: costs of the steps, outer: C, the cost of the pass that made the problem, all in
    order. The right side is what a new batch buys for the cost of its pass and as many steps. Where decreases fall from
    step to step, the first t at which this holds is one more than the number of steps with the greatest decrease for
    their cost; nothing is to be tuned.
    Source: Charnov, "Optimal foraging, the marginal value theorem" (1976).
    """
    return decreases[-1] / costs[-1] < sum(decreases) / (outer + sum(costs))


def cost_of_pass(problem: LocalProblem) -> float:
    """The multiply-adds of a layer's share of the net's own pass: its product forward, and its cotangents' back.

    A table is looked up, and no cotangent goes back from indices.
    """
    if problem.indexed:
        return float(problem.target.numel())
    return 2.0 * problem.a.shape[0] * problem.weight.numel()


def cost_of_step(problem: LocalProblem, rows: int, first: bool) -> float:
    """The multiply-adds of one local step: a product forward, one for the gradient, and the optimizer's own.

    The first needs no product forward where the problem has the cotangents. A step by `AᵀA` counts as one by rows; in
    a metric the product with its inverse is added, of the rows or of their gradient, whichever is the smaller.
    """
    products = 1 if first and problem.g is not None and not problem.indexed else 2
    width = problem.weight.shape[-2] if problem.indexed else problem.weight.numel()
    count = products * rows * width + TRAFFIC * problem.weight.numel()
    if problem.metric is not None and not problem.indexed:
        count += min(rows, problem.weight.shape[-2]) * problem.metric.second.numel()
    return float(count)


class Judge:
    """Follows the local steps of a problem, and asks a rule whether they are enough.

        d_t = −½ ⟨∇_{t−1} + ∇_t, W_t − W_{t−1}⟩

    is the decrease of step t, of the objective with its quadratic terms: the trapezoidal rule, exact for the squared
    loss where each step takes all rows. Where each takes its own, both gradients are unbiased, and the second is of
    rows that the step has not seen. In a metric, gradients and the inner product are the metric's.
    """

    def __init__(self, problem: LocalProblem, rule: Stop, rows: int, workspace: Workspace) -> None:
        self._problem, self._rule, self._rows = problem, rule, rows
        self._now = [t for t in (problem.weight, problem.bias) if t is not None]
        self._before, self._gradients = (
            [workspace.take(f"{name}{n}", tuple(t.shape), t) for n, t in enumerate(self._now)]
            for name in ("judged", "judged gradient")
        )
        self._started = False
        self._decreases: list[float] = []
        self._costs: list[float] = []

    def enough(self, *gradients: Tensor | None) -> bool:
        """Whether the steps before this one were enough, from the gradients of weight and bias at the present ones."""
        found = [g for g in gradients if g is not None]
        if self._started:
            moves = [now - before for now, before in zip(self._now, self._before, strict=True)]
            if self._problem.metric is not None:
                pair = self._problem.metric.lowered(moves[0], moves[1] if len(moves) > 1 else None)
                moves = [t for t in pair if t is not None]
            moved = torch.stack([((old + new) * move).sum()
                                 for old, new, move in zip(self._gradients, found, moves, strict=True)])  # fmt: skip
            first = not self._decreases
            self._decreases.append(-0.5 * float(moved.sum()))
            self._costs.append(cost_of_step(self._problem, self._rows, first))
        self._started = True
        for kept, t in zip([*self._before, *self._gradients], [*self._now, *found], strict=True):
            kept.copy_(t)
        return bool(self._decreases) and self._rule(self._decreases, self._costs, cost_of_pass(self._problem))
