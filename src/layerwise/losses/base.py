"""The likelihood of a loss call: gradient, Hessian products, exact and sampled roots of the Hessian.

The total loss is `L = Σ_r w_r l_r(z_r)`: the term r depends on its own outputs `z_r` alone, and the weight
`w_r` holds the reduction, all weights of the call, and `c = dL/dℓ`, the cotangent of the call's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..errors import BadInput, NonFinite, Undefined
from .call import LossCall

__all__ = ["FirstOrder", "Likelihood", "Unread"]

Unread = list[tuple[Tensor | Sequence[Tensor], Callable[[list[float]], None]]]
"""Numbers that are read with a result, each with what raises where they are bad."""


class Likelihood:
    """What curvature needs to know about one loss call; built by `likelihood`.

    logits: detached, `[*S]` as given to the call.
    class_axis: the axis over which one term's outputs are coupled; None: each element is its own term.
    elementwise: True where `class_axis` is None; the Hessian is then diagonal.
    columns: number of root columns, `C - 1` for classes, 1 for an elementwise loss, 0 where there is no root.
    terms: the denominator of the mean reduction: loss terms that count (rows or elements), or the sum of
        their weights where torch divides by it. The same number for `sum` and `none`. On an accelerator a tensor
        without axes, where it depends on values: nobody waits for it.
    unread: None, or a list that takes what is otherwise read at once: numbers, and what raises for bad ones.
    mean: True where the call's reduction is the mean; None for a loss of the user's own without a given reduction.
    link: the transfer function that belongs to the loss: "softmax", "sigmoid", "exp" or "identity".
    canonical: True where the Hessian is the Fisher information of the model's predictive distribution, so
        that `sample` draws labels; False where `sample` draws signs for the exact root instead.
    """

    class_axis: int | None = None
    columns: int = 0
    link: str = "identity"
    canonical: bool = False
    mean: bool | None
    terms: float | Tensor
    unread: Unread | None = None

    def __init__(self, call: LossCall, logits: Tensor, c: Tensor | float, terms: float | Tensor) -> None:
        self.call = str(call)
        self.logits = logits.detach()
        self.terms = terms
        self.mean = call.reduction == "mean"
        self._z = _wide(self.logits)
        if not isinstance(c, Tensor) or c.dtype is not self._z.dtype or c.device != self._z.device or c.requires_grad:
            c = torch.as_tensor(c, dtype=self._z.dtype, device=self._z.device).detach()
        shape = call.term_shape if call.reduction == "none" else torch.Size()
        if c.shape != shape:
            raise BadInput(f"{call}: c has shape {tuple(c.shape)}, but the call's output has {tuple(shape)}.")
        if self.mean and isinstance(terms, float) and terms == 0:
            raise BadInput(f"{call}: no target counts (all ignored, or of weight 0), so the mean is 0/0; skip it.")
        self._c = c

    @cached_property
    def _scale(self) -> Tensor:
        """The weight of a term before the weights of the call: 0-dimensional, or one number per term."""
        return self._c / self.terms if self.mean else self._c

    @property
    def curved(self) -> bool:
        """Whether the loss has second derivatives in its outputs that are not all zero."""
        return self.columns > 0

    @property
    def elementwise(self) -> bool:
        """True where each element of the logits is its own term, so that the Hessian is diagonal."""
        return self.class_axis is None

    def gradient(self) -> Tensor:
        """Gradient of the total loss with respect to the logits, `[*S]`."""
        return self._out(self._gradient())

    def hessian_product(self, v: Tensor) -> Tensor:
        """Product of the loss Hessian with vectors `[..., *S]`, also where weights are negative.

        Raises: `Undefined` for losses of first order.
        """
        return self._product(v).to(v.dtype)

    def root(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Columns `start` to `stop` of the exact root of the loss Hessian, `[stop - start, *S]`.

        With classes, column j holds at each term r the vector `s_rj` along the class axis, and
        `Σ_j s_rj s_rjᵀ = w_r ∇²l_r`. For an elementwise loss the only column holds `sqrt(w_r l_r″)`, and
        each element of it is a column of its own. In both cases two terms must not share a cotangent
        where products across terms count (terms of one sample): zero all other positions.
        Raises: `Undefined` for negative weights or losses of first order, `NonFinite` for nan.
        """
        start, stop, _ = slice(start, stop).indices(self.columns)
        return self._out(self._root(start, max(start, stop)))

    def class_root(self) -> Tensor:
        """All columns of the exact root with one for each class, `[C, *S]`: `s_j = sqrt(w p_j) (e_j - p)`.

        They are linearly dependent, and `root` needs one column less; elementwise losses have that one.
        Raises: as `root`.
        """
        return self.root()

    def sample(self, draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Random `s` `[draws, *S]` with mean zero and `E Σ_draws s sᵀ` equal to the loss Hessian.

        Each draw and each term takes its own label ŷ from the predictive distribution, and
        `s = sqrt(w_r / draws) ∇_z (-log p(ŷ | z))`; where not `canonical`, `s` is the exact root with a
        random sign per element. Different terms are independent, so all of them may share a cotangent.
        Source: Martens, Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate
        curvature", section 5 (labels from the model's own distribution).
        generator: on the logits' device; None: torch's own of that device.
        Raises: as `root`; `BadInput` for a generator of another device or `draws < 1`.
        """
        if draws < 1:
            raise BadInput(f"sample was asked for {draws} draws: ask for at least 1.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise BadInput(f"sample got {generator!r} as its generator: pass a torch.Generator, or None.")
        if generator is not None and generator.device.type != self.logits.device.type:
            raise BadInput(
                f"sample got a generator on {generator.device} for logits on {self.logits.device}: make one there."
            )
        return self._out(self._sample(draws, generator))

    def counting(self) -> Tensor | None:
        """Which loss terms count, bool, broadcastable to the logits; None where all do.

        A term counts unless its weight in the total is zero: an ignored target, a class of weight zero, or a zero that
        the user multiplied it by.
        """
        return None

    def weights(self) -> Tensor | None:
        """The weights w of the terms, where `gradient() = w (f(z) − y)` with f the link; else None.

        Where w > 0 is the same for all terms, the loss is w times the matching loss of its link, with targets y.
        """
        return None

    # What a kind of loss defines, in at least float32.

    def _gradient(self) -> Tensor:
        raise NotImplementedError

    def _product(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _root(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError

    def _sample(self, draws: int, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def _out(self, x: Tensor) -> Tensor:
        return x.to(self.logits.dtype)

    def _check_weights(self, *weights: Tensor) -> None:
        """Refuse weights, or curvatures, of terms that have no real square root; all are read at once."""
        ends = [end for each in weights if each.numel() for end in torch.aminmax(each)]
        if not ends:
            return
        if self.unread is None:
            self._check_ends(torch.stack(ends).tolist())
        else:
            self.unread.append((torch.stack(ends), self._check_ends))

    def _check_ends(self, found: list[float]) -> None:
        if not all(map(math.isfinite, found)):
            raise NonFinite(
                f"{self.call}: the curvature of its terms holds nan or infinity; look at the model's output, "
                "the targets and the scale of the loss."
            )
        if (low := min(found)) < 0:
            raise Undefined(
                f"{self.call}: a term enters the total loss with the negative weight or curvature {low:.3g}, "
                "so its Hessian has no real root; ask for a product with the Hessian or GGN instead, or keep "
                "the loss's weights and its scale nonnegative."
            )


class FirstOrder(Likelihood):
    """A loss of which the gradient alone is usable; `why` says so."""

    def __init__(
        self, call: LossCall, logits: Tensor, c: Tensor | float, terms: float | Tensor, gradient: Tensor, why: str
    ) -> None:
        super().__init__(call, logits, c, terms)
        self.class_axis = call.class_axis
        scale = self._scale
        if self.class_axis is not None and scale.dim():
            scale = scale.unsqueeze(self.class_axis)
        self._scaled = scale * gradient
        self._why = why

    def counting(self) -> Tensor | None:
        """Bool, broadcastable to the logits, or None."""
        if self.class_axis is not None:
            return (self._scaled != 0).any(self.class_axis, keepdim=True)
        return self._scale != 0 if self._scale.dim() else None

    def _gradient(self) -> Tensor:
        return self._scaled

    def _product(self, v: Tensor) -> Tensor:
        raise Undefined(f"{self.call}: {self._why}")

    def _root(self, start: int, stop: int) -> Tensor:
        raise Undefined(f"{self.call}: {self._why}")

    def _sample(self, draws: int, generator: torch.Generator | None) -> Tensor:
        raise Undefined(f"{self.call}: {self._why}")


def number(x: Tensor) -> float | Tensor:
    """A tensor without axes as a number; on an accelerator as it is, without a wait."""
    return float(x) if x.device.type == "cpu" else x


def _wide(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    if x.dtype is torch.float32 or x.dtype is torch.float64:  # to ask torch costs more than its kernels
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))
