"""Replacements of composite calls inside activation checkpoints (`torch.utils.checkpoint`).

A checkpointed block runs again in the backward pass, outside every torch-function mode, and the checkpoint matches the
tensors saved by both runs by counting them. So the original call runs as well, first, for the count alone. Its
replacement follows with the same random draws, and its saved tensors bypass the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import _pop_mode_temporarily
from torch.utils import _python_dispatch

from layerwise.errors import UnsupportedCall
from layerwise.losses import tensors_in
from layerwise.tensors import forked_random

__all__ = ["standing_in"]

_MODULE = "torch.utils.checkpoint"


def standing_in(
    written: Callable[..., Any], parts: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Run `parts` in place of `written`, with the same values up to rounding.

    Raises UnsupportedCall inside a checkpoint with a policy of what to save, and where the two calls draw different
    random numbers.
    """
    if not _checkpointed():
        return parts(*args, **kwargs)
    name = getattr(written, "__name__", repr(written))
    if any(type(mode).__module__ == _MODULE for mode in _python_dispatch._get_current_dispatch_mode_stack()):
        raise UnsupportedCall(
            f"{name} inside a checkpoint with a policy of what to save (create_selective_checkpoint_contexts), which "
            "counts the calls that it hides; checkpoint this block without a policy while it is observed"
        )
    with forked_random({t.device for t in tensors_in((args, kwargs))}), _no_modes():
        first = written(*args, **kwargs)
    with saved_tensors_hooks(Tensor.detach, _same):  # detached: a tensor with its node inside that node would never go
        out = parts(*args, **kwargs)
    with torch._C.DisableTorchFunction(), torch.no_grad():
        if not all(_agree(a, b) for a, b in zip(tensors_in(first), tensors_in(out), strict=True)):
            raise UnsupportedCall(
                f"{name} inside a checkpoint draws random numbers that its parts do not (dropout of a fused kernel?), "
                "so the backward pass would see other ones; run it without dropout, or without checkpointing"
            )
    return out


def _checkpointed() -> bool:
    """Whether tensors saved for the backward pass go to a checkpoint now."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", "") == _MODULE


@contextmanager
def _no_modes() -> Iterator[None]:
    """Leave every torch-function mode, as in a backward pass."""
    with ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by rounding at most and have the same strides, the order in which random calls draw.

    Where the draws differ, the difference is as large as the values.
    """
    if not a.numel():
        return True
    if any(x != y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1):
        return False
    scale = float(a.abs().nan_to_num(0.0).max())
    tolerance = torch.finfo(a.dtype).eps ** 0.25
    return bool(torch.isclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True).all())
