"""One layer's local problem: fit its outputs to targets, with its inputs frozen.

    min over W, b of   Σ_r D(W a_r + b, target_r) + (‖W − W₀‖² + ‖b − b₀‖²) / 2η

The layer is a grouped linear map on rows, `Z[r,k,o] = Σ_i W[k,o,i] A[r,k,i] + b[k,o]`, where the rows `r`
are samples times positions. With `G = ∂L/∂Z` of the batch loss L as written, sums over rows are sums
over the batch, and the first local gradient is `γ·∂L/∂W` for every transfer function.
Source: Amid, Anil and Warmuth, "LocoProp" (2022), sections 3 and 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.transfer import IDENTITY, Transfer

__all__ = ["Clip", "LocalProblem", "local_gradient", "local_loss", "predict", "target_m", "target_s"]

Clip = Literal["range", "bounded"] | None


@dataclass(frozen=True)
class LocalProblem:
    """The inputs, targets and loss of one layer, and the weights to start from.

    a: `[R,K,I]` input rows. weight: `[K,O,I]`; bias: `[K,O]` or None. target: `[R,K,O]`.
    transfer: the identity gives the squared loss `½‖z − y‖²` of LocoProp-S, the layer's own transfer
    function the matching loss `F(z) − y·z` of LocoProp-M.
    prox: η of the proximal term, or None for no such term.
    g, gamma: where the targets came from a backward pass, its cotangent `[R,K,O]` and γ, so that
    `f(z) − target = γ g` at the starting weights; the first step then needs no forward product.
    Leave `g` out where targets were clipped. rest: `[R,K,O]`, terms of the layer's output that stay as they are,
    `z = W a + b + rest` (a frozen bias), or None. `weight` and `bias` may be views of parameters: solvers
    that work in place change them. Raises BadInput where shapes do not fit.
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

    def __post_init__(self) -> None:
        k, o, i = self.weight.shape if self.weight.dim() == 3 else (-1, -1, -1)
        r = self.a.shape[0]
        fits = (
            self.a.shape == (r, k, i)
            and self.target.shape == (r, k, o)
            and (self.bias is None or self.bias.shape == (k, o))
            and all(t is None or t.shape == (r, k, o) for t in (self.g, self.rest))
        )
        if not fits:
            seen = {name: tuple(t.shape) for name in ("a", "weight", "bias", "target", "g", "rest")
                    if (t := getattr(self, name)) is not None}  # fmt: skip
            raise BadInput(
                f"a local problem needs a [R,K,I], weight [K,O,I], bias [K,O], target, g and rest [R,K,O]: got {seen}"
            )
        if r == 0:
            raise BadInput("a local problem needs at least one row: got an empty batch")
        if self.prox is not None and not self.prox > 0:
            raise BadInput(f"the proximal term ‖W − W₀‖²/2η needs η > 0, or None for no term: got {self.prox}")


def target_s(z: Tensor, g: Tensor, gamma: float) -> Tensor:
    """LocoProp-S's targets before the transfer function, `z − γ g`; all shapes `[R,K,O]`."""
    return torch.add(z, g, alpha=-gamma)


def target_m(
    z: Tensor, g: Tensor, gamma: float, transfer: Transfer, clip: Clip = None, y: Tensor | None = None
) -> Tensor:
    """LocoProp-M's targets after the transfer function, `f(z) − γ g`; all shapes `[R,K,O]`.

    y: `f(z)`, where the forward pass has it already. Raises BadInput for an unknown clip.
    A target outside the closed range of f leaves the local problem unbounded below: a tanh unit with
    target 1.2 pulls with at least 0.2 for ever. Clipping is off by default all the same, because it
    also weakens the first local gradient below γ·backprop, and a few small steps cannot drift far. The
    published settings do not clip, and clipping ReLU's targets at 0 costs ReLU nets their signal: the
    negative part of a target is what switches an active unit off.
    clip="bounded" projects on the range where it is bounded on both sides (tanh, sigmoid, softmax's
    simplex): for problems solved far, without a proximal term. clip="range" projects ReLU's as well.
    """
    target = torch.add(transfer.f(z) if y is None else y, g, alpha=-gamma)
    if clip is None:
        return target
    if clip not in ("range", "bounded"):
        raise BadInput(f'clip={clip!r} is unknown: use "range", "bounded" or None')
    two_sided = transfer.low > float("-inf") and transfer.high < float("inf")
    return transfer.project(target) if two_sided or clip == "range" else target


def predict(problem: LocalProblem, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The layer's outputs before the transfer function, `[R,K,O]`, at given or starting weights."""
    weight = problem.weight if weight is None else weight
    bias = problem.bias if bias is None else bias
    z = torch.einsum("rki,koi->rko", problem.a, weight)
    z = z if bias is None else z + bias
    return z if problem.rest is None else z + problem.rest


def local_loss(problem: LocalProblem, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The local objective at given weights, a scalar, by its definition: the oracle of the solvers.

        Σ_r [F(z_r) − y_r·z_r] + (‖W − W₀‖² + ‖b − b₀‖²)/2η        (summed over rows, divided by nothing)

    The term F*(y), constant in the weights, is left out: it is infinite for a target out of range.
    """
    loss = problem.transfer.matching(predict(problem, weight, bias), problem.target).sum()
    if problem.prox is not None:
        for new, old in ((weight, problem.weight), (bias, problem.bias)):
            if new is not None and old is not None:
                loss = loss + (new - old).square().sum() / (2 * problem.prox)
    return loss


def local_gradient(
    problem: LocalProblem, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `local_loss`, `(dW [K,O,I], db [K,O] or None)`, from all rows.

    `δ = f(z) − target`, `dW = Σ_r δ_r a_rᵀ`, `db = Σ_r δ_r`: no derivative of f (LocoProp, equation 7).
    """
    delta = problem.transfer.f(predict(problem, weight, bias)) - problem.target
    dw = torch.einsum("rko,rki->koi", delta, problem.a)
    db = None if problem.bias is None else delta.sum(0)
    if problem.prox is not None:
        if weight is not None:
            dw = dw + (weight - problem.weight) / problem.prox
        if db is not None and bias is not None:
            db = db + (bias - problem.bias) / problem.prox  # type: ignore[operator]
    return dw, db
