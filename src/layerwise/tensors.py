"""Helpers for plain tensors: finiteness, complex squares, memory, copy on write, sparse to dense, random states.

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
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "HALF", "Verdict", "WrongAssumption", "all_finite", "as_real", "dense", "empty", "forked_random", "free_memory",
    "is_finite", "is_out_of_memory", "largest_entries", "lazy_copy", "norms", "one_on", "random_states_of",
    "set_random_states", "squared", "together_finite", "wide_type", "widened", "without_grad", "write_where",
]  # fmt: skip


HALF = torch.float16, torch.bfloat16

P = ParamSpec("P")
R = TypeVar("R")


def without_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: `torch.no_grad()`, entered only where gradients are recorded, as in no hook of a backward pass."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        torch._C._set_grad_enabled(False)  # not `torch.no_grad()`, whose end an interrupt can cut short
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return called


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are held in: float32 for half precision, which loses small terms and overflows at 65,504."""
    return torch.float32 if dtype in HALF else dtype


def widened(x: Tensor) -> Tensor:
    """The tensor in the type that sums are held in."""
    return x.to(torch.float32) if x.dtype in HALF else x


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if x.numel() == 1 and x.layout is torch.strided:
        return cmath.isfinite(x.item())
    x = x.detach()
    # NaN and infinity survive a sum, which costs a tenth; a sum of finite numbers may overflow
    return cmath.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


def together_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity: one launch for all and one wait for each accelerator and type.

    The CPU waits for nothing, and sums cost it less: as in `is_finite`, their own sum shows that all are finite.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        if t.layout is not torch.strided:
            if not is_finite(t):
                return False
        elif t.numel():
            t = as_real(t.detach())
            kinds.setdefault((t.device, t.dtype), []).append(t)
    for (device, _), some in kinds.items():
        if device.type != "cpu":
            if not bool(torch.isfinite(torch.stack(_largest(some))).all()):
                return False
        elif not bool(torch.isfinite(torch.stack([t.sum() for t in some]).sum())) and not all(map(is_finite, some)):
            return False
    return True


def largest_entries(tensors: Mapping[str, Tensor]) -> Iterator[tuple[list[str], list[Tensor]]]:
    """The largest |entry| of named tensors, NaN where one is: names and a number `[]` each, for each device and type.

    The host does not wait.
    """
    kinds: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, t in tensors.items():
        t = t.detach()
        t = as_real(t if t.layout is torch.strided else t._values() if t.is_sparse else t.to_dense())
        if t.numel():
            kinds.setdefault((t.device, t.dtype), {})[name] = t
    for some in kinds.values():
        yield list(some), _largest(list(some.values()))


def _largest(tensors: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(tensors, math.inf))


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm `[]` of each tensor, in float32 for half precision: one launch for tensors of one type."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        kinds.setdefault((t.device, t.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for (_, dtype), places in kinds.items():
        norms_of = torch._foreach_norm([tensors[i] for i in places], 2, wide_type(dtype))
        found |= zip(places, norms_of, strict=True)
    return [found[i] for i in range(len(tensors))]


class WrongAssumption(Exception):
    """What a step has assumed is not so: it is to be computed again, with what is read."""


class _Question(NamedTuple):
    """Numbers of a `Verdict`, with what was said of them."""

    values: list[Tensor]
    judge: Callable[[list[float]], None]
    places: Sequence[str]
    good: Callable[[Tensor], Tensor] | None


