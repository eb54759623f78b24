"""Whitening: a layer's problem in coordinates in which its inputs are uncorrelated and of equal size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.metric import Metric, joined_columns
from layerwise.local.problem import LocalProblem, Pull
from layerwise.local.regularizers import Average
from layerwise.local.solvers.closed import inputs_with_ones

__all__ = ["Whitening", "projected", "whitened"]

Update = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Whitening:
    """Measure a layer's weights by K-FAC's input factor: `‖V‖² = tr(V M Vᵀ)`, `M = Ā + λ tr(Ā)/I I`.

        Ā ← decay Ā + (1 − decay) (1/R) Σ_r a_r a_rᵀ, the first one as it is,      a bias as an input of 1

    It stands among the regularizers, and makes theirs the norms of `W' = W M^{1/2}`: the problem is solved in these
    coordinates, on inputs `a' = M^{-1/2} a`, and the fit is the same. One gradient step is `W − lr γ G M⁻¹`, FOOF with
    a running mean, and with a `NaturalStep` that has a decay K-FAC's; `WeightDecay` is decoupled from the metric then;
    `ProximalSolve` is damped by M, and a `SpectralNorm` is of `(W − W₀) M^{1/2}`. Local optimizers with
    a state keep it in the layer's own coordinates, of gradients in the metric.

    decay: of the running mean, which is saved with the state, and starts anew where a bias is frozen or thawed; 0 takes
    the batch's own. damping: λ, in units of Ā's mean
    diagonal. every: how many batches share a mean and its inverse, whose price they share, too; the first of them is
    measured. A table's metric is diagonal: how often each row is looked up. Raises BadInput for settings that cannot
    be. Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015);
    Benzing, "Gradient descent on neurons and its link to approximate second-order optimization" (2022).
    """

    decay: float = 0.95
    damping: float = 1e-2
    every: int = 1
    averages: ClassVar[str] = "inputs"

    def __post_init__(self) -> None:
        whole = isinstance(self.every, int) and self.every >= 1
        if not (0 <= self.decay < 1 and 0 < self.damping < float("inf") and whole):
            raise BadInput(
                f"Whitening needs a decay in [0, 1), a finite damping > 0 and every as an integer >= 1; got {self}"
            )

    def __call__(self, weight: Tensor, bias: Tensor | None, gamma: float, average: Average | None) -> Metric:
        """The metric of a running second moment, `average[0]`. Raises BadInput without one, or for one that misfits."""
        if average is None:
            raise BadInput("Whitening measures by a running second moment of a layer's inputs, and was given none")
        metric = Metric(average[0], self.damping)
        if not metric.fits(weight.shape, bias is not None):
            raise BadInput(
                f"the running second moment of the inputs is {tuple(average[0].shape)}, and the weight has "
                f"{tuple(weight.shape)}, [K,O,I]{'' if bias is None else ', with a 1 for a bias'}"
            )
        return metric


def whitened(problem: LocalProblem) -> tuple[LocalProblem, Callable[[Update], Update]]:
    """A problem in the coordinates of its metric, without one; and what carries an update back.

    There the bias is a column of the weight. One without a metric is itself.
    """
    metric, bias = problem.metric, problem.bias is not None
    if metric is None:
        return problem, lambda update: update

    def white(pull: Pull) -> Pull:
        if pull.weight is None and pull.bias is None:
            return pull
        weight = problem.weight if pull.weight is None else pull.weight
        centre = problem.bias if pull.bias is None else pull.bias
        return Pull(pull.strength, metric.white(weight, centre))

    rows = metric.white_rows(inputs_with_ones(problem)).transpose(0, 1)
    found = replace(
        problem, a=rows, weight=metric.white(problem.weight, problem.bias), bias=None, metric=None,
        pulls=tuple(white(pull) for pull in problem.pulls),
    )  # fmt: skip
    return found, lambda update: metric.plain(joined_columns(*update), bias)


def projected(problem: LocalProblem, starts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The points of a problem's ball nearest to its weight and bias, in its metric.

    starts: each of them as it is, with its value at the start. Without a metric each is in a ball of its own.
    """
    ball, metric = problem.ball, problem.metric
    assert ball is not None
    if metric is None:
        return [ball.projected(now, start) for now, start in starts]
    now, start = (metric.white(pair[0], pair[1] if len(pair) > 1 else None) for pair in zip(*starts, strict=True))
    changes = metric.plain(ball.projected(now, start) - now, len(starts) > 1)
    return [at + change for (at, _), change in zip(starts, changes, strict=False) if change is not None]
