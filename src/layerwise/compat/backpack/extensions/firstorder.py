"""Extensions for per-sample gradients g_n, of sample n's term in the loss as written.

For a mean over N samples g_n includes the factor 1/N; the g_n sum to `.grad`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from layerwise import quantities
from layerwise.compat.backpack.extensions.backprop_extension import BackpropExtension, Subsampled
from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import Quantity

__all__ = ["BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"]


class _PerSampleGrad(Subsampled, quantities.PerSampleGrad):
    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        return (self.confined(gradient.per_sample()[0]),)


class BatchGrad(BackpropExtension):
    """The gradient g_n of every sample's term, in `grad_batch`, `[N, *shape]`; see `layerwise.PerSampleGrad`.

    subsampling: indices of the samples to compute; N is then their number.
    """

    def __init__(self, subsampling: Sequence[int] | None = None) -> None:
        super().__init__("grad_batch", subsampling)

    def quantity(self) -> Quantity:
        """`PerSampleGrad` of the selected samples."""
        q = _PerSampleGrad()
        q.index = self._subsampling
        return q


class BatchL2Grad(BackpropExtension):
    """||g_n||², in `batch_l2`, `[N]`; see `layerwise.SquaredNorm`."""

    def __init__(self) -> None:
        super().__init__("batch_l2")

    def quantity(self) -> Quantity:
        """`SquaredNorm`."""
        return quantities.SquaredNorm()


class SumGradSquared(BackpropExtension):
    """sum_n g_n², in `sum_grad_squared`, `[*shape]`; see `layerwise.SecondMoment`."""

    def __init__(self) -> None:
        super().__init__("sum_grad_squared")

    def quantity(self) -> Quantity:
        """`SecondMoment`."""
        return quantities.SecondMoment()


class Variance(BackpropExtension):
    """sum_n g_n² / N - (sum_n g_n / N)², in `variance`, `[*shape]`; see `layerwise.Variance`."""

    def __init__(self) -> None:
        super().__init__("variance")

    def quantity(self) -> Quantity:
        """`Variance`."""
        return quantities.Variance()
