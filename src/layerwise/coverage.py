"""Coverage, proved on the autograd graph: every path from the loss to a parameter passes a recorded use.

The calls that were seen prove nothing: a custom autograd Function, a scripted block or another thread are
invisible to a torch-function mode. So the graph itself is walked. From the total to the values of the known
losses, from their logits to the outputs of uses, from each use on to the edges its data had before the
call. Whatever reaches a parameter another way is an error that names the parameter and the node.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerwise.errors import UncoveredUse, Undefined, UnknownLoss
from layerwise.tape import Tape
from layerwise.uses import LossUse, Use

__all__ = ["Graph", "known_losses", "prove"]


@dataclass(frozen=True)
class Graph:
    """The part of a tape that a total depends on: its uses (in call order) and losses."""

    total: Tensor
    weight: Tensor | None
    uses: list[Use]
    losses: list[LossUse]

    @property
    def batch(self) -> Tensor | None:
        """The batch that the first use read, possibly through maps that keep the samples."""
        return self.uses[0].batch if self.uses else None

    def parameters(self) -> list[str]:
        """Names of the parameters with at least one use, in no particular order."""
        return sorted(set().union(*(d.names for use in self.uses for d in use.used)))


def prove(tape: Tape, total: Tensor, weight: Tensor | None = None, need_loss: bool = True) -> Graph:
    """The uses and losses that `total` depends on, after proof that they cover every parameter.

    With `need_loss`, every path must also pass through a loss that the tape knows.
    Raises UncoveredUse, UnknownLoss, or Undefined (a parameter enters the loss directly).
    """
    if not total.requires_grad or total.grad_fn is None:
        raise UnknownLoss(
            "asked for a backward pass from a tensor that does not depend on any parameter; "
            "was the loss detached, or computed under no_grad?"
        )
    names = {id(p): name for name, p in tape.parameters.items()}
    use_at = _by_node(tape.uses)
    roots: list[Any] = [total.grad_fn]
    reached_losses: list[LossUse] = []
    if need_loss:
        reached_losses = _walk_to_losses(tape, total, names, use_at)
        roots = [loss.logits.node for loss in reached_losses]
    reached = _walk_to_uses(roots, names, use_at, tape.spent)
    return Graph(total, weight, sorted(reached, key=lambda u: u.index), reached_losses)


def known_losses(tape: Tape, total: Tensor) -> Graph:
    """The losses that `total` is made of, where every path to a parameter passes through one; no uses.

    What is below the losses need not be known. Raises UnknownLoss, UncoveredUse or Undefined as `prove`.
    """
    names = {id(p): name for name, p in tape.parameters.items()}
    return Graph(total, None, [], _walk_to_losses(tape, total, names, _by_node(tape.uses)))


def _by_node(uses: list[Use]) -> dict[Any, list[Use]]:
    table: dict[Any, list[Use]] = {}
    for use in uses:
        table.setdefault(use.edge.node, []).append(use)
    return table


def _walk_to_losses(tape: Tape, total: Tensor, names: dict[int, str], use_at: dict[Any, list[Use]]) -> list[LossUse]:
    """The losses that the total is made of; a path around them is an error."""
    loss_at: dict[Any, list[LossUse]] = {}
    for loss in tape.losses:
        loss_at.setdefault(loss.value.node, []).append(loss)
    seen: set[Any] = set()
    stack = [total.grad_fn]
    found: list[LossUse] = []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in loss_at:
            found += loss_at[node]
            continue
        if node in use_at and not use_at[node][0].call.out_shape:
            raise Undefined(_enters(", ".join(use_at[node][0].names)))
        if node in use_at:
            raise UnknownLoss(
                f"a path from the loss to {use_at[node][0]} passes through no loss that is known; seen: "
                f"{_seen(tape)}. Make the loss with torch.nn.functional's cross_entropy, mse_loss, "
                "binary_cross_entropy_with_logits, ... (their modules do), times constants and summed"
            )
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            if not found and not tape.uses:
                raise UncoveredUse(_uncovered(name, "the loss", "no call with it was seen"))
            raise Undefined(_enters(name))
        stack += [child for child, _ in node.next_functions]
    return found


def _walk_to_uses(
    roots: list[Any], names: dict[int, str], use_at: dict[Any, list[Use]], spent: Collection[Any]
) -> list[Use]:
    """The uses below the roots, jumping from a use to its data; a parameter met on the way is an error."""
    seen: set[Any] = set()
    stack: list[tuple[Any, Any]] = [(node, None) for node in roots]
    reached: list[Use] = []
    while stack:
        node, parent = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in use_at:
            for use in use_at[node]:
                reached.append(use)
                stack += [(edge.node, node) for edge in use.inputs]
            continue
        if node in spent:
            raise Undefined(
                "this backward pass runs through a forward that was observed before (retain_graph), so its samples "
                "would count twice; add the losses up and call backward once, or run the forward again"
            )
        if node.name() == "CheckpointFunctionBackward":
            raise UncoveredUse(
                "the model runs a block under torch.utils.checkpoint with use_reentrant=True, which hides the "
                "block's parameters; pass use_reentrant=False"
            )
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            via = parent.name() if parent is not None else "the loss"
            raise UncoveredUse(_uncovered(name, via, "a call that the tape cannot see passes it on"))
        stack += [(child, node) for child, _ in node.next_functions]
    return reached


def _enters(name: str) -> str:
    return (
        f"parameter {name!r} enters the loss directly (a regularizer, a learned weight of the loss?), so the loss is "
        "not a sum over samples; leave that term out of the observed backward pass and add its gradient yourself"
    )


def _uncovered(name: str, via: str, why: str) -> str:
    return (
        f"parameter {name!r} is reached from the loss through the autograd node {via}, and {why}. Custom "
        "autograd Functions, scripted blocks and forwards outside the context are invisible, and a batch made inside "
        "it by torch.eye, ones or arange counts as a constant: make the batch outside, run the forward inside, write "
        "the block with torch calls, or freeze the parameter"
    )


def _seen(tape: Tape) -> str:
    return ", ".join(loss.call.name for loss in tape.losses) or "no known loss call"
