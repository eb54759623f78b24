"""Checks a recorded run for NaN, infinity and overflow, before anything moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from layerwise.errors import NonFinite
from layerwise.local.layers.layer import Layer
from layerwise.local.layers.record import Recorded
from layerwise.local.problem import contract
from layerwise.tape.uses import first_bad_call
from layerwise.tensors import Verdict, is_finite, without_grad

__all__ = ["ask_safe", "first_bad_call", "norms_of", "unsafe"]

# Norms bound every entry of a product; the factor allows for a convolution's windows, which repeat entries.
MARGIN = 1e3


@without_grad
def unsafe(recorded: Recorded, gamma: Callable[[str], float]) -> str | None:
    """The first tensor that forbids a step, in words, or None.

    It holds NaN or infinity, or makes `z`, `γ g` or `(γ ∂L/∂w)²` overflow. gamma: γ of a parameter's name.
    Cost: reads each layer's input, weight and cotangent once; one synchronization with the device.
    """
    if recorded.loss.device.type != "cpu":
        verdict = Verdict()
        ask_safe(verdict, recorded, gamma)
        return verdict.reason(NonFinite)
    if not math.isfinite(recorded.loss.item()):
        return first_bad_call(recorded.tape.uses) or "the loss"
    tensors = _read(recorded)
    return _unsafe(recorded, gamma, tensors, norms_of(tensors).tolist()) if tensors else None


@without_grad
def ask_safe(verdict: Verdict, recorded: Recorded, gamma: Callable[[str], float]) -> None:
    """As `unsafe`, when the verdict is read; NonFinite then holds the words."""

    def judge_loss(found: list[float]) -> None:
        if not math.isfinite(found[0]):
            raise NonFinite(first_bad_call(recorded.tape.uses) or "the loss")

    verdict.ask(recorded.loss, judge_loss, ["the loss"])
    tensors = _read(recorded)

    def judge(norms: list[float]) -> None:
        if (where := _unsafe(recorded, gamma, tensors, norms)) is not None:
            raise NonFinite(where)

    if tensors:
        products = [f"a product with {part.name}" for part in _parts(recorded)]
        products += [f"the square of the gradient of {name}" for name in recorded.gradients]
        verdict.ask(norms_of(tensors), judge, [*_places(recorded), *products], partial(_good, recorded, gamma))


def _floats(part: Layer) -> list[Tensor]:
    """The data of a use whose norms bound its products."""
    return [t for t in part.data if t.is_floating_point()]


def _read(recorded: Recorded) -> list[Tensor]:
    """The tensors that a step reads."""
    tensors: list[Tensor] = []
    for part in _parts(recorded):
        tensors += _floats(part)
        tensors += part.parameter, recorded.cotangents[part.use.index]
    tensors += recorded.gradients.values()
    return tensors


def _places(recorded: Recorded) -> list[str]:
    """What they are."""
    places: list[str] = []
    for part in _parts(recorded):
        places += [f"the input of {part.name}"] * len(_floats(part))
        places += [part.name, f"the cotangent at the output of {part.name}"]
    return [*places, *(f"the gradient of {name}" for name in recorded.gradients)]


def _parts(recorded: Recorded) -> list[Layer]:
    return [part for layer in recorded.layers for part in layer.parts]


def _unsafe(
    recorded: Recorded, gamma: Callable[[str], float], tensors: list[Tensor], norms: list[float]
) -> str | None:  # fmt: skip
    if not math.isfinite(sum(norms)):
        # a finite tensor with an infinite norm: bounded by its largest entry instead
        norms = [float(t.double().norm()) if n == math.inf else n for n, t in zip(norms, tensors, strict=True)]
        for place, norm in zip(_places(recorded), norms, strict=True):
            if not norm < math.inf:
                return place
    left = iter(norms)
    for part in _parts(recorded):
        a = sum([next(left) for _ in _floats(part)])
        # the rows are not among the call's arguments: indices, or a norm's normalised input
        if part.kind.indexed or part.kind.elementwise:
            a += part.use.call.out_shape.numel() ** 0.5
        w, back, factor, most = next(left), next(left), gamma(part.name), _largest_squarable(part.parameter.dtype)
        if max(a, 1.0) * max(w, back * factor) * MARGIN > most and (found := _overflow(recorded, part, factor)):
            return found
    for (name, rest), norm in zip(recorded.gradients.items(), left, strict=True):
        factor = gamma(name)
        if norm * factor > _largest_squarable(rest.dtype) and not is_finite((rest * factor).square()):
            return f"the square of the gradient of {name}"
    return None


def _good(recorded: Recorded, gamma: Callable[[str], float], norms: Tensor) -> Tensor:
    """As `_unsafe`, from norms alone and on their device: by place, then by layer and by gradient.

    A product that only the check entry by entry would find within its type's range is not good.
    """
    left = iter(norms.unbind())
    sizes, others, factors, most = [], [], [], []
    for part in _parts(recorded):
        a = sum((next(left) for _ in _floats(part)), 0.0)
        a = a + (part.use.call.out_shape.numel() ** 0.5 if part.kind.indexed or part.kind.elementwise else 0.0)
        sizes.append(a if isinstance(a, Tensor) else norms.new_full((), a))
        others += [next(left), next(left)]
        factors += [1.0, gamma(part.name)]
        most += [_largest_squarable(part.parameter.dtype) / MARGIN] * 2
    for name, rest in recorded.gradients.items():
        factors.append(gamma(name))
        most.append(_largest_squarable(rest.dtype))
        others.append(next(left))
    # in shares of what the type holds, which no number of another type can exceed
    shares = torch.stack(torch._foreach_mul(others, [f / m for f, m in zip(factors, most, strict=True)]))
    if not sizes:
        return torch.cat([norms < math.inf, shares <= 1])
    pairs = 2 * len(sizes)
    products = shares[:pairs].view(-1, 2).amax(1) * torch.stack(sizes).clamp(min=1)
    return torch.cat([norms < math.inf, products <= 1, shares[pairs:] <= 1])


def norms_of(tensors: list[Tensor]) -> Tensor:
    """Euclidean norms; infinite beyond the type's range."""
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype in (torch.float32, torch.float64) and all(t.dtype is dtype and t.device == device for t in tensors):
        norms = list(torch._foreach_norm(tensors))
    else:
        norms = []
        for t in tensors:
            kind = t.dtype if t.dtype is torch.float64 else torch.float32
            norms.append(torch.linalg.vector_norm(t, dtype=kind).to(device, torch.float64))
    return torch.stack(norms)


@cache
def _largest_squarable(dtype: torch.dtype) -> float:
    """The largest number whose square a type holds."""
    return float(torch.finfo(dtype).max) ** 0.5


def _overflow(recorded: Recorded, layer: Layer, factor: float) -> str | None:
    """The check entry by entry, where norms are too coarse a bound."""
    if not is_finite(layer.output()):
        return f"the output of {layer.name}"
    g = layer.rows(recorded.cotangents[layer.use.index]) * factor
    gradient = contract(g, layer.input(), layer.matrix().shape[-1])
    if not (is_finite(g) and is_finite(gradient.square()) and is_finite(g.sum(0).square())):
        return f"the square of the gradient of {layer.name}"
    return None
