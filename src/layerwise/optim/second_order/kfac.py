"""K-FAC: natural-gradient descent with Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from layerwise.optim.second_order.base import CurvatureOptimizer
from layerwise.optim.second_order.preconditioner import Preconditioner
from layerwise.optim.second_order.settings import FACTORS, KroneckerWords, in_present_words, spelled_out

__all__ = ["KFAC"]


class KFAC(CurvatureOptimizer):
    """The K-FAC optimizer: descend along the gradient preconditioned by Kronecker factors of the curvature.

        d = ν (B ⊗ A + λI)⁻¹ g,   m ← β m + d,   W ← (1 - lr·weight_decay) W - lr m
        ν = min(1, sqrt(κ / sum lr² g·(B ⊗ A + λI)⁻¹ g)),  κ = kl_clip (None: ν = 1)

        opt = lw.optim.KFAC(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    The factors alone are the quantity `lw.KFAC`. More on every argument: the page Second-order training of the docs.

    Args:
        model: an nn.Module, or a mapping of names to tensors.
        params: as for any torch optimizer, default all; groups may have their own lr, damping, momentum, weight_decay.
        kind: "kfac", "kflr", "kfra", "ekfac" or "foof"; see `Preconditioner`.
        lr: default 0.03, and 1 with step_size="quadratic".
        damping: λ of a weight's group, in the units of the GGN of the loss (foof: of the inputs, squared).
        momentum: β.
        weight_decay: decoupled.
        kl_clip: κ, a bound on the quadratic model of the step; "auto": 3e-4, and 1 with step_size="quadratic".
        step_size: "lr", or "quadratic": m ← α d + μ m, (α, μ) minimize the quadratic model with the batch's exact GGN.
        adapt_damping_every: every so many steps λ adapts to how well the quadratic model predicted the loss.
        damping_form, factor_decay, update_factors_every, update_inverses_every: as for `Preconditioner`.
        draws, sharing, joint, rows, largest_factor, seed, on_nonfinite, parallel: as for `Preconditioner`.
        curvature, schedule: the values `Curvature` and `Schedule`, in place of the keywords for their fields.

    The closure returns the loss; where it calls backward itself, the gradient is what it leaves in `.grad`. "quadratic"
    and adapt_damping_every run it again, with the same random numbers and without a trace: with the same batch, please.
    Raises BadInput, UncoveredUse, UnknownLoss; NonFinite with `on_nonfinite="raise"` (default: skip the batch, count
    it). On steps that measure no factors, errors of the model's own calls are torch's.
    Source: Martens and Grosse (2015), sections 4 to 7; Ba, Grosse and Martens (2017), section 5, for κ;
    Loshchilov and Hutter (2019) and Zhang et al. (2019) for the weight decay.
    """

    _kind = "KFAC"

    @spelled_out(KroneckerWords, like=Preconditioner)
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
        **words: Unpack[KroneckerWords],
    ) -> None:
        preconditioner = Preconditioner(model, **in_present_words(KFAC.__init__, words, FACTORS))
        super().__init__(preconditioner, params, lr, momentum, weight_decay, kl_clip, step_size, adapt_damping_every)
