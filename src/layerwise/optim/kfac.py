"""K-FAC: natural-gradient descent with Kronecker-factored curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.local.record import dense, is_finite
from layerwise.optim.named import NamedOptimizer
from layerwise.optim.preconditioner import LARGEST_FACTOR, Preconditioner, Watched
from layerwise.pull import alone
from layerwise.replay import check_loss
from layerwise.uses import named_parameters_of

__all__ = ["KFAC"]


@dataclass(frozen=True)
class _Run:
    """One run of a closure: its loss, the gradients by name, and what was watched."""

    loss: Tensor
    gradients: dict[str, Tensor]
    watched: Watched


class KFAC(NamedOptimizer[_Run]):
    """Descend along the gradient preconditioned by the Kronecker factors of the GGN (natural gradient).

        d = ν (B ⊗ A + λI)⁻¹ g,   m ← β m + d,   W ← (1 - lr·weight_decay) W - lr m
        ν = min(1, sqrt(κ / sum lr² g·(B ⊗ A + λI)⁻¹ g)),  κ = kl_clip (None: ν = 1)

        opt = lw.optim.KFAC(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    The closure returns the loss; where it calls backward itself, the gradient is what it leaves in `.grad`, as for
    any torch optimizer. Factors, inverses, and the arguments that `Preconditioner` has too are described there.
    Parameters without factors (see `describe()`) take the step with d = ν g: their plain gradient.

    model: an nn.Module, or a mapping of names to tensors. params: as for any torch optimizer, default all; groups may
    have their own lr, damping (of the group that the weight is in), momentum and weight_decay (decoupled).
    kl_clip: κ, a bound on the quadratic model of the change in the model's distribution, in units of the loss.
    Raises BadInput, UncoveredUse, UnknownLoss; NonFinite with `on_nonfinite="raise"` (default: skip the batch, count
    it). On steps that measure no factors, errors of the model's own calls are torch's.
    Source: Martens and Grosse (2015), sections 4 to 6; Ba, Grosse and Martens (2017), section 5, for κ;
    Loshchilov and Hutter (2019) and Zhang et al. (2019) for the weight decay.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        kind: Literal["kfac", "kflr"] = "kfac",
        lr: float = 0.03,
        damping: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        kl_clip: float | None = 3e-4,
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
    ) -> None:
        if kl_clip is not None and not 0 < kl_clip < float("inf"):
            raise BadInput(f"KFAC's kl_clip must be None or a finite number > 0, got {kl_clip!r}")
        self.preconditioner = Preconditioner(
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
        )
        self.kl_clip = kl_clip
        defaults = {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model, params, defaults, on_nonfinite)

    def _check(self, group: Mapping[str, Any]) -> None:
        self.preconditioner.check()
        lr, damping, momentum, decay = (group[key] for key in ("lr", "damping", "momentum", "weight_decay"))
        if not (0 <= lr < float("inf") and 0 < damping < float("inf") and 0 <= momentum < 1):
            raise BadInput(
                f"KFAC needs a finite lr ≥ 0 and damping > 0 and momentum in [0, 1); got lr={lr}, damping={damping}, "
                f"momentum={momentum}"
            )
        if not 0 <= decay < float("inf"):
            raise BadInput(f"KFAC needs a finite weight_decay ≥ 0; got weight_decay={decay}")

    # -- a step --------------------------------------------------------------------------------------------

    def _named(self) -> dict[str, Tensor]:
        """Our parameters that require grad, by name, in the model's order."""
        named = named_parameters_of(self._model)
        return {name: p for name, p in named.items() if p.requires_grad and self._ours(p)}

    def _run(self, closure: Callable[[], Tensor]) -> _Run:
        named = self._named()
        before = {name: (p.grad, -1 if p.grad is None else p.grad._version) for name, p in named.items()}
        with self.preconditioner.watch(named) as watched, torch.enable_grad():
            loss = closure()
            check_loss(loss)
            with alone(loss.device.type):
                found = _left_behind(named, before)
                if not found and watched.bad is None:
                    found = _gradients(loss, named, watched)
        if not is_finite(loss) and watched.bad is None:
            watched.bad = "the loss"
        return _Run(loss.detach(), found, watched)

    def _damping(self, name: str) -> float:
        return float(self._group_at[id(self._parameters()[name])]["damping"])

    def _parameters(self) -> dict[str, Tensor]:
        return named_parameters_of(self._model)

    def _unsafe(self, run: _Run) -> str | None:
        return self.preconditioner.unsafe(run.watched, run.gradients, self._damping)

    @torch.no_grad()
    def _move(self, run: _Run) -> None:
        self.preconditioner.advance(run.watched, self._damping)
        directions = self.preconditioner.precondition(run.gradients)
        named = self._named()
        groups = {name: self._group_at[id(named[name])] for name in directions}
        rates = {name: float(group["lr"]) for name, group in groups.items()}
        factor = clip_factor(run.gradients, directions, rates, self.kl_clip)
        for name, d in directions.items():
            p, group = named[name], groups[name]
            buffer = self.state[p].get("momentum")
            buffer = descend(p, d, buffer, factor, group["lr"], group["momentum"], group["weight_decay"])
            self.state[p] = {"momentum": buffer}

    # -- state -----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """How the gradient of each parameter is treated, by name."""
        return self.preconditioner.describe()

    @property
    def counters(self) -> dict[str, int]:
        """Blocks whose inverse needed more damping, or is the identity."""
        return self.preconditioner.counters

    def state_dict(self) -> dict[str, Any]:
        """torch's, with names, the number of skipped batches, and the preconditioner's state."""
        return {**super().state_dict(), "preconditioner": self.preconditioner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, parameters by name; goes on bitwise where it stopped.

        Raises BadInput where the saved state is of other parameters than ours, or of another kind of factors.
        """
        rest = {key: value for key, value in state_dict.items() if key != "preconditioner"}
        self.preconditioner.check_state(state_dict["preconditioner"])
        super().load_state_dict(rest)
        self.preconditioner.load_state_dict(state_dict["preconditioner"])


def _left_behind(named: Mapping[str, Tensor], before: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gradients, where the closure ran a backward pass: those in `.grad` if any of them changed."""
    found = {name: p.grad for name, p in named.items() if p.grad is not None}
    changed = any(g is not before[name][0] or g._version != before[name][1] for name, g in found.items())
    return {name: dense(g.detach()) for name, g in found.items()} if changed else {}


def _gradients(loss: Tensor, named: Mapping[str, Tensor], watched: Watched) -> dict[str, Tensor]:
    """The gradients of the loss that the closure returned; none of them in `.grad`."""
    if not loss.requires_grad:
        raise BadInput("the closure's loss depends on no parameter; was it detached, or computed under no_grad?")
    params = list(named.values())
    if watched.backward is not None:
        found = watched.backward(loss, params)
    else:
        found = list(torch.autograd.grad(loss, params, allow_unused=True))
    return {name: dense(g) for name, g in zip(named, found, strict=True) if g is not None}


def clip_factor(
    gradients: Mapping[str, Tensor], directions: Mapping[str, Tensor], rates: Mapping[str, float], clip: float | None
) -> float:
    """ν = min(1, sqrt(κ / sum over parameters of lr² g·d)), at which the step's quadratic form is at most κ.

    Source: Ba, Grosse and Martens (2017), "Distributed second-order optimization using Kronecker-factored
    approximations", section 5.
    """
    if clip is None or not directions:
        return 1.0
    device = next(iter(directions.values())).device
    dots = torch.stack([(gradients[n] * d).sum().to(device, torch.float64) for n, d in directions.items()]).tolist()
    size = sum(rates[name] ** 2 * dot for name, dot in zip(directions, dots, strict=True))
    return min(1.0, math.sqrt(clip / size)) if size > 0 else 1.0


def descend(
    p: Tensor, d: Tensor, buffer: Tensor | None, factor: float, lr: float, momentum: float, weight_decay: float
) -> Tensor:
    """One step in place: m ← β m + ν d, p ← (1 - lr·weight_decay) p - lr m. Returns m, without momentum ν d."""
    buffer = d * factor if buffer is None or not momentum else buffer.mul_(momentum).add_(d, alpha=factor)
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.sub_(buffer, alpha=lr)
    return buffer
