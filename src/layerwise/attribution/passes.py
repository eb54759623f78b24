"""One batch at a time: the values of a quantity of chosen parameters, with the model left as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from layerwise.errors import BadInput, RandomPass
from layerwise.observation.accumulate import batch_loss, shown
from layerwise.observation.backward_pass import PassSettings
from layerwise.observation.engine import Observation
from layerwise.observation.results import Results
from layerwise.quantities.base import Quantity
from layerwise.ranks.group import digest_of, values_digest
from layerwise.ranks.trainers import is_sharded, unreduced, unwrapped
from layerwise.replay.state import RandomState
from layerwise.tape.binding import chosen_names

__all__ = ["Chosen", "KnownWeights", "Loader", "given"]

Loader = Iterable[Any]


class Chosen:
    """The parameters of a model that are attributed to, and passes that observe these alone, at least in float32.

    patterns: as `parameters=` of `observe`; None: all parameters. Those that do not require gradients are left out.
    Raises BadInput for a pattern that matches no such parameter.
    """

    def __init__(self, model: nn.Module, patterns: str | Sequence[str] | None) -> None:
        if not isinstance(model, nn.Module):
            raise BadInput(f"asked to attribute to {type(model).__name__}; give a torch.nn.Module")
        self.model = model
        known = [name for name, p in model.named_parameters() if p.requires_grad]
        self.names = chosen_names("parameters", patterns, known)
        self._patterns, self._warned = patterns, False
        if not self.names:
            raise BadInput("asked to attribute to no parameter: none requires gradients")

    def observed(self, loss_fn: Callable[..., Tensor], batch: Any, quantity: Quantity) -> Results:
        """The results of a forward pass over a batch, and of what the quantity sends back through it.

        loss_fn is called as `accumulate` calls it. No `.grad` is made, and the model's are left as they are.
        """
        settings = PassSettings(pooled=True, parameters=self._patterns)
        observation = Observation(self.model, [quantity], settings)
        with observation as results, unreduced(self.model):
            before = None if self._warned else RandomState({p.device for p in self.model.parameters()}, ("torch",))
            loss = batch_loss(unwrapped(self.model), loss_fn, batch)
            if before is not None and before.moved():
                self._warned = True
                warnings.warn(
                    f"{type(self.model).__name__} draws random numbers in its forward pass (dropout in train mode?), "
                    "so that each pass, and what is computed from it, is of another network; call model.eval() first",
                    RandomPass,
                    stacklevel=2,
                )
            observation.send(loss)
        return results


class KnownWeights:
    """A model's weights as they are now: versions tell where nothing was written, a digest where the same was."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._seen, self.digest = model, _versions(model), _digest(model)

    def are_the_same(self) -> bool:
        """Whether the model's are these still, and none was frozen or thawed."""
        now = _versions(self._model)
        if now != self._seen:
            if [free for *_, free in now] != [free for *_, free in self._seen] or _digest(self._model) != self.digest:
                return False
            self._seen = now
        return True


def _versions(model: nn.Module) -> list[tuple[int, int, bool]]:
    return [(id(p), p._version, p.requires_grad) for p in model.parameters()]


def _digest(model: nn.Module) -> str:
    state = {name: t.to_local() if is_sharded(t) else t for name, t in model.state_dict().items()}
    return digest_of({name: values_digest(t) for name, t in state.items()})


def given(batches: Loader, what: str, shown_as: str | None = None) -> Iterator[Any]:
    """The batches, with a bar where it has a name; raises BadInput for what gives none, or is one batch."""
    one = isinstance(batches, tuple) and all(isinstance(b, Tensor) for b in batches)
    if one or isinstance(batches, (Tensor, Mapping)):
        raise BadInput(f"{what} is one batch; give an iterable of batches, such as [(x, y)]")
    if not isinstance(batches, Iterable):
        raise BadInput(f"{what} is {type(batches).__name__}, no iterable of batches; give a DataLoader or [(x, y)]")
    none = True
    for batch in batches if shown_as is None else shown(batches, shown_as):
        none = False
        yield batch
    if none:
        raise BadInput(f"{what} gave no batch; an iterator can be used up: make a new one")
