"""Losses that are a sum over elements: the Hessian is diagonal, and its root one number per element."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BadInput
from .base import FirstOrder, Likelihood, _wide, number
from .call import LossCall, _expanded

__all__ = ["Elementwise", "elementwise"]

Score = Callable[[torch.Size, torch.Generator | None], Tensor]


class _Term(NamedTuple):
    """The term `κ l(z)` of every element, before reduction: tensors that broadcast to the logits' shape.

    gradient: `κ l′`; weight: κ (None: 1); hessian: `l″` (None: of no use, the loss is of first order);
    score: draws of `-∂ log p(ŷ | z) / ∂z`, of variance `l″` (None: no such distribution);
    terms: the denominator of the mean (None: the number of elements).
    """

    gradient: Tensor
    hessian: Tensor | None
    weight: Tensor | None = None
    score: Score | None = None
    link: str = "identity"
    terms: float | Tensor | None = None


class Elementwise(Likelihood):
    """Every element of the logits is its own term."""

    columns = 1

    def __init__(
        self, call: LossCall, logits: Tensor, c: Tensor | float, terms: float | Tensor, term: _Term, hessian: Tensor
    ) -> None:
        super().__init__(call, logits, c, terms)
        self.link = term.link
        self.canonical = term.score is not None
        self._slope = term.gradient
        self._hessian = hessian
        self._score = term.score
        self._weight = self._scale if term.weight is None else self._scale * term.weight

    def _gradient(self) -> Tensor:
        return self._scale * self._slope

    def _product(self, v: Tensor) -> Tensor:
        return self._weight * self._hessian * v

    def _root(self, start: int, stop: int) -> Tensor:
        return self._sqrt.expand(1, *self.logits.shape)[start:stop].clone()

    def _sample(self, draws: int, generator: torch.Generator | None) -> Tensor:
        root = self._sqrt  # checks weights and curvature, also where its value is not needed
        shape = torch.Size([draws, *self.logits.shape])
        if self._score is not None:
            return (self._weight / draws).sqrt() * self._score(shape, generator)
        signs = torch.randint(2, shape, generator=generator, device=root.device).to(root.dtype)
        return signs.mul_(2).sub_(1).mul_(root / draws**0.5)

    def counting(self) -> Tensor | None:
        """Bool `[*S]`, or None; without weights all elements count."""
        return self._weight != 0 if self._weight.dim() else None

    def weights(self) -> Tensor | None:
        """Of the squared error and the logistic loss."""
        if not self.canonical or self.link == "exp":
            return None
        return self._weight * self._hessian if self.link == "identity" else self._weight

    @cached_property
    def _sqrt(self) -> Tensor:
        curvature = self._weight * self._hessian
        self._check_weights(self._weight, curvature)
        return curvature.sqrt()


def elementwise(call: LossCall, logits: Tensor, c: Tensor | float) -> Likelihood:
    """Likelihood of a loss that is a sum over elements."""
    z = _wide(logits)
    term = _TERMS[call.name](call.name, z, call.target.to(z.dtype), call.options)
    terms = float(z.numel()) if term.terms is None else term.terms
    if term.hessian is None:
        why = "its second derivative is zero wherever it exists, so it has a gradient only; use huber_loss."
        return FirstOrder(call, logits, c, terms, term.gradient, why)
    return Elementwise(call, logits, c, terms, term, term.hessian)


def _normal(z: Tensor, variance: Tensor) -> Score:
    """Scores of `ŷ ~ N(z, 1/variance)`: normal with this variance."""

    def score(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=z.dtype, device=z.device) * variance.sqrt()

    return score


def _weighted(gradient: Tensor, weight: Tensor | None) -> Tensor:
    return gradient if weight is None else gradient * weight


def _mse(name: str, z: Tensor, y: Tensor, options: Mapping[str, Any]) -> _Term:
    """(z - y)²: a normal distribution of variance 1/2; a weighted mean divides by the sum of the weights."""
    weight = _weight(z, options)
    two = torch.full_like(z, 2.0)
    terms = None if weight is None else number(weight.sum())
    return _Term(_weighted(2 * (z - y), weight), two, weight, _normal(z, two), terms=terms)


def _bce(name: str, z: Tensor, y: Tensor, options: Mapping[str, Any]) -> _Term:
    """κ σ(z)(1 - σ(z)) with `κ = weight (π y + 1 - y)` for a positive weight π: a Bernoulli distribution."""
    p, q = torch.sigmoid(z), torch.sigmoid(-z)
    weight, positive = _weight(z, options), options.get("pos_weight")
    if positive is None:
        gradient, kappa = p - y, weight
    else:
        positive = _expanded(name, "pos_weight", positive, z).to(z.dtype)
        gradient = (1 - y) * p - positive * y * q
        kappa = positive * y + (1 - y) if weight is None else weight * (positive * y + (1 - y))

    def score(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        u = torch.rand(shape, generator=generator, dtype=z.dtype, device=z.device)
        return torch.where(u < p, -q, p)

    return _Term(_weighted(gradient, weight), p * q, kappa, score, "sigmoid")


def _bce_of_probabilities(name: str, p: Tensor, y: Tensor, options: Mapping[str, Any]) -> _Term:
    """-y log p - (1 - y) log(1 - p), whose Hessian y/p² + (1 - y)/(1 - p)² depends on the target.

    Torch keeps p(1 - p) at 1e-12 or more in its derivative, and so do we, in both.
    """
    weight, spread = _weight(p, options), (p * (1 - p)).clamp(min=1e-12)
    return _Term(_weighted((p - y) / spread, weight), (y - 2 * p * y + p * p) / spread**2, weight)


def _soft_margin(name: str, z: Tensor, y: Tensor, options: Mapping[str, Any]) -> _Term:
    """log(1 + exp(-y z)), with y² σ(z y) σ(-z y) as Hessian."""
    miss = torch.sigmoid(-y * z)
    return _Term(-y * miss, y * y * miss * torch.sigmoid(y * z))


def _huber(name: str, z: Tensor, y: Tensor, options: Mapping[str, Any]) -> _Term:
    """½(z - y)² inside delta, linear outside with zero Hessian; a weighted mean divides by elements."""
    weight, delta, d = _weight(z, options), float(options["delta"]), z - y
    return _Term(_weighted(d.clamp(-delta, delta), weight), (d.abs() < delta).to(z.dtype), weight)


def _smooth_l1(name: str, z: Tensor, y: Tensor, options: Mapping[str, Any]) -> _Term:
    """The Huber loss divided by its threshold beta; beta = 0 is the absolute error."""
    beta, d = float(options["beta"]), z - y
    if beta == 0:
        return _Term(d.sign(), None)
    return _Term((d / beta).clamp(-1, 1), (d.abs() < beta).to(z.dtype) / beta)


def _l1(name: str, z: Tensor, y: Tensor, options: Mapping[str, Any]) -> _Term:
    """|z - y|: no curvature; a weighted mean divides by the sum of the weights."""
    weight = _weight(z, options)
    terms = None if weight is None else number(weight.sum())
    return _Term(_weighted((z - y).sign(), weight), None, terms=terms)


def _gaussian_nll(name: str, z: Tensor, y: Tensor, options: Mapping[str, Any]) -> _Term:
    """½(log v + (z - y)²/v) with the given variance v, at least eps."""
    var = torch.as_tensor(options["var"], dtype=z.dtype, device=z.device)
    if not isinstance(options["var"], Tensor):
        var = var.expand(z.shape)
    if var.shape != z.shape and var.shape == z.shape[:-1]:
        var = var.unsqueeze(-1)  # torch reads this as one variance per row, also where sizes are equal
    if var.dim() != z.dim():
        raise BadInput(f"{name} got var of shape {tuple(var.shape)} for an input of shape {tuple(z.shape)}.")
    precision = 1 / _expanded(name, "var", var, z).clamp(min=float(options["eps"]))
    return _Term((z - y) * precision, precision, None, _normal(z, precision))


def _poisson_nll(name: str, z: Tensor, y: Tensor, options: Mapping[str, Any]) -> _Term:
    """exp(z) - y z: a Poisson distribution of rate exp(z).

    With `log_input=False`, z - y log(z + eps): its Hessian y/(z + eps)² depends on the target, so it is not
    the Fisher information of the predictive distribution.
    """
    if not options["log_input"]:
        shifted = z + float(options["eps"])
        return _Term(1 - y / shifted, y / shifted**2)
    rate = z.exp()

    def score(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
        # an accelerator, which tells infinity and NaN later, does not go on with either
        usable = rate if rate.device.type == "cpu" else rate.where(rate < math.inf, 0)
        return rate - torch.poisson(usable.expand(shape), generator=generator)

    return _Term(rate - y, rate, None, score, "exp")


def _weight(z: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    weight = options.get("weight")
    return None if weight is None else weight.to(z.dtype).expand(z.shape)


_TERMS: dict[str, Callable[[str, Tensor, Tensor, Mapping[str, Any]], _Term]] = {
    "mse_loss": _mse,
    "binary_cross_entropy_with_logits": _bce,
    "binary_cross_entropy": _bce_of_probabilities,
    "soft_margin_loss": _soft_margin,
    "huber_loss": _huber,
    "smooth_l1_loss": _smooth_l1,
    "l1_loss": _l1,
    "gaussian_nll_loss": _gaussian_nll,
    "poisson_nll_loss": _poisson_nll,
}
