"""Running means of a step: of parameters, and of second moments of what comes into layers and out of them, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.local.metric import Metric, second_moment
from layerwise.local.problem import Term
from layerwise.tensors import widened

__all__ = ["RunningMeans"]


@dataclass
class RunningMeans:
    """Those before a step, which it leaves as they are, and those after it, by name.

    metrics: the last metric of each layer whose inputs are not measured at every batch, with its inverse.
    """

    before: Mapping[str, Tensor]
    metrics: dict[str, Metric] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)

    def updated(self, key: str, now: Tensor, decay: float) -> Tensor:
        """`decay · old + (1 − decay) · now`, in float32 for half precision; where none of its shape was, `now`."""
        old, now = self.before.get(key), widened(now)
        old = None if old is None or old.shape != now.shape else old.to(now)  # the model may have changed its type
        self.after[key] = now.clone() if old is None else decay * old + (1 - decay) * now
        return self.after[key]

    def of_inputs(self, name: str, rows: Tensor, matrix: Tensor, bias: bool, decay: float, every: int) -> Tensor:
        """The second moment of a layer's inputs, updated at the first of `every` batches and kept at the others.

        rows: as for `second_moment`. matrix: the weight, `[K,O,I]`. Of another shape than before it starts anew.
        """
        key, age = f"{name} inputs", f"{name} inputs age"
        (k, _, i), old = matrix.shape, self.before.get(key)
        shape = (k, i + bias, i + bias) if rows.is_floating_point() else (k, i)
        fits = old is not None and tuple(old.shape) == shape
        count = int(self.before.get(age, 0)) % every if fits else 0
        if every > 1:
            self.after[age] = torch.tensor(count + 1)
        if old is None or count == 0:
            return self.updated(key, second_moment(rows, i, bias, matrix), decay)
        self.after[key] = old
        return old

    def kept(self, name: str, term: Term) -> Term:
        """A layer's term; the metric that the layer had, with its inverse, where it is of the same second moment."""
        if not isinstance(term, Metric):
            return term
        held = self.metrics.get(name)
        if held is None or held.second is not term.second or held.damping != term.damping:
            held = self.metrics[name] = term
        return held
