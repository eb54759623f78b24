"""`torch.func`: per-sample gradients by `vmap(grad)`, reduced as a user would; their mean is the gradient."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from ..nets import Problem
from .base import Program, reduced

__all__ = ["program"]

_POWER = {"per-sample gradient": 1, "norms": 2, "second moment": 2, "variance": 2, "pairwise dots": 2}


def program(quantity: str, problem: Problem) -> Program:
    """Rows of all parameters, then the quantity."""
    model, n = copy.deepcopy(problem.model), len(problem.x)
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    reduced(quantity, {}, n)  # raises where it has no such quantity

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (weights, buffers), (x[None],)), y[None])

    rows = vmap(grad(loss), in_dims=(None, 0, 0))

    def run() -> dict[str, Any]:
        found = rows(parameters, problem.x, problem.y)
        for name, p in model.named_parameters():
            p.grad = found[name].mean(0)
        return reduced(quantity, found, n)

    power = _POWER.get(quantity)
    return Program(run, None if power is None else lambda r: {k: v / n**power for k, v in r.items()})
