"""Kronecker factors of the diagonal blocks of the generalized Gauss-Newton matrix: `KFAC` and `KFLR`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.gradient.parameter import ParameterGradient
from layerwise.gradient.parts import RowsPart
from layerwise.graph.cotangents import Cotangent, Exact, Sampled
from layerwise.operators.kronecker import Kronecker
from layerwise.quantities.base import Context, Quantity, Union, positive, takes_draws
from layerwise.quantities.kronecker.factor_sums import Factors, Sums, blocks_of
from layerwise.rows import contract, layout
from layerwise.rows.base import Rows

__all__ = ["KFAC", "KFLR", "KroneckerFactors", "options"]

SHARING = ("expand", "reduce")
ROWS = ("real", "all")


class KroneckerFactors(Quantity):
    """Base of the Kronecker-factored quantities: factors from any columns of a GGN root.

    sharing: "expand" (each position counts as a sample of its own) or "reduce" (a sample's positions are combined
    before squaring). joint: a bias is a further input of its weight. rows: "real" (A is the mean over the rows that a
    loss term which counts can reach) or "all" (padding counts as well).
    """

    powers: tuple[float, ...] = (1,)
    smaller = "or take DiagGGN for it; optimizers do so above `largest_factor=`"

    def __init__(self, cotangent: Cotangent, sharing: str, joint: bool, rows: str = "real") -> None:
        if rows not in ROWS:
            raise BadInput(f'{type(self).__name__}: rows must be "real" or "all", got {rows!r}')
        if sharing not in SHARING:
            raise BadInput(f'{type(self).__name__.lstrip("_")}: sharing must be "expand" or "reduce", got {sharing!r}')
        self.cotangent = cotangent
        self.sharing = sharing
        self.joint = joint
        self.needs_samples = sharing == "reduce"
        self.rows = rows
        self.real_rows = rows == "real"

    def numbers(self, gradient: ParameterGradient) -> int:
        """Those of the factors: K·I² and K·O² for each matrix, a diagonal of I for a look-up."""
        groups = gradient.groups
        if groups is None or self.from_gradients(gradient):
            o, i, _ = layout.dense_sides(gradient.shape)
            return o * o + (i if i > layout.LONG_SIDE else i * i)
        inputs = 0 if gradient.column else sum(self._inputs(part.rows) for part in groups)
        return inputs + sum(self._outputs(part.rows) for part in groups)

    def _inputs(self, rows: Rows) -> int:
        k, i = rows.cotangents[0].shape[3], rows.size_in
        return k * (i if rows.kind == "index" and self.sharing == "expand" else i * i)

    def _outputs(self, rows: Rows) -> int:
        k, o = rows.cotangents[0].shape[3:]
        return k * o * o

    def compute(self, gradient: ParameterGradient) -> tuple[Any, ...]:
        """The sums of the factors of each matrix."""
        groups, laid = gradient.groups, None
        if groups is None or self.from_gradients(gradient):
            laid = layout.FactorForm("gradients", (layout.dense_layout(gradient.shape),))
            sums: tuple[Sums, ...] = (_of_gradients(gradient),)
        else:
            if not gradient.column:
                laid = gradient.laid(self.joint)
            sums = tuple(self._of_rows(gradient, part) for part in groups)
        form = laid.form if laid is not None else "rows"  # None for further stacks, which are added to the first
        return (Factors(gradient.name, gradient.shape, form, sums, laid),)

    def from_gradients(self, gradient: ParameterGradient) -> bool:
        """Whether the factors must come from dense gradients: "reduce" of an index over too many inputs."""
        return self.sharing == "reduce" and any(_long(part.rows) for part in gradient.groups or ())

    def _of_rows(self, gradient: ParameterGradient, part: RowsPart) -> Sums:
        rows, first = part.rows, not gradient.column
        size = rows.g.shape[1:3].numel()
        real = part.mask(self.real_rows) if first else None
        if self.sharing == "reduce":
            rows = _reduced(rows, real)
        b = self.output_factor(gradient, rows)
        nothing = b.new_zeros(())
        if not first:  # the inputs are the same for every stack of cotangents
            return Sums(nothing, nothing, b.new_zeros(2), b, (0.0, 0.0))
        count: int | Tensor = rows.g.shape[1] * rows.g.shape[2]
        if real is not None:
            chosen = real.any(1, keepdim=True) if self.sharing == "reduce" else real
            rows, count = contract.chosen(rows, chosen), chosen.sum()
        counts = b.new_full((2,), size)  # a copy from the host would wait for the device
        counts[0].fill_(count)
        mean = nothing
        if self.joint and rows.kind == "float":
            assert rows.a is not None
            mean = rows.a.sum((0, 1))
        known = (None if isinstance(count, Tensor) else float(count)), float(size)
        return Sums(contract.input_gram(rows), mean, counts, b, known)

    def output_factor(self, gradient: ParameterGradient, rows: Rows) -> Tensor:
        """Sum of output products over the rows, `[K,O,O]`."""
        return gradient.output_gram(rows.g)

    def finish(self, values: Mapping[str, tuple[Any, ...]], union: Union, context: Context) -> Any:
        """The operator."""
        return Kronecker(blocks_of({name: value[0] for name, value in values.items()}, self.joint))


class KFAC(KroneckerFactors):
    """Kronecker-factored approximation of the GGN's diagonal blocks, from sampled labels.

    For each parameter W[k,o,i], with s the sampled root column at its outputs, in the loss's scale, B (x) A
    approximates the block; A `[K,I,I]`, B `[K,O,O]`:
    `sharing="expand"`: A[k] = mean over n, t of a a^T, B[k] = sum over n, t and draws of s s^T;
    `sharing="reduce"`: A[k] = mean over n of abar abar^T, abar the mean of a over t, and
    B[k] = sum over n and draws of (sum_t s)(sum_t s)^T.
    These means are over real rows, those that a loss term which counts can send a cotangent to: not over the padding
    behind ignored targets (or terms that are multiplied by zero), nor over rows that an index or a mask leaves out
    before the loss. `rows="all"` counts them too.
    A bias has A = 1; with `joint=True` it is the last input, constant 1, of the weight whose rows it is added to
    (A is `[K,I+1,I+1]`), or keeps its own block where weight or bias is used without the other. Further uses of one
    parameter count as further positions. The result is a `Kronecker` operator, whose `forms` name for each parameter
    the source of its factors:
    "rows": as above. "slices": as above for each of the disjoint slices that its uses read, `w[0]`, `w[1]`, ...
    "gradients", for a parameter without rows (a derived weight, a tied embedding): B = sum over n and draws of D D^T,
    A = sum of D^T D / tr B, D the gradient of one sample and draw as a matrix [first axis, rest]; B (x) A has the
    trace of the block. A factor of more than 16384 rows is reduced to its diagonal.
    Raises UnknownLoss, BadInput, SamplesMixed ("reduce" or "gradients"), or Undefined (batches of different forms).
    Source: Martens and Grosse (2015), section 3; Grosse and Martens (2016); Eschenhagen et al. (2023); for gradients
    Morwani et al. (2024), section 3.
    """

    @takes_draws
    def __init__(
        self,
        draws: int = 1,
        generator: torch.Generator | None = None,
        sharing: str = "expand",
        joint: bool = False,
        rows: str = "real",
    ) -> None:
        if draws is None:
            raise BadInput("KFAC's draws must be a whole number of at least 1, got None; KFLR has the exact root")
        self.draws = positive("KFAC's draws", draws)
        super().__init__(Sampled(draws, generator), sharing, joint, rows)

    def __repr__(self) -> str:
        return f"KFAC(draws={self.draws}{options(self)})"


class KFLR(KroneckerFactors):
    """Kronecker-factored approximation of the GGN's diagonal blocks, from the exact root of the loss Hessian.

    As `KFAC`, with the sum over draws replaced by the sum over all root columns v: its B is the expectation of
    KFAC's, and A is the same. `[K,I,I]`, `[K,O,O]`; `(C-1)` columns for C classes and each loss term of a sample.
    Exact for a linear layer of one sample and one position. The result is a `Kronecker` operator; forms as in `KFAC`.
    Raises UnknownLoss, BadInput, SamplesMixed, or Undefined (a loss without a root, or batches of different forms).
    Source: Botev, Ritter and Barber (2017); Dangel et al. (2020), table 1.
    """

    def __init__(self, sharing: str = "expand", joint: bool = False, rows: str = "real") -> None:
        super().__init__(Exact(), sharing, joint, rows)

    def __repr__(self) -> str:
        return f"KFLR({options(self)[2:]})"


def options(quantity: KroneckerFactors) -> str:
    """The arguments that differ from their defaults, as text for `repr`, each after a comma."""
    sharing = "" if quantity.sharing == "expand" else f", sharing={quantity.sharing!r}"
    return sharing + (", joint=True" if quantity.joint else "") + ("" if quantity.rows == "real" else ", rows='all'")


def _long(rows: Rows) -> bool:
    """Whether the inputs are an index with too many classes for a dense input factor."""
    return rows.kind == "index" and rows.size_in > layout.LONG_SIDE


def _reduced(rows: Rows, real: Tensor | None = None) -> Rows:
    """One row for each sample: the mean of the inputs over its (real) positions, the sum of the cotangents over all."""
    a, g = rows.a, rows.g.sum(2, keepdim=True)
    if a is None:
        return Rows(None, g, 1)
    shares = None if real is None else real.to(g.dtype) / real.sum(1, keepdim=True).clamp(min=1)
    if a.is_floating_point():
        mean = a.mean(1, keepdim=True) if shares is None else (a * shares[:, :, None, None]).sum(1, keepdim=True)
        return Rows(mean, g, rows.size_in)
    mean = g.new_zeros(len(a), rows.size_in)
    if a.shape[1]:
        mean.scatter_add_(1, a, g.new_full(a.shape, 1 / a.shape[1]) if shares is None else shares)
    return Rows(mean[:, None, None], g, rows.size_in)


def _of_gradients(gradient: ParameterGradient) -> Sums:
    """The sums of D D^T and D^T D, with their common trace."""
    outputs, inputs = gradient.dense_grams()
    trace = outputs.diagonal(dim1=1, dim2=2).sum()
    return Sums(inputs, trace.new_zeros(()), torch.stack([trace, torch.zeros_like(trace)]), outputs, (None, 0.0))
