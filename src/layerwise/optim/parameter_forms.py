"""Shapes, types and devices of an optimizer's parameters, which its state follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput

__all__ = ["ParameterForms"]


class ParameterForms:
    """What the state of an optimizer was made for, and what its parameters were in the last step.

    owner: the optimizer's name. stateful: the parameters that have a state already.
    """

    def __init__(self, owner: str, stateful: Iterable[Tensor] = ()) -> None:
        self._owner = owner
        self._last: list[Any] = []
        self._shapes: dict[Tensor, torch.Size] = {p: p.shape for p in stateful}  # when the state was made

    def follow(
        self, groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]],
        type_of: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
    ) -> None:  # fmt: skip
        """Convert the state to the types and devices of parameters that were converted after it was made.

        type_of: the type of the state of a parameter of some type.
        Raises BadInput for a parameter of another shape than its state was made for.
        """
        named = [entry for group in groups for entry in zip(group["param_names"], group["params"], strict=True)]
        forms = [(p.shape, p.dtype, p.device) for _, p in named]
        if forms == self._last:
            return
        for name, p in named:
            then = self._shapes.get(p)
            if then is not None and then != p.shape and state.get(p):
                raise BadInput(
                    f"{name} was of shape {tuple(then)} when {self._owner} made its state, and is of shape "
                    f"{tuple(p.shape)} now; make a new optimizer for the changed model"
                )
            self._shapes[p] = p.shape
        for p, own in state.items():
            for key, t in own.items():
                if isinstance(t, Tensor) and t.dim() and t.is_floating_point():
                    own[key] = t.to(p.device, type_of(p.dtype))
        self._last = forms
