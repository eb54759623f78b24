"""`as_loss`: marks a function of the user's own as a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import BadInput

__all__ = ["OwnCall", "OwnLoss", "as_loss", "tensors_in"]

_REDUCTIONS = (None, "mean", "sum")


class OwnLoss:
    """A function marked as a loss; made by `as_loss`."""

    def __init__(self, func: Callable[..., Tensor], reduction: str | None) -> None:
        self.func = func
        self.reduction = reduction
        self.__name__ = getattr(func, "__name__", None) or type(func).__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's value; an active tape records the call."""
        tensors = list(tensors_in((args, kwargs)))
        if has_torch_function(tensors):
            return handle_torch_function(self, tensors, *args, **kwargs)
        return self.func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"as_loss({self.__name__}, reduction={self.reduction!r})"


def as_loss(func: Callable[..., Tensor], reduction: str | None = None) -> OwnLoss:
    """Mark a function as a loss, whose first argument is the model's output: L = Σ_n l_n(z_n).

        criterion = lw.as_loss(focal_loss, reduction="mean")
        criterion(model(x), y).backward()        # inside `observe`

    Its Hessian in that argument (a tensor, or tensors in tuples, lists and mappings) is then that of the loss,
    taken by differentiating twice. Without the mark, the output of the observed module is that argument.
    reduction: "mean" where the loss is a mean over the samples, "sum" where it is a sum over them. None: unknown;
    then quantities of one batch with `scale="loss"` alone are defined.
    Values and gradients are those of `func`; outside of `observe` the mark does nothing. Raises: `BadInput`.
    """
    if not callable(func):
        raise BadInput(f"as_loss needs a function of the model's output, got {type(func).__name__}")
    if reduction not in _REDUCTIONS:
        raise BadInput(f'as_loss: reduction must be None, "mean" or "sum", got {reduction!r}')
    return OwnLoss(func, reduction)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for x in value.values():
            yield from tensors_in(x)
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from tensors_in(x)


@dataclass(frozen=True, eq=False)
class OwnCall:
    """A call of a loss of the user's own, with the attributes of `LossCall`.

    logits: one of the tensors that it depends on, or zeros of its shape. place: where the user called it, in words.
    """

    name: str
    logits: Tensor
    reduction: str | None = None
    class_axis: int | None = None
    learned: tuple[str, ...] = ()
    place: str = ""

    def __str__(self) -> str:
        outputs = f" of outputs {tuple(self.logits.shape)}" if self.logits.numel() else ""
        return f"{self.name}{outputs}{self.place}"
