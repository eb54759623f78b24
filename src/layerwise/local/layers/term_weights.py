"""The weight of a loss's terms, which decides the problem of the layer that makes its logits."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from layerwise.local.layers.layer import Layer, one_weight
from layerwise.tensors import Verdict, WrongAssumption

__all__ = ["TermWeights"]

_TIMES = 2  # so often in a row a weight was the same before it is assumed


class _SeenWeight(NamedTuple):
    weight: float | None
    times: int


class TermWeights:
    """The weights of the terms of losses by layer and shape of logits, read only where they may have changed.

    Ignored targets and a factor of the loss lie on the device. Where a step is judged late, a weight that was the same
    twice in a row is assumed, and compared with the right one then. verdict: what the present step reads late, or None.
    """

    def __init__(self) -> None:
        self.verdict: Verdict | None = None
        self._seen: dict[tuple[str, tuple[int, ...]], _SeenWeight] = {}

    def of(self, layer: Layer) -> float | None:
        """The one weight of the terms of all losses that read a layer's outputs; None where there is no one."""
        ends = layer.weight_ends()
        if ends is None:
            return None
        key = layer.name, tuple(layer.use.call.out_shape)
        seen, verdict = self._seen.get(key, _SeenWeight(None, 0)), self.verdict
        if ends.device.type == "cpu" or verdict is None or seen.times < _TIMES:
            weight = one_weight(ends.tolist())
            self._seen[key] = _SeenWeight(weight, seen.times + 1 if weight == seen.weight else 1)
            return weight
        verdict.ask(ends, partial(self._compare, key))
        return seen.weight

    def _compare(self, key: tuple[str, tuple[int, ...]], ends: list[float]) -> None:
        if one_weight(ends) != self._seen[key].weight:
            del self._seen[key]
            raise WrongAssumption
