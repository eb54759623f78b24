"""Difference target propagation for nets of signs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.method import Batch, Parameters

from .nets import Sign, linears

__all__ = ["TargetPropagation", "target_propagation"]


class TargetPropagation:
    """Targets by learnt inverses, for a net Linear, sign, ..., Linear.

    Unit activations are `h_l = tanh(W_l s_{l−1})`, `s_l = sign(h_l)` is what is passed on, `s_0 = x`; an inverse
    `g_l(s_l) = tanh(V_l s_l)` gives `h_{l−1}` back. A step on a batch: each inverse above the first layer lowers
    `‖g_l(f_l(h̃)) − h̃‖²` with `h̃ = h_{l−1} + ε`, ε Gaussian, both passing on signs; the targets are

        ĥ_{L−1} = h_{L−1} − rate · B dL/ds_{L−1},   ĥ_{l−1} = h_{l−1} + g_l(sign(ĥ_l)) − g_l(s_l),

    and each hidden layer lowers `‖h_l − ĥ_l‖²` (mean over the batch), the last one the loss, all by Adam.
    Source: Lee, Zhang, Fischer and Bengio, "Difference Target Propagation" (2015), algorithm 1 and section 3.2.
    """

    def __init__(self, layers: list[nn.Linear], lr: float, target_rate: float, noise: float) -> None:
        self.layers, self.target_rate, self.noise = layers, target_rate, noise
        hidden = layers[:-1]
        self.inverses = [nn.Linear(m.out_features, m.in_features, dtype=m.weight.dtype) for m in hidden[1:]]
        forward = [p for m in layers for p in m.parameters()]
        self.forward = torch.optim.Adam(forward, lr, fused=True)
        backward = [p for m in self.inverses for p in m.parameters()]
        self.backward = torch.optim.Adam(backward, lr, fused=True) if backward else None

    def activations(self, x: Tensor) -> list[Tensor]:
        """h of every hidden layer."""
        found: list[Tensor] = []
        for layer in self.layers[:-1]:
            found.append(torch.tanh(layer(_sign(found[-1]) if found else x)))
        return found

    def inverse_loss(self, h: list[Tensor]) -> Tensor:
        """What the inverses lower."""
        total = h[0].new_zeros(())
        for inverse, layer, below in zip(self.inverses, self.layers[1:-1], h, strict=False):
            noisy = (below + self.noise * torch.randn_like(below)).detach()
            with torch.no_grad():
                above = _sign(layer(_sign(noisy)))
            total = total + (torch.tanh(inverse(above)) - noisy).square().sum(1).mean()
        return total

    def targets(self, h: list[Tensor], y: Tensor) -> list[Tensor]:
        """ĥ of every hidden layer."""
        top = _sign(h[-1]).requires_grad_()
        loss = F.cross_entropy(self.layers[-1](top), y, reduction="sum")
        found = [h[-1] - self.target_rate * torch.autograd.grad(loss, top)[0]]
        with torch.no_grad():
            for inverse, below, above in zip(reversed(self.inverses), h[-2::-1], h[:0:-1], strict=True):
                step = torch.tanh(inverse(_sign(found[0]))) - torch.tanh(inverse(_sign(above)))
                found.insert(0, below + step)
        return found

    def local_loss(self, x: Tensor, y: Tensor, h: list[Tensor], targets: list[Tensor]) -> Tensor:
        """What the layers lower: no term has a gradient to another layer's weights."""
        inputs = [x, *map(_sign, h)]
        total = F.cross_entropy(self.layers[-1](inputs[-1]), y)
        for layer, a, target in zip(self.layers, inputs, targets, strict=False):
            total = total + (torch.tanh(layer(a)) - target).square().sum(1).mean()
        return total

    def step(self, x: Tensor, y: Tensor) -> None:
        """Inverses, targets, layers."""
        with torch.no_grad():
            h = self.activations(x)
        if self.backward is not None:
            self.backward.zero_grad()
            self.inverse_loss(h).backward()
            self.backward.step()
        targets = self.targets(h, y)
        self.forward.zero_grad()
        self.local_loss(x, y, h, targets).backward()
        self.forward.step()


def _sign(h: Tensor) -> Tensor:
    return torch.where(h > 0, 1.0, -1.0).to(h.dtype)


def target_propagation(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Any:
    """A step on a batch; the loss before it."""
    method = TargetPropagation(linears(model, Sign), **hyper)

    def step(batch: Batch) -> Tensor:
        with torch.no_grad():
            loss = batch()
        method.step(batch.x, batch.y)
        return loss

    return step
