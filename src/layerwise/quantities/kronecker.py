"""Kronecker factors of the generalized Gauss-Newton matrix's blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise import contract
from layerwise.cotangents import Cotangent, Exact, Sampled
from layerwise.errors import BadInput, Undefined
from layerwise.gradients import ParameterGradient
from layerwise.operators.kronecker import Kronecker, KroneckerBlock
from layerwise.ops.base import Rows
from layerwise.quantities.base import Context, Quantity, Union, positive

__all__ = ["KFAC", "KFLR", "KroneckerFactors", "joined_rows", "options"]

SHARING = ("expand", "reduce")
_MOST_INPUTS = 2**14  # of an index under "reduce", whose input factor is no longer diagonal


class KroneckerFactors(Quantity):
    """What the Kronecker-factored quantities share: the factors of any root columns.

    sharing: "expand" (each position counts as a sample of its own) or "reduce" (the positions of one sample
    meet before they are squared). joint: a bias is a further input of its weight.
    """

    powers: tuple[float, ...] = (0, 0, 0, 1)
    needs_matrix = True

    def __init__(self, cotangent: Cotangent, sharing: str, joint: bool) -> None:
        if sharing not in SHARING:
            raise BadInput(f'{type(self).__name__}: sharing must be "expand" or "reduce", got {sharing!r}')
        self.cotangent = cotangent
        self.sharing = sharing
        self.joint = joint
        self.needs_samples = sharing == "reduce"
        self.needs_partner = joint

    def compute(self, gradient: ParameterGradient) -> tuple[Any, ...]:
        """Sum of input products, sum of inputs (for a bias), numbers of inputs and of rows, sum of output products."""
        rows = joined_rows(gradient)
        size = rows.g.shape[1:3].numel()
        if self.sharing == "reduce":
            rows = _reduced(gradient.name, rows)
        b = self.output_factor(gradient, rows)
        counts = b.new_tensor([rows.g.shape[1] * rows.g.shape[2], size])
        nothing = b.new_zeros(())
        if gradient.column:  # the inputs are the same for every stack of cotangents
            return nothing, nothing, counts.new_zeros(2), b
        inputs = nothing
        if self.joint and rows.a is not None and rows.a.is_floating_point():
            inputs = rows.a.sum((0, 1))
        return contract.input_gram(rows), inputs, counts, b

    def output_factor(self, gradient: ParameterGradient, rows: Rows) -> Tensor:
        """Sum of output products over the rows, `[K,O,O]`."""
        return gradient.output_gram(rows.g)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> Any:
        """The operator, with the maps of each parameter to its matrix."""
        return Kronecker(self._blocks(values, context))

    def _blocks(self, values: Mapping[str, tuple[Tensor, ...]], context: Context) -> dict[str, KroneckerBlock]:
        blocks: dict[str, KroneckerBlock] = {}
        pairs = _pairs(values, context) if self.joint else {}
        inside = set(pairs.values())
        for name, (a_sum, inputs, counts, b, *_) in values.items():
            if name in inside:
                continue
            layout, bias = context.matrices[name], pairs.get(name)
            a = None if layout.bias else a_sum if counts[0] == 1 else a_sum / counts[0]
            if bias is not None:
                a = _with_constant(a_sum / counts[0], inputs / counts[0])
            blocks[name] = KroneckerBlock(a, b, layout.fold, layout.matrix, bias)
        return blocks


class KFAC(KroneckerFactors):
    """Kronecker-factored approximation of the GGN's diagonal blocks, from sampled labels.

    For each parameter W[k,o,i], with s the sampled root at its outputs (it carries the loss's scale), B (x) A
    approximates the block; A `[K,I,I]`, B `[K,O,O]`:
    `sharing="expand"`: A[k] = mean over n, t of a a^T, B[k] = sum over n, t and draws of s s^T;
    `sharing="reduce"`: A[k] = mean over n of abar abar^T, abar the mean of a over t, and
    B[k] = sum over n and draws of (sum_t s)(sum_t s)^T.
    A bias has A = 1; with `joint=True` it is the last input, constant 1, of the weight whose rows it is added to
    (A is `[K,I+1,I+1]`), and keeps a block of its own where one of the two is used without the other. Further uses
    of one parameter are further positions. The result is a `Kronecker` operator.
    Raises UnknownLoss, BadInput, Undefined (no row form), or SamplesMixed ("reduce").
    Source: Martens and Grosse (2015), section 3; Grosse and Martens (2016); Eschenhagen et al. (2023).
    """

    def __init__(
        self,
        samples: int = 1,
        generator: torch.Generator | None = None,
        sharing: str = "expand",
        joint: bool = False,
    ) -> None:
        if samples is None:
            raise BadInput("KFAC's samples must be a whole number of at least 1, got None; KFLR has the exact root")
        self.samples = positive("KFAC's samples", samples)
        super().__init__(Sampled(samples, generator), sharing, joint)

    def __repr__(self) -> str:
        return f"KFAC(samples={self.samples}{options(self)})"


class KFLR(KroneckerFactors):
    """Kronecker-factored approximation of the GGN's diagonal blocks, from the exact root of the loss Hessian.

    As `KFAC`, with the sum over draws replaced by the sum over all root columns v: its B is the expectation of
    KFAC's, and A is the same. `[K,I,I]`, `[K,O,O]`; `(C-1)` columns for C classes and each loss term of a sample.
    Exact for a linear layer of one sample and one position. The result is a `Kronecker` operator.
    Raises UnknownLoss, BadInput, SamplesMixed, or Undefined (no row form, or a loss without a root).
    Source: Botev, Ritter and Barber (2017); Dangel et al. (2020), table 1.
    """

    def __init__(self, sharing: str = "expand", joint: bool = False) -> None:
        super().__init__(Exact(), sharing, joint)

    def __repr__(self) -> str:
        return f"KFLR({options(self)[2:]})"


def joined_rows(gradient: ParameterGradient) -> Rows:
    """The rows of all uses of a parameter, or Undefined."""
    part = gradient.joined
    if part is not None and part.rows is not None:
        return part.rows
    uses = ", ".join(repr(p.use) for p in gradient.parts)
    why = (
        "uses lay it out as different matrices"
        if all(p.rows is not None for p in gradient.parts)
        else "value reaches them through a derived tensor or a call without row form"
    )
    raise Undefined(
        f"asked for Kronecker factors of {gradient.name!r}, whose {why}: {uses}; leave the parameter out by "
        "freezing it, or ask for a diagonal quantity"
    )


def options(quantity: KroneckerFactors) -> str:
    """What was asked for besides the defaults, each with a comma in front."""
    sharing = "" if quantity.sharing == "expand" else f", sharing={quantity.sharing!r}"
    return sharing + (", joint=True" if quantity.joint else "")


def _reduced(name: str, rows: Rows) -> Rows:
    """One row for each sample: the mean of the inputs and the sum of the cotangents over the positions."""
    a, g = rows.a, rows.g.sum(2, keepdim=True)
    if a is None:
        return Rows(None, g, 1)
    if a.is_floating_point():
        return Rows(a.mean(1, keepdim=True), g, rows.size_in)
    if rows.size_in > _MOST_INPUTS:
        raise Undefined(
            f'asked for the factors of {name!r} with sharing="reduce", whose input factor would be a dense '
            f'{rows.size_in} x {rows.size_in} matrix; use sharing="expand", where it is diagonal'
        )
    mean = g.new_zeros(len(a), rows.size_in)
    if a.shape[1]:
        mean.scatter_add_(1, a, g.new_full(a.shape, 1 / a.shape[1]))
    return Rows(mean[:, None, None], g, rows.size_in)


def _pairs(values: Mapping[str, tuple[Tensor, ...]], context: Context) -> dict[str, str]:
    """Weights and their biases: those that met in every row of both."""
    pairs: dict[str, str] = {}
    for name, (_, inputs, counts, *_) in values.items():
        bias = context.matrices[name].partner
        if bias is None or bias not in values or not inputs.dim() or bias in pairs.values():
            continue
        if bool(values[bias][2][1] == counts[1]):
            pairs[name] = bias
    return pairs


def _with_constant(a: Tensor, mean: Tensor) -> Tensor:
    """The mean of `(a, 1)(a, 1)^T`, `[K,I+1,I+1]`, from those of a a^T and a."""
    top = torch.cat([a, mean[:, :, None]], 2)
    bottom = torch.cat([mean, mean.new_ones(len(mean), 1)], 1)
    return torch.cat([top, bottom[:, None]], 1)
