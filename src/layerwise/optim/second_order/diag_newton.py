"""Newton's method with a diagonal of the curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.optim.second_order.data_parallel import DataParallel
from layerwise.optim.second_order.newton import Newton
from layerwise.optim.second_order.preconditioner import Preconditioner

__all__ = ["DiagNewton"]

CURVATURES: dict[str, Any] = {
    "ggn": "diag-ggn",
    "ggn-mc": "diag-ggn-mc",
    "hessian": "diag-hessian",
    "hessian-mc": "diag-hessian-mc",
}


class DiagNewton(Newton):
    """Descend along the gradient divided by the damped diagonal of the curvature.

        d = ν (|D| + λ)⁻¹ g,   m ← β m + d,   θ ← (1 - lr·weight_decay) θ - lr m
        ν = min(1, sqrt(κ / sum lr² g·(|D| + λ)⁻¹ g)),  κ = kl_clip (None: ν = 1)

        opt = lw.optim.DiagNewton(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    D is the running average, corrected for its start, of the diagonal measured every `update_every` steps. curvature:
    "ggn-mc", the GGN's diagonal from `samples` drawn labels; "ggn", exact; "hessian", the exact Hessian's (for small
    models, see `lw.DiagHessian`); "hessian-mc", from `samples` products with random signs. The average of the Hessian's
    is taken before its absolute value.

    The other arguments are those of `KFAC`; more on D in `Preconditioner`. Default, where not given: lr 0.03, and 1
    with step_size="quadratic"; kl_clip "auto": 3e-4, and 1 with "quadratic".
    Raises as `KFAC`; SamplesMixed where train-mode batch norm mixes the samples under "ggn"; Undefined where "hessian"
    takes too many products.
    Source: Dangel et al. (2020), section 4 ("ggn"); Becker and LeCun (1989) (the absolute value); Yao et al. (2021)
    ("hessian-mc"); for the options those of `KFAC`.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        curvature: Literal["ggn", "ggn-mc", "hessian", "hessian-mc"] = "ggn-mc",
        lr: float | None = None,
        damping: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        kl_clip: float | Literal["auto"] | None = "auto",
        step_size: Literal["lr", "quadratic"] = "lr",
        adapt_damping_every: int | None = None,
        decay: float = 0.95,
        update_every: int = 5,
        samples: int = 1,
        seed: int = 0,
        on_nonfinite: Literal["skip", "raise"] = "skip",
        parallel: DataParallel | None = None,
    ) -> None:
        if curvature not in CURVATURES:
            raise BadInput(f"DiagNewton's curvature is one of {', '.join(CURVATURES)}; got {curvature!r}")
        preconditioner = Preconditioner(
            model,
            CURVATURES[curvature],
            damping=damping,
            factor_decay=decay,
            update_factors_every=update_every,
            samples=samples,
            seed=seed,
            on_nonfinite=on_nonfinite,
            parallel=parallel,
        )
        super().__init__(
            model, params, preconditioner, lr, momentum, weight_decay, kl_clip, step_size, adapt_damping_every,
            on_nonfinite,
        )  # fmt: skip
