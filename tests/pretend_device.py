"""A pretend accelerator: tensors on `pretend:0` hold CPU data, and every operation unwraps, runs and wraps.

    with counted() as count:
        model.to("pretend")(x.to("pretend")).sum().backward()
    count.launches, count.synchronisations

It raises where CUDA does (tensors or generators of two devices in one operation), draws from a generator of its own,
runs backward passes in the device's thread, and counts what makes an accelerator slow: operations launched, times the
host waits for a value, and copies from the host. Importing it registers the device for the whole process, so tests
that use it run in a process of their own. Gaps: an operation on the CPU alone takes the device's generator; torch ends
the process where Python raises an error in a backward pass on a device that is registered from Python, so the error of
an operation is printed first.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

__all__ = ["DEVICE", "Count", "DeviceTensor", "counted"]

NAME = "pretend"
torch.utils.rename_privateuse1_backend(NAME)
DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")

# The host waits for a value, or for a shape that depends on values.
_WAITS = {
    "_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_dim", "_unique2", "unique_consecutive",
    "unique_dim_consecutive", "bincount", "repeat_interleave", "is_nonzero", "_linalg_check_errors", "linalg_cholesky",
    "cholesky", "_linalg_eigh", "_linalg_svd", "linalg_lstsq", "linalg_eig", "_linalg_eigvals", "cholesky_inverse",
}  # fmt: skip
_COPIES = {"_to_copy", "copy_", "copy", "_copy_from", "_copy_from_and_resize", "_pin_memory", "_lazy_clone"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_NO_LAUNCH = {"detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "empty", "empty_strided", "empty_like",
    "new_empty", "new_empty_strided", "_local_scalar_dense", "set_", "resize_", "_lazy_clone"}  # fmt: skip
_DIRECT = ("copy_", "arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "randperm",
    "randperm.generator", "tril_indices", "triu_indices")  # fmt: skip
# A CPU tensor without axes is a number to these, as to all pointwise operations.
_PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product_attention")
_NUMBERS = {"fill_", "fill", "masked_fill", "masked_fill_", "where", "clamp", "clamp_", "_amp_foreach_non_finite_check"}


@dataclass
class Count:
    """What was counted: launches and synchronisations by operation, and copies from the host."""

    by_launch: Counter[str] = field(default_factory=Counter)
    by_wait: Counter[str] = field(default_factory=Counter)
    uploads: int = 0

    @property
    def launches(self) -> int:
        """The number of operations launched, those that only look at tensors otherwise left out."""
        return self.by_launch.total()

    @property
    def synchronisations(self) -> int:
        """How often the host waited for the device."""
        return self.by_wait.total()


_counts: list[Count] = []


@contextmanager
def counted() -> Iterator[Count]:
    """Count what the device does inside the context, in any thread."""
    _counts.append(Count())
    try:
        yield _counts[-1]
    finally:
        _counts.pop()


_PlainGenerator = torch.Generator
_generators: WeakValueDictionary[int, _PlainGenerator] = WeakValueDictionary()  # of the device, by address


class _Generator(_PlainGenerator):
    """`torch.Generator`, which for the pretend device is a CPU generator that says otherwise."""

    def __new__(cls, device: Any = "cpu") -> Any:
        device = torch.device(device)
        if device.type != NAME:
            return _PlainGenerator.__new__(_PlainGenerator, device)
        made = super().__new__(cls, CPU)
        _generators[made._cdata] = made
        return made

    @property
    def device(self) -> torch.device:
        """`pretend:0`."""
        return DEVICE


class _IsGenerator(type(_PlainGenerator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _PlainGenerator)


class DeviceTensor(Tensor):
    """A tensor on the pretend device; `raw` is its data on the CPU."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            layout=raw.layout, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.raw = raw
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.raw})"

    def data_ptr(self) -> int:
        """The address of the data."""
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the data."""
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        """As numbers, which the host waits for."""
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.raw, self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _rebuild(raw: Tensor, requires_grad: bool) -> Tensor:
    return DeviceTensor(raw).requires_grad_(requires_grad)


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _check_one_device(func: Any, name: str, flat: list[Any]) -> None:
    numbers = torch.Tag.pointwise in func.tags or name in _NUMBERS or name.startswith("_foreach")
    for i, a in enumerate(flat):
        if isinstance(a, Tensor) and not isinstance(a, DeviceTensor):
            if name in _INDEXING and isinstance(flat[0], DeviceTensor) and i > 0 and not a.is_floating_point():
                continue
            if a.dim() or not (numbers or name in _INDEXING) or (i == 0 and func._schema.is_mutable):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and "
                    f"{a.device}! (argument {i} of {func})"
                )


def _count(func: Any, name: str, args: Any, flat: list[Any], kwargs: dict[str, Any], reads: bool) -> None:
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    masks = name in _INDEXING and any(isinstance(a, DeviceTensor) and a.dtype == torch.bool for a in flat[1:])
    for count in _counts:
        if not (view or name in _NO_LAUNCH):
            count.by_launch[name] += _kernels(name, args)
        if (reads and (name in _WAITS or masks)) or _to_host(name, flat, kwargs):
            count.by_wait[name] += 1
        if _from_host(name, flat, kwargs):
            count.uploads += 1


def _kernels(name: str, args: Any) -> int:
    """Of a `_foreach` operation, as CUDA has it: one for all tensors, or one for each.

    One where all are dense and of one type, that of a number on the device too, and those at the same place of several
    lists have the same strides.
    """
    if not name.startswith("_foreach"):
        return 1
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    first = lists[0]

    def strides(t: Tensor) -> list[int]:
        return [s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1]

    ours = [*(t for some in lists for t in some), *(a for a in args if isinstance(a, Tensor))]
    together = all(t.dtype == first[0].dtype and _dense(t) for t in ours) and all(
        t.shape == one.shape and strides(t) == strides(one)
        for some in lists
        for t, one in zip(some, first, strict=True)
    )
    return 1 if together else len(first)


def _dense(t: Tensor) -> bool:
    """Whether a tensor's elements fill its memory, each once, in any order of its axes."""
    size = 1
    for stride, n in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != size:
            return False
        size *= n
    return True


