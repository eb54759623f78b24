"""Which torch calls make a loss, and the meaning of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput
from .mark import OwnLoss

__all__ = ["LossCall", "bind", "check", "is_loss", "sides_of"]

_NAMES = (
    "cross_entropy",
    "nll_loss",
    "mse_loss",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy",
    "soft_margin_loss",
    "huber_loss",
    "smooth_l1_loss",
    "gaussian_nll_loss",
    "poisson_nll_loss",
    "l1_loss",
)
_LOSSES: dict[Any, str] = {getattr(F, name): name for name in _NAMES}
_SIGNATURES = {name: inspect.signature(func) for func, name in _LOSSES.items()}
# by name: the arguments in their order with their defaults, and those that have none
_DEFAULTS = {
    name: ({key: p.default for key, p in signature.parameters.items()},
           {key for key, p in signature.parameters.items() if p.default is p.empty})
    for name, signature in _SIGNATURES.items()
}  # fmt: skip
_CLASS = frozenset({"cross_entropy", "nll_loss"})
# f(z, y) = f(y, z): a call with prediction and target exchanged means the same.
_SYMMETRIC = frozenset({"mse_loss", "huber_loss", "smooth_l1_loss", "l1_loss"})


@dataclass(frozen=True, eq=False)
class LossCall:
    """One loss call with its arguments by name.

    name: the function's name in `torch.nn.functional`.
    logits: the prediction, still attached: the call's input, or `z` where the input is `log_softmax(z)`.
    target: detached; class indices, class probabilities, or values.
    reduction: "mean", "sum" or "none".
    options: the call's other arguments, tensors detached.
    class_axis: the axis of the classes in `logits`; None for an elementwise loss.
    log_softmax: True where `logits` are the input of `log_softmax`, not that of the call.
    learned: names of the arguments besides the prediction that require grad; not empty: no likelihood.
    place: where the user called it, in words.
    """

    name: str
    logits: Tensor
    target: Tensor
    reduction: str
    options: Mapping[str, Any]
    class_axis: int | None
    log_softmax: bool
    learned: tuple[str, ...]
    place: str = ""

    def recorded(self, place: str) -> LossCall:
        """The call with its prediction detached, and where the user made it."""
        return LossCall(
            self.name, self.logits.detach(), self.target, self.reduction, self.options, self.class_axis,
            self.log_softmax, self.learned, place,
        )  # fmt: skip

    @property
    def soft(self) -> bool:
        """True where the target holds class probabilities."""
        return self.name == "cross_entropy" and self.target.shape == self.logits.shape

    @property
    def term_shape(self) -> torch.Size:
        """Shape of the loss terms, which is the call's output shape with `reduction="none"`."""
        shape = list(self.logits.shape)
        if self.class_axis is not None:
            del shape[self.class_axis]
        return torch.Size(shape)

    @cached_property
    def class_range(self) -> tuple[int, int]:
        """The smallest and largest class index of the target, in one wait for the device."""
        ends = torch.aminmax(self.target)
        if ends[0].device.type == "cpu":
            return int(ends[0]), int(ends[1])
        low, high = torch.stack(ends).tolist()
        return int(low), int(high)

    def unread_range(self) -> tuple[Tensor, Callable[[list[float]], None]] | None:
        """On an accelerator: the class range without ignored targets, still there, and what raises BadInput for it.

        None where `check` has read it, or where there is none.
        """
        if self.class_axis is None or self.soft or self.target.device.type == "cpu":
            return None
        kept = self.target.masked_fill(self.target == self.options["ignore_index"], 0)
        return torch.stack(torch.aminmax(kept)), lambda found: _check_range(self, *map(int, found))

    def __str__(self) -> str:
        return (
            f"{self.name}(input {tuple(self.logits.shape)}, target {tuple(self.target.shape)}, "
            f"reduction={self.reduction!r}){self.place}"
        )


