"""Whether tensors hold numbers alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_finite"]


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    x = x.detach()
    # neither is lost in a sum, which costs a tenth; a sum may overflow by itself
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