def _to_host(name: str, flat: list[Any], kwargs: dict[str, Any]) -> bool:
    if name == "_to_copy":
        return (
            isinstance(flat[0], DeviceTensor) and kwargs.get("device") is not None and not _is_device(kwargs["device"])
        )
    return name == "copy_" and not isinstance(flat[0], DeviceTensor)


def _from_host(name: str, flat: list[Any], kwargs: dict[str, Any]) -> bool:
    if name == "_to_copy":
        return not isinstance(flat[0], DeviceTensor)
    return name == "copy_" and isinstance(flat[0], DeviceTensor) and not isinstance(flat[1], DeviceTensor)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    try:
        return _operation(func, args, kwargs)
    except Exception:
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            traceback.print_exc()
        raise


def _operation(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = pytree.tree_flatten((args, kwargs))
    name = func.overloadpacket.__name__
    reads = any(isinstance(a, DeviceTensor) for a in flat)
    asked = kwargs.get("device")
    onto = _is_device(asked) if asked is not None else reads
    if reads and name not in _COPIES:
        _check_one_device(func, name, flat)
    for a in flat:
        if isinstance(a, _PlainGenerator) and onto != (a._cdata in _generators):
            wanted, found = (NAME, "cpu") if onto else ("cpu", NAME)
            raise RuntimeError(f"Expected a {wanted!r} device type for generator but found {found!r} ({func})")
    _count(func, name, args, flat, kwargs, reads)
    raw = [a.raw if isinstance(a, DeviceTensor) else CPU if isinstance(a, torch.device) else a for a in flat]
    raw_args, raw_kwargs = pytree.tree_unflatten(raw, spec)
    random = onto and torch.Tag.nondeterministic_seeded in func.tags and raw_kwargs.get("generator") is None
    with _drawing() if random else _as_is():
        out = func(*raw_args, **raw_kwargs)
    if torch.Tag.inplace_view not in func.tags and any(
        isinstance(a, DeviceTensor) and a.shape != a.raw.shape for a in flat
    ):
        raise NotImplementedError(f"{func} resizes a tensor, which the pretend device cannot")
    if name == "copy_":
        return args[0]
    wrapped = pytree.tree_map(
        lambda o: DeviceTensor(o) if isinstance(o, Tensor) and not isinstance(o, DeviceTensor) else o, out
    ) if onto else out  # fmt: skip
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if onto else wrapped


@contextmanager
def _as_is() -> Iterator[None]:
    yield


@contextmanager
def _drawing() -> Iterator[None]:
    """Let operations without a generator draw from the device's own."""
    own, before = _module.default_generators[0], torch.default_generator.get_state()
    torch.default_generator.set_state(own.get_state())
    try:
        yield
    finally:
        own.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


class _Module:
    """What `torch.get_device_module("pretend")` gives."""

    def __init__(self) -> None:
        self.default_generators = (_Generator(NAME),)

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.default_generators[0].manual_seed(seed)

    def get_rng_state(self, device: Any = NAME) -> Tensor:
        return self.default_generators[0].get_state()

    def set_rng_state(self, state: Tensor, device: Any = NAME) -> None:
        self.default_generators[0].set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, dev_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


def _register() -> tuple[_Module, Any]:
    module = _Module()
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module(NAME, module)
    torch._C._acc.register_python_privateuseone_hook(_Hook())
    torch._C._acc.register_python_privateuseone_device_guard(_Guard())
    torch.serialization.add_safe_globals([_rebuild])
    torch.Generator = _IsGenerator("Generator", (_Generator,), {})  # type: ignore[misc]
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    # `torch.tensor(..., device=)` copies below Python's dispatch key, and factories resize an empty tensor
    direct = torch.library.Library("aten", "IMPL")
    for name in _DIRECT:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.aten, packet), overload or "default")
        direct.impl(name, lambda *args, _op=op, **kwargs: _run(_op, args, kwargs), "PrivateUse1")
    return module, (library, direct, *_autocasts())


def _autocasts() -> tuple[Any, Any]:
    """What casts under autocast: products to its type; all else is as it comes."""
    key = "AutocastPrivateUse1"
    rest, products = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, key)
    within = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(op: Any, *args: Any, **kwargs: Any) -> Any:
        low = torch.get_autocast_dtype(NAME)
        to = lambda x: x.to(low) if isinstance(x, Tensor) and x.dtype == torch.float32 else x  # noqa: E731
        with torch._C._ExcludeDispatchKeyGuard(within):
            return op(*pytree.tree_map(to, args), **pytree.tree_map(to, kwargs))

    for name in _PRODUCTS:
        op = getattr(torch.ops.aten, name).default
        products.impl(name, partial(cast, op), key)
    return rest, products


_module, _libraries = _register()
