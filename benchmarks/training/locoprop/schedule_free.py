"""Schedule-free AdamW, a baseline: no schedule of rates, an average of the iterates in its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ScheduleFreeAdamW"]


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """AdamW's steps of z along gradients at y, between z and its running average x; the model holds y.

        z ← z − lr u,   x ← (1 − c) x + c z,   y = (1 − β₁) z + β₁ x,      u = g/(√v̂ + ε) + λ y,   c = lr²/Σ lr²

    The rate rises linearly over the warm-up. `average` puts x into the model, for an evaluation at the end.
    Source: Defazio et al., "The road less scheduled" (2024), algorithm 1.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, warm_up: int = 10,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._warm_up, self._count, self._weights = warm_up, 0, 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move y and z along the gradients at y."""
        self._count += 1
        share = min(1.0, self._count / self._warm_up)
        for group in self.param_groups:
            lr, (beta1, beta2), eps = group["lr"] * share, group["betas"], group["eps"]
            correction = 1 - beta2**self._count
            c = share**2 / (self._weights + share**2)
            for y in group["params"]:
                if y.grad is None:
                    continue
                state = self.state[y]
                if not state:
                    state["z"], state["v"] = y.clone(), torch.zeros_like(y)
                z, v = state["z"], state["v"]
                v.mul_(beta2).addcmul_(y.grad, y.grad, value=1 - beta2)
                u = y.grad / (v / correction).sqrt().add_(eps)
                u.add_(y, alpha=group["weight_decay"])
                y.lerp_(z, c).add_(u, alpha=-lr * (1 - beta1 * (1 - c)))
                z.sub_(u, alpha=lr)
        self._weights += share**2

    @torch.no_grad()
    def average(self) -> None:
        """Put x in the place of y."""
        for group in self.param_groups:
            for y in group["params"]:
                if "z" in self.state[y]:
                    y.lerp_(self.state[y]["z"], 1 - 1 / group["betas"][0])
