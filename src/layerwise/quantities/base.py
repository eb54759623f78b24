"""What a quantity is: a cotangent to send back, a function of a parameter's gradient, and how batches join."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from layerwise.errors import BadInput, NoBackward, Renamed
from layerwise.gradient.parameter import ParameterGradient
from layerwise.graph.cotangents import Cotangent, Gradient
from layerwise.graph.coverage import Graph
from layerwise.graph.samples import SampleLayout
from layerwise.losses import Likelihood
from layerwise.ranks.group import Ranks
from layerwise.tape.tape import Tape

__all__ = ["ByParameter", "Context", "Quantity", "Union", "positive", "sum_of_stacks", "takes_draws"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Union:
    """The batches that a result covers: their samples, whether their losses are means, and the scale asked for.

    terms: the denominator of the mean (of the first one, where several are added), or 1.
    """

    samples: int
    mean: bool
    scale: str
    terms: float = 1.0


@dataclass(frozen=True)
class Context:
    """What `finish` may read besides its values: the gradient."""

    gradient: Mapping[str, Tensor]


class Quantity:
    """Base of all quantities; a new one is a subclass with `compute`, and `finish` where it is not a sum.

    cotangent: what is sent back. needs_samples: whether the samples must be told apart.
    powers: for each tensor that `compute` returns, how it scales with the loss (gradient 1, square 2).
    concatenate: results of several batches are concatenated along samples instead of added; one answer, or one
        for each tensor.
    stacks: results of several stacks of cotangents are concatenated along dim 1 instead of added.
    computed_first: whether it comes before the other quantities, which can read their values off its contraction.
    revisits: whether a quantity of the gradient has a second stage in each batch: `compute` sees every parameter,
        `survey` the values of all, and `revisit` sees every parameter once more and gives the final tensors. Between
        the stages the cotangents of all uses are held beside the inputs that the tape holds anyway, and the
        per-sample gradients of parameters that reach their uses through a derived tensor.
    rows_only: whether uses without row form may be handed over as parts without numbers, which `covers` refuses.
    """

    cotangent: Cotangent = Gradient()
    needs_samples: bool = True
    powers: tuple[float, ...] = (2,)
    concatenate: bool | tuple[bool, ...] = False
    stacks: ClassVar[bool] = False
    computed_first: ClassVar[bool] = False
    revisits: ClassVar[bool] = False
    rows_only: ClassVar[bool] = False

    def check_losses(self, losses: Sequence[Likelihood]) -> None:
        """Raise Undefined where the quantity does not exist for these losses; called before anything is sent."""

    def check_union(self, seen: Union, batch: Union) -> None:
        """Raise Undefined where the batches seen so far and a further one have no result in common."""

    def check_size(self, columns: int, samples: int, sizes: Mapping[str, int]) -> None:
        """Refuse, before any work, what would not fit: called with V, N and the elements of each parameter."""

    def covers(self, gradient: ParameterGradient) -> bool:
        """Whether the parameter is to have a result; the same for all stacks of one batch."""
        return True

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """The quantity's tensors for one parameter and one stack of cotangents."""
        raise NotImplementedError

    def first_pass(self) -> Quantity | None:
        """The quantity that a two-pass quantity needs over all data first (the factors of a basis), or None."""
        return None

    def second_pass(self, result: Any) -> Quantity:
        """The quantity of the second pass over the data, from the result of `first_pass` over all data."""
        raise NotImplementedError

    def second_values(self, values: Mapping[str, tuple[Any, ...]], second: Quantity) -> dict[str, tuple[Any, ...]]:
        """Values of the second-pass quantity `second`, recomputed from values of this one over the same batches."""
        raise NotImplementedError

    def broadcast(self, ranks: Ranks) -> None:
        """Broadcast rank 0's second-pass state (eigenbasis), so that all ranks use identical numbers."""

    def settings(self) -> dict[str, Any]:
        """What ranks must agree on for their values to add up: its repr, and numbers among the attributes."""
        simple = {key: v for key, v in vars(self).items() if isinstance(v, bool | int | float | str | None)}
        return {"repr": repr(self)} | simple

    def compute_graph(self, tape: Tape, graph: Graph, layout: SampleLayout | None) -> dict[str, tuple[Tensor, ...]]:
        """The quantity's tensors by parameter, from the graph itself (cotangents `Second`, `InGraph`).

        layout: None where the samples cannot be told apart.
        """
        raise NotImplementedError

    def survey(self, values: Mapping[str, tuple[Tensor, ...]], batch: Union) -> Any:
        """What the second stage needs, from the first stage's values of all parameters in one batch."""
        raise NotImplementedError

    def revisit(self, gradient: ParameterGradient, survey: Any) -> tuple[Tensor, ...]:
        """The quantity's tensors for one parameter, in the second stage."""
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


def sum_of_stacks(quantity: Quantity, gradients: Iterable[ParameterGradient]) -> dict[str, tuple[Any, ...]]:
    """A quantity's values by parameter, summed over the gradients of several stacks of cotangents."""
    values: dict[str, tuple[Any, ...]] = {}
    for gradient in gradients:
        if quantity.covers(gradient):
            new, old = quantity.compute(gradient), values.get(gradient.name)
            values[gradient.name] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))
    return values


def positive(what: str, value: int | None) -> int | None:
    """Check a count: None or at least 1."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise BadInput(f"{what} must be None or a whole number of at least 1, got {value!r}")
    return value


def takes_draws(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function take `samples=`, the old word for the number of `draws`, with a warning."""

    @wraps(function)
    def called(*args: P.args, **given: P.kwargs) -> R:
        if "samples" in given:
            name = function.__qualname__.removesuffix(".__init__")
            if "draws" in given:
                raise TypeError(f"{name} got both draws= and samples=, the old word for it")
            warnings.warn(
                f"{name}(samples=) is {name}(draws=) now: samples are those of the batch. The next release takes the "
                "old word no more", Renamed, stacklevel=2,
            )  # fmt: skip
            given["draws"] = given.pop("samples")
        return function(*args, **given)

    return called