def is_loss(func: Callable[..., Any]) -> bool:
    """True where `func` makes a loss: one that `bind` understands, or one that is marked by `as_loss`."""
    return func in _LOSSES or type(func) is OwnLoss


def sides_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The prediction and the target of a loss call: its input and target, or those of an exchanged call."""
    first = args[0] if args else kwargs.get("input")
    second = args[1] if len(args) > 1 else kwargs.get("target")
    return _prediction_first(_LOSSES[func], first, second)


def bind(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    log_softmax_input: Tensor | None = None,
    log_softmax_dim: int | None = None,
) -> LossCall:
    """Name the arguments of a loss call and check their shapes; values are checked by `check`.

    log_softmax_input, log_softmax_dim: where the input was made by `log_softmax(z, dim)`, this `z` and `dim`
    (None: the caller knows that it is the class axis). `nll_loss` and `cross_entropy` are then both
    `cross_entropy(z, target)`, and the result's `logits` are `z`, which its `log_softmax` says; where
    `dim` is another axis, and for all other losses, `logits` stay the input.
    A call of a symmetric loss whose target alone requires grad is read with the two exchanged.
    Raises: `BadInput` for shapes that torch would broadcast, the legacy arguments `size_average` and
    `reduce`, an unknown reduction, a target of the wrong dtype.
    """
    name = _LOSSES[func]
    options = _named(name, args, kwargs)
    if options.pop("size_average", None) is not None or options.pop("reduce", None) is not None:
        raise BadInput(f"{name} was called with the legacy size_average or reduce: pass reduction instead.")
    options.pop("reduce", None)
    logits, target, reduction = options.pop("input"), options.pop("target"), options.pop("reduction")
    if reduction not in ("mean", "sum", "none"):
        raise BadInput(f"{name} was called with reduction={reduction!r}: use 'mean', 'sum' or 'none'.")
    logits, target = _prediction_first(name, logits, target)
    if not logits.is_floating_point():
        raise BadInput(f"{name} got an input of dtype {logits.dtype}: it needs a real floating-point input.")
    class_axis = None if name not in _CLASS else 0 if logits.dim() == 1 else 1
    if class_axis is None:
        _check_elementwise(name, logits, target, options)
    else:
        _check_classes(name, logits, target, options, class_axis)
    log_softmax = _normalises(class_axis, logits, log_softmax_input, log_softmax_dim)
    others = {"target": target, **options}
    return LossCall(
        name=name,
        logits=log_softmax_input if log_softmax and log_softmax_input is not None else logits,
        target=target.detach(),
        reduction=reduction,
        options={key: x.detach() if isinstance(x, Tensor) else x for key, x in options.items()},
        class_axis=class_axis,
        log_softmax=log_softmax,
        learned=tuple(key for key, x in others.items() if isinstance(x, Tensor) and x.requires_grad),
    )


def _named(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a loss call by name."""
    defaults, required = _DEFAULTS[name]
    given = dict(zip(defaults, args, strict=False))
    found = {**defaults, **given, **kwargs}
    plain = len(args) <= len(defaults) == len(found) and not given.keys() & kwargs.keys()
    if plain and required <= given.keys() | kwargs.keys():
        return found
    try:
        _SIGNATURES[name].bind(*args, **kwargs)
    except TypeError as error:
        raise BadInput(f"{name} was called with arguments it does not have: {error}.") from None
    return found


def _prediction_first(name: str, logits: Any, target: Any) -> tuple[Any, Any]:
    """The two exchanged where the loss is symmetric and only the second requires grad."""
    if name in _SYMMETRIC and isinstance(target, Tensor) and target.requires_grad and not logits.requires_grad:
        return target, logits
    return logits, target


