"""Cross entropy: a softmax over classes, with class weights, ignored rows, smoothing and soft targets.

Every variant has the term `-Σ_c m_c log p_c` with `p = softmax(z)` and target masses m; M = Σ_c m_c:

    ∇ = M p - m,    ∇² = M (diag p - p pᵀ)

Class indices y: `m = α_y (1-ε) e_y + (ε/C) α`, with class weights α and label smoothing ε; the mean
divides by the sum of α_y over rows that are not ignored. Class probabilities q: `m = α ∘ ((1-ε) q + ε/C)`;
the mean divides by the number of rows.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .base import FirstOrder, Likelihood, _wide, number
from .call import LossCall

__all__ = ["Softmax", "softmax"]


class _Masses:
    """Target masses m of every term before scaling by reduction and c.

    total: M, `[*term_shape]`; terms: the mean's denominator. Class indices are never made one-hot.
    """

    def __init__(self, call: LossCall, dtype: torch.dtype) -> None:
        self.axis = axis = call.class_axis if call.class_axis is not None else 0
        self.classes = classes = call.logits.shape[axis]
        self.smoothing = float(call.options.get("label_smoothing", 0.0))
        alpha = call.options["weight"]
        self.alpha = None if alpha is None else alpha.to(dtype)
        self._call, self.hard = call, not call.soft
        if call.soft:
            m = call.target.to(dtype) * (1 - self.smoothing) + self.smoothing / classes
            self.soft = m if self.alpha is None else m * self._along_classes(self.alpha, m.dim())
            self.total = self.soft.sum(axis)
            self.terms: float | Tensor = float(self.total.numel())
            return
        kept = call.target != call.options["ignore_index"]
        self.kept = kept.to(dtype)
        row = self.kept if self.alpha is None else self.alpha[self.index] * self.kept
        counts_all = self.alpha is None and not _may_ignore(call)
        self.terms = float(row.numel()) if counts_all else number(row.sum())
        self.on_label = row * (1 - self.smoothing) if self.smoothing else row
        self.total = self.on_label
        if self.smoothing:
            weight = float(classes) if self.alpha is None else self.alpha.sum()
            self.total = self.total + self.kept * (self.smoothing / classes * weight)

    @cached_property
    def index(self) -> Tensor:
        """The classes; 0 where the target is ignored."""
        target = self._call.target
        return target.long().masked_fill(target == self._call.options["ignore_index"], 0)

    def subtract(self, g: Tensor, scale: Tensor) -> Tensor:
        """`g - scale m`, in place; g `[*S]`, scale 0-dimensional or `[*term_shape]`."""
        if not self.hard:
            return g.sub_((scale.unsqueeze(self.axis) if scale.dim() else scale) * self.soft)
        on_label = (scale * self.on_label).unsqueeze(self.axis)
        g.scatter_add_(self.axis, self.index.unsqueeze(self.axis), -on_label)
        if self.smoothing:
            spread = (scale * self.kept * (self.smoothing / self.classes)).unsqueeze(self.axis)
            g.sub_(spread if self.alpha is None else spread * self._along_classes(self.alpha, g.dim()))
        return g

    def _along_classes(self, alpha: Tensor, dim: int) -> Tensor:
        return alpha.reshape([-1 if axis == self.axis else 1 for axis in range(dim)])


def _may_ignore(call: LossCall) -> bool:
    """Whether a target may be ignored; on an accelerator without a look at them."""
    if call.target.device.type != "cpu":
        return True
    low, high = call.class_range
    return low <= int(call.options["ignore_index"]) <= high


class Softmax(Likelihood):
    """Categorical likelihood: each term is one softmax over the class axis."""

    link = "softmax"
    canonical = True

    def __init__(self, call: LossCall, logits: Tensor, c: Tensor | float, masses: _Masses) -> None:
        super().__init__(call, logits, c, masses.terms)
        self.class_axis = self._axis = masses.axis
        self.columns = max(masses.classes - 1, 0)
        self._masses = masses

    @cached_property
    def _weight(self) -> Tensor:
        return (self._scale * self._masses.total).unsqueeze(self._axis)

    @cached_property
    def _p(self) -> Tensor:
        return torch.softmax(self._z, self._axis)

    def _gradient(self) -> Tensor:
        return self._masses.subtract(self._weight * self._p, self._scale)

    def _product(self, v: Tensor) -> Tensor:
        pv = self._p * v
        return self._weight * (pv - self._p * pv.sum(self._axis - self._p.dim(), keepdim=True))

    def _root(self, start: int, stop: int) -> Tensor:
        # diag p - p pᵀ = D (I - u uᵀ) D with u = sqrt(p) of norm 1 and D = diag u. The Householder
        # reflection Q = I - v vᵀ / (1 + u_k), v = u + e_k, maps e_k to -u, so its other columns q_j span the
        # complement of u, and s_j = u ∘ q_j = u_j e_j - u_j / (1 + u_k) (p + u_k e_k), j ≠ k, is a root of
        # C - 1 columns. With k the likeliest class no entry suffers cancellation, however sure the model is.
        k, u, reflected = self._pivot
        j = torch.arange(start, stop, device=k.device).reshape([-1] + [1] * k.dim())
        # Class k has no column: at j = k is the column of the last class.
        j = torch.where(j == k, self.columns, j)
        f = self._sqrt_weight * u.expand(j.shape[0], *u.shape).gather(self._axis + 1, j)
        return (f * reflected).scatter_add_(self._axis + 1, j, f)

    def _sample(self, draws: int, generator: torch.Generator | None) -> Tensor:
        # The score of the label y is p - e_y, with covariance diag p - p pᵀ.
        factor = self._sqrt_weight / draws**0.5
        p = self._p.movedim(self._axis, -1)
        y = torch.multinomial(p.reshape(-1, p.shape[-1]), draws, replacement=True, generator=generator)
        y = y.T.reshape(draws, *p.shape[:-1]).unsqueeze(self._axis + 1)
        s = (factor * self._p).repeat(draws, *[1] * self._p.dim())
        return s.scatter_add_(self._axis + 1, y, -factor.expand(y.shape))

    def class_root(self) -> Tensor:
        """`[C, *S]`."""
        p, dim = self._p, self._p.dim()
        e = torch.eye(p.shape[self._axis], dtype=p.dtype, device=p.device)
        e = e.reshape([len(e)] + [-1 if axis == self._axis else 1 for axis in range(dim)])
        u = (self._sqrt_weight * p.sqrt()).movedim(self._axis, 0).unsqueeze(self._axis + 1)
        return self._out(u * (e - p))

    def counting(self) -> Tensor | None:
        """Bool `[*S]` with one class, or None; without weights the number of terms tells, at no cost."""
        masses = self._masses
        terms = masses.terms
        counts_all = isinstance(terms, float) and terms == masses.total.numel()
        if masses.hard and masses.alpha is None and not self._scale.dim() and counts_all:
            return None
        return self._weight != 0

    def weights(self) -> Tensor | None:
        """One for all terms without class weights and ignored targets."""
        return self._weight

    @cached_property
    def _sqrt_weight(self) -> Tensor:
        self._check_weights(self._weight, self._p.sum())
        return self._weight.sqrt()

    @cached_property
    def _pivot(self) -> tuple[Tensor, Tensor, Tensor]:
        """Likeliest class k, u = sqrt(p), and -(p + u_k e_k) / (1 + u_k)."""
        k = self._p.argmax(self._axis, keepdim=True)
        u = self._p.sqrt()
        u_k = u.gather(self._axis, k)
        return k, u, self._p.scatter_add(self._axis, k, u_k).div_(-1 - u_k)


def softmax(call: LossCall, logits: Tensor, c: Tensor | float) -> Likelihood:
    """Likelihood of `cross_entropy`, and of `nll_loss` of a `log_softmax`."""
    z = _wide(logits)
    masses = _Masses(call, z.dtype)
    if call.name == "cross_entropy" or call.log_softmax:
        return Softmax(call, logits, c, masses)
    one = torch.ones((), dtype=z.dtype, device=z.device)
    return FirstOrder(
        call,
        logits,
        c,
        masses.terms,
        masses.subtract(torch.zeros_like(z), one),
        "it is linear in its input, and no log_softmax over its class axis was seen to make this input, so "
        "only its gradient is known; use cross_entropy, or nll_loss(log_softmax(z, dim=1)).",
    )
