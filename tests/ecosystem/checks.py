"""Each cell of a row: a quantity of the library against brute force."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import oracle
import torch
from torch import Tensor

import layerwise as lw
from ecosystem.base import Program

__all__ = ["COLUMNS", "Cell", "Truth", "outcome"]

REL = 1e-9


@dataclass(frozen=True)
class Cell:
    """What came out: "exact", "refused" with the error's class and text, or "n/a" where brute force is a choice."""

    kind: str
    why: str = ""


class Truth:
    """Brute force on one program, each part computed once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        with oracle.plain_operations():
            found = oracle.used_names(oracle.parameters(program.model), program.value)
            if not program.mixed:
                oracle.assert_close(sum(term().detach() for term in program.terms()), program.value())
        self.params = {n: p for n, p in oracle.parameters(program.model).items() if n in found}

    @cached_property
    def grads(self) -> dict[str, Tensor]:
        """`[N, *shape]`: each sample in a run of its own."""
        rows = [oracle.gradient(self.params, term) for term in self.program.terms()]
        return {name: torch.stack([row[name] for row in rows]) for name in self.params}

    @cached_property
    def jacobian(self) -> list[Tensor]:
        """For each parameter `[D, P]`, over all elements of what the loss receives."""
        with oracle.plain_operations():
            return oracle._jacobian(oracle._flat(self.program.outputs(self.program.batch)), self.params)

    @cached_property
    def loss_hessian(self) -> Tensor:
        """`[D, D]`."""
        leaf, shaped = oracle._leaf(self.program.outputs(self.program.batch))
        value = self.program.loss_of(shaped, self.program.batch)
        oracle.assert_close(value, self.program.value())
        return oracle._hessian(value, leaf)

    def diag_ggn(self) -> dict[str, Tensor]:
        """The diagonal of JᵀHJ."""
        pairs = zip(self.params.items(), self.jacobian, strict=True)
        return {name: (jac * (self.loss_hessian @ jac)).sum(0).view(p.shape) for (name, p), jac in pairs}

    def ggn_product(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """JᵀHJ v."""
        z = sum(jac @ v[name].flatten() for name, jac in zip(self.params, self.jacobian, strict=True))
        back = self.loss_hessian @ z
        pairs = zip(self.params.items(), self.jacobian, strict=True)
        return {name: (back @ jac).view(p.shape) for (name, p), jac in pairs}

    def hessian_product(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """H v, by the gradient of ⟨gradient, v⟩."""
        leaves = list(self.params.values())
        with oracle.plain_operations():
            grads = torch.autograd.grad(self.program.value(), leaves, create_graph=True)
            inner = sum((g * v[name]).sum() for name, g in zip(self.params, grads, strict=True))
            return dict(zip(self.params, oracle._pull(inner, self.params), strict=True))


def _observed(truth: Truth, quantity: Any) -> dict[str, Tensor]:
    program = truth.program
    with lw.observe(program.model, quantity, **program.options) as seen:
        program.value().backward()
    program.model.zero_grad()
    return dict(seen[quantity])


def _directions(params: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in params.items()}


def _product(truth: Truth, operator: Callable[..., Any], want: Callable[..., dict[str, Tensor]]) -> None:
    every = oracle.parameters(truth.program.model)
    v = _directions(every)
    got = operator(truth.program.model, truth.program.value) @ v
    oracle.assert_close({name: got[name] for name in truth.params}, want(v), rel=REL)
    assert all(not value.any() for name, value in got.items() if name not in truth.params)


def _first(
    quantity: Callable[[], Any], want: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Callable[[Truth], None]:
    return lambda truth: oracle.assert_close(_observed(truth, quantity()), want(truth.grads), rel=REL)


def _squared_norm(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.abs().square().reshape(len(g), -1).sum(1) for name, g in grads.items()}


def _variance(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (g - g.mean(0)).abs().square().mean(0) for name, g in grads.items()}


COLUMNS: dict[str, Callable[[Truth], None]] = {
    "PerSampleGrad": _first(lw.PerSampleGrad, lambda g: g),
    "SquaredNorm": _first(lw.SquaredNorm, _squared_norm),
    "Variance": _first(lw.Variance, _variance),
    "DiagGGN": lambda truth: oracle.assert_close(_observed(truth, lw.DiagGGN()), truth.diag_ggn(), rel=REL),
    "GGN": lambda truth: _product(truth, lw.GGN, truth.ggn_product),
    "Hessian": lambda truth: _product(truth, lw.Hessian, truth.hessian_product),
}


def outcome(truth: Truth, column: str) -> Cell:
    """One cell. A wrong value fails, and so does an error without a type."""
    if truth.program.outputs is None and column in ("DiagGGN", "GGN"):
        return Cell("n/a")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            COLUMNS[column](truth)
    except lw.errors.LayerwiseError as error:
        return Cell("refused", f"{type(error).__name__}: {error}")
    return Cell("exact")
