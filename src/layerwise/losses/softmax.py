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

_BLOCK = 64  # classes of a block, from which one is drawn


class _Masses:
    """Target masses m of every term before scaling by reduction and c.

    total: M, `[*term_shape]`; terms: the mean's denominator; uniform: whether M is 1 for all terms, as is known without
    a look at each. Class indices are never made one-hot.
    """

    uniform = False

    def __init__(self, call: LossCall, dtype: torch.dtype) -> None:
        self.axis = axis = call.class_axis if call.class_axis is not None else 0
        self.classes = classes = call.logits.shape[axis]
        self.smoothing = float(call.options.get("label_smoothing", 0.0))
        alpha = call.options["weight"]
        self.alpha = None if alpha is None else alpha.to(dtype)
        self._call, self._dtype, self.hard = call, dtype, not call.soft
        if call.soft:
            m = call.target.to(dtype) * (1 - self.smoothing) + self.smoothing / classes
            self.soft = m if self.alpha is None else m * self._along_classes(self.alpha, m.dim())
            self.terms: float | Tensor = float(call.term_shape.numel())
            return
        counts_all = self.alpha is None and not _may_ignore(call)
        self.terms = float(call.target.numel()) if counts_all else number(self._row.sum())
        self.uniform = counts_all and not self.smoothing

    @cached_property
    def kept(self) -> Tensor:
        """1 for a term that is not ignored, else 0."""
        return (self._call.target != self._call.options["ignore_index"]).to(self._dtype)

    @cached_property
    def _row(self) -> Tensor:
        return self.kept if self.alpha is None else self.alpha[self.index] * self.kept

    @cached_property
    def on_label(self) -> Tensor:
        """The mass on the label."""
        return self._row * (1 - self.smoothing) if self.smoothing else self._row

    @cached_property
    def total(self) -> Tensor:
        """M."""
        if not self.hard:
            return self.soft.sum(self.axis)
        if not self.smoothing:
            return self.on_label
        weight = float(self.classes) if self.alpha is None else self.alpha.sum()
        return self.on_label + self.kept * (self.smoothing / self.classes * weight)

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
        y = _drawn(p.reshape(-1, p.shape[-1]), draws, generator)
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
        uniform = self._masses.uniform and not self._scale.dim()
        return self._scale if uniform else self._weight

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


def _drawn(p: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """Classes drawn with probabilities p `[R,C]`, int64 `[R,draws]`.

    Of many classes a block is drawn first, by the sums of all blocks, and then a class of the block, for on the CPU
    `torch.multinomial` draws a random number for each class. Sums are in double precision, where the device has it,
    since single precision would round off a class out of 50,000. Where p holds NaN, which an accelerator tells later,
    any class is drawn.
    """
    rows, classes = p.shape
    if draws * _BLOCK >= classes:
        if draws == 1:  # what `torch.multinomial` does, which waits for a look at p
            q = torch.empty_like(p, memory_format=torch.contiguous_format).exponential_(1, generator=generator)
            return torch.div(p, q, out=q).argmax(1, keepdim=True)
        p = p if p.device.type == "cpu" else p.where(p >= 0, 1)
        return torch.multinomial(p, draws, replacement=True, generator=generator)
    dtype = torch.float32 if p.device.type == "mps" else torch.float64
    whole, rest = divmod(classes, _BLOCK)
    blocks = p[:, : whole * _BLOCK].reshape(rows, whole, _BLOCK).sum(2, dtype=dtype)
    if rest:
        blocks = torch.cat([blocks, p[:, -rest:].sum(1, keepdim=True, dtype=dtype)], 1)
    block = _first_beyond(blocks.cumsum(1), draws, generator)
    at = block.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK, device=p.device)
    inside = p.gather(1, at.clamp(max=classes - 1).flatten(1)).view(at.shape).to(dtype).where(at < classes, 0)
    found = block * _BLOCK + _first_beyond(inside.cumsum(2).flatten(0, 1), 1, generator).view(rows, draws)
    return found.clamp_(max=classes - 1)


def _first_beyond(sums: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
    """`[R,draws]`: the first places at which cumulative sums `[R,C]` exceed uniform shares of their last ones."""
    u = torch.rand(len(sums), draws, dtype=sums.dtype, device=sums.device, generator=generator)
    found = torch.searchsorted(sums, u.mul_(sums[:, -1:]), right=True)
    return found.clamp_(max=sums.shape[1] - 1)  # where a share is rounded up to the whole


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
