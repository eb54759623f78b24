"""Coverage, proved on the autograd graph: every path from the loss to a parameter passes a recorded use.

The calls that were seen prove nothing: a custom autograd Function, a scripted block or another thread are
invisible to a torch-function mode. So the graph itself is walked. From the total to the values of the known
losses, from their logits to the outputs of uses, from each use on to the edges its data had before the
call. Whatever reaches a parameter another way is an error that names the parameter and the node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import UncoveredUse, Undefined, UnknownLoss
from layerwise.graph.walk import Node, by_node, children, edges, inputs, nodes
from layerwise.losses import OwnCall
from layerwise.tape.binding import Leaves
from layerwise.tape.tape import Tape
from layerwise.tape.uses import LossUse, OwnUse, Use

__all__ = ["Graph", "known_losses", "prove"]


@dataclass(frozen=True)
class Graph:
    """The part of a tape that a total depends on: its uses (in call order) and losses.

    known: losses with a likelihood. own: the user's own losses, which are the rest of the total.
    """

    total: Tensor
    weight: Tensor | None
    uses: list[Use]
    known: list[LossUse]
    own: list[OwnUse]

    @property
    def losses(self) -> list[LossUse]:
        """All that enters a loss: what the known ones receive, then the boundary of the user's own."""
        return [*self.known, *(part for own in self.own for part in own.boundary)]

    @property
    def batch(self) -> Tensor | None:
        """The batch that the first use read, possibly through maps that keep the samples."""
        return self.uses[0].batch if self.uses else None

    def parameters(self) -> list[str]:
        """Names of the parameters with at least one use, in no particular order."""
        return sorted(set().union(*(d.names for use in self.uses for d in use.used)))


def prove(
    tape: Tape,
    total: Tensor,
    weight: Tensor | None = None,
    need_loss: bool = True,
    without: Sequence[LossUse] = (),
) -> Graph:
    """The uses and losses that `total` depends on, after proof that they cover every parameter.

    With `need_loss`, every path must also pass through a loss that the tape knows, or through what the model
    returned where the tape kept that. without: losses to take as if they were not known.
    Raises UncoveredUse, UnknownLoss, or Undefined (a parameter enters the loss directly).
    """
    if not total.requires_grad or total.grad_fn is None:
        raise UnknownLoss(
            "asked for a backward pass from a tensor that does not depend on any parameter; "
            "was the loss detached, or computed under no_grad?"
        )
    graph = known_losses(tape, total, without) if need_loss else Graph(total, None, [], [], [])
    roots = [loss.logits for loss in graph.losses] if need_loss else [(total.grad_fn, 0)]
    reached = _walk_to_uses(roots, tape.leaves(), by_node(tape.uses), tape.spent)
    return Graph(total, weight, sorted(reached, key=lambda u: u.index), graph.known, graph.own)


def known_losses(tape: Tape, total: Tensor, without: Sequence[LossUse] = ()) -> Graph:
    """The losses that `total` is made of, where every path to a parameter passes through one; no uses.

    What is below the losses need not be known. Raises UnknownLoss, UncoveredUse or Undefined as `prove`.
    """
    walk = _LossWalk(tape, without)
    if not walk.to_losses(total, ()) and tape.returned is not None:
        walk.to_losses(total, tape.returned)
        walk.own.append(_rest(walk.boundary, walk.loose))
    for own in walk.own:
        if own.value is not None:
            walk.inside(own)
    return Graph(total, None, [], walk.known, walk.own)


