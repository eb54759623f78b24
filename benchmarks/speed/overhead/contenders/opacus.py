"""Opacus: per-sample gradients by its module hooks, and ghost norms."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..nets import Problem
from .base import Program, Unsupported

__all__ = ["program"]


def program(quantity: str, problem: Problem) -> Program:
    """A step of the wrapped model; the hooks see nothing of modules in evaluation mode."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    if quantity not in ("per-sample gradient", "norms"):
        raise Unsupported("no such quantity")
    if not problem.model.training:
        raise Unsupported("its hooks record nothing in evaluation mode")
    model, n = copy.deepcopy(problem.model), len(problem.x)
    ghost = quantity == "norms"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if ghost:
            wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, strict=False)
        else:
            wrapped = GradSampleModule(model, strict=False)
    named = dict(model.named_parameters())
    field = "_norm_sample" if ghost else "grad_sample"

    def run() -> dict[str, Any]:
        for p in named.values():
            p.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            F.cross_entropy(wrapped(problem.x), problem.y).backward()
        found = {k: getattr(p, field, None) for k, p in named.items()}
        for p in named.values():
            setattr(p, field, None)
        return {k: v for k, v in found.items() if v is not None}

    def values(result: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: (v / n) ** 2 if ghost else v / n for k, v in result.items()}

    return Program(run, values, lambda r: list(r))
