"""The table of known calls, and `register`, which adds a user's entry to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.ops import contraction, conv, elementwise, embedding, norm
from layerwise.ops.base import Call, Slot
from layerwise.ops.elementwise import one_by_one
from layerwise.ops.forms import Form
from layerwise.rows.base import Samples, gradients

__all__ = ["BUILD", "LINEAR", "Build", "Entry", "register"]

Build = Callable[[Call, Sequence[Tensor]], "list[Slot | None]"]
BUILD: dict[Callable[..., Any], Build] = {
    func: family.slots for family in (elementwise, norm, embedding, conv, contraction) for func in family.FUNCTIONS
}
LINEAR = frozenset((*contraction.FUNCTIONS, *conv.FUNCTIONS, *norm.FUNCTIONS))  # their derivatives read no output


class Entry:
    """A registered function; `remove()`, or the end of a `with` block, removes it from the table."""

    def __init__(self, func: Callable[..., Any], build: Build) -> None:
        self.func = func
        BUILD[func] = build

    def remove(self) -> None:
        """Forget the function; without effect the second time."""
        BUILD.pop(self.func, None)

    def __enter__(self) -> Entry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def register(
    func: Callable[..., Any],
    *,
    form: Callable[[Call], Form | None] | None = None,
    slot: Callable[[Call, Tensor], Slot | None] | None = None,
    example: Sequence[Any],
    options: Mapping[str, Any] | None = None,
) -> Entry:
    """Add a torch function to the known calls, after a test of the entry against autograd.

    A description is a grouped linear map `Z[n,t,k,o] = Σ_i W[k,o,i] A[n,t,k,i]` of each tensor that needs a gradient.

    func: a torch function or tensor method that the model calls; functions of one's own are followed inside anyway.
    form: of a product of tensors: its einsum, or None for arguments that it does not describe.
    slot: of anything else: the map of one tensor of a call, or None for an argument that it does not describe.
    example: arguments of the function to test it with, `func(*example, **options)`; tensors that require gradients
        are what is described. Sizes that differ from one another find more mistakes.

    Raises BadInput where the function is known already, where not exactly one of `form` and `slot` is given, where
    the example has nothing to describe, and where the entry's gradients, whole or per sample along any axis that it
    offers, are not those of autograd (relative 1e-9 in float64).
    """
    name = getattr(func, "__name__", str(func))
    if func in BUILD:
        raise BadInput(f"{name} is known already; an entry of your own would change what others rely on")
    if form is not None and slot is None:
        build = _products(form)
    elif slot is not None and form is None:
        build = partial(one_by_one, slot)
    else:
        given = "both" if form is not None else "neither"
        raise BadInput(f"{name} needs one of form= (a product of tensors) and slot= (anything else), not {given}")
    _test(name, build, *_recorded(func, example, options or {}))
    return Entry(func, build)


def _products(form: Callable[[Call], Form | None]) -> Build:
    def build(call: Call, used: Sequence[Tensor]) -> list[Slot | None]:
        return contraction.described(call, form(call), used)

    return build


def _recorded(
    func: Callable[..., Any], example: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Call, list[Tensor], Tensor]:
    """The call as the tape would record it, in float64; its tensors that require gradients; its output."""

    def double(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().double().requires_grad_(x.requires_grad)
        return x

    args, kwargs = tuple(map(double, example)), {key: double(value) for key, value in options.items()}
    with torch.enable_grad():
        out = func(*args, **kwargs)
    used = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    return Call(func, args, kwargs, out.shape), used, out


def _test(name: str, build: Build, call: Call, used: list[Tensor], out: Tensor) -> None:
    """Compare the entry with autograd, one sample's cotangent at a time."""
    if not used:
        raise BadInput(f"no tensor of the example of {name} requires a gradient: there is nothing to describe")
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    for tensor, slot in zip(used, build(call, used), strict=True):
        where = f"the entry of {name} for the tensor of shape {tuple(tensor.shape)}"
        if slot is None:
            raise BadInput(f"{where} describes nothing: it returned None for the example")
        (whole,) = torch.autograd.grad(out, tensor, cotangent, retain_graph=True)
        if slot.factored:
            _same(where, "gradient", slot.fold(gradients(slot.rows(cotangent[None], None)).sum(1))[0], whole)
        if slot.linear:
            _same(where, "gradient (which a linear slot has everywhere)", whole, _elsewhere(call, tensor, cotangent))
        for axis in slot.axes:
            each = [
                torch.autograd.grad(out, tensor, torch.where(place, cotangent, 0.0), retain_graph=True)[0]
                for place in _places(out.shape, axis)
            ]
            found = slot.dense(cotangent[None], Samples(out.shape[axis], axis))[0]
            _same(where, f"per-sample gradient along axis {axis} of the output", found, torch.stack(each))


def _elsewhere(call: Call, tensor: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of the tensor at twice its value."""
    twice = (2 * tensor.detach()).requires_grad_()
    args = tuple(twice if x is tensor else x for x in call.args)
    kwargs = {key: twice if x is tensor else x for key, x in call.kwargs.items()}
    with torch.enable_grad():
        out = call.func(*args, **kwargs)
    return torch.autograd.grad(out, twice, cotangent)[0]


def _places(shape: torch.Size, axis: int) -> list[Tensor]:
    """One mask for each index of an axis."""
    index = torch.arange(shape[axis]).reshape(-1, *(1,) * (len(shape) - 1 - axis))
    return [index == n for n in range(shape[axis])]


def _same(where: str, what: str, found: Tensor, true: Tensor) -> None:
    if found.shape != true.shape:
        raise BadInput(f"{where}: the {what} has shape {tuple(found.shape)}, autograd's {tuple(true.shape)}")
    error = float((found - true).abs().max() / true.abs().max().clamp(min=1e-300))
    if not error <= 1e-9:
        raise BadInput(f"{where}: the {what} differs from autograd's by {error:.1e} of its largest element")
