"""Recognition of losses from autograd nodes, for losses computed outside of extended modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise import losses
from layerwise.compat.backpack.read_tape import Record, record_at
from layerwise.graph.walk import Node, nodes
from layerwise.tape.uses import LossUse

__all__ = ["read_losses"]

_REDUCTIONS = ("none", "mean", "sum")
# By autograd node of an elementwise loss: its function, and the arguments that the node saves.
_ELEMENTWISE: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "MseLossBackward0": (F.mse_loss, ()),
    "BinaryCrossEntropyWithLogitsBackward0": (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    "HuberLossBackward0": (F.huber_loss, ("delta",)),
    "SmoothL1LossBackward0": (F.smooth_l1_loss, ("beta",)),
}
_CLASSES = ("NllLossBackward0", "NllLoss2DBackward0")
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


def read_losses(total: Tensor, known: Sequence[LossUse]) -> list[LossUse]:
    """The losses between `total` and the recorded uses, besides the known ones.

    Cross entropy of class indices, NLL, MSE, BCE with logits, Huber and smooth L1. Other losses stay unknown.
    """
    stops: dict[Node, tuple[()]] = dict.fromkeys((loss.value.node for loss in known), ())
    found: list[LossUse] = []
    for node in nodes([(total.grad_fn, 0)], stops):
        if node in stops:
            continue
        if _holds_uses(record_at(node)):
            stops[node] = ()
        elif (loss := _read(node)) is not None:
            assert isinstance(loss.call, losses.LossCall)
            losses.check(loss.call)
            found.append(loss)
            stops[node] = ()
    return found


def _holds_uses(record: Record | None) -> bool:
    return record is not None and bool(record.uses)


def _read(node: Any) -> LossUse | None:
    """The loss of one node, or None."""
    name = node.name()
    if name in _CLASSES:
        return _classes(node)
    if name not in _ELEMENTWISE:
        return None
    func, options = _ELEMENTWISE[name]
    given = {option: getattr(node, f"_saved_{option}") for option in options}
    edge = _input(node) or _input(node, 1)  # symmetric losses: the prediction may be the second argument
    if edge is None:
        return None
    call = losses.bind(func, (node._saved_self, node._saved_target), {**given, "reduction": _reduction(node)})
    call = dataclasses.replace(call, logits=call.logits.detach())
    return LossUse(call, edge, GradientEdge(node, 0))


def _classes(node: Any) -> LossUse | None:
    """The loss of an NLL node, including a log-softmax before it."""
    scores, target, edge = node._saved_self.detach(), node._saved_target, _input(node)
    if edge is None:
        return None
    below: Any = edge.node
    reshaped = below.name() in _VIEWS
    if reshaped:  # several position axes were flattened
        below = below.next_functions[0][0]
    softmax = below is not None and below.name() == "LogSoftmaxBackward0"
    if reshaped and (not softmax or _reduction(node) == "none"):
        return None
    options = {
        "weight": node._saved_weight,
        "ignore_index": _signed(node._saved_ignore_index),
        "reduction": _reduction(node),
    }
    if not softmax:
        return LossUse(losses.bind(F.nll_loss, (scores, target), options), edge, GradientEdge(node, 0))
    given, scores, edge = scores.shape, below._saved_result.detach(), _input(below)
    dim = _signed(below._saved_dim) % scores.dim()
    if edge is None or (reshaped and (dim != 1 or scores.shape[:2] != given[:2])):
        return None
    if reshaped:
        target = target.reshape(scores.shape[0], *scores.shape[2:])
    # log-probabilities have the same softmax as the logits
    call = losses.bind(F.nll_loss, (scores, target), options, scores, dim)
    return LossUse(call, edge if call.log_softmax else GradientEdge(*node.next_functions[0]), GradientEdge(node, 0))


def _input(node: Any, place: int = 0) -> GradientEdge | None:
    if len(node.next_functions) <= place:
        return None
    child, number = node.next_functions[place]
    return None if child is None else GradientEdge(child, number)


def _reduction(node: Any) -> str:
    return _REDUCTIONS[node._saved_reduction]


def _signed(value: int) -> int:
    """A saved int64 that the node exposes as uint64."""
    return value - 2**64 if value >= 2**63 else value
