"""The operations: how each torch call that uses a parameter is a grouped linear map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import UnsupportedCall
from layerwise.ops import contraction, conv, elementwise, embedding, norm
from layerwise.ops.arguments import any_complex, writes_first
from layerwise.ops.base import Call, Rows, Samples, Slot
from layerwise.ops.opaque import OpaqueSlot

__all__ = ["Call", "Rows", "Samples", "Slot", "is_known", "refused", "slots", "writes_first"]

_BUILD: dict[Callable[..., Any], Callable[[Call, Sequence[Tensor]], list[Slot | None]]] = {
    func: family.slots for family in (elementwise, norm, embedding, conv, contraction) for func in family.FUNCTIONS
}

_ADVICE = "; write it with linear layers, or freeze its parameters"
_ATTENTION = "attention with its projections inside one torch call" + _ADVICE
_RECURRENT = "a recurrent layer with its weights inside one torch call" + _ADVICE
_REFUSED: dict[Callable[..., Any], str] = {F.multi_head_attention_forward: _ATTENTION}
for _name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
    if hasattr(torch, _name):
        _REFUSED[getattr(torch, _name)] = _ATTENTION
for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _REFUSED[getattr(torch, _name)] = _RECURRENT
    _REFUSED[getattr(torch, _name + "_cell")] = _RECURRENT


def slots(call: Call, used: Sequence[Tensor]) -> list[Slot]:
    """One slot for each tensor that a call uses.

    A call, or a place in a call, that no family describes gets an `OpaqueSlot`: exact, but slow.
    For a call that writes its first argument, the data in `call` must be the values before it.

    Raises `UnsupportedCall` where the call overwrites one of the tensors in `used`.
    """
    if call.args and any(u is call.args[0] for u in used) and writes_first(call.func):
        raise UnsupportedCall(
            f"{call.func.__name__} overwrites a tensor of shape {tuple(call.args[0].shape)} that was "
            "computed from parameters; use the form that returns a new tensor"
        )
    build = _BUILD.get(call.func)
    if build is None or any_complex(call.args) or any_complex(call.kwargs.values()):
        return [OpaqueSlot(call, u) for u in used]
    known = zip(used, build(call, used), strict=True)
    return [OpaqueSlot(call, u) if slot is None else slot for u, slot in known]


def is_known(func: Callable[..., Any]) -> bool:
    """Whether some family describes a torch function (single places in it may still be opaque)."""
    return func in _BUILD


def refused(func: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> str | None:
    """Why calls of a function on parameters cannot be recorded as one call; None where they can.

    The text completes "layerwise does not decompose ...".
    """
    reason = _REFUSED.get(func)
    if reason is None and (func is F.embedding or func is F.embedding_bag):
        max_norm = (kwargs or {}).get("max_norm", args[3] if len(args) > 3 else None)
        if max_norm is not None:
            return "a table with max_norm, which rescales the parameter itself during the forward"
    return reason
