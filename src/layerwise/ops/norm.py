"""Scale and shift of the norms, and PReLU: vectors over fixed axes of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.ops.arguments import bind
from layerwise.ops.base import Call, Slot
from layerwise.ops.elementwise import ElementwiseSlot, one_by_one

__all__ = ["FUNCTIONS", "slots"]

# the names of the arguments of the norms as torch.nn.functional and as torch have them
_NORMS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.layer_norm: ("layer", ("input", "normalized_shape", "weight", "bias", "eps")),
    torch.layer_norm: ("layer", ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")),
    F.rms_norm: ("rms", ("input", "normalized_shape", "weight", "eps")),
    torch.rms_norm: ("rms", ("input", "normalized_shape", "weight", "eps")),
    F.group_norm: ("group", ("input", "num_groups", "weight", "bias", "eps")),
    torch.group_norm: ("group", ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled")),
    F.batch_norm: ("batch", (
        "input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")),
    torch.batch_norm: ("batch", (
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps",
        "cudnn_enabled")),
    F.instance_norm: ("instance", (
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")),
    torch.instance_norm: ("instance", (
        "input", "weight", "bias", "running_mean", "running_var", "use_input_stats", "momentum", "eps",
        "cudnn_enabled")),
}  # fmt: skip
_DEFAULTS = {"training": False, "use_input_stats": True, "momentum": 0.1, "eps": 1e-5}
_OF_KIND = {
    (kind, names): tuple(None if (kind, name) == ("rms", "eps") else _DEFAULTS.get(name) for name in names)
    for kind, names in _NORMS.values()
}


def _bound(kind: str, names: tuple[str, ...], call: Call) -> dict[str, Any] | None:
    """The arguments of a norm by name; None where it has one that is not named."""
    bound = bind(call, names, _OF_KIND[kind, names])
    return None if bound is None else dict(zip(names, bound, strict=True))


def _normalised(kind: str, names: tuple[str, ...], dtype: torch.dtype, call: Call) -> Tensor:
    """The normalised input that the scale multiplies. Running statistics are read, never written."""
    v = _bound(kind, names, call)
    assert v is not None
    x = v["input"].detach().to(dtype)
    lowered = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if lowered else nullcontext():
        if kind == "layer":
            return torch.layer_norm(x, v["normalized_shape"], eps=v["eps"])
        if kind == "rms":
            return torch.rms_norm(x, v["normalized_shape"], eps=v["eps"])
        if kind == "group":
            return F.group_norm(x, v["num_groups"], eps=v["eps"])
        if kind == "instance" and v["use_input_stats"]:
            return F.instance_norm(x, eps=v["eps"])
        if kind == "batch" and v["training"]:
            return F.batch_norm(x, None, None, training=True, eps=v["eps"])
        mean, var = v["running_mean"].to(dtype), v["running_var"].to(dtype)
        return F.batch_norm(x, mean, var, training=False, eps=v["eps"])


def _norm(kind: str, names: tuple[str, ...], call: Call, argument: Tensor) -> Slot | None:
    v = _bound(kind, names, call)
    if v is None or sum(1 for value in v.values() if value is argument) != 1:
        return None
    if kind in ("layer", "rms"):
        view = (1,) * (len(call.out_shape) - argument.ndim) + tuple(argument.shape)
    else:
        view = (1, -1, *(1,) * (len(call.out_shape) - 2))
        view = tuple(argument.numel() if n == -1 else n for n in view)
    if argument is v["weight"]:
        rows = partial(_normalised, kind, names, argument.dtype)
        slot = ElementwiseSlot(argument, view, call.out_shape, partial(rows, call), aligned=False)
        slot.computed = rows
        return slot
    if argument is v.get("bias"):
        return ElementwiseSlot(argument, view, call.out_shape, 1, aligned=False)
    return None


def _prelu(call: Call, argument: Tensor) -> Slot | None:
    bound = bind(call, ("input", "weight"), (None, None))
    if bound is None or bound[1] is not argument or bound[0] is argument:
        return None
    x = bound[0].detach()
    view = [1] * x.ndim
    if argument.numel() > 1:
        view[1] = argument.numel()
    return ElementwiseSlot(argument, tuple(view), call.out_shape, lambda: x.clamp(max=0), aligned=False)


FUNCTIONS: dict[Callable[..., Any], Callable[[Call, Tensor], Slot | None]] = {
    torch.prelu: _prelu,
    torch.Tensor.prelu: _prelu,
    **{func: partial(_norm, *entry) for func, entry in _NORMS.items()},
}


def slots(call: Call, used: Sequence[Tensor]) -> list[Slot | None]:
    """The slots of a norm's weight and bias or a PReLU's slopes; None for any other tensor."""
    return one_by_one(FUNCTIONS[call.func], call, used)
