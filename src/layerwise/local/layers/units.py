"""What one unit of a target's γ is in a recorded run: the loss as written, that of a sample, or Polyak's step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch

from layerwise.local.layers.record import Recorded
from layerwise.local.targets import Polyak, Target, slope
from layerwise.tensors import without_grad

__all__ = ["Units"]


class Units:
    """The unit of γ of each parameter, by name. targets: the target of a parameter's name.

    With a `Polyak` among them the loss and all slopes are read at once, one wait on an accelerator.
    """

    def __init__(self, run: Recorded, targets: Callable[[str], Target]) -> None:
        self._run, self._targets = run, targets

    def of(self, name: str) -> float:
        """1 for a target per batch, N per sample, Polyak's step per `Polyak`."""
        per = getattr(self._targets(name), "per", "batch")
        if isinstance(per, Polyak):
            loss, slopes = self._read
            return per.step(loss, slopes[name] if per.over == "layer" else sum(slopes.values()))
        return float(self._run.samples) if per == "sample" else 1.0

    @cached_property
    @without_grad
    def _read(self) -> tuple[float, dict[str, float]]:
        """The loss, and `Σ_r ⟨g_r, p_r⟩` by name: of each layer's rows, and of gradients outside the layers."""
        run, cotangents = self._run, {layer.name: self._run.cotangent_rows(layer) for layer in self._run.layers}
        cotangents |= run.gradients
        targets = {layer.name: self._targets(layer.name) for layer in run.layers}
        found = [slope(targets.get(name), g) for name, g in cotangents.items()]
        loss, *values = torch.stack([run.loss.double(), *(value.double() for value in found)]).tolist()
        return loss, {
            name: value
            if 0 < value < math.inf
            else float(slope(targets.get(name), g.double()))  # beyond its type's range
            for (name, g), value in zip(cotangents.items(), values, strict=True)
        }
