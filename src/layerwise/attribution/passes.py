"""One batch at a time: the values of a quantity of chosen parameters, with the model left as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.observation.accumulate import batch_loss
from layerwise.observation.backward_pass import PassSettings
from layerwise.observation.engine import Observation
from layerwise.observation.results import Results
from layerwise.quantities.base import Quantity
from layerwise.ranks.trainers import unreduced, unwrapped
from layerwise.replay.state import Gradients

__all__ = ["Chosen"]


class Chosen:
    """The parameters of a model that are attributed to, and passes that observe these alone.

    patterns: regular expressions, of which one must match a parameter's whole name; None: all parameters. Those that
    do not require gradients are left out.
    Raises BadInput for a pattern that is none or that matches no such parameter.
    """

    def __init__(self, model: nn.Module, patterns: str | Sequence[str] | None) -> None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"asked to attribute to {type(model).__name__}; give a torch.nn.Module")
        self.model = model
        known = [name for name, p in model.named_parameters() if p.requires_grad]
        self.patterns = None if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
        for pattern in self.patterns or ():
            if not any(_matches(pattern, name) for name in known):
                raise BadInput(
                    f"{pattern!r} matches the whole name of no trainable parameter; there are: {', '.join(known)}"
                )
        self.names = [name for name in known if self.patterns is None or any(_matches(p, name) for p in self.patterns)]
        if not self.names:
            raise BadInput("asked to attribute to no parameter: none requires gradients, or no pattern was given")

    def observed(self, loss_fn: Callable[..., Tensor], batch: Any, quantity: Quantity) -> Results:
        """The results of one forward and backward pass over a batch; loss_fn is called as `accumulate` calls it.

        The others' gradients are computed, too: where samples lie is read off the first layers, whoever is asked about.
        """
        gradients = Gradients(list(self.model.parameters()), values=False)
        try:
            for p in self.model.parameters():
                p.grad = None
            asked = [self._restricted(quantity)]
            with (
                Observation(self.model, asked, PassSettings(pooled=True, grad="rows")) as results,
                unreduced(self.model),
            ):
                batch_loss(unwrapped(self.model), loss_fn, batch).backward()
        finally:
            gradients.put_back()
        return results

    def _restricted(self, quantity: Quantity) -> Quantity:
        """A copy of the quantity that covers the chosen parameters alone."""
        if self.patterns is None:
            return quantity
        limited, covers, names = copy.copy(quantity), quantity.covers, frozenset(self.names)
        limited.covers = lambda gradient: gradient.name in names and covers(gradient)  # type: ignore[method-assign]
        return limited


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise BadInput(f"{pattern!r} is no regular expression for parameter names: {error}") from None
