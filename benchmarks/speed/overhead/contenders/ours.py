"""Layerwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import layerwise as lw

from ..nets import Problem
from .base import Program, Unsupported

__all__ = ["by_rows", "parts", "program"]

Make = Callable[[], Sequence[lw.Quantity]]

SIX: dict[str, Callable[[], lw.Quantity]] = {
    "SquaredNorm": lw.SquaredNorm,
    "SecondMoment": lw.SecondMoment,
    "Variance": lw.Variance,
    "NoiseScale": lw.NoiseScale,
    "PairwiseDot": lw.PairwiseDot,
    "FisherDiag": lambda: lw.FisherDiag("data"),
}
MAKE: dict[str, Make] = {
    "empty observe": lambda: (),
    "per-sample gradient": lambda: (lw.PerSampleGrad(),),
    "norms": lambda: (lw.SquaredNorm(),),
    "second moment": lambda: (lw.SecondMoment(),),
    "variance": lambda: (lw.Variance(),),
    "four first-order": lambda: (lw.PerSampleGrad(), lw.SquaredNorm(), lw.SecondMoment(), lw.Variance()),
    "six reduced first-order": lambda: [make() for make in SIX.values()],
    "GGN diagonal, 1 sample": lambda: (lw.DiagGGN(draws=1),),
    "GGN diagonal, exact": lambda: (lw.DiagGGN(),),
    "K-FAC, 1 sample": lambda: (lw.KFAC(draws=1),),
    "KFLR": lambda: (lw.KFLR(),),
    "Hessian diagonal": lambda: (lw.DiagHessian(),),
    "pairwise dots": lambda: (lw.PairwiseDot(),),
}
if "KFRA" in lw.__all__:
    MAKE["KFRA"] = lambda: (getattr(lw, "KFRA")(),)  # noqa: B009
BY_ROWS = (
    "per-sample gradient", "norms", "second moment", "variance", "four first-order", "six reduced first-order",
)  # fmt: skip


def program(quantity: str, problem: Problem) -> Program:
    """The observed step; for products, the operator and one product from the graph that the gradient uses too."""
    if quantity == "GGN times a vector":
        return _product(problem)
    if quantity not in MAKE:
        raise Unsupported(f"layerwise {lw.__version__} has no {quantity}")
    factors = quantity in ("K-FAC, 1 sample", "KFLR", "KFRA")
    single = quantity not in ("empty observe", "four first-order", "six reduced first-order")
    return _observed(problem, MAKE[quantity], _factors if factors else (lambda r: dict(r[0])) if single else None)


def by_rows(quantity: str, problem: Problem) -> Program:
    """The step in which the gradients of weights are sums of the per-sample gradients that a quantity forms."""
    if quantity not in BY_ROWS:
        raise Unsupported("forms no per-sample gradients")
    return _observed(problem, MAKE[quantity], None if "first-order" in quantity else lambda r: dict(r[0]), "rows")


def parts(quantity: str, problem: Problem) -> dict[str, Program]:
    """The quantities of a row alone, to compare their sum with all of them together."""
    if quantity != "six reduced first-order":
        return {}
    return {name: _observed(problem, lambda make=make: (make(),), None) for name, make in SIX.items()}  # type: ignore[misc]


def _observed(
    problem: Problem, make: Make, values: Callable[[Any], dict[str, Tensor]] | None, grad: str = "autograd"
) -> Program:
    def run() -> list[Any]:
        quantities = make()
        with lw.observe(problem.model, *quantities, grad=grad) as seen:
            problem.step()
        return [seen[q] for q in quantities]

    return Program(run, values)


def _factors(result: Any) -> dict[str, Tensor]:
    found = {}
    for name, block in result[0].blocks.items():
        for letter, factor in (("A", block.A), ("B", block.B)):
            if factor is not None and factor.dim() == 3 and len(factor) == 1:
                found[f"{name}.{letter}"] = factor[0] / factor[0].trace()
    return found


def _product(problem: Problem) -> Program:
    v = direction(problem)

    def run() -> dict[str, Tensor]:
        kept = []

        def closure() -> Tensor:
            for p in problem.model.parameters():
                p.grad = None
            kept.append(problem.loss())
            return kept[0]

        result = lw.GGN(problem.model, closure) @ v
        kept[0].backward()
        return result

    return Program(run, lambda r: r)


def direction(problem: Problem) -> dict[str, Tensor]:
    """A seeded direction, by parameter name."""
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(p.shape, generator=generator) for k, p in problem.model.named_parameters()}
