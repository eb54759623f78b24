"""The operations: how each torch call that uses a parameter is a grouped linear map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.ops import attention, contraction, elementwise, recurrent
from layerwise.ops.arguments import any_complex, bind, replace, writes_first
from layerwise.ops.base import Call, Slot
from layerwise.ops.elementwise import ElementwiseSlot
from layerwise.ops.embedding import bags_of_rows
from layerwise.ops.forms import Form
from layerwise.ops.opaque import OpaqueSlot
from layerwise.ops.registry import BUILD, LINEAR, Entry, register
from layerwise.rows.base import Rows, Samples

__all__ = [
    "LINEAR",
    "Call",
    "ElementwiseSlot",
    "Entry",
    "Form",
    "Rows",
    "Samples",
    "Slot",
    "bags_of_rows",
    "bind",
    "decomposition",
    "refused",
    "register",
    "replace",
    "slots",
    "writes_first",
]

_FAMILIES = {
    func: family for family in (attention, contraction, elementwise, recurrent) for func in family.DECOMPOSITIONS
}
_INFERENCE = {getattr(torch, name, None) for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")}


def slots(call: Call, used: Sequence[Tensor]) -> list[Slot]:
    """One slot for each tensor that a call uses.

    A call, or an argument of it, that no family describes gets an `OpaqueSlot`: exact, but slow.
    For a call that writes its first argument, that argument in `call` must be the values before it.
    """
    build = BUILD.get(call.func)
    if build is None or any_complex(call.args) or any_complex(call.kwargs.values()):
        return [OpaqueSlot(call, u) for u in used]
    known = zip(used, build(call, used), strict=True)
    found = [OpaqueSlot(call, u) if slot is None else slot for u, slot in known]
    for place, slot in enumerate(found):
        slot.place = place
    return found


def refused(func: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> str | None:
    """Why calls of a function on parameters cannot be recorded as one call; None where they can.

    The text completes "layerwise does not decompose ...".
    """
    kwargs = kwargs or {}
    if func in _FAMILIES:
        return _FAMILIES[func].refused(args, kwargs)
    if func in _INFERENCE:
        return "attention by a call meant for inference; call F.multi_head_attention_forward, or freeze its parameters"
    if func is F.embedding or func is F.embedding_bag:
        max_norm = kwargs.get("max_norm", args[3] if len(args) > 3 else None)
        if max_norm is not None:
            return "a table with max_norm, which rescales the parameter itself during the forward"
    return None


def decomposition(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function of the same arguments that does by plain calls what a composite function hides; None for others.

    Its values and derivatives equal the composite's up to rounding, not bitwise.
    """
    return _FAMILIES[func].DECOMPOSITIONS[func] if func in _FAMILIES else None