def check(call: LossCall) -> None:
    """Refuse a batch for which torch has no loss, or nan; call it before the torch call.

    Cost: one minimum and maximum over class indices. On an accelerator they are not waited for: torch's own kernels
    assert the range there, and `LossCall.unread_range` reads it with other verdicts.
    Raises: `BadInput` for an empty batch, two devices, class indices out of range, a mean over ignored targets alone.
    """
    if call.logits.numel() == 0:
        raise BadInput(f"{call}: the batch is empty; skip it.")
    if call.target.device != call.logits.device:
        raise BadInput(
            f"{call}: its input lies on {call.logits.device} and its target on {call.target.device}; move one."
        )
    if call.class_axis is None or call.soft or call.target.device.type != "cpu":
        return
    classes, ignored = call.logits.shape[call.class_axis], call.options["ignore_index"]
    low, high = call.class_range
    inside = low >= 0 and high < classes
    if inside and not low <= ignored <= high:
        return
    kept = call.target[call.target != ignored]
    if not kept.numel():
        if call.reduction == "mean":
            raise BadInput(
                f"{call}: all {call.target.numel()} targets equal ignore_index={ignored}, so the mean is "
                "0/0; skip the batch, or use reduction='sum'."
            )
        return
    _check_range(call, *(int(x) for x in torch.aminmax(kept)))


def _check_range(call: LossCall, low: int, high: int) -> None:
    classes, ignored = call.logits.shape[call.class_axis or 0], call.options["ignore_index"]
    if low < 0 or high >= classes:
        raise BadInput(
            f"{call}: targets lie in [{low}, {high}], but the input has {classes} classes, 0 to "
            f"{classes - 1} (ignore_index={ignored}); correct the targets or the size of the model's output."
        )


def _normalises(class_axis: int | None, logits: Tensor, z: Tensor | None, dim: int | None) -> bool:
    """True where `log_softmax` normalised `z` over the classes of this call."""
    if class_axis is None or z is None or z.shape != logits.shape:
        return False
    return dim is None or dim % z.dim() == class_axis


def _check_elementwise(name: str, logits: Tensor, target: Tensor, options: Mapping[str, Any]) -> None:
    if target.shape != logits.shape:
        raise BadInput(
            f"{name} got an input of shape {tuple(logits.shape)} and a target of shape "
            f"{tuple(target.shape)}: torch would broadcast them; give both the same shape."
        )
    weight = options.get("weight")
    if weight is None:
        return
    if name in ("binary_cross_entropy_with_logits", "binary_cross_entropy"):
        _expanded(name, "weight", weight, logits)
    elif weight.shape != logits.shape:
        raise BadInput(f"{name} got a weight of shape {tuple(weight.shape)}: it needs {tuple(logits.shape)}.")


def _check_classes(name: str, logits: Tensor, target: Tensor, options: Mapping[str, Any], class_axis: int) -> None:
    if logits.dim() == 0:
        raise BadInput(f"{name} got a 0-dimensional input: it needs [C], [N,C] or [N,C,...].")
    weight, shape = options["weight"], logits.shape
    if weight is not None and weight.shape != (shape[class_axis],):
        raise BadInput(f"{name} got a weight of shape {tuple(weight.shape)} for {shape[class_axis]} classes.")
    if name == "cross_entropy" and target.shape == shape:
        if not target.is_floating_point():
            raise BadInput(f"{name} got class probabilities of dtype {target.dtype}: make them float.")
        return
    rows = shape[:class_axis] + shape[class_axis + 1 :]
    if target.shape != rows:
        raise BadInput(
            f"{name} got an input of shape {tuple(shape)} and a target of shape {tuple(target.shape)}: class "
            f"indices need {tuple(rows)}" + (f", class probabilities {tuple(shape)}." if class_axis else ".")
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise BadInput(f"{name} got class indices of dtype {target.dtype}: make them int64.")


def _expanded(name: str, argument: str, x: Tensor, like: Tensor) -> Tensor:
    """`x` broadcast to the shape of `like`; `BadInput` where that would enlarge `like`."""
    try:
        return x.expand(like.shape)
    except RuntimeError:
        raise BadInput(
            f"{name} got {argument} of shape {tuple(x.shape)}: it does not broadcast to {tuple(like.shape)}."
        ) from None
