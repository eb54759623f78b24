"""Helpers for plain tensors: finiteness, complex squares, huge pages, copy on write, sparse to dense, random states.

Per-sample gradients are bound by page faults, not by arithmetic: on Linux a tensor of 400 MB touches 100,000 small
pages for the first time. Asking for transparent huge pages (`madvise`) is only a hint, without which memory is
allocated as always. Nothing is cached: the memory is freed with the tensor.
"""

from __future__ import annotations

import cmath
import ctypes
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "all_finite", "as_real", "dense", "empty", "forked_random", "is_finite", "lazy_copy", "random_states_of",
    "set_random_states", "squared", "together_finite", "without_grad",
]  # fmt: skip


P = ParamSpec("P")
R = TypeVar("R")


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: `torch.no_grad()`, entered only where gradients are recorded, as in no hook of a backward pass."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return called


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    x = x.detach()
    # NaN and infinity survive a sum, which costs a tenth; a sum of finite numbers may overflow
    return cmath.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


def together_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity: one launch for all and one wait for each accelerator and type.

    The CPU waits for nothing, and a sum costs it less.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        t = as_real(t.detach()) if t.layout is torch.strided else t.detach()
        if t.device.type == "cpu" or t.layout is not torch.strided:
            if not is_finite(t):
                return False
        elif t.numel():
            kinds.setdefault((t.device, t.dtype), []).append(t)
    largest = (torch.stack(list(torch._foreach_norm(some, math.inf))) for some in kinds.values())
    return all(bool(torch.isfinite(found).all()) for found in largest)


def as_real(x: Tensor) -> Tensor:
    """A complex tensor with its two parts as a last axis, `[*shape, 2]`; a real one as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def squared(x: Tensor) -> Tensor:
    """|x|², real."""
    return as_real(x).square().sum(-1) if x.is_complex() else x.square()


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity: one call and one wait for each device.

    The call is that of a gradient scaler, which multiplies in place, here by 1: no bit changes.
    """
    devices: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        devices.setdefault(t.device, []).append(t)
    try:
        for device, some in devices.items():
            found = torch.zeros((), device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(some, found, _one(device))
            if found.item():
                return False
    except RuntimeError:  # types, layouts and devices that scalers do not know
        return all(map(is_finite, tensors))
    return True


_LARGE = 2**23  # bytes from which the hint pays; a huge page has 2**21
_PAGE = 4096
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    call.restype = ctypes.c_int
    found: Callable[..., int] = call
    return found


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor `[*shape]` with the type and device of `like`."""
    tensor = like.new_empty(tuple(shape))
    size = tensor.numel() * tensor.element_size()
    if size >= _LARGE and tensor.device.type == "cpu" and (hint := _madvise()) is not None:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        hint(start, (tensor.data_ptr() + size - start) // _PAGE * _PAGE, _MADV_HUGEPAGE)
    return tensor


def lazy_copy(tensor: Tensor) -> Tensor:
    """A copy on write: memory is shared until torch copies it when either tensor is written to."""
    try:
        return torch._lazy_clone(tensor)
    except RuntimeError:  # memory without copy on write
        return tensor.clone()


def random_states_of(devices: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """The states of torch's generators of the accelerators among the devices."""
    states = {}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            states[device] = torch.get_device_module(device).get_rng_state(*_number(device))
    return states


def set_random_states(states: Mapping[torch.device, Tensor]) -> None:
    """Set torch's generators of accelerators to the given states."""
    for device, state in states.items():
        torch.get_device_module(device).set_rng_state(state, *_number(device))


def _number(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # its module has one device, and takes no number


@contextmanager
def forked_random(devices: Iterable[torch.device]) -> Iterator[None]:
    """Give torch's generators of the CPU and of the devices their state back at exit."""
    states = random_states_of(devices)
    with torch.random.fork_rng([]):
        try:
            yield
        finally:
            set_random_states(states)


def dense(g: Tensor) -> Tensor:
    """A possibly sparse gradient as a dense tensor."""
    return g.to_dense() if g.is_sparse else g
