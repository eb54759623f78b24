"""One batch at a time: the values of a quantity of chosen parameters, with the model left as it was."""

from __future__ import annotations

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
from layerwise.tape.binding import chosen_names

__all__ = ["Chosen"]


class Chosen:
    """The parameters of a model that are attributed to, and passes that observe these alone.

    patterns: as `parameters=` of `observe`; None: all parameters. Those that do not require gradients are left out.
    Raises BadInput for a pattern that matches no such parameter.
    """

    def __init__(self, model: nn.Module, patterns: str | Sequence[str] | None) -> None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"asked to attribute to {type(model).__name__}; give a torch.nn.Module")
        self.model = model
        known = [name for name, p in model.named_parameters() if p.requires_grad]
        self.names = chosen_names("parameters", patterns, known)
        self._patterns = patterns
        if not self.names:
            raise BadInput("asked to attribute to no parameter: none requires gradients")

    def observed(self, loss_fn: Callable[..., Tensor], batch: Any, quantity: Quantity) -> Results:
        """The results of a forward pass over a batch, and of what the quantity sends back through it.

        loss_fn is called as `accumulate` calls it. No `.grad` is made, and the model's are left as they are.
        """
        observation = Observation(self.model, [quantity], PassSettings(pooled=True, parameters=self._patterns))
        with observation as results, unreduced(self.model):
            observation.send(batch_loss(unwrapped(self.model), loss_fn, batch))
        return results
