"""Scratch memory that local steps use again and again, and what they view of it and of a layer's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem

__all__ = ["Frame", "Owned", "Workspace", "frame_of"]

_MOST_VIEWS = 256
T = TypeVar("T")


class Workspace:
    """Scratch memory for layers solved one after another: a flat buffer per name, grown as needed; and constants."""

    def __init__(self) -> None:
        self._flat: dict[Any, Tensor] = {}
        self._shaped: dict[Any, Tensor] = {}  # cached views of the buffers, and constants
        self._made: dict[str, tuple[tuple[Any, ...], Any]] = {}  # by layer: what was made with views, and of what

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are empty."""
        return Workspace, ()

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of a shape, with the type and device of `like`."""
        key = (name, shape, like.dtype, like.device)
        found = self._shaped.get(key)
        if found is None:
            place, size = (name, like.dtype, like.device), math.prod(shape)
            flat = self._flat.get(place)
            if flat is None or flat.numel() < size:
                flat = self._flat[place] = torch.empty(size, dtype=like.dtype, device=like.device)
                self._shaped.clear()  # views keep the old buffer alive
                self._made.clear()
            found = self._keep(key, flat[:size].view(shape))
        return found

    def constant(self, value: float, size: int, like: Tensor) -> Tensor:
        """A read-only vector of one number."""
        key = (value, size, like.dtype, like.device)
        found = self._shaped.get(key)
        return self._keep(key, like.new_full((size,), value)) if found is None else found

    def once(self, layer: str, of: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make()` gave of the same objects for a layer the last time, else what it gives now."""
        found = self._made.get(layer)
        if found is not None and len(found[0]) == len(of) and all(map(is_, found[0], of)):
            made: T = found[1]
            return made
        made = make()
        self._made[layer] = of, made
        return made

    def _keep(self, key: Any, made: Tensor) -> Tensor:
        if len(self._shaped) >= _MOST_VIEWS:
            self._shaped.clear()
        self._shaped[key] = made
        return made


class Owned(NamedTuple):
    """The parameters in their own shapes, of which a problem's `weight` and `bias` are views.

    fold: carries a gradient `[K,O,I]` to the shape of the weight; None for a reshape. layer: the name under which a
    workspace remembers what it made for these tensors; None: nothing.
    """

    weight: Tensor
    bias: Tensor | None
    fold: Callable[[Tensor], Tensor] | None = None
    layer: str | None = None


class Frame:
    """What of a layer's local steps stays from batch to batch: scratch for gradients, and what is viewed for products.

    dw, db: scratch `[K,O,I]` and `[K,O]`. grad_w, grad_b: in the parameters' shapes. serves: whether `grad_w` shows
    what is written to `dw`; else it is folded at each step. w, b, wt, out_w, out_b: for products, with K in front, or
    dropped where it is 1.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, indexed: bool, owned: Owned, workspace: Workspace) -> None:
        _check_shared("weight", owned.weight, weight)
        _check_shared("bias", owned.bias, bias)
        self.dw = workspace.take("dw", weight.mT.shape, weight).mT if indexed else workspace.take(
            "dw", weight.shape, weight
        )  # fmt: skip
        self.db = None if bias is None else workspace.take("db", bias.shape, weight)
        grad_w = self.dw.reshape(owned.weight.shape) if owned.fold is None else owned.fold(self.dw)
        self.grad_b = None if owned.bias is None or self.db is None else self.db.view(owned.bias.shape)
        # a view of the scratch serves all steps; torch's fused optimizers need it contiguous as the weight is
        self.serves = grad_w.untyped_storage().data_ptr() == self.dw.untyped_storage().data_ptr()
        self.serves &= grad_w.is_contiguous() or not owned.weight.is_contiguous()
        self.grad_w = grad_w if self.serves or owned.fold is None else None
        self.single = weight.shape[0] == 1
        self.w = weight[0] if self.single else weight
        self.b = bias if bias is None or self.single else bias.unsqueeze(1)
        self.wt = self.w.mT
        self.out_w = self.dw[0] if self.single else self.dw
        self.out_b = None if self.db is None else self.db[0] if self.single else self.db


def frame_of(problem: LocalProblem, owned: Owned, workspace: Workspace) -> Frame:
    """The frame of a problem's weights, from the batch before where they are the same tensors."""
    weight, bias, indexed = problem.weight, problem.bias, problem.indexed

    def made() -> Frame:
        return Frame(weight, bias, indexed, owned, workspace)

    if owned.layer is None:
        return made()
    return workspace.once(owned.layer, (owned.weight, owned.bias, weight, bias, indexed), made)


def _check_shared(name: str, owned: Tensor | None, used: Tensor | None) -> None:
    if (owned is None) != (used is None):
        raise BadInput(f"local_steps: the layer's {name} and the problem's must both be given or both be None")
    if owned is not None and used is not None and owned.data_ptr() != used.data_ptr():
        raise BadInput(
            f"local_steps works in place: problem.{name} {tuple(used.shape)} must be a view of the {name} "
            f"{tuple(owned.shape)} that the optimizer owns, and they share no memory"
        )
