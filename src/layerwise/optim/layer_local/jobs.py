"""What a step has to solve, layer by layer, and those who may do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from layerwise.local.layers.layer import Layer
from layerwise.local.solvers.run import Task
from layerwise.local.solvers.values import Anderson, ConjugateGradient, LocalSteps, Newton, Solver

__all__ = ["Crew", "Facts", "Job", "Rest", "State", "operations"]

Facts = Mapping[str, Any]
State = dict[Any, Any]
_TRAFFIC = 12  # an optimizer's passes over a weight and its state, in multiply-adds


class Job(NamedTuple):
    """A layer to be fitted: the parameters that move, by name; what counts multiply-adds; what makes its task.

    cost: asked where work is shared out, not in every step. task: also gives what tells the kind of the local
    optimizer.
    """

    params: Mapping[str, Tensor]
    cost: Callable[[], float]
    task: Callable[[], tuple[Task, Callable[[], Any]]]


class Rest(NamedTuple):
    """A parameter without a local problem, which moves along its gradient."""

    params: Mapping[str, Tensor]
    cost: Callable[[], float]
    move: Callable[[], None]


class Crew:
    """Those who solve the jobs of a step. By default they are one process, which agrees with itself."""

    def run(self, jobs: Sequence[Job], rest: Sequence[Rest], state: State) -> None:
        """Solve the jobs and move the rest. state: the optimizer's, by parameter."""
        raise NotImplementedError

    def meet(self, facts: Facts) -> None:
        """Refuse, by name, what is not the same for all."""

    def agreed(
        self, where: str | None, loss: Tensor, facts: Callable[[], Facts], tensors: Callable[[], Mapping[str, Tensor]]
    ) -> str | None:
        """The place that forbids the step for any, before anything moves. facts, tensors: what all must have alike."""
        return where

    def anywhere(self, where: str | None) -> str | None:
        """The place that forbids what was done, for any."""
        return where

    def whole(self, state: State, params: Mapping[str, Tensor]) -> State:
        """The state of all parameters, of which some may be kept elsewhere."""
        return state

    def loaded(self) -> None:
        """Take note that a state was loaded."""


def operations(solver: Solver, layer: Layer) -> float:
    """Multiply-adds of a layer's local solve, counted roughly: what comes out serves to share the work."""
    k, o, i = layer.matrix().shape
    rows = sum(part.use.call.out_shape.numel() for part in layer.parts) / max(k * o, 1)
    weights = k * o * i
    if isinstance(solver, LocalSteps):
        taken = rows if solver.rows == "all" else -(-rows // solver.steps) if solver.rows == "auto" else solver.rows
        return float(solver.steps * weights * (2 * min(taken, rows) + _TRAFFIC))
    products = 0
    if isinstance(solver, Newton):
        products = solver.iterations * solver.inner
    elif isinstance(solver, ConjugateGradient):
        products = solver.iterations
    elif isinstance(solver, Anderson):
        products = solver.steps
    if products:
        return float(2 * products * rows * weights)
    return float(rows * weights + k * i * i * (rows + i + o))  # a memory, a ridge solve, or a function of one's own
