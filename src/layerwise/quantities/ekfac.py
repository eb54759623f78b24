"""K-FAC's eigenbasis with the exact second moments of the gradients in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise import contract
from layerwise.cotangents import Exact, Sampled
from layerwise.gradients import ParameterGradient
from layerwise.operators.kronecker import EigenBlock, EigenKronecker, Kronecker
from layerwise.ops.base import Rows
from layerwise.quantities.base import Context, Union, positive
from layerwise.quantities.kronecker import KroneckerFactors, joined_rows

__all__ = ["EKFAC", "KeptRows"]


@dataclass(frozen=True)
class KeptRows:
    """Rows held until more is known about them: a sum of terms, each weight times a quadratic function of its rows.

    Adding joins the terms and multiplying scales their weights, so that it takes a tensor's place wherever values
    of stacks and batches are summed. The memory is that of all rows, and grows with every batch.
    """

    terms: tuple[tuple[Rows, float], ...]

    def __add__(self, other: KeptRows) -> KeptRows:
        *before, (last, weight) = self.terms
        (first, its), *after = other.terms
        if last.a is not None and first.a is not None and torch.equal(last.a, first.a):
            first = Rows(last.a, first.g, first.size_in)  # a further stack of the same batch: hold its inputs once
        return KeptRows((*before, (last, weight), (first, its), *after))

    def __mul__(self, factor: float) -> KeptRows:
        return KeptRows(tuple((rows, weight * factor) for rows, weight in self.terms))

    def __truediv__(self, divisor: float) -> KeptRows:
        return self * (1 / divisor)

    def second_moment(self, block: EigenBlock) -> Tensor:
        """`[K,O,I]`: sum of the squared per-sample gradients in the eigenbasis of a block."""
        total = torch.zeros_like(block.spectrum)
        for rows, weight in self.terms:
            a, g = rows.a, (rows.g.transpose(2, 3) @ block.basis_out).transpose(2, 3)
            if a is not None and block.basis_in is not None:
                a = (a.transpose(1, 2) @ block.basis_in).transpose(1, 2)
            total.add_(contract.second_moment(Rows(a, g, rows.size_in)), alpha=weight)
        return total


class EKFAC(KroneckerFactors):
    """The GGN's diagonal in K-FAC's eigenbasis: a block approximation closer to the GGN than K-FAC's.

    With B = Q_B diag(b) Q_B^T and A = Q_A diag(a) Q_A^T the factors of `KFAC` ("expand"), the block of a parameter
    W[k,o,i] is (Q_B (x) Q_A) diag(S) (Q_B (x) Q_A)^T, with S[k,o,i] = sum over n, v of (Q_B^T D Q_A)^2, `[K,O,I]`,
    in place of K-FAC's b a^T, and D the gradient of sample n from the sampled root v, summed over positions and
    uses. Basis and S come from the same columns. `samples=None` takes all columns of the exact root: the basis is
    KFLR's, and S the exact diagonal of the GGN in it.
    The result is an `EigenKronecker` operator, in the units of the GGN.

    Memory: the eigenbasis is known after the last backward pass only, so the rows of all parameters are held until
    then, N·T·K·(I + V·O) numbers for each use (I counts a convolution's whole window), and more with every batch.
    Raises UnknownLoss, SamplesMixed, BadInput, or Undefined (no row form).
    Source: George et al. (2018), algorithm 1.
    """

    powers: tuple[float, ...] = (*KroneckerFactors.powers, 1)

    def __init__(self, samples: int | None = 1, generator: torch.Generator | None = None) -> None:
        self.samples = positive("EKFAC's samples", samples)
        super().__init__(Exact() if samples is None else Sampled(samples, generator), "expand", False)
        self.needs_samples = True

    def compute(self, gradient: ParameterGradient) -> tuple[Any, ...]:
        """What `KFAC` sums, and the rows."""
        rows = joined_rows(gradient)
        # the user may write to a batch's memory before the rows are read
        held = Rows(None if rows.a is None else rows.a.clone(), rows.g, rows.size_in)
        return *super().compute(gradient), KeptRows(((held, 1.0),))

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> EigenKronecker:
        """The operator: both stages, now that all rows are known."""
        basis = Kronecker(self._blocks(values, context)).eigh()
        return EigenKronecker(
            {name: replace(b, spectrum=values[name][-1].second_moment(b)) for name, b in basis.blocks.items()}
        )

    def __repr__(self) -> str:
        return f"EKFAC(samples={self.samples})"
