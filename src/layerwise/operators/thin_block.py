"""The damped inverse of a Kronecker block, of which a large factor has low rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from layerwise.operators.kronecker import KroneckerBlock
from layerwise.operators.low_rank import ThinInverse, thin_inverse
from layerwise.operators.ridge import inverse

__all__ = ["ThinBlock", "has_factors", "thin_block"]

Side = ThinInverse | Tensor


class ThinBlock(KroneckerBlock):
    """`(B + βI)⁻¹ ⊗ (A + αI)⁻¹` of a single group, with a thin inverse in place of one factor or both.

    of: the block. right, left: the inverses of its A and B. The factors A and B of the inverse are made when they are
    first read, to be saved or sent; from then on products are taken with them, so that a run goes on with the bits of
    what it saved.
    """

    right: Side
    left: Side

    def __init__(self, of: KroneckerBlock, right: Side, left: Side) -> None:
        fields = {"layout": of.layout, "bias": of.bias, "form": of.form, "parameter": of.parameter}
        vars(self).update(fields, right=right, left=left)

    @property
    def size(self) -> torch.Size:
        """(K, O, I)."""
        sides = (side.shape[-1] if isinstance(side, Tensor) else len(side.thin) for side in (self.left, self.right))
        return torch.Size((1, *sides))

    @property
    def like(self) -> Tensor:
        """A tensor of the block's type, on its device."""
        return self.left if isinstance(self.left, Tensor) else self.left.thin

    @property
    def _is_dense(self) -> bool:
        """Whether both factors were read."""
        return {"A", "B"} <= vars(self).keys()

    @cached_property
    def A(self) -> Tensor:
        """The inverse of the input factor, `[1,I,I]`."""
        return _dense(self.right)

    @cached_property
    def B(self) -> Tensor:
        """The inverse of the output factor, `[1,O,O]`."""
        return _dense(self.left)

    def apply(self, w: Tensor) -> Tensor:
        """The block's product with `[..., 1,O,I]`."""
        if self._is_dense:
            return super().apply(w)
        w = self.left.after(w.mT).mT if isinstance(self.left, ThinInverse) else self.left @ w
        return self.right.after(w) if isinstance(self.right, ThinInverse) else w @ self.right

    def product(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's product with the tensors of the parameter and its bias."""
        if self._is_dense:
            return super().product(name, values)
        w = self.gather(name, values)
        return self.scatter(name, self.apply(w.to(self.like.dtype)).to(w.dtype))


def has_factors(block: KroneckerBlock) -> bool:
    """Whether both sides of a block are one matrix, of which `thin_block` looks for a root."""
    return block.A is not None and block.A.ndim == 3 and block.B.ndim == 3 and len(block.B) == 1


def thin_block(block: KroneckerBlock, damping: float, balanced: bool) -> ThinBlock | None:
    """The damped inverse of a block, as of `KroneckerBlock.inverse`; None where no factor is large and of low rank.

    Raises as `inverse`.
    """
    if not has_factors(block):
        return None
    assert block.A is not None
    extra_a, extra_b = block.dampings(damping, balanced)
    right, left = thin_inverse(block.A[0], extra_a[0]), thin_inverse(block.B[0], extra_b[0])
    if right is None and left is None:
        return None
    return ThinBlock(
        block, inverse(block.A, extra_a, math.inf) if right is None else right,
        inverse(block.B, extra_b, math.inf) if left is None else left,
    )  # fmt: skip


def _dense(side: Side) -> Tensor:
    return side if isinstance(side, Tensor) else side.dense()[None]
