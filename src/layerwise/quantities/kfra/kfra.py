"""Kronecker factors from a recursion of the batch-averaged Hessian (KFRA)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.graph.cotangents import InGraph
from layerwise.graph.coverage import Graph
from layerwise.graph.samples import SampleLayout
from layerwise.quantities.base import Union, positive, sum_of_stacks
from layerwise.quantities.kfra.recursion import AveragedGradient, averaged
from layerwise.quantities.kronecker.factor_sums import Sums
from layerwise.quantities.kronecker.factors import KroneckerFactors, options
from layerwise.rows.base import Rows
from layerwise.tape.tape import Tape

__all__ = ["KFRA"]

MAX_BYTES = 2**28


class KFRA(KroneckerFactors):
    """Kronecker-factored approximation of the GGN's diagonal blocks, from a recursion over the batch average.

    For a chain of uses 1 to L with outputs z_l (D_l values per sample), H_n the Gauss-Newton Hessian in z_L of
    sample n's term in the loss as written, and J_n = dz_{l+1}/dz_l:

        G_L = sum_n H_n,    G_l = (1/N) sum_n J_n^T G_{l+1} J_n,

    which for z_{l+1} = W f(z_l) is (W^T G_{l+1} W) * (1/N) sum_n d_n d_n^T with d_n = f'(z_l). B `[K,O,O]` are the
    blocks of G_l over the outputs at one position, summed over positions, `sharing="expand"`; `"reduce"` sums the
    blocks over all pairs of positions. A `[K,I,I]`, biases, `joint` and the scale (that of the loss) are as in `KFLR`:
    with Gbar_l the same recursion for the average Hessian of the samples' losses before reduction,
    G_l = Gbar_l under a mean over the N samples, and G_l = N Gbar_l under a sum. Equal to `KFLR` at the last use, for
    one sample, and wherever J_n is the same for all samples. The result is a `Kronecker` operator.

    A and the average are over all rows, padding too (the `rows="all"` of `KFAC`).
    Forms are those of `KFAC`; for "gradients", D are per-sample gradients from the columns of a root of G_l / N.

    One average over the batch is taken between two uses, whatever lies between them. Averages of two batches cannot be
    combined, so a second backward pass in one `observe` is refused.
    max_bytes: the largest block `[D_l, D_l]` allowed. Raises Undefined (no chain: a path around a use, a weight used
    twice, several losses; a block over max_bytes; several batches), SamplesMixed, UnknownLoss, NonFinite,
    BadInput.
    Source: Botev, Ritter and Barber (2017), section 3.4; Dangel et al. (2020), table 1.
    """

    def __init__(self, sharing: str = "expand", joint: bool = False, max_bytes: int = MAX_BYTES) -> None:
        positive("KFRA's max_bytes", max_bytes)
        super().__init__(InGraph(), sharing, joint, "all")
        self.max_bytes = max_bytes
        self.needs_samples = True

    def gradients(self, tape: Tape, graph: Graph, layout: SampleLayout | None) -> Iterator[ParameterGradient]:
        """The parameters with their averaged blocks, or with the columns of a block's root."""
        assert layout is not None  # needs_samples
        return averaged(tape, graph, layout, self.max_bytes)

    def compute_graph(self, tape: Tape, graph: Graph, layout: SampleLayout | None) -> dict[str, tuple[Any, ...]]:
        """The sums of the factors of each parameter."""
        return sum_of_stacks(self, self.gradients(tape, graph, layout))

    def compute(self, gradient: ParameterGradient) -> tuple[Any, ...]:
        """The sums of the factors of each matrix."""
        if not isinstance(gradient, AveragedGradient):  # columns of the block's root
            return super().compute(gradient)
        if self.from_gradients(gradient):
            raise Undefined(
                f'asked for KFRA of {gradient.name!r} {tuple(gradient.shape)} with sharing="reduce", whose input '
                'factor would be a dense matrix of its first axis; use sharing="expand", where it is diagonal'
            )
        (found,) = super().compute(gradient)
        if not self.joint:  # a single batch: its means are final and computed in place
            found = replace(found, sums=tuple(map(_mean_in_place, found.sums)))
        return (found,)

    def output_factor(self, gradient: ParameterGradient, rows: Rows) -> Tensor:
        """The averaged blocks over the outputs, summed over positions."""
        if not isinstance(gradient, AveragedGradient):
            return super().output_factor(gradient, rows)
        return _over_positions(gradient.curvature, self.sharing).diagonal(dim1=0, dim2=2).movedim(2, 0).to(rows.g.dtype)

    def check_union(self, seen: Union, batch: Union) -> None:
        """Refuse a second batch."""
        raise Undefined(
            f"asked for KFRA of {seen.samples} samples and {batch.samples} further ones: its recursion averages over "
            "one batch at every layer, so the factors of two batches do not join to those of both; observe each batch "
            "on its own, or ask for KFLR, whose factors join"
        )

    def __repr__(self) -> str:
        given = options(self).removesuffix(", rows='all'") + (
            "" if self.max_bytes == MAX_BYTES else f", max_bytes={self.max_bytes}"
        )
        return f"KFRA({given[2:]})"


def _mean_in_place(sums: Sums) -> Sums:
    """The mean of the inputs, as the sum over one."""
    sums.inputs.div_(sums.counts[0])
    sums.counts.div_(sums.counts[0].clone())
    seen, size = sums.known or (None, 0.0)
    return replace(sums, known=(1.0, size / seen) if seen else None)


def _over_positions(curvature: Tensor, sharing: str) -> Tensor:
    """`[K,O,K,O]` from `[T,K,O,T,K,O]`: the sum over equal positions ("expand") or over all pairs ("reduce")."""
    if curvature.shape[0] == 1:
        return curvature[0, :, :, 0]
    return curvature.diagonal(dim1=0, dim2=3).sum(-1) if sharing == "expand" else curvature.sum((0, 3))
