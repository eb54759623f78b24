"""What a quantity is: a cotangent to send back, a function of a parameter's gradient, and how batches join."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.cotangents import Cotangent, Gradient
from layerwise.errors import BadInput, NoBackward
from layerwise.gradients import Matrix, ParameterGradient

__all__ = ["ByParameter", "Context", "Quantity", "Union"]


@dataclass(frozen=True)
class Union:
    """The batches that a result covers: their samples, whether their losses are means, and the scale asked for."""

    samples: int
    mean: bool
    scale: str


@dataclass(frozen=True)
class Context:
    """What `finish` may read besides its values: how parameters are matrices (`needs_matrix`), and the gradient."""

    matrices: Mapping[str, Matrix]
    gradient: Mapping[str, Tensor]


class Quantity:
    """Base of all quantities; a new one is a subclass with `compute`, and `finish` where it is not a sum.

    cotangent: what is sent back. needs_samples: whether the samples must be told apart.
    powers: for each tensor that `compute` returns, how it scales with the loss (gradient 1, square 2).
    concatenate: results of several batches are concatenated along samples instead of added.
    needs_matrix: whether `finish` reads how parameters are laid out as matrices.
    """

    cotangent: Cotangent = Gradient()
    needs_samples: ClassVar[bool] = True
    powers: ClassVar[tuple[int, ...]] = (2,)
    concatenate: ClassVar[bool] = False
    needs_matrix: ClassVar[bool] = False

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """The quantity's tensors for one parameter and one stack of cotangents."""
        raise NotImplementedError

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> Any:
        """The result, from the values of all parameters summed over stacks and batches."""
        return ByParameter({name: value[0] for name, value in values.items()})

    @property
    def name(self) -> str:
        """The attribute under which the result is found: the class name in snake case."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__)
        return words.lower()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ByParameter(Mapping[str, Tensor]):
    """Results keyed by parameter name, as in `model.named_parameters()`; `.total` where it is defined."""

    def __init__(self, values: Mapping[str, Tensor], total: Tensor | None = None) -> None:
        self._values = dict(values)
        self._total = total

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._values[name]
        except KeyError:
            known = ", ".join(self._values) or "none"
            raise KeyError(f"no result for parameter {name!r}; there are: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def total(self) -> Tensor:
        """The whole model's value: given by the quantity, or the sum over all elements of all parameters."""
        if self._total is not None:
            return self._total
        if not self._values:
            raise NoBackward("asked for the total of a result that holds no parameter")
        return torch.stack([v.sum() for v in self._values.values()]).sum()

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(v.shape)}" for name, v in self._values.items())
        return f"ByParameter({shapes})"


def positive(what: str, value: int | None) -> int | None:
    """Check a number of samples: None or at least 1."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise BadInput(f"{what} must be None or a whole number of at least 1, got {value!r}")
    return value
