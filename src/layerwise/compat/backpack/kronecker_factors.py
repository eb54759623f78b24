"""Kronecker factors in BackPACK's convention, from a Kronecker-factored quantity of layerwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.graph.coverage import Graph
from layerwise.graph.samples import SampleLayout
from layerwise.losses import Likelihood
from layerwise.quantities import KFRA
from layerwise.quantities.base import Context, Quantity, Union, sum_of_stacks
from layerwise.quantities.kronecker.factors import KroneckerFactors
from layerwise.rows import contract
from layerwise.rows.base import Rows
from layerwise.rows.layout import MatrixLayout
from layerwise.tape.tape import Tape

__all__ = ["Factors"]


class Factors(Quantity):
    """Kronecker factors as lists: `[B, A]` for weights and `[B]` for biases.

    A = (1/N) sum_{n,t} a a^T, with a sum over the positions t where `layerwise` takes their mean. B is that of the
    quantity `of` with `sharing="reduce"`, which sums a sample's positions before squaring. A is in the memory order of
    one output's inputs, so `B (x) A` is the block of the parameter with its output axis first; for transposed
    convolutions and embeddings this differs from the parameter's own order.
    Raises Undefined for a weight with groups, or with an element for each output (its block is no Kronecker product),
    and for a parameter whose uses do not read it as one matrix.
    """

    powers = (0, 0, 1)
    needs_samples = True

    def __init__(self, of: KroneckerFactors) -> None:
        self.of = of
        self.cotangent = of.cotangent

    def check_losses(self, losses: Sequence[Likelihood]) -> None:
        """As the quantity `of`."""
        self.of.check_losses(losses)

    def check_size(self, columns: int, samples: int, sizes: Mapping[str, int]) -> None:
        """As the quantity `of`."""
        self.of.check_size(columns, samples, sizes)

    def numbers(self, gradient: ParameterGradient) -> int:
        """As the quantity `of`."""
        return self.of.numbers(gradient)

    def compute_graph(self, tape: Tape, graph: Graph, layout: SampleLayout | None) -> dict[str, tuple[Tensor, ...]]:
        """The sums of `compute`, from the recursion of `KFRA`."""
        assert isinstance(self.of, KFRA)
        return sum_of_stacks(self, self.of.gradients(tape, graph, layout))

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """Sum of a a^T (a scalar for a bias), number of samples, sum of output products."""
        rows, layout = _rows(gradient)
        k = rows.g.shape[3]
        if k > 1:
            raise Undefined(
                f"asked for Kronecker factors of {gradient.name!r}, whose block falls into {k} groups and is no "
                "Kronecker product; take layerwise's KFAC or KFLR, whose result knows groups, or freeze the parameter"
            )
        summed = rows.g if rows.g.shape[2] == 1 else rows.g.sum(2, keepdim=True)
        b = self.of.output_factor(gradient, Rows(rows.a, summed, rows.size_in))
        nothing = b.new_zeros(())
        if gradient.column:  # the inputs are the same for every stack of cotangents
            return nothing, nothing, b
        inputs = nothing if layout.bias else _in_memory_order(contract.input_gram(rows)[0], layout)
        return inputs, b.new_tensor(rows.g.shape[1]), b

    def finish(
        self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context
    ) -> dict[str, list[Tensor]]:
        """The factors by parameter name."""
        return {name: [b[0], a / n] if a.dim() else [b[0]] for name, (a, n, b) in values.items()}

    def __repr__(self) -> str:
        return f"Factors({self.of!r})"


def _rows(gradient: ParameterGradient) -> tuple[Rows, MatrixLayout]:
    """The rows of a parameter that is used as one matrix, and the layout of the matrix in it."""
    laid = gradient.laid()
    if laid.form != "rows" or gradient.all_rows is None:
        uses = ", ".join(repr(part.use) for part in gradient.parts)
        raise Undefined(
            f"asked for Kronecker factors of {gradient.name!r}, which its uses do not read as one matrix: {uses}; take "
            f"layerwise's KFAC or KFLR, which have its factors from {laid.form}, or freeze the parameter"
        )
    return gradient.all_rows.rows, laid.matrices[0]


def _in_memory_order(a: Tensor, layout: MatrixLayout) -> Tensor:
    """Sums of a a^T with the inputs permuted to the memory order of the parameter."""
    if a.dim() == 1:  # an index has a diagonal factor
        a = a.diag()
    places = layout.places()[0, 0]  # memory positions of the first output's inputs
    if bool((places.diff() > 0).all()):
        return a
    order = places.argsort().to(a.device)
    return a[order][:, order]
