"""K-FAC: natural-gradient descent with Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.optim.second_order.data_parallel import DataParallel
from layerwise.optim.second_order.newton import Newton
from layerwise.optim.second_order.preconditioner import LARGEST_FACTOR, Preconditioner

__all__ = ["KFAC"]

KINDS = ("kfac", "kflr", "kfra", "ekfac", "foof")


class KFAC(Newton):
    """Descend along the gradient preconditioned by Kronecker factors of the curvature (natural gradient).

        d = ν (B ⊗ A + λI)⁻¹ g,   m ← β m + d,   W ← (1 - lr·weight_decay) W - lr m
        ν = min(1, sqrt(κ / sum lr² g·(B ⊗ A + λI)⁻¹ g)),  κ = kl_clip (None: ν = 1)

        opt = lw.optim.KFAC(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    The closure returns the loss; where it calls backward itself, the gradient is what it leaves in `.grad`, as for
    any torch optimizer. Kinds, factors, inverses, the fallback for parameters without factors (see `describe()`), and
    the arguments that `Preconditioner` has too are described there.

    model: an nn.Module, or a mapping of names to tensors. params: as for any torch optimizer, default all; groups may
    have their own lr, damping (of the group that the weight is in), momentum and weight_decay (decoupled).
    kl_clip: κ, a bound on the quadratic model of the change in the model's distribution, in units of the loss.
    step_size: "lr", or "quadratic": m ← α d + μ m with the (α, μ) that minimize, on this batch, the quadratic model of
    the loss M(δ) = g·δ + ½ δᵀ(G + λI)δ with the exact GGN G (momentum=0: μ = 0), then W ← W - lr m; costs one more run
    of the closure and two products. adapt_damping_every: every so many steps λ (each group's "damping") is divided or
    multiplied by (19/20)^every where the loss fell by less than 1/4 or more than 3/4 of what M said; costs two more
    runs and a product on those steps; a step to NaN or infinity is then taken back. More runs of the closure see the
    same random numbers and leave no trace; it must use the same batch.
    Default, where not given: lr 0.03, and 1 with "quadratic"; kl_clip "auto": 3e-4, and 1 with "quadratic".
    Raises BadInput, UncoveredUse, UnknownLoss; NonFinite with `on_nonfinite="raise"` (default: skip the batch, count
    it). On steps that measure no factors, errors of the model's own calls are torch's.
    Source: Martens and Grosse (2015), sections 4 to 7; Ba, Grosse and Martens (2017), section 5, for κ;
    Loshchilov and Hutter (2019) and Zhang et al. (2019) for the weight decay.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        kind: Literal["kfac", "kflr", "kfra", "ekfac", "foof"] = "kfac",
        lr: float | None = None,
        damping: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        kl_clip: float | Literal["auto"] | None = "auto",
        step_size: Literal["lr", "quadratic"] = "lr",
        adapt_damping_every: int | None = None,
        damping_form: Literal["pi", "factored", "eigen"] = "pi",
        factor_decay: float = 0.95,
        update_factors_every: int = 5,
        update_inverses_every: int = 20,
        samples: int = 1,
        sharing: Literal["expand", "reduce"] = "expand",
        joint: bool = True,
        largest_factor: int = LARGEST_FACTOR,
        seed: int = 0,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        parallel: DataParallel | None = None,
    ) -> None:
        if kind not in KINDS:
            raise BadInput(f"KFAC's kinds are {', '.join(KINDS)}; got kind={kind!r}")
        preconditioner = Preconditioner(
            model,
            kind,
            damping=damping,
            damping_form=damping_form,
            factor_decay=factor_decay,
            update_factors_every=update_factors_every,
            update_inverses_every=update_inverses_every,
            samples=samples,
            sharing=sharing,
            joint=joint,
            largest_factor=largest_factor,
            seed=seed,
            on_nonfinite=on_nonfinite,
            parallel=parallel,
        )
        super().__init__(
            model, params, preconditioner, lr, momentum, weight_decay, kl_clip, step_size, adapt_damping_every,
            on_nonfinite,
        )  # fmt: skip
