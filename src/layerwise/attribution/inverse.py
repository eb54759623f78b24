"""The damped inverse of a curvature that is diagonal in a Kronecker basis, applied to stacks of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from layerwise.gradient.parameter import ParameterGradient
from layerwise.operators import EigenBlock, EigenKronecker
from layerwise.operators.diagonal import check_damping
from layerwise.quantities.inner_products import SampleQuantity
from layerwise.rows.layout import dense_layout

__all__ = ["DampedInverse", "SelfProducts", "diagonal_blocks"]

_SHARE = 0.1  # of a block's mean eigenvalue: the damping where none is given


class DampedInverse:
    """`(G + λ I)⁻¹` of each block of an `EigenKronecker`; None for the identity, which is not damped.

    damping: λ in the units of G; None: for each block a tenth of its mean eigenvalue (Grosse et al. 2023, appendix).
    """

    def __init__(self, curvature: EigenKronecker | None, damping: float | None) -> None:
        if damping is not None:
            check_damping("Influence", damping)
        self.curvature, self.damping = curvature, damping

    @cached_property
    def _blocks(self) -> dict[str, list[EigenBlock]]:
        assert self.curvature is not None
        found: dict[str, list[EigenBlock]] = {}
        for key, block in self.curvature.blocks.items():
            damping = _SHARE * float(block.spectrum.mean()) if self.damping is None else self.damping
            inverse = EigenKronecker({key: block}).inverse(damping).blocks[key]
            found.setdefault(block.parameter or key, []).append(inverse)
        return found

    def solve(self, name: str, gradients: Tensor) -> Tensor:
        """The product with gradients `[M,*shape]` of one parameter, `[M,*shape]`; zero for one without curvature."""
        if self.curvature is None:
            return gradients
        total = torch.zeros_like(gradients)
        for block in self._blocks.get(name, ()):
            w = (
                torch.stack([block.matrix(g) for g in gradients])
                if len(gradients)
                else gradients.reshape(0, *block.size)
            )
            total = total + block.fold(block.apply(w.to(block.like.dtype)).to(gradients.dtype))
        return total


def diagonal_blocks(entries: Mapping[str, Tensor]) -> EigenKronecker:
    """A diagonal matrix over named parameters as blocks whose basis is the identity."""
    blocks = {}
    for name, entry in entries.items():
        laid = dense_layout(entry.shape)
        blocks[name] = EigenBlock(None, None, laid.matrix(entry), laid)
    return EigenKronecker(blocks)


class SelfProducts(SampleQuantity):
    """<g_n, (G + λ I)⁻¹ g_n> of every sample, `[N]`, from the gradients of a few samples at a time."""

    powers = (2,)

    def __init__(self, inverse: DampedInverse) -> None:
        self.inverse = inverse

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N]`."""
        if self.inverse.curvature is None:
            return (gradient.squared_norm()[0],)
        found = [(g[0] * self.inverse.solve(gradient.name, g[0])).flatten(1).sum(1) for g in gradient.chunks()]
        return (torch.cat(found),)
