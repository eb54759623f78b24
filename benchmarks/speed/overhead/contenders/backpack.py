"""BackPACK: extensions on extended modules; first-order ones also where it knows only some of the modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..nets import Problem
from .base import Program, Unsupported, reduced
from .ours import direction

__all__ = ["program"]

# quantity -> extensions and their fields
EXTENSIONS: dict[str, dict[str, str]] = {
    "per-sample gradient": {"BatchGrad": "grad_batch"},
    "norms": {"BatchL2Grad": "batch_l2"},
    "second moment": {"SumGradSquared": "sum_grad_squared"},
    "variance": {"Variance": "variance"},
    "four first-order": {
        "BatchGrad": "grad_batch", "BatchL2Grad": "batch_l2", "SumGradSquared": "sum_grad_squared",
        "Variance": "variance",
    },
    "six reduced first-order": {
        "BatchL2Grad": "batch_l2", "SumGradSquared": "sum_grad_squared", "Variance": "variance",
        "BatchGrad": "grad_batch",
    },
    "GGN diagonal, 1 sample": {"DiagGGNMC": "diag_ggn_mc"},
    "GGN diagonal, exact": {"DiagGGNExact": "diag_ggn_exact"},
    "K-FAC, 1 sample": {"KFAC": "kfac"},
    "KFLR": {"KFLR": "kflr"},
    "KFRA": {"KFRA": "kfra"},
    "Hessian diagonal": {"DiagHessian": "diag_h"},
    "pairwise dots": {"BatchGrad": "grad_batch"},
}  # fmt: skip
FIRST_ORDER = {"BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"}


def program(quantity: str, problem: Problem) -> Program:
    """A step under the extensions; the fields are taken off the parameters, as a user would before the next step."""
    import backpack
    from backpack import extensions

    if quantity == "GGN times a vector":
        return _product(problem)
    if quantity not in EXTENSIONS:
        raise Unsupported("no such quantity")
    fields = EXTENSIONS[quantity]
    model = copy.deepcopy(problem.model)
    named = dict(model.named_parameters())
    first_order = set(fields) <= FIRST_ORDER  # the others need a graph of modules alone
    model = backpack.extend(model, use_converter=not first_order and _nested(model))
    criterion = backpack.extend(nn.CrossEntropyLoss())

    def run() -> dict[str, tuple[Any, ...]]:
        for p in named.values():
            p.grad = None
        used = [getattr(extensions, name)() for name in fields]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with backpack.backpack(*used):
                criterion(model(problem.x), problem.y).backward()
        found = {k: tuple(p.__dict__.pop(f) for f in fields.values() if f in p.__dict__) for k, p in named.items()}
        found = {k: v for k, v in found.items() if len(v) == len(fields)}
        if quantity in ("pairwise dots", "six reduced first-order"):
            dots = reduced("pairwise dots", {k: v[-1] for k, v in found.items()}, len(problem.x))
            return {k: (*v[:-1], dots[k]) for k, v in found.items()}
        return found

    factors = quantity in ("K-FAC, 1 sample", "KFLR", "KFRA")
    linear = {f"{m}.{p}" for m, module in problem.model.named_modules() if isinstance(module, nn.Linear)
              for p in ("weight", "bias")}  # fmt: skip
    return Program(run, (lambda r: _factors(r, linear)) if factors else _first, lambda r: list(r))


def _nested(model: nn.Module) -> bool:
    """Whether the model is more than a chain of layers."""
    return not isinstance(model, nn.Sequential) or any(list(child.children()) for child in model.children())


def _first(result: dict[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    return {k: v[0] for k, v in result.items()}


def _factors(result: dict[str, Any], linear: set[str]) -> dict[str, Tensor]:
    """Up to scale; B of a convolution is not ours: BackPACK sums over the positions first."""
    found = {}
    for name, (factors,) in result.items():
        for letter, factor in zip("BA", factors, strict=False):
            if letter == "A" or name in linear:
                found[f"{name}.{letter}"] = factor / factor.trace()
    return found


def _product(problem: Problem) -> Program:
    from backpack.hessianfree.ggnvp import ggn_vector_product_from_plist

    model, v = copy.deepcopy(problem.model), direction(problem)
    named = dict(model.named_parameters())
    criterion = nn.CrossEntropyLoss()

    def run() -> dict[str, Tensor]:
        for p in named.values():
            p.grad = None
        output = model(problem.x)
        loss = criterion(output, problem.y)
        loss.backward(retain_graph=True)
        product = ggn_vector_product_from_plist(loss, output, list(named.values()), [v[k] for k in named])
        return dict(zip(named, product, strict=True))

    return Program(run, lambda r: r)