class Verdict:
    """Numbers that stay on their device until `read`, which waits once for each device, and raises for bad ones."""

    def __init__(self) -> None:
        self._asked: list[_Question] = []
        self._error: tuple[type[Exception], tuple[Any, ...]] | None = None  # a raised one would be in a cycle

    def ask(
        self, values: Tensor | Sequence[Tensor], judge: Callable[[list[float]], None], places: Sequence[str] = (),
        good: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Read some numbers with the others. judge: raises where they are bad.

        places, good: for `flags`, what is judged and, by the numbers on their device, whether it is well; by default
        where they are finite.
        """
        parts = [values] if isinstance(values, Tensor) else values
        self._asked.append(_Question([x.detach().reshape(-1) for x in parts], judge, places, good))

    def join(self, other: Verdict) -> None:
        """Read the other's numbers with these."""
        self._asked += other._asked

    @torch.no_grad()
    def flags(self) -> tuple[Tensor, list[str]]:
        """Whether all is well at each place, `[places]`, on one device; the host does not wait, and no judge is asked.

        Only for a verdict whose numbers were all asked with their places.
        """
        device = self._asked[0].values[0].device
        plain = [x.to(device) for each in self._asked if each.good is None for x in each.values]
        finite = iter((torch.cat(plain).abs() < math.inf).split([len(x) for x in plain]) if plain else ())
        found: list[Tensor] = []
        for values, _, _, good in self._asked:
            found += islice(finite, len(values)) if good is None else [good(torch.cat([x.to(device) for x in values]))]
        return torch.cat(found), [name for each in self._asked for name in each.places]

    def read(self) -> None:
        """Judge all numbers; raises the first error, and raises it again whenever it is called."""
        if self._error is not None:
            kind, args = self._error
            raise kind(*args)
        asked, self._asked = self._asked, []
        devices: dict[torch.device, list[Tensor]] = {}
        for x in (x for values, *_ in asked for x in values if x.device.type != "cpu"):
            devices.setdefault(x.device, []).append(x)
        found = {device: iter(torch.cat(some).tolist()) for device, some in devices.items()}
        try:
            for values, judge, *_ in asked:
                its = (x.tolist() if x.device.type == "cpu" else islice(found[x.device], len(x)) for x in values)
                judge([number for some in its for number in some])
        except Exception as error:
            self._error = type(error), error.args
            raise

    def reason(self, kind: type[Exception]) -> str | None:
        """As `read`, with the words of an error of this kind in place of raising it; None where all is well."""
        try:
            self.read()
        except kind as error:
            return str(error)
        return None


def as_real(x: Tensor) -> Tensor:
    """A complex tensor with its two parts as a last axis, `[*shape, 2]`; a real one as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def squared(x: Tensor) -> Tensor:
    """|x|², real."""
    return as_real(x).square().sum(-1) if x.is_complex() else x.square()


@torch.no_grad()
def write_where(flag: Tensor, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Targets ← values where a flag `[]` on a device holds, else unchanged: in a few launches, without a wait.

    Bits are chosen, so that NaN stays out.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for target, value in zip(targets, values, strict=True):
        kinds.setdefault((target.device, target.dtype), []).append((target, value))
    for (device, dtype), pairs in kinds.items():
        old, new = (torch.cat([t.detach().reshape(-1).to(dtype) for t in some]) for some in zip(*pairs, strict=True))
        chosen = torch.where(flag.to(device), new, old).split([t.numel() for t, _ in pairs])
        torch._foreach_copy_([t for t, _ in pairs], [c.view(t.shape) for c, (t, _) in zip(chosen, pairs, strict=True)])


@cache
def one_on(device: torch.device) -> Tensor:
    """The number 1 `[]` on a device, in float32, made there once; not to be written."""
    return torch.ones((), device=device)


@without_grad
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
            torch._amp_foreach_non_finite_check_and_unscale_(some, found, one_on(device))
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


def free_memory(device: torch.device) -> int | None:
    """The bytes that can still be allocated on a device; None where that is not known.

    CPU (Linux): what the kernel calls available, and no more than the memory cgroups leave. Accelerators: what
    is free there, and what torch's allocator holds unused.
    """
    if device.type == "cpu":
        return min(_available(), default=None)
    try:
        free, _ = torch.accelerator.get_memory_info(device)
        return int(free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device))
    except (RuntimeError, ValueError, AttributeError):  # a device, or a release of torch, that does not say
        return None


_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_OF_CGROUP = {  # by version: the folder, and the files of its limit and use, and in memory.stat the files that can go
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _available() -> Iterator[int]:
    """What the system leaves, and each cgroup of this process, in bytes."""
    if (kilobytes := _field(_PROC / "meminfo", "MemAvailable:")) is not None:
        yield 1024 * kilobytes
    try:
        lines = (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = 1 if "memory" in controllers.split(",") else 2
        if version == 1 or not controllers:
            folder, limit, use, unneeded = _OF_CGROUP[version]
            root, own = _CGROUPS / folder, Path(path.lstrip("/"))
            for group in (root / own, *(root / parent for parent in own.parents)):
                most, used = _whole_number(group / limit), _whole_number(group / use)
                if most is not None and used is not None:
                    yield max(0, most - used + (_field(group / "memory.stat", unneeded) or 0))


def _whole_number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file; "max"
        return None


def _field(file: Path, name: str) -> int | None:
    """The whole number after a name, in a file of one name a line."""
    try:
        words = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        return next((int(found[1]) for found in words if found[:1] == [name]), None)
    except (OSError, ValueError, IndexError):
        return None


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch's errors then are RuntimeErrors, on the CPU with nothing but their text."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("allocate memory" in said or "not enough memory" in said)
