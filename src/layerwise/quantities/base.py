"""The base of quantities: a cotangent to backpropagate, a function of a parameter's gradient, a sum over batches."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar

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
    """The batches that a result covers: number of samples, whether their losses are means, and the scale asked for.

    terms: the denominator of the mean loss (of the first one, where several losses are added), or 1.
    pooled: whether further batches join to one with it, of which a mean runs over all terms (`accumulate`, ranks); else
    their losses add up as they are (several backward passes in one `observe`).
    """

    samples: int
    mean: bool
    scale: str
    terms: float | Tensor = 1.0
    pooled: bool = False


@dataclass(frozen=True)
class Context:
    """What `finish` may read besides its values: the gradient of the loss by parameter."""

    gradient: Mapping[str, Tensor]


class Quantity:
    """Base of all quantities: a subclass defines `compute`, and `finish` where the result is not a plain sum.

    cotangent: what is backpropagated from the loss. needs_samples: whether per-sample gradients are needed.
    powers: for each tensor that `compute` returns, how it scales with the loss (gradient 1, square 2).
    concatenate: results of several batches are concatenated along samples instead of added; one bool for all
        tensors, or one for each.
    stacks: results of several stacks of cotangents are concatenated along dim 1 instead of added.
    rows_of_many: how the rows of several parameters alike may stand as those of one, for which `compute` then gives
        the values of all: "samples", where the value of each sample is of its own rows alone, or "groups", where the
        value of each element is; None where neither is.
    computed_first: whether it is computed before other quantities, because they can reuse its contraction.
    revisits: whether the quantity has a second stage in each batch: `compute` gets every parameter, `survey` the
        values of all, and `revisit` gets every parameter again and returns the final tensors. Between the stages
        memory holds the cotangents of all uses beside the recorded inputs, and the per-sample gradients of
        parameters that reach their uses through a derived tensor.
    rows_only: whether uses without row form may be passed as parts without numbers, which `covers` refuses.
    wirtinger: whether it is defined for complex parameters, with |g|² for a square (g = 2 dL/dw*, as in `.grad`).
    smaller: how to ask for less, in words, where a result is larger than its parameter.
    real_rows: whether the parts must tell which rows are real: those that a loss term which counts can reach.
    """

    cotangent: Cotangent = Gradient()
    needs_samples: bool = True
    powers: tuple[float, ...] = (2,)
    concatenate: bool | tuple[bool, ...] = False
    stacks: ClassVar[bool] = False
    rows_of_many: ClassVar[Literal["samples", "groups"] | None] = None
    computed_first: ClassVar[bool] = False
    revisits: ClassVar[bool] = False
    rows_only: ClassVar[bool] = False
    wirtinger: bool = False
    real_rows: bool = False
    smaller: ClassVar[str] = "or take a smaller batch"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        first = next(c for c in cls.__mro__ if "compute" in vars(c) or "rows_of_many" in vars(c))
        if "rows_of_many" not in vars(first):
            cls.rows_of_many = None

    def check_losses(self, losses: Sequence[Likelihood]) -> None:
        """Raise Undefined where the quantity does not exist for these losses; called before backpropagation."""

    def check_union(self, seen: Union, batch: Union) -> None:
        """Raise Undefined where a further batch cannot be joined with those observed so far."""

    def check_size(self, columns: int, samples: int, sizes: Mapping[str, int]) -> None:
        """Raise, before any work, for a too large result; columns: V, samples: N, sizes: elements by name."""

    def covers(self, gradient: ParameterGradient) -> bool:
        """Whether the parameter gets a result; must be the same for all stacks of cotangents of one batch."""
        return True

    def forms_rows(self, positions: int, outputs: int, inputs: int) -> bool:
        """Whether `compute` forms a weight's per-sample gradients, all or a few at a time, so that their sum is cheap.

        positions: T of a sample; outputs, inputs: O and I of the weight's matrix.
        """
        return False

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """The quantity's tensors for one parameter and one stack of cotangents."""
        raise NotImplementedError

    def numbers(self, gradient: ParameterGradient) -> int:
        """How many numbers `compute` returns for one parameter: what has no room is refused before."""
        return gradient.shape.numel()

    def first_pass(self) -> Quantity | None:
        """The quantity that a two-pass quantity needs over all data first (the factors of a basis), or None."""
        return None

    def second_pass(self, result: Any) -> Quantity:
        """The quantity of the second pass over the data, from the result of `first_pass` over all data, its own now."""
        raise NotImplementedError

    def second_values(self, values: Mapping[str, tuple[Any, ...]], second: Quantity) -> dict[str, tuple[Any, ...]]:
        """Values of the second-pass quantity `second`, recomputed from values of this one over the same batches."""
        raise NotImplementedError

    def broadcast(self, ranks: Ranks) -> None:
        """Broadcast rank 0's second-pass state (eigenbasis), so that all ranks use identical numbers."""

    def settings(self) -> dict[str, Any]:
        """What ranks must agree on before their values are added: the repr, and all plain attributes."""
        simple = {key: v for key, v in vars(self).items() if isinstance(v, bool | int | float | str | None)}
        return {"repr": repr(self)} | simple

    def compute_graph(self, tape: Tape, graph: Graph, layout: SampleLayout | None) -> dict[str, tuple[Tensor, ...]]:
        """The quantity's tensors by parameter, computed on the autograd graph (cotangents `Second`, `InGraph`).

        layout: where samples lie in each tensor; None where samples are mixed.
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
        """The attribute of `Seen` that holds the result: the class name in snake case."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__)
        return words.lower()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ByParameter(Mapping[str, Tensor]):
    """Results by parameter name, as in `model.named_parameters()`; `.total` for the whole model, where defined."""

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
            raise NoBackward(
                "asked for the total of a result that holds no parameter: the loss reached none that was asked for"
            )
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


def positive(what: str, value: int | None, none: bool = True) -> int | None:
    """Return the count if it is a whole number of at least 1, or None where `none`; raise BadInput otherwise."""
    if (value is None and not none) or (value is not None and (not isinstance(value, int) or value < 1)):
        raise BadInput(f"{what} must be {'None or ' * none}a whole number of at least 1, got {value!r}")
    return value


def takes_draws(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: accept `samples=`, the deprecated name of `draws=`, with a warning."""

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
