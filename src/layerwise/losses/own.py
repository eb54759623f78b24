"""The likelihood of a loss of the user's own, from blocks of its Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..errors import NonFinite, Undefined
from .base import Likelihood, _wide
from .mark import OwnCall

__all__ = ["DeclaredLikelihood", "OwnLikelihood"]

_MOST_ELEMENTS = 2**27  # of the blocks of a loss Hessian in memory at once
_STACK_ELEMENTS = 2**22  # of the columns multiplied by the loss Hessian at once


class DeclaredLikelihood(Likelihood):
    """A loss of the user's own before it is differentiated: its name, its reduction and the number of its terms.

    mean: None where `as_loss` was given no reduction.
    """

    def __init__(self, call: OwnCall, samples: int) -> None:
        self.call = str(call)
        self.logits = call.logits
        self.terms = float(samples)
        self.mean = None if call.reduction is None else call.reduction == "mean"


class OwnLikelihood(Likelihood):
    """A loss known by products with its Hessian, whose blocks lie along one axis of its outputs.

    Roots are eigenvectors times roots of eigenvalues of the blocks; they exist where the loss is convex in the
    outputs at this batch. `sample` draws a random sign for every root column and loss term.
    beside: the other parts of the total; where one of them is curved, a part without curvature has a root of zeros.
    """

    beside: Sequence[Likelihood] = ()

    def __init__(
        self,
        call: str,
        logits: Tensor,
        class_axis: int | None,
        gradient: Tensor,
        product: Callable[[Tensor], Tensor],
    ) -> None:
        self.call = call
        self.logits = logits
        self.class_axis = class_axis
        self.mean = None
        self.terms = 1.0
        self._slope = gradient
        self._apply = product

    @property
    def columns(self) -> int:  # type: ignore[override]
        """The rank of the largest block."""
        return len(self._columns)

    @property
    def curved(self) -> bool:
        """Whether the product with a random direction is not zero."""
        v = torch.rand(self.logits.shape, generator=torch.Generator().manual_seed(0)).to(self.logits)
        return bool((self._apply(v[None]) != 0).any())

    def _gradient(self) -> Tensor:
        return self._slope

    def _product(self, v: Tensor) -> Tensor:
        shape = v.shape
        return self._apply(v.reshape(-1, *self.logits.shape)).reshape(shape)

    def _root(self, start: int, stop: int) -> Tensor:
        return self._columns[start:stop].clone()

    def _sample(self, draws: int, generator: torch.Generator | None) -> Tensor:
        root, axis = self._columns, self.class_axis
        shape = [draws, *root.shape]
        if axis is not None:
            shape[axis + 2] = 1
        signs = torch.randint(2, shape, generator=generator, device=root.device).to(root.dtype)
        return (signs.mul_(2).sub_(1) * root).sum(1) / draws**0.5

    @cached_property
    def _columns(self) -> Tensor:
        """The root's columns, `[K, *S]`."""
        if self.class_axis is None:
            curvature = _wide(self._apply(torch.ones_like(self.logits)[None]))
            self._check(curvature, 1)
            return curvature.clamp(min=0).sqrt()
        blocks = self._blocks(self.class_axis)
        if not bool(torch.isfinite(blocks).all()):
            raise NonFinite(self._not_finite)
        values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
        tiny = self._check(values, blocks.shape[-1])
        kept = values.flatten(0, -2).amax(0) > tiny
        kept[-1:] = True  # of a part without curvature, a column of zeros
        root = vectors[..., kept] * values[..., kept].clamp(min=0).sqrt().unsqueeze(-2)
        return root.movedim(-1, 0).movedim(-1, self.class_axis + 1)

    def _blocks(self, axis: int) -> Tensor:
        """`[*terms, C, C]`."""
        shape = self.logits.shape
        size = shape[axis]
        if shape.numel() * size > _MOST_ELEMENTS:
            raise Undefined(
                f"{self.call}: its outputs are coupled in blocks of {size}, {shape.numel() // max(1, size)} of them, "
                f"more than {_MOST_ELEMENTS} numbers to take a root of; ask for products (GGN, Hessian), a smaller "
                "batch, or write the loss as a sum over positions"
            )
        columns = []
        for j in torch.arange(size, device=self.logits.device).split(max(1, _STACK_ELEMENTS // shape.numel())):
            unit = self.logits.new_zeros(len(j), *shape).movedim(axis + 1, 1)
            unit[torch.arange(len(j), device=j.device), j] = 1
            columns.append(_wide(self._apply(unit.movedim(1, axis + 1))))
        return torch.cat(columns).movedim(axis + 1, -1).movedim(0, -1)

    @property
    def _not_finite(self) -> str:
        return f"{self.call}: its Hessian holds NaN or infinity; look at the model's output and the loss"

    def _check(self, values: Tensor, size: int) -> float:
        """Raise where curvatures have no real roots; the size up to which one counts as zero."""
        low, high = (float(x) for x in torch.aminmax(values))
        if not math.isfinite(low) or not math.isfinite(high):
            raise NonFinite(self._not_finite)
        scale = max(-low, high)
        if scale == 0 and not any(other.curved for other in self.beside):
            raise Undefined(
                f"{self.call}: its second derivative in the outputs is zero everywhere (a piecewise linear loss?), so "
                "only its gradient is of use; take a smooth one such as huber_loss"
            )
        tiny = 16 * size * torch.finfo(self.logits.dtype).eps * scale
        if low < -64 * tiny:
            raise Undefined(
                f"{self.call}: it is not convex in the outputs (an eigenvalue of its Hessian there is {low:.3g}, the "
                f"largest {high:.3g}), so the generalized Gauss-Newton matrix has no real root; ask for quantities of "
                "the Hessian (DiagHessian, Hessian) or for products (GGN)"
            )
        return tiny
