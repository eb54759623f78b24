"""Whether the passes that a step is made from are the passes whose gradients `.grad` holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.tape.uses import named_parameters_of

__all__ = ["GradVersions", "WholePasses"]


class GradVersions:
    """The `.grad` of a model's parameters now, by their versions: no values are copied."""

    def __init__(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        params = named_parameters_of(model).values()
        self._seen = [(p, p.grad, -1 if p.grad is None else p.grad._version) for p in params]

    def are_as_then(self) -> bool:
        """Whether nothing was written to them since."""
        return all(p.grad is g and (g is None or g._version == version) for p, g, version in self._seen)


class WholePasses:
    """Backward passes, each of which ended, or left `.grad` as it was; `torn` once one did neither."""

    def __init__(self) -> None:
        self.torn = False

    @contextmanager
    def running(self, model: nn.Module | Mapping[str, Tensor]) -> Iterator[None]:
        """Around one pass."""
        grads = GradVersions(model)
        try:
            yield
        except BaseException:
            self.torn = self.torn or not grads.are_as_then()
            raise

    def check(self, instead: str = "") -> None:
        """Raise BadInput where `.grad` holds a part of a pass that failed. instead: what else to do."""
        if self.torn:
            raise BadInput(
                "an exception ended a recorded backward pass, or watch() itself, after .grad had been written to, "
                "which now holds more than what was recorded: drop the gradients with zero_grad(), and run the whole "
                f"batch again{instead}"
            )
