"""Measures of each layer on one batch: gradient noise, curvature, size of the next update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import layerwise as lw

from .digits import Problem, reconstruction_loss
from .methods import Settings
from .train import Run, minibatches

__all__ = ["Layer", "observed_layers"]


@dataclass(frozen=True)
class Layer:
    """The measures of one layer (weight and bias together) on one batch of N samples.

    noise: `N² Σ V / ‖G‖²`, V the variance over samples and G the batch gradient: the batch size at
        which noise and signal are equally large (McCandlish et al., 2018, eq. 2.9).
    curvature: mean of the diagonal of the generalized Gauss-Newton matrix.
    update: `‖ΔW‖ / ‖W‖` of the method's next step on the same batch.
    """

    name: str
    noise: float
    curvature: float
    update: float


def observed_layers(problem: Problem, method: str, settings: Settings, *, seed: int, epochs: int = 3) -> list[Layer]:
    """Train `method` for a few epochs, observe one batch, take one step on it: a `Layer` per linear layer."""
    run = Run(method, settings, seed)
    for epoch in range(1, epochs + 1):
        run.epoch(problem.x_train, epoch)
    x = minibatches(problem.x_train, seed, epochs + 1)[0]
    run.model.zero_grad()
    with lw.observe(run.model, lw.Variance(), lw.DiagGGN()) as seen:
        reconstruction_loss(run.model, x).backward()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    gradient = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.step(x)
    after = dict(run.model.named_parameters())

    layers = []
    for name, module in run.model.named_children():
        if not isinstance(module, nn.Linear):
            continue
        names = [f"{name}.{p}" for p, _ in module.named_parameters()]

        def joined(values: Mapping[str, Tensor], names: list[str] = names) -> Tensor:
            return torch.cat([values[n].detach().flatten() for n in names]).double()

        noise = len(x) ** 2 * joined(seen.variance).sum() / joined(gradient).square().sum()
        curvature = joined(seen.diag_ggn).mean()
        update = (joined(after) - joined(before)).norm() / joined(before).norm()
        label = f"{name}\n{module.in_features}→{module.out_features}"
        layers.append(Layer(label, float(noise), float(curvature), float(update)))
    return layers
