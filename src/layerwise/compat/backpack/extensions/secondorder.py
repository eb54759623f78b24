"""Extensions for the Hessian of the loss and its generalized Gauss-Newton matrix (GGN)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor

from layerwise import quantities
from layerwise.compat.backpack.extensions.backprop_extension import BackpropExtension, Subsampled
from layerwise.compat.backpack.kronecker_factors import Factors
from layerwise.compat.backpack.roots import ByClass
from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import Quantity

__all__ = [
    "KFAC",
    "KFLR",
    "KFRA",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "SqrtGGNExact",
    "SqrtGGNMC",
]


class DiagGGNExact(BackpropExtension):
    """diag(sum_n J_n^T H_n J_n), in `diag_ggn_exact`, `[*shape]`; see `layerwise.DiagGGN`."""

    def __init__(self) -> None:
        super().__init__("diag_ggn_exact")

    def quantity(self) -> Quantity:
        """`DiagGGN()`."""
        return quantities.DiagGGN()


class BatchDiagGGNExact(BackpropExtension):
    """diag(J_n^T H_n J_n) of every sample, in `diag_ggn_exact_batch`, `[N, *shape]`; see `layerwise.DiagGGN`."""

    def __init__(self) -> None:
        super().__init__("diag_ggn_exact_batch")

    def quantity(self) -> Quantity:
        """`DiagGGN(per_sample=True)`."""
        return quantities.DiagGGN(per_sample=True)


class _Sampled(BackpropExtension):
    """Base of extensions that draw labels from the model (Monte Carlo)."""

    def __init__(self, mc_samples: int, savefield: str, subsampling: Sequence[int] | None = None) -> None:
        super().__init__(savefield, subsampling)
        self._mc_samples = mc_samples

    def get_num_mc_samples(self) -> int:
        """The number of draws."""
        return self._mc_samples


class DiagGGNMC(_Sampled):
    """An unbiased estimate of `DiagGGNExact` from `mc_samples` draws, in `diag_ggn_mc`, `[*shape]`."""

    def __init__(self, mc_samples: int = 1) -> None:
        super().__init__(mc_samples, "diag_ggn_mc")

    def quantity(self) -> Quantity:
        """`DiagGGN(draws)`."""
        return quantities.DiagGGN(self._mc_samples)


class BatchDiagGGNMC(_Sampled):
    """An unbiased estimate of `BatchDiagGGNExact` from `mc_samples` draws, in `diag_ggn_mc_batch`, `[N, *shape]`."""

    def __init__(self, mc_samples: int = 1) -> None:
        super().__init__(mc_samples, "diag_ggn_mc_batch")

    def quantity(self) -> Quantity:
        """`DiagGGN(draws, per_sample=True)`."""
        return quantities.DiagGGN(self._mc_samples, per_sample=True)


class _SqrtGGN(Subsampled, quantities.SqrtGGN):
    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        return (self.confined(gradient.per_sample().transpose(0, 1)),)


class SqrtGGNExact(BackpropExtension):
    """The root of the GGN, in `sqrt_ggn_exact`, `[V, N, *shape]`; see `layerwise.SqrtGGN`.

    For classification V = C·P, one column s_c = sqrt(w p_c)(e_c - p) for each of C classes and P loss terms of a
    sample, classes first; for an elementwise loss V = P.
    """

    def __init__(self, subsampling: Sequence[int] | None = None) -> None:
        super().__init__("sqrt_ggn_exact", subsampling)

    def quantity(self) -> Quantity:
        """`SqrtGGN`, with one column for each class."""
        q = _SqrtGGN(max_elements=sys.maxsize)
        q.cotangent, q.index = ByClass(), self._subsampling
        return q


class SqrtGGNMC(_Sampled):
    """An unbiased root of the GGN from `mc_samples` draws, in `sqrt_ggn_mc`, `[mc_samples, N, *shape]`."""

    def __init__(self, mc_samples: int = 1, subsampling: Sequence[int] | None = None) -> None:
        super().__init__(mc_samples, "sqrt_ggn_mc", subsampling)

    def quantity(self) -> Quantity:
        """`SqrtGGN(draws)`."""
        q = _SqrtGGN(self._mc_samples, max_elements=sys.maxsize)
        q.index = self._subsampling
        return q


class DiagHessian(BackpropExtension):
    """The diagonal of the Hessian, in `diag_h`, `[*shape]`; see `layerwise.DiagHessian`."""

    second_order = True

    def __init__(self) -> None:
        super().__init__("diag_h")

    def quantity(self) -> Quantity:
        """`DiagHessian` without a limit on its cost."""
        return quantities.DiagHessian(max_products=None)


class BatchDiagHessian(BackpropExtension):
    """The diagonal of the Hessian of every sample's term, in `diag_h_batch`, `[N, *shape]`."""

    second_order = True

    def __init__(self) -> None:
        super().__init__("diag_h_batch")

    def quantity(self) -> Quantity:
        """`DiagHessian(per_sample=True)` without a limit on its cost."""
        return quantities.DiagHessian(per_sample=True, max_products=None)


class KFAC(_Sampled):
    """Kronecker factors from `mc_samples` draws, in `kfac`: `[B, A]` of a weight, `[B]` of a bias.

    A = (1/N) sum_{n,t} a a^T `[I,I]`, B = sum_{n,v} (sum_t s)(sum_t s)^T `[O,O]`, s the sampled roots at the
    outputs; `B (x) A` approximates the block of the weight with its output axis first.
    """

    def __init__(self, mc_samples: int = 1) -> None:
        super().__init__(mc_samples, "kfac")

    def quantity(self) -> Quantity:
        """The factors in BackPACK's convention, with the root of `layerwise.KFAC`."""
        return Factors(quantities.KFAC(self._mc_samples, sharing="reduce"))


class KFLR(BackpropExtension):
    """Kronecker factors from the exact root, in `kflr`, as lists like those of `KFAC`."""

    def __init__(self) -> None:
        super().__init__("kflr")

    def quantity(self) -> Quantity:
        """The factors in BackPACK's convention, with the root of `layerwise.KFLR`."""
        return Factors(quantities.KFLR(sharing="reduce"))


class KFRA(BackpropExtension):
    """Kronecker factors from the batch-averaged recursion, in `kfra`, as lists like those of `KFAC`.

    See `layerwise.KFRA`, for chains of layers; here block sizes are not limited.
    """

    def __init__(self) -> None:
        super().__init__("kfra")

    def quantity(self) -> Quantity:
        """The factors in BackPACK's convention, with the recursion of `layerwise.KFRA`."""
        return Factors(quantities.KFRA(sharing="reduce", max_bytes=sys.maxsize))
