"""The damped inverse of a curvature that is diagonal in a Kronecker basis, applied to stacks of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, reduce

import torch
from torch import Tensor

from layerwise.gradient.parameter import ParameterGradient
from layerwise.gradient.parts import RowsPart
from layerwise.operators import EigenBlock, EigenKronecker
from layerwise.operators.diagonal import check_damping
from layerwise.quantities.inner_products import Direction, Projections, SampleQuantity
from layerwise.quantities.kronecker.ekfac import rotated_rows
from layerwise.rows import contract
from layerwise.rows.layout import dense_layout

__all__ = ["DampedInverse", "ProjectedSolved", "Solved", "diagonal_blocks", "of_rank"]

_SHARE = 0.1  # of a block's mean eigenvalue: the damping where none is given
_ELEMENTS = 2**22  # of gradients in memory at once


class DampedInverse:
    """`(G + λ I)⁻¹` of each block of an `EigenKronecker`; None for the identity, which is not damped.

    damping: λ in the units of G; None: for each block a tenth of its mean eigenvalue (Grosse et al. 2023, appendix).
    """

    def __init__(self, curvature: EigenKronecker | None, damping: float | None) -> None:
        if damping is not None:
            check_damping("Influence", damping)
        self.curvature, self.damping = curvature, damping

    @cached_property
    def _operator(self) -> EigenKronecker:
        assert self.curvature is not None
        inverses: dict[str, EigenBlock] = {}
        for key, block in self.curvature.blocks.items():
            damping = _SHARE * float(block.spectrum.mean()) if self.damping is None else self.damping
            inverses |= EigenKronecker({key: block}).inverse(damping).blocks
        return EigenKronecker(inverses)

    @cached_property
    def _blocks(self) -> dict[str, list[EigenBlock]]:
        found: dict[str, list[EigenBlock]] = {}
        for key, block in self._operator.blocks.items():
            found.setdefault(block.parameter or key, []).append(block)
        return found

    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The product with a tensor of each parameter's shape, by name; raises BadInput as the operators do."""
        return dict(other) if self.curvature is None else self._operator @ other

    def spectrum(self, name: str) -> Tensor:
        """The eigenvalues 1 / (σ + λ) of the one block of a parameter, `[K,O,I]`."""
        return self._blocks[name][0].spectrum

    def solve(self, gradient: ParameterGradient) -> Tensor:
        """The product with every sample's gradient, `[N,*shape]`; zero for a parameter without curvature."""
        if self.curvature is None:
            return gradient.rows()[0]
        n, dtype = gradient.parts[0].size[1], gradient.like.dtype
        each = [
            block.fold(block.rotate_back(w * block.spectrum).to(dtype)) for block, w in self._rotated(gradient, 0, n)
        ]
        return reduce(torch.add, each) if each else gradient.like.new_zeros(n, *gradient.shape)

    def norm(self, gradient: ParameterGradient) -> Tensor:
        """<g_n, (G + λ I)⁻¹ g_n> of every sample, `[N]`, from the gradients of a few samples at a time."""
        if self.curvature is None:
            return gradient.squared_norm()[0]
        n = gradient.parts[0].size[1]
        found = gradient.like.new_zeros(n)
        step = max(1, _ELEMENTS // max(1, gradient.shape.numel()))
        for low in range(0, n, step):
            for block, w in self._rotated(gradient, low, low + step):
                found[low : low + step] += w.square().flatten(1) @ block.spectrum.flatten()
        return found

    def _rotated(self, gradient: ParameterGradient, low: int, high: int) -> Iterator[tuple[EigenBlock, Tensor]]:
        """For each block of the inverse, gradients of some samples in its eigenbasis, `[n,K,O,I]`."""
        blocks, groups = self._blocks.get(gradient.name, []), gradient.groups or []
        if [part.layout() for part in groups] == [b.layout for b in blocks] and all(map(_rows_first, groups, blocks)):
            for part, block in zip(groups, blocks, strict=True):
                yield block, contract.per_sample(rotated_rows(contract.narrow(part.rows, low, high - low), block))[0]
            return
        dense = gradient.per_sample(low, high)[0]
        for block in blocks:
            yield block, block.rotate(block.matrix(dense).to(block.like.dtype))


def _rows_first(part: RowsPart, block: EigenBlock) -> bool:
    """Whether rotating the inputs and cotangents of a sample takes fewer operations than rotating its gradient."""
    _, o, i = block.size
    return part.rows.g.shape[2] * (o * o + i * i) < o * i * (o + i)


def diagonal_blocks(entries: Mapping[str, Tensor]) -> EigenKronecker:
    """A diagonal matrix over named parameters as blocks whose basis is the identity."""
    blocks = {}
    for name, entry in entries.items():
        laid = dense_layout(entry.shape)
        blocks[name] = EigenBlock(None, None, laid.matrix(entry), laid)
    return EigenKronecker(blocks)


def of_rank(vectors: Tensor, rank: int | None) -> Direction:
    """Vectors `[Q, *shape]` as factors of their best approximations of a rank (None: as they are, exact).

    Each is the matrix `[first axis, rest]`; its leading singular vectors come from the product of its shorter side with
    itself. Where that side has no more than `rank` rows nothing is gained: they stay whole.
    """
    m = vectors.reshape(len(vectors), vectors.shape[1] if vectors.dim() > 1 else 1, -1)
    if rank is None or min(m.shape[1:]) <= rank:
        return (vectors,)
    turned = m.shape[1] > m.shape[2]
    m = m.mT if turned else m
    short = torch.linalg.eigh(m @ m.mT)[1][..., -rank:].mT
    return (short @ m, short) if turned else (short, short @ m)


class Solved(SampleQuantity):
    """(G + λ I)⁻¹ g_n of every sample, `[N, *shape]`; as_norm: <g_n, (G + λ I)⁻¹ g_n>, `[N]`."""

    def __init__(self, inverse: DampedInverse, as_norm: bool = False) -> None:
        self._compute, self.powers = (inverse.norm, (2,)) if as_norm else (inverse.solve, (1,))

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, *shape]`, or `[N]`."""
        return (self._compute(gradient),)


class ProjectedSolved(Projections):
    """L v_n R^T of v_n = (G + λ I)⁻¹ g_n of every sample, `[N, P·Q]`, for L `[P,R]` and R `[Q,C]` by parameter.

    eigenvalues: `[P,Q]` of the inverse for parameters whose rows of L and R are its eigenvectors. There it is L g_n R^T
    times these, from rows apart, and neither g_n nor v_n is formed.
    """

    def __init__(
        self, inverse: DampedInverse, sides: Mapping[str, tuple[Tensor, Tensor]], eigenvalues: Mapping[str, Tensor]
    ) -> None:
        super().__init__(sides)
        self._inverse, self.eigenvalues = inverse, eigenvalues

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, P·Q]`."""
        if (values := self.eigenvalues.get(gradient.name)) is not None:
            return (super().compute(gradient)[0] * values.flatten().to(gradient.like),)
        v = self._inverse.solve(gradient)
        left, right = (side.to(v) for side in self.sides[gradient.name])
        return ((left @ v.reshape(len(v), left.shape[1], right.shape[1]) @ right.T).flatten(1),)
