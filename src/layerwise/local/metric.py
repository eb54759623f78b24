"""Metrics: inner products of a layer's weights that come from its inputs, and the coordinates in which they are plain.

Weight and bias are one matrix `[W b]`, `[K,O,I']`, with the bias as one more input that is always 1. In the metric
`⟨V, W⟩ = tr(V M Wᵀ)` the gradient is `G M⁻¹`, and in the coordinates `W' = W M^{1/2}`, `a' = M^{-1/2} a` it is plain,
with the same outputs `W' a' = W a`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from layerwise.errors import NonFinite
from layerwise.operators.ridge import inverse
from layerwise.tensors import is_finite

__all__ = ["Metric", "joined_columns", "second_moment"]

Pair = tuple[Tensor, Tensor | None]


def second_moment(a: Tensor, size_in: int, bias: bool, like: Tensor) -> Tensor:
    """`A = (1/R) Σ_r a_r a_rᵀ`, `[K,I',I']`; of looked-up rows its diagonal `[1,I]`, how often each was, over R.

    a: `[R,K,I]`, or int64 `[R]`. bias: whether a 1 is one more input.
    """
    if not a.is_floating_point():
        return torch.bincount(a, minlength=size_in).to(like.dtype).div_(len(a)).unsqueeze(0)
    rows = a.transpose(0, 1)
    rows = torch.cat((rows, rows.new_ones(*rows.shape[:-1], 1)), -1) if bias else rows
    return (rows.mT @ rows).div_(len(a))


def joined_columns(weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[W b]`, `[K,O,I']`."""
    return weight if bias is None else torch.cat((weight, bias.unsqueeze(-1)), -1)


@dataclass(frozen=True)
class Metric:
    """`M = A + λ tr(A)/I' I` by group, of a running second moment A of a layer's inputs.

    second: A, `[K,I',I']`; or `[1,I]`, the diagonal of a looked-up table's, whose bias has the metric 1.
    Where M is zero, as for inputs that are, so are its inverse and its roots.
    """

    second: Tensor
    damping: float

    @property
    def diagonal(self) -> bool:
        """Whether A is a table's."""
        return self.second.dim() == 2

    def fits(self, shape: torch.Size, bias: bool) -> bool:
        """Whether it is one of weights `[K,O,I]`, with a bias or without."""
        k, _, i = shape
        return tuple(self.second.shape) == ((k, i) if self.diagonal else (k, i + bias, i + bias))

    @cached_property
    def _damped(self) -> Tensor:
        """M, or the diagonal of a table's."""
        if self.diagonal:
            return self.second + self.damping * self.second.mean(-1, keepdim=True)
        found = self.second.clone()
        found.diagonal(dim1=-2, dim2=-1).add_(self._extra.unsqueeze(-1))
        return found

    @property
    def _extra(self) -> Tensor:
        return self.damping * self.second.diagonal(dim1=-2, dim2=-1).mean(-1)

    @cached_property
    def _inverse(self) -> Tensor:
        return _powers(self._damped, -1.0) if self.diagonal else inverse(self.second, self._extra)

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        """`M^{1/2}` and `M^{-1/2}`, symmetric. Raises NonFinite where M is not finite."""
        if not is_finite(self._damped):
            raise NonFinite("the second moment of the layer's inputs holds NaN or infinity")
        if self.diagonal:
            return self._damped.sqrt(), _powers(self._damped, -0.5)
        values, basis = torch.linalg.eigh(self._damped)
        found = (values.clamp_min(0).sqrt(), _powers(values, -0.5))
        return (basis * found[0].unsqueeze(-2)) @ basis.mT, (basis * found[1].unsqueeze(-2)) @ basis.mT

    def raised(self, weight: Tensor, bias: Tensor | None) -> Pair:
        """`[W b] M⁻¹`: the gradient in the metric, of partial derivatives."""
        return self._times(self._inverse, weight, bias)

    def raise_(self, dw: Tensor, db: Tensor | None) -> None:
        """Replace the partial derivatives of a fit by its gradient in the metric, in place.

        Of quadratic terms, whose norms are the metric's too, that is what it is without one.
        """
        for kept, raised in zip((dw, db), self.raised(dw, db), strict=True):
            if kept is not None and raised is not None:
                kept.copy_(raised)

    def raised_rows(self, rows: Tensor, bias: bool) -> Pair:
        """`M⁻¹ [a 1]` of inputs `[...,R,I]`, without its last column and that: `Σ_r δ_r (M⁻¹ [a_r 1])ᵀ` is `G M⁻¹`."""
        right = self._inverse if rows.dim() > 2 else self._inverse[0]
        if not bias:
            return rows @ right, None
        found = rows @ right[..., :-1, :] + right[..., -1:, :]
        return found[..., :-1], found[..., -1]

    def lowered(self, weight: Tensor, bias: Tensor | None) -> Pair:
        """`[W b] M`: whose inner product with `V` is `⟨V, [W b]⟩` in the metric."""
        return self._times(self._damped, weight, bias)

    def white(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[W b] M^{1/2}`, `[K,O,I']`: weights in the coordinates of the metric."""
        return joined_columns(*self._times(self._roots[0], weight, bias))

    def white_rows(self, rows: Tensor) -> Tensor:
        """`M^{-1/2} a` of inputs with ones, `[K,R,I']`."""
        if not self.diagonal:
            return rows @ self._roots[1]
        return rows * torch.nn.functional.pad(self._roots[1], (0, rows.shape[-1] - self.second.shape[-1]), value=1.0)

    def plain(self, matrix: Tensor, bias: bool) -> Pair:
        """`[W b]` from `[W b] M^{1/2}`, as weight and bias."""
        pair = (matrix[..., :-1], matrix[..., -1]) if bias else (matrix, None)
        return self._times(self._roots[1], *pair)

    def _times(self, right: Tensor, weight: Tensor, bias: Tensor | None) -> Pair:
        if self.diagonal:
            return weight * right.unsqueeze(-2), bias
        found = joined_columns(weight, bias) @ right
        return (found, None) if bias is None else (found[..., :-1], found[..., -1])


def _powers(values: Tensor, power: float) -> Tensor:
    """Powers of numbers above rounding, 0 of the others."""
    floor = values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    return torch.where(values > floor.clamp_min(0), values.clamp_min(torch.finfo(values.dtype).tiny).pow(power), 0)
