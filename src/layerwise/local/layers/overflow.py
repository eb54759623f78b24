"""Checks a recorded run for NaN, infinity and overflow, before anything moves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layerwise.local.layers.layer import Layer
from layerwise.local.layers.record import Recorded
from layerwise.local.problem import contract
from layerwise.tape.uses import first_bad_call
from layerwise.tensors import is_finite

__all__ = ["first_bad_call", "unsafe"]

# Norms bound every entry of a product; the factor allows for a convolution's windows, which repeat entries.
MARGIN = 1e3


@torch.no_grad()
def unsafe(recorded: Recorded, gamma: Callable[[str], float]) -> str | None:
    """The first tensor that forbids a step, in words, or None.

    It holds NaN or infinity, or makes `z`, `γ g` or `(γ ∂L/∂w)²` overflow. gamma: γ of a parameter's name.
    Cost: reads each layer's input, weight and cotangent once; one synchronization with the device.
    """
    if not is_finite(recorded.loss):
        return first_bad_call(recorded.tape.uses) or "the loss"
    places: list[str] = []
    tensors: list[Tensor] = []
    parts = [part for layer in recorded.layers for part in layer.parts]
    for part in parts:
        data = [t for t in part.data if t.is_floating_point()]
        places += [f"the input of {part.name}"] * len(data)
        places += [part.name, f"the cotangent at the output of {part.name}"]
        tensors += [*data, part.parameter, recorded.cotangents[part.use.index]]
    for name, g in recorded.gradients.items():
        places.append(f"the gradient of {name}")
        tensors.append(g)
    norms = _norms(tensors)
    for place, norm in zip(places, norms, strict=True):
        if not norm < float("inf"):
            return place
    left = iter(norms)
    for part in parts:
        a = sum(next(left) for t in part.data if t.is_floating_point())
        # the rows are not among the call's arguments: indices, or a norm's normalised input
        a += part.use.call.out_shape.numel() ** 0.5 if part.kind.indexed or part.kind.elementwise else 0.0
        w, back, factor, most = next(left), next(left), gamma(part.name), _largest_squarable(part.parameter)
        if max(a, 1.0) * max(w, back * factor) * MARGIN > most and (found := _overflow(recorded, part, factor)):
            return found
    for (name, rest), norm in zip(recorded.gradients.items(), left, strict=True):
        factor = gamma(name)
        if norm * factor > _largest_squarable(rest) and not is_finite((rest * factor).square()):
            return f"the square of the gradient of {name}"
    return None


def _norms(tensors: list[Tensor]) -> list[float]:
    """Euclidean norms, copied from the device at once; infinite beyond the type's range."""
    if not tensors:
        return []
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype in (torch.float32, torch.float64) and all(t.dtype is dtype and t.device == device for t in tensors):
        norms = list(torch._foreach_norm(tensors))
    else:
        norms = []
        for t in tensors:
            kind = t.dtype if t.dtype is torch.float64 else torch.float32
            norms.append(torch.linalg.vector_norm(t, dtype=kind).to(device, torch.float64))
    found: list[float] = torch.stack(norms).tolist()
    # a finite tensor with an infinite norm: bounded by its largest entry instead
    for j, norm in enumerate(found):
        if norm == float("inf"):
            found[j] = float(tensors[j].double().norm())
    return found


def _largest_squarable(t: Tensor) -> float:
    """The largest number whose square the type holds."""
    return float(torch.finfo(t.dtype).max) ** 0.5


def _overflow(recorded: Recorded, layer: Layer, factor: float) -> str | None:
    """The check entry by entry, where norms are too coarse a bound."""
    if not is_finite(layer.output()):
        return f"the output of {layer.name}"
    g = layer.rows(recorded.cotangents[layer.use.index]) * factor
    gradient = contract(g, layer.input(), layer.matrix().shape[-1])
    if not (is_finite(g) and is_finite(gradient.square()) and is_finite(g.sum(0).square())):
        return f"the square of the gradient of {layer.name}"
    return None
