"""CPU cost of LocoProp's local steps against ordinary training steps, on the MNIST deep autoencoder.

    python -m benchmarks.speed.local_step [--threads 1] [--repeats 9] [--batch 1000] [--steps 10]

Random data of MNIST's shape; nothing is trained. Each arm runs a whole training step: forward, backward
and update. The arms with local steps send their backward pass to the pre-activations alone, so they pay
no gradient products of their own, and their targets, transfers and state updates are all inside. Arms are
interleaved in alternating order; a figure is the lower quartile of CPU time, and its ratio to RMSProp's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import probe
from benchmarks.autoencoder import SIZES, deep_autoencoder
from layerwise.local.problem import LocalProblem, target_m
from layerwise.local.solvers.steps import StepPlan, local_steps
from layerwise.local.solvers.tf_rmsprop import TFRMSProp
from layerwise.local.solvers.workspace import Owned, Workspace
from layerwise.local.transfer import IDENTITY, SIGMOID, TANH

TRANSFERS = (TANH, TANH, TANH, IDENTITY, TANH, TANH, TANH, SIGMOID)
GAMMA = 10.0


class Net:
    """The autoencoder's weights and its plain forward pass, without a tape."""

    def __init__(self) -> None:
        self.params = list(deep_autoencoder(0).parameters())
        self.weights, self.biases = self.params[::2], self.params[1::2]

    def forward(self, x: Tensor, detach: bool = False) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Loss, the layers' inputs (and last f(z)), pre-activations; detach=True: no graph to the weights."""
        inputs, outputs, h = [], [], x
        for w, b, f in zip(self.weights, self.biases, TRANSFERS, strict=True):
            inputs.append(h)
            z = F.linear(h, w.detach() if detach else w, b.detach() if detach else b)
            if detach and not z.requires_grad:
                z.requires_grad_()
            outputs.append(z)
            h = f.f(z)
        inputs.append(h)
        loss = F.binary_cross_entropy_with_logits(outputs[-1], x, reduction="sum") / len(x)
        return loss, inputs, outputs


def ordinary(net: Net, x: Tensor, optimizer: torch.optim.Optimizer | None) -> Callable[[], None]:
    def step() -> None:
        for p in net.params:
            p.grad = None
        net.forward(x)[0].backward()
        if optimizer is not None:
            optimizer.step()

    return step


def cotangents(net: Net, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        loss, _, outputs = net.forward(x, detach=True)
        torch.autograd.grad(loss, outputs)

    return step


def locoprop(net: Net, x: Tensor, matching: bool, steps: int, rows: int | None) -> Callable[[], None]:
    optimizers = [TFRMSProp(pair) for pair in zip(net.weights, net.biases, strict=True)]
    workspace = Workspace()

    def step() -> None:
        loss, inputs, outputs = net.forward(x, detach=True)
        grads = torch.autograd.grad(loss, outputs)
        own = (net.weights, net.biases, TRANSFERS, optimizers)
        layers = zip(inputs[:-1], outputs, inputs[1:], grads, *own, strict=True)
        with torch.no_grad():
            for a, z, y, g, w, b, f, optimizer in layers:
                target = target_m(z, g, GAMMA, f, y=y) if matching else torch.add(z, g, alpha=-GAMMA)
                problem = LocalProblem(
                    a.detach().unsqueeze(1), w.detach().unsqueeze(0), b.detach().unsqueeze(0),
                    target.unsqueeze(1), f if matching else IDENTITY, g=g.unsqueeze(1), gamma=GAMMA,
                )  # fmt: skip
                local_steps(problem, optimizer, StepPlan(steps, rows), Owned(w, b), workspace)

    return step


def main() -> None:
    """Print the table."""
    made = probe.parser("benchmarks.speed.local_step", __doc__, threads=1, repeats=9, batch=1000, steps=10)
    options = probe.parsed(made)
    x, t = torch.rand(options.batch, SIZES[0]), options.steps
    share = max(options.batch // t, 1)
    nets = [Net() for _ in range(8)]
    rmsprop = torch.optim.RMSprop(nets[1].params, 1e-5, momentum=0.9, foreach=True)
    arms = {
        "forward and backward": ordinary(nets[0], x, None),
        "RMSProp (torch, foreach)": ordinary(nets[1], x, rmsprop),
        "RMSProp (TensorFlow 1's)": ordinary(nets[2], x, TFRMSProp(nets[2].params)),
        "cotangents only": cotangents(nets[3], x),
        f"M, {t} steps, all rows": locoprop(nets[4], x, True, t, None),
        f"M, {t} steps, {share} rows each": locoprop(nets[5], x, True, t, share),
        f"S, {t} steps, all rows (Gram)": locoprop(nets[6], x, False, t, None),
        f"S, {t} steps, {share} rows each": locoprop(nets[7], x, False, t, share),
    }  # fmt: skip
    found = probe.interleaved(arms, options.repeats)
    base = found["RMSProp (torch, foreach)"]
    print(f"batch {options.batch}, threads {options.threads}, lower quartile of {options.repeats}\n")
    rows = [[name, f"{1e3 * seconds:.1f}", f"{seconds / base:.2f}"] for name, seconds in found.items()]
    print(probe.table(["training step", "ms", "RMSProp = 1"], rows))


if __name__ == "__main__":
    main()
