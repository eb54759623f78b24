"""Newton's method with a diagonal of the curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from layerwise.optim.second_order.base import CurvatureOptimizer
from layerwise.optim.second_order.preconditioner import Preconditioner
from layerwise.optim.second_order.settings import (
    DIAGONALS,
    OF_DIAGONALS,
    DiagonalWords,
    in_present_words,
    spelled_out,
)

__all__ = ["DiagNewton"]


class DiagNewton(CurvatureOptimizer):
    """The optimizer that descends along the gradient divided by the damped diagonal of the curvature.

        d = ν (|D| + λ)⁻¹ g,   m ← β m + d,   θ ← (1 - lr·weight_decay) θ - lr m
        ν = min(1, sqrt(κ / sum lr² g·(|D| + λ)⁻¹ g)),  κ = kl_clip (None: ν = 1)

        opt = lw.optim.DiagNewton(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    D is a running average, of the Hessian's diagonal before its absolute value is taken. The diagonals alone are the
    quantities `lw.DiagGGN` and `lw.DiagHessian`. More on every argument: the page Second-order training of the docs.

    Args:
        model: an nn.Module, or a mapping of names to tensors.
        params: as for any torch optimizer, default all; groups may have their own lr, damping, momentum, weight_decay.
        kind: D, of "diag-ggn" or "diag-hessian".
        draws: labels (or random signs) drawn for each sample; None: exact, for few classes, or a small model's Hessian.
        lr, damping, momentum, weight_decay, kl_clip, step_size, adapt_damping_every: as for `KFAC`.
        decay: ρ of the running average.
        update_every: steps from one measured diagonal to the next.
        seed, on_nonfinite, parallel: as for `Preconditioner`.
        curvature, schedule: the values `Curvature` and `Schedule`, in place of the keywords for their fields.

    Raises as `KFAC`; SamplesMixed where train-mode batch norm mixes the samples under the exact "diag-ggn"; Undefined
    where the exact "diag-hessian" takes too many products.
    Source: Dangel et al. (2020), section 4 ("diag-ggn"); Becker and LeCun (1989) (the absolute value); Yao et al.
    (2021) ("diag-hessian" of draws); for the options those of `KFAC`.
    """

    _kind = "DiagNewton"

    @spelled_out(DiagonalWords, like=Preconditioner, kind="diag-ggn", draws=1)
    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        kl_clip: float | Literal["auto"] | None = "auto",
        step_size: Literal["lr", "quadratic"] = "lr",
        adapt_damping_every: int | None = None,
        **words: Unpack[DiagonalWords],
    ) -> None:
        given = in_present_words(DiagNewton.__init__, words, DIAGONALS)
        default: dict[str, Any] = {} if "curvature" in given else {"kind": "diag-ggn", "draws": 1}
        asked = default | {OF_DIAGONALS.get(word, word): value for word, value in given.items()}
        preconditioner = Preconditioner(model, **asked)
        super().__init__(preconditioner, params, lr, momentum, weight_decay, kl_clip, step_size, adapt_damping_every)
