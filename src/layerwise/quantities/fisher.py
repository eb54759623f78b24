"""The diagonals of the true and of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerwise.errors import BadInput, Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.graph.cotangents import Gradient, Sampled
from layerwise.losses import Likelihood
from layerwise.quantities.base import ByParameter, Context, Quantity, Union, positive, takes_draws

__all__ = ["FisherDiag"]


class FisherDiag(Quantity):
    """The diagonal of the Fisher information, with labels from the model or from the data, `[*shape]`.

    labels="model": the true Fisher, estimated from `draws` labels drawn from the model's predictive distribution
    at every loss term; unbiased. Its expectation is the GGN's diagonal, with the loss's weights: the mean over n of
    E[(d log p / d theta)²] for a mean loss, the sum for a sum; multiplying the loss by c multiplies it by c.
    labels="data": the empirical Fisher, with the labels of the batch, exact: N sum_n g_n² for a mean over N (the mean
    of squared gradients of the samples' own losses), sum_n g_n² for a sum; multiplying the loss by c multiplies it
    by c². The gradients of a sample's loss terms are added before squaring. It does not estimate the true Fisher.
    `scale` changes neither.
    Raises SamplesMixed, UnknownLoss, or Undefined: for labels="model" where the loss is no negative log-likelihood,
    for labels="data" where a mean and a sum are added.
    Source: Martens (2020); Kunstner, Balles and Hennig (2019), eq. 2 and 3.
    """

    @takes_draws
    def __init__(self, labels: str = "model", draws: int = 1, generator: torch.Generator | None = None) -> None:
        if labels not in ("model", "data"):
            raise BadInput(f'FisherDiag\'s labels must be "model" or "data", got {labels!r}')
        positive("FisherDiag's draws", draws, none=False)
        self.labels, self.draws = labels, draws
        self.cotangent = Sampled(draws, generator) if labels == "model" else Gradient()
        self.wirtinger = labels == "data"
        self.powers = (1,) if labels == "model" else (2,)

    def check_losses(self, losses: Sequence[Likelihood]) -> None:
        """Raise Undefined for losses that are no likelihoods (labels="model") or mix means and sums (labels="data")."""
        if self.labels == "data" and len({loss.mean for loss in losses}) > 1:
            raise Undefined(
                f"asked for the empirical Fisher's diagonal of a total that adds a mean and a sum "
                f"({', '.join(loss.call for loss in losses)}), so the weight of a sample's own loss is not one number; "
                "use the same reduction, or ask for SecondMoment"
            )
        for loss in losses:
            if self.labels == "data" and loss.mean is None:
                raise Undefined(
                    f"asked for the empirical Fisher's diagonal, N sum_n g_n² for a mean, but whether {loss.call} is "
                    'one is not said; mark it: lw.as_loss(fn, reduction="mean") or "sum", or ask for SecondMoment'
                )
            if self.labels == "model" and not loss.canonical:
                raise Undefined(
                    f"asked for the true Fisher's diagonal, but {loss.call} is not the negative log-likelihood of a "
                    "distribution that labels can be drawn from, with the Fisher information as its Hessian; ask for "
                    'DiagGGN, or FisherDiag(labels="data")'
                )

    def check_union(self, seen: Union, batch: Union) -> None:
        """Refuse a mean and a sum together, for labels="data"."""
        if self.labels == "data" and seen.mean != batch.mean:
            raise Undefined(
                "asked for the empirical Fisher's diagonal of backward passes from a mean and a sum, so the weight of "
                "a sample's own loss is not one number; use the same reduction, or ask for SecondMoment"
            )

    def forms_rows(self, positions: int, outputs: int, inputs: int) -> bool:
        """For labels of the data, whose squared gradients are summed."""
        return self.labels == "data"

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[*shape]`."""
        return (gradient.second_moment(),)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """The diagonals by parameter."""
        factor = union.samples if self.labels == "data" and union.mean else 1
        return ByParameter({k: v[0] * factor if factor != 1 else v[0] for k, v in values.items()})

    def __repr__(self) -> str:
        return f"FisherDiag(labels={self.labels!r}" + (f", draws={self.draws})" if self.labels == "model" else ")")
