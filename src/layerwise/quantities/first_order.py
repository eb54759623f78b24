"""Quantities of the per-sample gradients: the gradients themselves, their norms and moments.

Scaling. With `scale="loss"` g_n is the gradient of sample n's term in the loss as written, so the g_n sum
to `.grad`. With `scale="sample"` a mean loss over N samples gives N·g_n, and moments are means over samples.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import ByParameter, Context, Quantity, Union
from layerwise.rows.cost import ghost_is_cheaper
from layerwise.tensors import dense, widened

__all__ = ["PerSampleGrad", "SecondMoment", "SquaredNorm", "Variance", "sample_factor"]


def sample_factor(union: Union) -> float:
    """The factor from g_n to the gradient that the scale asks for: N for a mean loss under "sample", 1 otherwise."""
    return union.samples if union.scale == "sample" and union.mean else 1.0


class PerSampleGrad(Quantity):
    """The gradient of every sample's loss term.

    g_n = d l_n / d theta, `[N, *shape]`, unit loss per parameter unit; sum_n g_n = `.grad`.
    `scale="sample"`: N g_n for a mean loss. Memory N·P.
    Raises SamplesMixed where samples are not independent. Source: Dangel et al. (2020), table 1.
    """

    powers = (1,)
    concatenate = True
    computed_first = True  # other quantities square these gradients
    rows_of_many = "samples"
    wirtinger = True

    def forms_rows(self, positions: int, outputs: int, inputs: int) -> bool:
        """Always."""
        return True

    def numbers(self, gradient: ParameterGradient) -> int:
        """V·N·P."""
        return gradient.size.numel() * gradient.shape.numel()

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, *shape]`."""
        return (gradient.rows()[0],)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """Keyed by parameter."""
        factor = sample_factor(union)
        return ByParameter({k: v[0] * factor if factor != 1 else v[0] for k, v in values.items()})


class SquaredNorm(Quantity):
    """The squared Euclidean norm of every sample's gradient, per parameter; `.total` over all parameters.

    ||g_n||^2, `[N]`, computed without holding `[N, P]`. Raises SamplesMixed.
    Source: Goodfellow (2015), eq. 2; Dangel et al. (2020), table 1; Li et al. (2022), eq. 4 (ghost norm).
    """

    powers = (2,)
    concatenate = True
    rows_of_many = "samples"
    wirtinger = True

    def forms_rows(self, positions: int, outputs: int, inputs: int) -> bool:
        """Where Gram matrices over the positions cost more."""
        return not ghost_is_cheaper(1, positions, outputs, inputs)

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N]`."""
        return (gradient.squared_norm()[0],)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """The norms by parameter; the total is the squared norm over all parameters, `[N]`."""
        factor = sample_factor(union) ** 2
        norms = {k: v[0] * factor if factor != 1 else v[0] for k, v in values.items()}
        total = sum(norms.values()) if norms else None
        return ByParameter(norms, total)  # type: ignore[arg-type]


class SecondMoment(Quantity):
    """The elementwise second moment of the per-sample gradients.

    M = sum_n g_n^2, `[*shape]`; `scale="sample"`: (1/N) sum_n (N g_n)^2 for a mean loss.
    Computed without holding `[N, P]`. Raises SamplesMixed. Source: Dangel et al. (2020), eq. 5.
    """

    rows_of_many = "groups"
    wirtinger = True

    def forms_rows(self, positions: int, outputs: int, inputs: int) -> bool:
        """Always."""
        return True

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[*shape]`."""
        return (gradient.second_moment(),)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """Keyed by parameter."""
        return ByParameter({k: _moment(v[0], union) for k, v in values.items()})


class Variance(Quantity):
    """The elementwise variance of the per-sample gradients.

    V = sum_n g_n^2 / N - (sum_n g_n / N)^2, `[*shape]`; `scale="sample"`: (1/N) sum_n (N g_n)^2 - grad^2.
    The smallest values suffer cancellation and are clamped at zero. Raises SamplesMixed.
    Source: Dangel et al. (2020), eq. 5.
    """

    rows_of_many = "groups"
    wirtinger = True

    def forms_rows(self, positions: int, outputs: int, inputs: int) -> bool:
        """Always."""
        return True

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """Second moment, `[*shape]`; the mean is taken from `.grad`."""
        return (gradient.second_moment(),)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """Keyed by parameter."""
        result = {}
        for name, (moment,) in values.items():
            total = widened(dense(context.gradient[name]))
            factor = sample_factor(union)  # in one new tensor: allocating costs more than arithmetic
            variance = moment * (factor**2 / union.samples)
            mine = total if not total.is_complex() else total.abs()
            variance.addcmul_(mine, mine, value=-((factor / union.samples) ** 2)).clamp_(min=0)
            result[name] = variance if union.samples > 1 else variance.zero_()
        return ByParameter(result)


def _moment(moment: Tensor, union: Union) -> Tensor:
    if union.scale == "loss":
        return moment
    return moment * (sample_factor(union) ** 2 / union.samples)
