"""Training without gradients: Taylor's ADMM, for nets Linear, ReLU, ..., Linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.method import Parameters

from .nets import linears
from .offline import ridged_factor, sweeping, with_one

__all__ = ["ADMM", "admm", "nearest_activation", "nearest_output", "nearest_preactivation"]

WARM_UP = 10  # sweeps before the multipliers move
JITTER = 1e-4  # of the mean diagonal: pixels that are never lit, and fewer rows than columns


def nearest_activation(w: Tensor, z_above: Tensor, h: Tensor, beta: float, gamma: float) -> Tensor:
    """`argmin_a β ‖z' − a Wᵀ‖² + γ ‖a − h‖²` by rows: the paper's (5). z' without the bias of the layer above."""
    matrix = beta * w.T @ w + gamma * torch.eye(w.shape[1], dtype=w.dtype)
    return torch.cholesky_solve((beta * z_above @ w + gamma * h).T, torch.linalg.cholesky(matrix)).T


def nearest_preactivation(a: Tensor, m: Tensor, beta: float, gamma: float) -> Tensor:
    """`argmin_z γ (a − max(z, 0))² + β (z − m)²`, each entry on its own: the lower of the minima of the two sides."""
    above = ((gamma * a + beta * m) / (gamma + beta)).clamp(min=0)
    below = m.clamp(max=0)
    cost_above = gamma * (a - above).square() + beta * (above - m).square()
    cost_below = gamma * a.square() + beta * (below - m).square()
    return torch.where(cost_above <= cost_below, above, below)


def nearest_output(target: Tensor, m: Tensor, multiplier: Tensor, beta: float) -> Tensor:
    """`argmin_z hinge(z) + λ z + β (z − m)²`: `max(1 − z, 0)` where the target is 1, `max(z, 0)` where it is 0."""
    free = m - multiplier / (2 * beta)  # where the hinge is flat
    pushed = free + torch.where(target > 0, 0.5, -0.5) / beta  # where it is not
    edge = target.to(m.dtype)
    up = torch.where(free >= edge, free, torch.minimum(pushed, edge))
    down = torch.where(free <= edge, free, torch.maximum(pushed, edge))
    return torch.where(target > 0, up, down)


class ADMM:
    """Alternating updates in closed form of weights, activations and pre-activations of all samples, for

        Σ hinge(z_L, y) + ⟨z_L, λ⟩ + β ‖z_L − W_L ã_{L−1}‖² + Σ_l γ ‖a_l − ReLU(z_l)‖² + β ‖z_l − W_l ã_{l−1}‖²,

    with a multiplier λ for the output alone, which moves by `β (z_L − W_L ã_{L−1})` after a warm-up. Activations and
    pre-activations start as unit Gaussians; ã has a column of ones, for the biases, which the paper has not.
    Source: Taylor, Burmeister, Xu, Singh, Patel and Goldstein, "Training Neural Networks Without Gradients: A
    Scalable ADMM Approach", ICML 2016, algorithm 1 and equations (1) to (8); one hinge a class.
    """

    def __init__(self, layers: list[nn.Linear], beta: float, gamma: float) -> None:
        self.layers, self.beta, self.gamma = layers, beta, gamma
        self.activations: list[Tensor] = []
        self.preactivations: list[Tensor] = []
        self.multiplier = torch.zeros(())
        self.sweeps = 0
        self._first: Tensor | None = None  # the factor of layer 1, whose inputs never change

    def _start(self, x: Tensor) -> None:
        widths = [layer.out_features for layer in self.layers]
        self.preactivations = [torch.randn(len(x), w, dtype=x.dtype) for w in widths]
        self.activations = [torch.randn(len(x), w, dtype=x.dtype) for w in widths[:-1]]
        self.multiplier = torch.zeros(len(x), widths[-1], dtype=x.dtype)

    @torch.no_grad()
    def _solve_weights(self, depth: int, below: Tensor) -> None:
        """`W_l ← z_l ã_{l−1}⁺`."""
        a = with_one(below)
        factor = self._first if depth == 0 else None
        if factor is None:
            factor = ridged_factor(a, JITTER)
        if depth == 0:
            self._first = factor
        found = torch.cholesky_solve(a.T @ self.preactivations[depth], factor).T
        self.layers[depth].weight.copy_(found[:, :-1])
        self.layers[depth].bias.copy_(found[:, -1])

    @torch.no_grad()
    def sweep(self, x: Tensor, y: Tensor) -> None:
        """One iteration of algorithm 1."""
        if not self.sweeps:
            self._start(x)
        z, below = self.preactivations, x
        for depth, layer in enumerate(self.layers[:-1]):
            self._solve_weights(depth, below)
            above = self.layers[depth + 1]
            h = z[depth].relu()
            a = nearest_activation(above.weight, z[depth + 1] - above.bias, h, self.beta, self.gamma)
            z[depth] = nearest_preactivation(a, layer(below), self.beta, self.gamma)
            self.activations[depth] = below = a
        self._solve_weights(len(self.layers) - 1, below)
        out = self.layers[-1](below)
        z[-1] = nearest_output(F.one_hot(y, out.shape[1]), out, self.multiplier, self.beta)
        self.sweeps += 1
        if self.sweeps > WARM_UP:
            self.multiplier += self.beta * (z[-1] - out)


def admm(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Any:
    """A step is `sweeps` sweeps."""
    method = ADMM(linears(model, nn.ReLU), hyper["beta"], hyper["gamma"])
    return sweeping(method.sweep, hyper["sweeps"])
