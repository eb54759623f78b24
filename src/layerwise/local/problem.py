"""One layer's local problem: fit its outputs to targets, with its inputs frozen.

    min over W, b of   Σ_r D(W a_r + b, target_r) + Σ_j c_j/2 (‖W − C_j‖² + ‖b − d_j‖²),     W, b in a norm ball

The layer is a grouped linear map on rows, `Z[r,k,o] = Σ_i W[k,o,i] A[r,k,i] + b[k,o]`, where the rows `r`
are samples times positions. With `G = ∂L/∂Z` of the batch loss L as written, sums over rows are sums
over the batch, and the first local gradient is `γ·∂L/∂W` for every transfer function.
Source: Amid, Anil and Warmuth, "LocoProp" (2022), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.metric import Metric
from layerwise.local.norms import NormBall
from layerwise.local.transfer import IDENTITY, Transfer

__all__ = [
    "Clip", "LocalProblem", "Pull", "PulledTensor", "Term", "contract", "local_gradient", "local_loss", "predict",
    "product", "pull_gradient", "pulled", "refuse_terms", "split_terms", "target_m",
]  # fmt: skip

Clip = Literal["range", "bounded"] | None


@dataclass(frozen=True)
class Pull:
    """One quadratic term of a local problem, `strength/2 (‖W − weight‖² + ‖b − bias‖²)`.

    weight `[K,O,I]` and bias `[K,O]` are the centre; None stands for the starting weights. Raises BadInput for a
    strength that is negative, or no finite number.
    """

    strength: float
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise BadInput(f"a term strength/2 ‖W − centre‖² needs a finite strength ≥ 0: got {self.strength}")


Term = Pull | NormBall | Metric


def split_terms(terms: Sequence[Term]) -> tuple[tuple[Pull, ...], NormBall | None, Metric | None]:
    """The quadratic terms, the norm ball or None, and the metric or None. Raises BadInput for several of either."""
    balls = [term for term in terms if isinstance(term, NormBall)]
    metrics = [term for term in terms if isinstance(term, Metric)]
    if len(balls) > 1:
        raise BadInput(f"a layer's weights can be kept in one norm ball, as two have no common vertices; got {balls}")
    if len(metrics) > 1:
        raise BadInput(f"a layer's weights are measured in one metric; got {len(metrics)} Whitening regularizers")
    pulls = tuple(term for term in terms if isinstance(term, Pull))
    return pulls, balls[0] if balls else None, metrics[0] if metrics else None


@dataclass(frozen=True)
class LocalProblem:
    """The inputs, targets and loss of one layer, and the weights to start from.

    a: `[R,K,I]` input rows; or int64 `[R]`, indices of one-hot rows (a table that is looked up, K = 1).
    weight: `[K,O,I]`; bias: `[K,O]` or None. target: `[R,K,O]`.
    transfer: the identity gives the squared loss `½‖z − y‖²` of LocoProp-S, the layer's own transfer
    function the matching loss `F(z) − y·z` of LocoProp-M.
    prox: η of the proximal term `(‖W − W₀‖² + ‖b − b₀‖²)/2η`, or None for no such term. pulls: further quadratic terms.
    ball: a norm ball that W and b stay in, or None; its centre may be W₀, b₀.
    metric: what all norms of the terms are measured in, or None; `whitened` makes a problem without one.
    g, gamma: where the targets came from a backward pass, its cotangent `[R,K,O]` and γ, so that
    `f(z) − target = γ g` at the starting weights; the first step then needs no forward product.
    Leave `g` out where targets were clipped. rest: `[R,K,O]`, constant terms of the output, `z = W a + b + rest` (a
    frozen bias), or None. `weight` and `bias` may be views of parameters, which in-place solvers change. Raises
    BadInput where shapes do not fit.
    """

    a: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    transfer: Transfer = IDENTITY
    prox: float | None = None
    g: Tensor | None = None
    gamma: float = 1.0
    rest: Tensor | None = None
    pulls: tuple[Pull, ...] = ()
    ball: NormBall | None = None
    metric: Metric | None = None

    @property
    def indexed(self) -> bool:
        """Whether the input rows are given as indices."""
        return not self.a.is_floating_point()

    @property
    def stiffness(self) -> float:
        """The curvature `1/η + Σ_j c_j` of the quadratic terms."""
        return sum((pull.strength for pull in self.pulls), 0.0 if self.prox is None else 1 / self.prox)

    def __post_init__(self) -> None:
        k, o, i = self.weight.shape if self.weight.dim() == 3 else (-1, -1, -1)
        r = self.a.shape[0]
        out = (r, k, o)
        fits = (
            self.a.shape == ((r,) if self.indexed and k == 1 else (r, k, i))
            and self.target.shape == out
            and (self.bias is None or self.bias.shape == (k, o))
            and (self.g is None or self.g.shape == out)
            and (self.rest is None or self.rest.shape == out)
        )
        if not fits:
            seen = {name: tuple(t.shape) for name in ("a", "weight", "bias", "target", "g", "rest")
                    if (t := getattr(self, name)) is not None}  # fmt: skip
            raise BadInput(
                f"a local problem needs a [R,K,I], weight [K,O,I], bias [K,O], target, g and rest [R,K,O]: got {seen}"
            )
        if r == 0:
            raise BadInput("a local problem needs at least one row: got an empty batch")
        if self.metric is not None and not self.metric.fits(self.weight.shape, self.bias is not None):
            raise BadInput(
                f"a metric of {tuple(self.metric.second.shape)} is none of weights {tuple(self.weight.shape)}"
            )
        if self.prox is not None and not self.prox > 0:
            raise BadInput(f"the proximal term ‖W − W₀‖²/2η needs η > 0, or None for no term: got {self.prox}")


def refuse_terms(problem: LocalProblem, asker: str, balls: bool = False) -> None:
    """Raise BadInput for a problem in a metric, or within a norm ball, in the name of a function that knows none.

    balls: whether it knows balls.
    """
    if problem.metric is not None:
        raise BadInput(
            f"{asker} knows no metric of the inputs, such as the regularizer Whitening gives: leave that out, choose "
            "another solver, or give it whitened(problem)[0]"
        )
    if problem.ball is not None and not balls:
        raise BadInput(
            f"{asker} knows quadratic terms alone, and this problem is kept in a norm ball, {problem.ball}: "
            "use ConditionalGradient or LocalSteps"
        )


def target_m(
    z: Tensor, g: Tensor, gamma: float, transfer: Transfer, clip: Clip = None, y: Tensor | None = None
) -> Tensor:
    """LocoProp-M's targets after the transfer function, `f(z) − γ g`; of the identity, LocoProp-S's `z − γ g`.

    All shapes `[R,K,O]`. y: `f(z)`, where the forward pass has it already. Raises BadInput for an unknown clip.
    A target outside the closed range of f leaves the local problem unbounded below: the gradient of a tanh unit with
    target 1.2 is at least 0.2 everywhere. Clipping weakens the first local gradient below γ·backprop, and a few small
    steps cannot drift far, so it is off by default, as in the published settings.
    clip="bounded" projects on ranges bounded on both sides (tanh, sigmoid, softmax's simplex): for problems solved far
    without a proximal term. clip="range" projects ReLU's targets too, whose negative part switches active units off.
    """
    target = torch.add(transfer.f(z) if y is None else y, g, alpha=-gamma)
    if clip is None:
        return target
    if clip not in ("range", "bounded"):
        raise BadInput(f'clip={clip!r} is unknown: use "range", "bounded" or None')
    two_sided = transfer.low > float("-inf") and transfer.high < float("inf")
    return transfer.project(target) if two_sided or clip == "range" else target


def product(a: Tensor, weight: Tensor) -> Tensor:
    """`Σ_i W[k,o,i] a[r,k,i]`, `[R,K,O]`."""
    return torch.einsum("rki,koi->rko", a, weight) if a.is_floating_point() else weight.mT[:, a].transpose(0, 1)


def contract(delta: Tensor, a: Tensor, size_in: int) -> Tensor:
    """`Σ_r δ[r,k,o] a[r,k,i]`, `[K,O,I]`: the adjoint of `product`."""
    if a.is_floating_point():
        return torch.einsum("rko,rki->koi", delta, a)
    return delta.new_zeros(size_in, delta.shape[-1]).index_add_(0, a, delta[:, 0]).t().unsqueeze(0)


def predict(problem: LocalProblem, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The layer's outputs before the transfer function, `[R,K,O]`, at given or starting weights."""
    weight = problem.weight if weight is None else weight
    bias = problem.bias if bias is None else bias
    z = product(problem.a, weight)
    z = z if bias is None else z + bias
    return z if problem.rest is None else z + problem.rest


def local_loss(problem: LocalProblem, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The local objective at given weights, a scalar, by its definition: the oracle of the solvers.

        Σ_r [F(z_r) − y_r·z_r] + Σ_j c_j/2 (‖W − C_j‖² + ‖b − d_j‖²)        (summed over rows, divided by nothing)

    The term F*(y), constant in the weights, is left out: it is infinite for a target out of range. So is a norm ball:
    the loss is that of weights within it. Raises BadInput for a problem in a metric.
    """
    refuse_terms(problem, "local_loss", balls=True)
    loss = problem.transfer.matching(predict(problem, weight, bias), problem.target).sum()
    pulls = problem.pulls if problem.prox is None else (Pull(1 / problem.prox), *problem.pulls)
    for pull in pulls:
        for new, old, centre in ((weight, problem.weight, pull.weight), (bias, problem.bias, pull.bias)):
            at, around = old if new is None else new, old if centre is None else centre
            if at is not None and around is not None:
                loss = loss + (at - around).square().sum() * (pull.strength / 2)
    return loss


def pull_gradient(problem: LocalProblem) -> tuple[Tensor, Tensor | None] | None:
    """The gradient `Σ_j c_j (W₀ − C_j)` of the quadratic terms at the starting weights; None where it is zero."""
    if not problem.pulls:
        return None
    found: list[Tensor | None] = []
    for start, centres in (
        (problem.weight, [(p.strength, p.weight) for p in problem.pulls]),
        (problem.bias, [(p.strength, p.bias) for p in problem.pulls]),
    ):
        terms = [c * (start - centre) for c, centre in centres if start is not None and centre is not None]
        found.append(torch.stack(terms).sum(0) if terms else None)
    dw, db = found
    if dw is None and db is None:
        return None
    dw = torch.zeros_like(problem.weight) if dw is None else dw
    return dw, torch.zeros_like(problem.bias) if db is None and problem.bias is not None else db


class PulledTensor(NamedTuple):
    """The quadratic terms `Σ_j c_j/2 ‖w − C_j‖²` of a weight or a bias w that moves.

    start: w before it moved, which the terms without a centre of their own are around, or None without such terms.
    """

    gradient: Tensor
    now: Tensor
    start: Tensor | None
    to_start: float
    centres: Sequence[tuple[float, Tensor]]

    def add_gradient(self, at_start: bool) -> None:
        """Add `Σ_j c_j (w − C_j)` to the gradient; terms around the start are exactly zero there."""
        start = None if at_start else self.start
        if held := sum((c for c, _ in self.centres), 0.0 if start is None else self.to_start):
            self.gradient.add_(self.now, alpha=held)
        for c, centre in self.centres:
            self.gradient.sub_(centre, alpha=c)
        if start is not None:
            self.gradient.sub_(start, alpha=self.to_start)


def pulled(
    problem: LocalProblem, pairs: Sequence[tuple[Tensor, Tensor]], scale: float, copy: Callable[[int, Tensor], Tensor]
) -> list[PulledTensor]:
    """The quadratic terms, times a scale, of the weight and of the bias: `(gradient, tensor)` in this order.

    copy: makes a copy of the weight (0) or the bias (1).
    """
    pulls = problem.pulls if problem.prox is None else (Pull(1 / problem.prox), *problem.pulls)
    terms = [(scale * pull.strength, (pull.weight, pull.bias)) for pull in pulls]
    found = []
    for number, (gradient, now) in enumerate(pairs if terms else ()):
        to_start = sum(c for c, around in terms if around[number] is None)
        centres = [(c, centre) for c, around in terms if (centre := around[number]) is not None]
        found.append(PulledTensor(gradient, now, copy(number, now) if to_start else None, to_start, centres))
    return found


def local_gradient(
    problem: LocalProblem, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `local_loss`, `(dW [K,O,I], db [K,O] or None)`, from all rows.

    `δ = f(z) − target`, `dW = Σ_r δ_r a_rᵀ`, `db = Σ_r δ_r`: no derivative of f (LocoProp, equation 7).
    Raises BadInput for a problem in a metric.
    """
    refuse_terms(problem, "local_gradient", balls=True)
    delta = problem.transfer.f(predict(problem, weight, bias)) - problem.target
    dw = contract(delta, problem.a, problem.weight.shape[-1])
    db = None if problem.bias is None else delta.sum(0)
    leaning, stiffness = pull_gradient(problem), problem.stiffness
    if leaning is not None:
        dw = dw + leaning[0]
        db = None if db is None or leaning[1] is None else db + leaning[1]
    if stiffness:
        dw = dw if weight is None else dw + stiffness * (weight - problem.weight)
        if db is not None and bias is not None and problem.bias is not None:
            db = db + stiffness * (bias - problem.bias)
    return dw, db
