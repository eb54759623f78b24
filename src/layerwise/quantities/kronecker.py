"""Kronecker factors of the generalized Gauss-Newton matrix's blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerwise import contract
from layerwise.cotangents import Sampled
from layerwise.errors import BadInput, Undefined
from layerwise.gradients import ParameterGradient
from layerwise.operators.kronecker import Kronecker, KroneckerBlock
from layerwise.quantities.base import Context, Quantity, Union, positive

__all__ = ["KFAC"]


class KFAC(Quantity):
    """Kronecker-factored approximation of the GGN's diagonal blocks, from sampled labels.

    For each parameter W[k,o,i]: A[k] = mean over n, t of a a^T, `[K,I,I]`, and B[k] = sum over n, t and draws
    of s s^T, `[K,O,O]`, with s the sampled root (it carries the loss's scale), so that B (x) A approximates
    the block. A bias has A = 1. Uses of one parameter are further positions ("expand").
    The result is a `Kronecker` operator. Raises UnknownLoss, or Undefined (no row form).
    Source: Martens and Grosse (2015), section 3; Grosse and Martens (2016); Eschenhagen et al. (2023).
    """

    powers = (0, 0, 1)
    needs_samples = False
    needs_matrix = True

    def __init__(self, samples: int = 1, generator: torch.Generator | None = None) -> None:
        if samples is None:
            raise BadInput("KFAC's samples must be a whole number of at least 1, got None")
        self.samples = positive("KFAC's samples", samples)
        self.cotangent = Sampled(samples, generator)

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """Sum of input products, number of rows, sum of cotangent products."""
        part = gradient.joined
        if part is None or part.rows is None:
            raise Undefined(
                f"asked for Kronecker factors of {gradient.name!r}, whose uses lay it out as different matrices: "
                + ", ".join(repr(p.use) for p in gradient.parts)
            )
        rows = part.rows
        g_factor = gradient.output_gram(rows.g)
        count = rows.g.new_tensor(float(rows.g.shape[1] * rows.g.shape[2]))
        if gradient.column:  # the inputs are the same for every stack of cotangents
            return count.new_zeros(()), count.new_zeros(()), g_factor
        return contract.input_gram(rows), count, g_factor

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> Kronecker:
        """The operator, with the maps of each parameter to its matrix."""
        blocks = {}
        for name, (a_sum, count, b) in values.items():
            layout = context.matrices[name]
            blocks[name] = KroneckerBlock(None if layout.bias else a_sum / count, b, layout.fold, layout.matrix)
        return Kronecker(blocks)

    def __repr__(self) -> str:
        return f"KFAC(samples={self.samples})"