class _LossWalk:
    """The way from a total down to its losses.

    known, own: the losses found; boundary: the tensors of the model's output that were met before a loss;
    loose: the uses that were met before either.
    """

    def __init__(self, tape: Tape, without: Sequence[LossUse]) -> None:
        self._tape = tape
        self._leaves = tape.leaves()
        self._use_at = by_node(tape.uses)
        dropped = set(map(id, without))
        self._loss_at: dict[Node, list[LossUse]] = {}
        for loss in tape.losses:
            # A call that learns from both sides has no likelihood, but may have a Hessian of its own.
            if id(loss) not in dropped and not (loss.call.learned and tape.returned is not None):
                self._loss_at.setdefault(loss.value.node, []).append(loss)
        self._own_at = {own.value.node: own for own in tape.own if own.value is not None}

    def to_losses(self, total: Tensor, outputs: Sequence[LossUse]) -> bool:
        """Walk; whether every path ends at a loss. A parameter met on the way is an error."""
        at = {(part.logits.node, part.logits.output_nr): part for part in outputs}
        self.known: list[LossUse] = []
        self.own: list[OwnUse] = []
        self.boundary: list[LossUse] = []
        self.loose: list[Use] = []
        stops = dict.fromkeys((*self._loss_at, *self._own_at, *self._use_at), ())
        for node, output in edges([(total.grad_fn, total.output_nr)], stops, at):
            if node in self._loss_at:
                self.known += self._loss_at[node]
            elif node in self._own_at:
                self.own.append(self._own_at[node])
            elif (node, output) in at:
                self.boundary.append(at[node, output])
            elif node in self._use_at:
                self._meet(self._use_at[node])
            else:
                self._refuse_parameter(node)
        return not self.boundary and not self.loose

    def _meet(self, uses: list[Use]) -> None:
        if not uses[0].call.out_shape:
            raise Undefined(_enters(", ".join(uses[0].names)))
        if self._tape.returned is None:
            raise UnknownLoss(
                f"a path from the loss to {uses[0]} passes through no loss that is known; seen: "
                f"{_seen(self._tape)}. Make the loss with torch.nn.functional's cross_entropy, mse_loss, "
                "binary_cross_entropy_with_logits, ... (their modules do), times constants and summed, or mark it with "
                "layerwise.as_loss(fn)(outputs, ...)"
            )
        self.loose += uses

    def _refuse_parameter(self, node: Node) -> None:
        name = self._leaves.name(node)
        if name is None:
            return
        if not self.known and not self._tape.uses:
            raise UncoveredUse(_uncovered(name, "the loss", "no call with it was seen"))
        raise Undefined(_enters(name))

    def inside(self, own: OwnUse) -> None:
        """Prove that a marked call depends on the model through its first argument alone."""
        assert own.value is not None
        ends = {(part.logits.node, part.logits.output_nr) for part in own.boundary}
        for node, output in edges([own.value], {}, ends):
            if (node, output) in ends:
                continue
            if node in self._use_at:
                raise UnknownLoss(
                    f"{own.call.name} is marked as a loss, but it depends on {self._use_at[node][0]} by another way "
                    "than its first argument; hand all that it reads of the model over as that argument, in a tuple"
                )
            self._refuse_parameter(node)


def _rest(boundary: list[LossUse], loose: list[Use]) -> OwnUse:
    """What no known loss explains, as one loss of what the model returned, and of uses that go past it."""
    call = OwnCall("the loss", boundary[0].call.logits if boundary else torch.empty(0))
    parts = list(boundary)
    for use in loose:
        data = use.edge.node._input_metadata[use.edge.output_nr]
        logits = torch.zeros((), dtype=data.dtype, device=data.device).expand(use.call.out_shape)
        parts.append(LossUse(OwnCall("the loss", logits), use.edge, use.edge))
    return OwnUse(call, parts, None, loose[0] if loose else None)


def _walk_to_uses(
    roots: Iterable[Any], leaves: Leaves, use_at: dict[Node, list[Use]], spent: Collection[Node]
) -> list[Use]:
    """The uses below the roots, jumping from a use to its data; a parameter met on the way is an error."""
    data = inputs(use_at)
    reached: list[Use] = []
    passed: list[Node] = []
    for node in nodes(roots, data):
        if node in use_at:
            reached += use_at[node]
            passed.append(node)
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
        name = leaves.name(node)
        if name is not None:
            above = (n.name() for n in reversed(passed) if any(edge[0] is node for edge in children(n, data)))
            via = next(above, "the loss")
            raise UncoveredUse(_uncovered(name, via, "a call that the tape cannot see passes it on"))
        passed.append(node)
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
