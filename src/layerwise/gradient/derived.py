"""Parameters used through a derived tensor (weight norm, LoRA's sum), and their gradients by the chain rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from layerwise.ops.base import Slot
from layerwise.rows.layout import MatrixLayout, grouped
from layerwise.tape.pull import pull
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use

__all__ = ["has_derived_gradient", "leaf_gradients", "without_rows"]


def leaf_gradients(used: Tensor, dense: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Vector-Jacobian products of gradients `[V,N,*used.shape]` to the leaves of `used`, `[V,N,*leaf.shape]` each."""
    flat = dense.flatten(0, 1)
    pulled: Sequence[Tensor | None]
    try:
        pulled = pull([used], [flat], leaves, batched=True) if len(flat) else [None for _ in leaves]
    except RuntimeError:  # an operation without a batching rule
        each = [pull([used], [row], leaves) for row in flat]
        columns = zip(*each, strict=True)
        pulled = [
            torch.stack([torch.zeros_like(p) if g is None else g for g in column])
            for p, column in zip(leaves, columns, strict=True)
        ]
    gradients = []
    for leaf, value in zip(leaves, pulled, strict=True):
        value = leaf.new_zeros(len(flat), *leaf.shape) if value is None else value
        gradients.append(value.to(leaf.dtype).unflatten(0, dense.shape[:2]))
    return gradients


def without_rows(tape: Tape, uses: Iterable[Use]) -> set[str]:
    """Names of parameters that some use reads through a derived tensor, without row form, or as several matrices."""
    names: set[str] = set()
    layouts: dict[str, list[tuple[MatrixLayout, Slot]]] = {}
    for use in uses:
        for derived, slot in zip(use.used, use.slots, strict=True):
            name = next(iter(derived.names))
            view = MatrixLayout.of_view(slot.used, tape.parameters[name])
            if len(derived.names) > 1 or not slot.factored or view is None:
                names |= derived.names
            else:
                layouts.setdefault(name, []).append((view, slot))
    for name, views in layouts.items():
        if len(views) > 1 and name not in names and grouped([v.then(slot.matrix) for v, slot in views]) is None:
            names.add(name)
    return names


def has_derived_gradient(tape: Tape, use: Use) -> bool:
    """Whether the gradient of a use reaches a parameter only through autograd: it reads a derived tensor, for one."""
    return any(
        slot.through_graph
        or (
            not slot.used.is_leaf
            and (len(d.names) > 1 or MatrixLayout.of_view(slot.used, tape.parameters[next(iter(d.names))]) is None)
        )
        for d, slot in zip(use.used, use.slots, strict=True)
    )
