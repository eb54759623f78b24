"""curvlinops: operators that run the model themselves; the gradient is a step of its own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..nets import Problem
from .base import Program, Unsupported
from .ours import direction

__all__ = ["program"]


def program(quantity: str, problem: Problem) -> Program:
    """GGN products, and K-FAC's factors with sampled labels (MC) or with the exact root (TYPE2)."""
    from curvlinops import FisherType, GGNLinearOperator, KFACLinearOperator

    kinds = {"K-FAC, 1 sample": FisherType.MC, "KFLR": FisherType.TYPE2}
    if quantity not in kinds and quantity != "GGN times a vector":
        raise Unsupported("no such quantity")
    own = Problem(copy.deepcopy(problem.model), problem.x, problem.y)
    criterion, v = nn.CrossEntropyLoss(), list(direction(problem).values())
    named, data = dict(own.model.named_parameters()), [(problem.x, problem.y)]

    def product() -> dict[str, Tensor]:
        own.step()
        operator = GGNLinearOperator(
            own.model, criterion, list(named.values()), data, check_deterministic=False, num_data=len(problem.x)
        )
        return dict(zip(named, operator @ v, strict=True))

    if quantity == "GGN times a vector":
        return Program(product, lambda r: r)
    known = {
        f"{m}.{p}": parameter
        for m, module in own.model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for p, parameter in module.named_parameters()
    }

    def factors() -> Any:
        own.step()
        operator = KFACLinearOperator(
            own.model, criterion, list(known.values()), data, fisher_type=kinds[quantity], num_data=len(problem.x),
            num_per_example_loss_terms=1,
        )  # fmt: skip
        operator.compute_kronecker_factors()
        return operator

    return Program(factors, None, lambda _: list(known))
