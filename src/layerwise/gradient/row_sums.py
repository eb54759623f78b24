"""Weight gradients that a backward pass leaves out: the sums of per-sample gradients that are formed anyway.

The graph stays as it is. The backward pass is told to end at every leaf but these weights, and at the uses, so autograd
sends on all that goes down and skips those products. The sums are then added to `.grad` by a backward pass from the
weights themselves, so that autograd accumulates them and runs every hook on them as always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from layerwise.gradient.row_views import Remembered, layout_of_call
from layerwise.ops.base import Slot
from layerwise.ops.conv import FUNCTIONS as CONVOLUTIONS
from layerwise.rows.base import RowNumbers, Samples
from layerwise.rows.cost import sums_are_cheaper
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use

__all__ = ["add_to_grad", "backward_without", "summed_weights"]


def summed_weights(
    tape: Tape, uses: Sequence[Use], layout: Mapping[int, Samples | RowNumbers], forms: Callable[[int, int, int], bool]
) -> frozenset[str]:
    """Names of the weights whose gradient is cheaper as the sum of per-sample gradients, which are formed anyway.

    Every use must read the parameter itself, as a matrix of float inputs, with enough positions a sample. The bias of a
    convolution is with its weight: torch computes both gradients where it is asked for one.
    layout: where the samples lie in the output of each use. forms: whether the per-sample gradients of a matrix are
    formed, by its positions, outputs and inputs.
    """
    sizes: dict[str, tuple[int, int, int]] = {}
    for use in uses:
        where = layout[use.index]
        key = layout_of_call(use, where, tape.parameters)
        each = None if key is None else _SIZES.get(key)
        if each is None:
            each = [_sizes(use, slot, where) for slot in use.slots]
            if key is not None:
                _SIZES.enter(key, each)
        for derived, (t, o, i) in zip(use.used, each, strict=True):
            for name in derived.names:
                own = derived.tensor is tape.owners.get(name) and derived.tensor.is_leaf
                before = sizes.get(name, (t, o, i))[0]
                sizes[name] = (before + t if own and t and before else 0, o, i)
    weights = {name for name, (t, o, i) in sizes.items() if sums_are_cheaper(t) and forms(t, o, i)}
    return frozenset(weights | _biases_beside(tape, uses, weights))


def _biases_beside(tape: Tape, uses: Iterable[Use], weights: set[str]) -> set[str]:
    """The biases that convolutions alone read, each beside such a weight."""
    beside: set[str] = set()
    elsewhere: set[str] = set()
    for use in uses:
        biases = {
            name
            for slot, derived in zip(use.slots, use.used, strict=True)
            if slot.bias and derived.tensor.is_leaf
            for name in derived.names
            if derived.tensor is tape.owners.get(name)
        }
        others = set(use.names) - biases
        if use.call.func in CONVOLUTIONS and others and others <= weights:
            beside |= biases
        else:
            elsewhere |= set(use.names)
    return beside - elsewhere


_SIZES: Remembered[Sequence[tuple[int, int, int]]] = Remembered()  # of each slot of a use, by the layout of its call


def _sizes(use: Use, slot: Slot, samples: Samples | RowNumbers) -> tuple[int, int, int]:
    """T, O and I of a slot with rows of float inputs, of samples on an axis; T = 0 for any other."""
    w, plain = slot.used, slot.factored and not (slot.bias or slot.indexed or slot.elementwise)
    if not plain or isinstance(samples, RowNumbers) or samples.axis in slot.aligned or w.is_complex():
        return 0, 0, 0
    k, o, i = slot.matrix(w.detach()).shape
    return use.call.out_shape.numel() // max(1, samples.n * k * o), o, i


def backward_without(weights: Iterable[Tensor], uses: Iterable[Use], reached: Iterable[Node]) -> Callable[..., None]:
    """`torch.autograd.backward` that gives all leaves but some weights their gradient.

    uses: whose cotangents must arrive. reached: the nodes of the graph.
    """
    left_out = set(map(id, weights))
    leaves = [node for node in reached if hasattr(node, "variable") and id(node.variable) not in left_out]
    ends = [*(GradientEdge(leaf, 0) for leaf in leaves), *(use.edge for use in uses)]
    return partial(torch.autograd.backward, inputs=ends)


def add_to_grad(parameters: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Accumulate gradients by autograd's own nodes, with the hooks on the parameters."""
    if sums:
        # through a view, whose gradient nothing else holds: autograd takes it over without a copy
        with torch.enable_grad():
            views = [parameters[name].view_as(parameters[name]) for name in sums]
        torch.autograd.backward(views, list(sums.values()))
