"""Every quantity: how it is asked for, how brute force computes it, and where it is n/a or may be refused.

    outcome(case("conv2d"), COLUMNS["KFLR expand"])      # a Cell, or an AssertionError

From this table come the table test of `test_matrix.py` and the page `docs/support.md`. To add a quantity: a
`Column`. A model of the zoo, or a column, enters the table by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import quantity_checks as check
import torch
from kfra_checks import NO_CHAIN, kfra
from quantity_checks import Drawn, Truth
from zoo import Case, Instance

import layerwise as lw
from layerwise import errors

__all__ = ["COLUMNS", "Cell", "Column", "outcome"]


@dataclass(frozen=True)
class Cell:
    """What a quantity gave on a model: "exact", "part", "sampled", "refused" or "n/a", and why it is not all exact."""

    kind: str
    why: str = ""


@dataclass(frozen=True)
class Column:
    """A quantity.

    ask: the quantity for `observe`; or, for an operator, `build`: (subject, closure) -> the operator.
    check: (truth, result, drawn) asserts that the result is what brute force computes, from the same draws; where
        brute force covers a part of it, it returns which.
    chain: whether it is for chains of layers alone.
    sampled: whether it is a random estimate; its columns or signs are then recorded as they are drawn.
    second: whether it differentiates the backward pass, which some operations of torch cannot.
    per_sample: whether it must tell the samples apart.
    undefined: why it does not exist for a model and a loss, or None.
    """

    name: str
    group: str
    check: Callable[[Truth, Any, Drawn], str | None]
    ask: Callable[[Truth], lw.Quantity] | None = None
    build: Callable[[Any, Callable[[], torch.Tensor]], Any] | None = None
    sampled: bool = False
    second: bool = False
    per_sample: bool = True
    chain: bool = False
    undefined: Callable[[Truth], str | None] = lambda truth: None

    def run(self, truth: Truth) -> tuple[Any, Drawn]:
        """The result, and the random columns that were drawn for it."""
        instance = truth.fresh()
        with check.recorded() if self.sampled else _no_draws() as drawn:
            return self._result(truth, instance), drawn

    def _result(self, truth: Truth, instance: Instance) -> Any:
        if self.build is not None:
            return self.build(instance.subject, instance.loss)
        quantity = self.ask(truth)
        try:
            with lw.observe(instance.subject, quantity, samples=truth.samples) as seen:
                instance.loss().backward()
        except errors.LayerwiseError:
            assert all(p.grad is None for p in instance.params.values()), "refused, but the gradient was changed"
            raise
        return seen[quantity]


def _no_draws() -> AbstractContextManager[Drawn]:
    return nullcontext(Drawn())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


# Where a quantity does not exist ----------------------------------------------------------------


def _one_sample(truth: Truth) -> str | None:
    return "one sample has no noise" if truth.instance.n == 1 else None


def _not_a_likelihood(truth: Truth) -> str | None:
    return "the loss is no likelihood" if truth.case.loss.name in ("huber_mean",) else None


def _mean_and_sum(truth: Truth) -> str | None:
    return "a mean and a sum are added" if truth.case.loss.name == "two_heads" else None


# The table --------------------------------------------------------------------------------------

FIRST, CURVATURE, FACTORS, OPERATORS = "first order", "curvature diagonals and roots", "Kronecker factors", "operators"

_TABLE = [
    Column("PerSampleGrad", FIRST, check.per_sample_grad, lambda t: lw.PerSampleGrad()),
    Column("SquaredNorm", FIRST, check.squared_norm, lambda t: lw.SquaredNorm()),
    Column("PairwiseDot", FIRST, check.pairwise_dot, lambda t: lw.PairwiseDot()),
    Column("SecondMoment", FIRST, check.second_moment, lambda t: lw.SecondMoment()),
    Column("Variance", FIRST, check.variance, lambda t: lw.Variance()),
    Column("NoiseScale", FIRST, check.noise_scale, lambda t: lw.NoiseScale(), undefined=_one_sample),
    Column("ClippedGrad", FIRST, check.clipped_grad, lambda t: lw.ClippedGrad(t.max_norm)),
    Column("Sketch", FIRST, check.sketch, lambda t: lw.Sketch(3, _generator()), sampled=True),
    Column("FisherDiag data", FIRST, check.fisher_of_data, lambda t: lw.FisherDiag("data"), undefined=_mean_and_sum),
    Column("DiagGGN exact", CURVATURE, check.diag_ggn, lambda t: lw.DiagGGN()),
    Column("DiagGGN per-sample", CURVATURE, check.diag_ggn_each, lambda t: lw.DiagGGN(per_sample=True)),
    Column("DiagGGN sampled", CURVATURE, check.sampled_diag_ggn, lambda t: lw.DiagGGN(2, _generator()), sampled=True),
    Column(
        "FisherDiag model", CURVATURE, check.sampled_diag_ggn, lambda t: lw.FisherDiag("model", 2, _generator()),
        sampled=True, undefined=_not_a_likelihood,
    ),
    Column("SqrtGGN exact", CURVATURE, check.sqrt_ggn, lambda t: lw.SqrtGGN()),
    Column("SqrtGGN sampled", CURVATURE, check.sampled_sqrt_ggn, lambda t: lw.SqrtGGN(2, _generator()), sampled=True),
    Column("DiagHessian exact", CURVATURE, check.diag_hessian, lambda t: lw.DiagHessian(), per_sample=False),
    Column("DiagHessian per-sample", CURVATURE, check.diag_hessian_each, lambda t: lw.DiagHessian(per_sample=True)),
    Column(
        "DiagHessian sampled", CURVATURE, check.sampled_diag_hessian,
        lambda t: lw.DiagHessian(draws=3, generator=_generator()), sampled=True, second=True, per_sample=False,
    ),
    Column(
        "KFAC expand", FACTORS, check.sampled_factors("expand"), lambda t: lw.KFAC(2, _generator()),
        sampled=True, per_sample=False,
    ),
    Column(
        "KFAC reduce", FACTORS, check.sampled_factors("reduce"), lambda t: lw.KFAC(2, _generator(), "reduce"),
        sampled=True,
    ),
    Column("KFLR expand", FACTORS, check.factors("expand"), lambda t: lw.KFLR()),
    Column("KFLR reduce", FACTORS, check.factors("reduce"), lambda t: lw.KFLR("reduce")),
    Column("KFRA", FACTORS, kfra, lambda t: lw.KFRA(), chain=True),
    Column("EKFAC", FACTORS, check.ekfac, lambda t: lw.EKFAC(None)),
    Column("GGN", OPERATORS, check.ggn_operator, build=lw.GGN, second=True, per_sample=False),
    Column("Hessian", OPERATORS, check.hessian_operator, build=lw.Hessian, second=True, per_sample=False),
]  # fmt: skip

COLUMNS: Mapping[str, Column] = {column.name: column for column in _TABLE}

MIXED = "samples are mixed"
BRANCHES = "the recursion is for chains"
HEADS = "the recursion starts at one loss"
SEVERAL = {"ce_stepwise", "two_calls", "two_heads"}


def refusal(case: Case, column: Column) -> tuple[type[errors.LayerwiseError], str] | None:
    """The error that a cell must raise, and why; nothing else may be refused."""
    tags = case.problem.tags
    if "mixed" in tags and column.per_sample:
        return errors.SamplesMixed, MIXED
    if column.chain and case.loss.name in SEVERAL:
        return errors.Undefined, HEADS
    if column.chain and case.problem.name in NO_CHAIN:
        return errors.Undefined, BRANCHES
    return None


# Cells ------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def truth_of(case: Case) -> Truth:
    """Brute force of a case, shared by the columns."""
    return Truth(case)


@cache
def outcome(case: Case, column: Column) -> Cell:
    """Run one cell of the table and check it; the same cell is run once.

    Raises: AssertionError where the result is not brute force's, or a refusal is none of those that are known.
    """
    truth = truth_of(case)
    why, expected = column.undefined(truth), refusal(case, column)
    if why is None and expected is None:
        part = check_result(truth, column)
        return Cell("part", part) if part else Cell("sampled" if column.sampled else "exact")
    error = errors.Undefined if why is not None else expected[0]
    try:
        result, _ = column.run(truth)
        if column.build is not None:  # an operator refuses at its first product
            result @ torch.ones(result.shape[0], dtype=result.dtype)
    except error as caught:
        check.refusal_says_enough(truth, column, caught, names=why is None)
        return Cell("n/a", why) if why is not None else Cell("refused", expected[1])
    raise AssertionError(f"{column.name} on {case.id} is no longer refused ({why or expected[1]}): say so in the table")


def check_result(truth: Truth, column: Column) -> str | None:
    """Compare one result with brute force; which part of it, where not the whole."""
    result, drawn = column.run(truth)
    return column.check(truth, result, drawn)
