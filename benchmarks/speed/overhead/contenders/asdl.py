"""ASDL as it is on the package index, `asdfghjkl` 0.1a5: per-sample gradients, and the Fisher in several shapes."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..nets import Problem
from .base import Program, Unsupported

__all__ = ["program"]

SHAPES = {"GGN diagonal, 1 sample": "diag", "K-FAC, 1 sample": "kron"}


def program(quantity: str, problem: Problem) -> Program:
    """Its `save_batch_gradient`, or a Fisher maker with one sampled label."""
    from asdl.fisher import FisherConfig, get_fisher_maker
    from asdl.grad_maker import LOSS_CROSS_ENTROPY
    from asdl.gradient import save_batch_gradient
    from asdl.matrices import FISHER_MC

    own = Problem(copy.deepcopy(problem.model), problem.x, problem.y)
    named = dict(own.model.named_parameters())
    if quantity == "per-sample gradient":

        def run() -> dict[str, Tensor]:
            save_batch_gradient(own.model, own.step)
            return {k: p.__dict__.pop("batch_grad") for k, p in named.items() if "batch_grad" in p.__dict__}

        return Program(run, lambda r: r, lambda r: list(r))
    if quantity not in SHAPES:
        raise Unsupported("no such quantity")
    config = FisherConfig(
        fisher_type=FISHER_MC, fisher_shapes=[SHAPES[quantity]], loss_type=LOSS_CROSS_ENTROPY, data_size=len(own.x)
    )
    maker = get_fisher_maker(own.model, config)
    parents: dict[nn.Module, list[str]] = {}
    for name in named:
        path, _, _ = name.rpartition(".")
        parents.setdefault(own.model.get_submodule(path), []).append(name)

    def fisher() -> Any:
        for p in named.values():
            p.grad = None
        output = maker.setup_model_call(own.model, own.x)
        maker.setup_loss_call(F.cross_entropy, output, own.y, reduction="sum")
        maker.forward_and_backward(calc_loss_grad=True)
        return {module: module.__dict__.pop("fisher") for module in parents if "fisher" in module.__dict__}

    return Program(fisher, None, lambda r: [name for module in r for name in parents[module]])
