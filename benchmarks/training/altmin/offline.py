"""Offline alternating minimization: every sample keeps its codes, and all weights are solved for on all samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.method import Batch, Parameters

from .nets import linears

__all__ = ["OfflineAM", "offline_am", "ridged_factor", "sweeping", "with_one"]

CODE_STEPS = 5


def with_one(a: Tensor) -> Tensor:
    """Inputs with a column of ones, for the bias."""
    return torch.cat([a, a.new_ones(len(a), 1)], 1)


def ridged_factor(a: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of `aᵀa` with `ridge · mean diag(aᵀa)` on its diagonal."""
    gram = a.T @ a
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.cholesky(gram)


def sweeping(sweep: Callable[[Tensor, Tensor], None], count: int) -> Callable[[Batch], Tensor]:
    """A step of `count` sweeps over all rows, which are the same in every step."""

    def step(batch: Batch) -> Tensor:
        loss = batch().detach()
        for _ in range(count):
            sweep(batch.x, batch.y)
        return loss

    return step


class OfflineAM:
    """Blockwise descent on the relaxed objective of a net Linear, ReLU, ..., Linear over the whole data set,

        Σ_n L(y_n, W_L ã_n) + (μ/2) Σ_l ‖c_nl − W_l ã_nl‖²,   ã = [ReLU(c_{l−1}), 1], ã of layer 1 = [x, 1].

    A sweep moves the codes from the output to the input, each by five gradient steps of length one over the
    curvature of its two terms, sample by sample taken back where they raised them; then every W_l at once: hidden
    ones by least squares, the output's by a step on Böhning and Lindsay's quadratic bound (curvature `½ ãᵀã`), both
    with ridge `ridge · mean diag(ãᵀã)` about where they were. So no part of a sweep raises the objective.
    Codes start at the net's own pre-activations. Sources: Carreira-Perpiñán and Wang (2014), section 3; Böhning and
    Lindsay, "Monotonicity of quadratic-approximation algorithms" (1988).
    """

    def __init__(self, layers: list[nn.Linear], coupling: float, ridge: float) -> None:
        self.layers, self.coupling, self.ridge = layers, coupling, ridge
        self.codes: list[Tensor] = []
        self._first: Tensor | None = None  # the factor of layer 1, whose inputs never change

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """The relaxed objective at the present codes and weights."""
        inputs = self._inputs(x)
        energy = F.cross_entropy(self.layers[-1](inputs[-1]), y, reduction="sum")
        for layer, a, c in zip(self.layers, inputs, self.codes, strict=False):
            energy = energy + self.coupling / 2 * (c - layer(a)).square().sum()
        return energy

    @torch.no_grad()
    def sweep(self, x: Tensor, y: Tensor) -> None:
        """Codes, then weights."""
        if not self.codes:
            a = x
            for layer in self.layers[:-1]:
                self.codes.append(layer(a))
                a = self.codes[-1].relu()
        for depth in reversed(range(len(self.codes))):
            self._move_code(depth, x, y)
        self._fit(x, y)

    def _inputs(self, x: Tensor) -> list[Tensor]:
        return [x, *(c.relu() for c in self.codes)]

    def _move_code(self, depth: int, x: Tensor, y: Tensor) -> None:
        below = x if depth == 0 else self.codes[depth - 1].relu()
        anchor, above = self.layers[depth](below), self.layers[depth + 1]
        last, weight = depth == len(self.codes) - 1, above.weight
        curvature = (0.5 if last else self.coupling) * torch.linalg.matrix_norm(weight, 2) ** 2 + self.coupling

        def energy_and_gradient(c: Tensor) -> tuple[Tensor, Tensor]:
            out = above(c.relu())
            if last:
                energy = F.cross_entropy(out, y, reduction="none")
                residual = out.softmax(1) - F.one_hot(y, out.shape[1])
            else:
                gap = out - self.codes[depth + 1]
                energy, residual = self.coupling / 2 * gap.square().sum(1), self.coupling * gap
            energy = energy + self.coupling / 2 * (c - anchor).square().sum(1)
            return energy, (residual @ weight) * (c > 0) + self.coupling * (c - anchor)

        code = self.codes[depth]
        energy, g = energy_and_gradient(code)
        for _ in range(CODE_STEPS):
            moved = code - g / curvature
            new, ahead = energy_and_gradient(moved)
            lower = new <= energy
            code, g = torch.where(lower[:, None], moved, code), torch.where(lower[:, None], ahead, g)
            energy = torch.where(lower, new, energy)
        self.codes[depth] = code

    def _fit(self, x: Tensor, y: Tensor) -> None:
        for depth, (layer, a) in enumerate(zip(self.layers, map(with_one, self._inputs(x)), strict=True)):
            out = layer(a[:, :-1])
            last = depth == len(self.codes)
            residual = F.one_hot(y, out.shape[1]) - out.softmax(1) if last else self.codes[depth] - out
            move = torch.cholesky_solve(a.T @ residual, self._factor(depth, a)).T * (2 if last else 1)
            layer.weight.add_(move[:, :-1])
            layer.bias.add_(move[:, -1])

    def _factor(self, depth: int, a: Tensor) -> Tensor:
        """The Cholesky factor of `ãᵀã` with its ridge."""
        if depth == 0 and self._first is not None:
            return self._first
        factor = ridged_factor(a, self.ridge)
        if depth == 0:
            self._first = factor
        return factor


def offline_am(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Any:
    """A step is `sweeps` sweeps."""
    method = OfflineAM(linears(model, nn.ReLU), hyper["coupling"], hyper["ridge"])
    return sweeping(method.sweep, hyper["sweeps"])
