"""Coverage, proved on the autograd graph: every path from the loss to a parameter passes a recorded use.

The recorded calls prove nothing: a custom autograd Function, a scripted block or another thread are invisible to a
torch-function mode. So the graph itself is walked: from the total to the values of the known losses, from their logits
to the outputs of uses, from each use to the edges that its data had before the call. A path that reaches a parameter
without passing a use is an error that names the parameter and the node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput, UncoveredUse, Undefined, UnknownLoss
from layerwise.graph.second.custom_functions import is_custom, written_at
from layerwise.graph.walk import SELECTIONS, Node, by_node, children, edges, inputs, nodes
from layerwise.losses import OwnCall, Unread
from layerwise.tape.gradient_calls import GradientUse
from layerwise.tape.origins import Origin
from layerwise.tape.tape import Tape
from layerwise.tape.uses import LossUse, OwnUse, Use, called_at, place

__all__ = ["Graph", "hides", "known_losses", "observed_before", "prove"]


@dataclass(frozen=True)
class Graph:
    """The part of a tape that a total depends on: its uses (in call order) and losses.

    known: losses with a likelihood, in call order. own: the user's own losses, which are the rest of the total.
    selections: the nodes between the losses' inputs and uses, or two uses, that pick elements by an index or a mask.
    in_losses: those between the total and the losses' inputs. calls: where the tensors come from that the model was
    called with, those of each call. met: the same of calls that took rows of several tensors together.
    asked: names of the parameters whose quantities are wanted; None: all.
    passed: the nodes on the way from the total, or from the losses' inputs, to the parameters, in the order of the
    walk. hidden: the edges that those among them read whose calls cannot be seen: functions of the user's own, and
    writes through views.
    unread: None, or a list that takes what is otherwise read at once: numbers, and what raises for bad ones.
    """

    total: Tensor
    weight: Tensor | None
    uses: list[Use]
    known: list[LossUse]
    own: list[OwnUse]
    selections: tuple[Node, ...] = ()
    in_losses: tuple[Node, ...] = ()
    calls: tuple[tuple[Origin, ...], ...] = ()
    met: tuple[tuple[Origin, ...], ...] = ()
    asked: frozenset[str] | None = None
    passed: Mapping[Node, None] = field(default_factory=dict)
    hidden: frozenset[tuple[Node | None, int]] = frozenset()
    unread: Unread | None = None

    @property
    def losses(self) -> list[LossUse]:
        """The inputs of all losses: the logits of the known ones, then the boundary of the user's own."""
        return [*self.known, *(part for own in self.own for part in own.boundary)]

    @property
    def entered(self) -> list[Origin]:
        """Where all tensors come from that the model was called with."""
        return [origin for call in self.calls for origin in call]

    @property
    def seed(self) -> Tensor:
        """The cotangent of the total: the weight of the backward pass, by default 1."""
        return torch.ones_like(self.total) if self.weight is None else self.weight

    @property
    def batch(self) -> Tensor | None:
        """The batch that the first use read, possibly through maps that keep the samples."""
        return self.uses[0].batch if self.uses else None

    def covered(self) -> list[str]:
        """Names of the parameters with at least one use, in no particular order."""
        return sorted(set().union(*(d.names for use in self.uses for d in use.used)))

    def parameters(self) -> list[str]:
        """Names of those among them whose quantities are wanted."""
        return [name for name in self.covered() if self.asked is None or name in self.asked]

    @cached_property
    def asked_uses(self) -> list[Use]:
        """The uses of the parameters whose quantities are wanted."""
        if self.asked is None:
            return self.uses
        return [use for use in self.uses if not self.asked.isdisjoint(use.names)]


def prove(
    tape: Tape,
    total: Tensor,
    weight: Tensor | None = None,
    need_loss: bool = True,
    without: Sequence[LossUse] = (),
) -> Graph:
    """The uses and losses that `total` depends on, after proof that they cover every parameter.

    With `need_loss`, every path must also pass through a known loss, or through the model's output where the tape
    recorded it. without: losses to treat as unknown.
    Raises UncoveredUse, UnknownLoss, Undefined (a parameter enters the loss directly), or BadInput (one was frozen).
    """
    if not total.requires_grad or total.grad_fn is None:
        raise UnknownLoss(
            "asked for a backward pass from a tensor that does not depend on any parameter; "
            "was the loss detached, or computed under no_grad?"
        )
    use_at = by_node(tape.uses)
    graph = known_losses(tape, total, without, use_at) if need_loss else Graph(total, None, [], [], [])
    roots = [loss.logits for loss in graph.losses] if need_loss else [(total.grad_fn, 0)]
    walk = _UseWalk(tape, use_at)
    walk.to_uses(roots)
    uses = sorted(walk.reached, key=lambda u: u.index)
    parameters = tape.parameters
    for use in uses:
        for name in use.names:
            if name not in parameters:
                raise BadInput(
                    f"the parameter {name!r} was frozen after a call with it, {use}, and before the backward pass from "
                    "it; freeze it before the forward pass, or after the backward pass"
                )
    in_losses = tuple(node for node in graph.in_losses if node not in walk.selections)
    return Graph(
        total, weight, uses, graph.known, graph.own, selections=tuple(walk.selections), in_losses=in_losses,
        calls=tuple(tape.entered), met=tuple(tape.met), passed=dict.fromkeys(walk.passed),
        hidden=frozenset(walk.hidden),
    )  # fmt: skip


def known_losses(
    tape: Tape, total: Tensor, without: Sequence[LossUse] = (), use_at: Mapping[Node, list[Use]] | None = None
) -> Graph:
    """The losses that `total` is made of, after proof that every path to a parameter passes one of them.

    Uses below the losses are not looked for. use_at: the tape's uses by node, where that table is made already. Raises
    UnknownLoss, UncoveredUse or Undefined as `prove`.
    """
    walk = _LossWalk(tape, without, by_node(tape.uses) if use_at is None else use_at)
    if not walk.to_losses(total, ()) and tape.returned is not None:
        walk.to_losses(total, tape.returned)
        walk.own.append(_unexplained(walk.boundary, walk.bypassing))
    for own in walk.own:
        if own.value is not None:
            walk.check_first_argument(own)
    order = {id(loss): i for i, loss in enumerate(tape.losses)}
    known = sorted(walk.known, key=lambda loss: order[id(loss)])
    return Graph(total, None, [], known, walk.own, in_losses=tuple(dict.fromkeys(walk.selections)))


class _LossWalk:
    """The walk from a total down to its losses.

    known, own: the losses found. boundary: the tensors of the model's output met before a loss. bypassing: the uses
    met before either. selections: the nodes met that pick elements.
    """

    def __init__(self, tape: Tape, without: Sequence[LossUse], use_at: Mapping[Node, list[Use]]) -> None:
        self._tape = tape
        self._leaves = tape.leaves()
        self._use_at = use_at
        dropped = set(map(id, without))
        self._loss_at: dict[Node, list[LossUse]] = {}
        for loss in tape.losses:
            # A call whose target also requires grad has no likelihood; as a loss of the user's own it has a Hessian.
            if id(loss) not in dropped and not (loss.call.learned and tape.returned is not None):
                self._loss_at.setdefault(loss.value.node, []).append(loss)
        self.selections: list[Node] = []
        self._own_at = {own.value.node: own for own in tape.own if own.value is not None}

    def to_losses(self, total: Tensor, outputs: Sequence[LossUse]) -> bool:
        """Walk from the total; whether every path ends at a loss. A parameter met on the way is an error."""
        at = {(part.logits.node, part.logits.output_nr): part for part in outputs}
        self._total = total
        self.known: list[LossUse] = []
        self.own: list[OwnUse] = []
        self.boundary: list[LossUse] = []
        self.bypassing: list[Use] = []
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
                self._pass(node)
        return not self.boundary and not self.bypassing

    def _meet(self, uses: list[Use]) -> None:
        if not uses[0].call.out_shape:
            raise Undefined(_enters(str(uses[0]), "as one number"))
        if self._tape.returned is None:
            raise UnknownLoss(
                f"a path from the loss to {uses[0]} passes through no loss that is known; seen: "
                f"{_seen(self._tape)}. Make the loss with torch.nn.functional's cross_entropy, mse_loss, "
                "binary_cross_entropy_with_logits, ... (their modules do), times constants and summed, or mark it with "
                "layerwise.as_loss(fn)(outputs, ...)"
            )
        self.bypassing += uses

    def _pass(self, node: Node) -> None:
        if node in self._tape.spent:
            raise observed_before()
        if node.name() in SELECTIONS:
            self.selections.append(node)
        name = self._leaves.name(node)
        if name is None:
            return
        above = self._above(node)
        if above is None or is_custom(above) or not (self._tape.derives(name) or self._tape.losses):
            raise UncoveredUse(_uncovered(self._tape, name, above))
        raise Undefined(_enters(f"parameter {name!r}", f"through autograd's {above.name()}"))

    def _above(self, node: Node) -> Node | None:
        """A node through which a walk from the total came to a node."""
        passed = nodes([(self._total.grad_fn, 0)])
        return next((n for n in passed if any(edge[0] is node for edge in n.next_functions)), None)

    def check_first_argument(self, own: OwnUse) -> None:
        """Prove that a marked call depends on the model through its first argument alone."""
        assert own.value is not None
        ends = {(part.logits.node, part.logits.output_nr) for part in own.boundary}
        for node, output in edges([own.value], {}, ends):
            if (node, output) in ends:
                continue
            name = self._leaves.name(node)
            if node in self._use_at or name is not None:
                what = f"the parameter {name!r}" if name is not None else self._use_at[node][0]
                raise UnknownLoss(
                    f"{own} is marked as a loss, but it depends on {what} by another way than its first "
                    "argument; hand all that it reads of the model over as that argument, in a tuple, and leave out "
                    "terms of parameters alone (a penalty), of which no sample has a part"
                )
            self._pass(node)


def _unexplained(boundary: list[LossUse], bypassing: list[Use]) -> OwnUse:
    """The part of the total without a known loss, as one loss of the model's output and of uses that bypass it."""
    first = boundary[0].call.logits if boundary else torch.empty(0)
    call = OwnCall("the loss", first, place=place(called_at()))
    parts = list(boundary)
    for use in bypassing:
        data = use.edge.node._input_metadata[use.edge.output_nr]
        logits = torch.zeros((), dtype=data.dtype, device=data.device).expand(use.call.out_shape)
        parts.append(LossUse(OwnCall("the loss", logits), use.edge, use.edge))
    derivatives = [use for use in bypassing if isinstance(use, GradientUse)]
    return OwnUse(call, parts, None, next(iter(derivatives or bypassing), None))


class _UseWalk:
    """The walk from the losses' inputs, or a total, down to the uses, following the data of each use.

    reached: the uses. selections: the nodes above and between them that pick elements. passed: all nodes, in order.
    hidden: the edges that nodes whose calls cannot be seen read.
    """

    def __init__(self, tape: Tape, use_at: Mapping[Node, list[Use]]) -> None:
        self._tape, self._use_at = tape, use_at
        self.reached: list[Use] = []
        self.selections: list[Node] = []
        self.passed: list[Node] = []
        self.hidden: list[tuple[Node | None, int]] = []

    def to_uses(self, roots: Iterable[Any]) -> None:
        """Walk from the roots; a parameter met on the way is an error."""
        use_at = self._use_at
        data, leaves, spent = inputs(use_at), self._tape.leaves(), self._tape.spent
        for node in nodes(roots, data):
            if node in use_at:
                self.reached += use_at[node]
                self.passed.append(node)
                continue
            if node in spent:
                raise observed_before()
            self._note(node, node.name())
            name = leaves.name(node)
            if name is not None:
                unseen = (n for n in self.passed if hides(n) and any(m is node for m in nodes([(n, 0)], data)))
                above = (n for n in reversed(self.passed) if any(edge[0] is node for edge in children(n, data)))
                raise UncoveredUse(_uncovered(self._tape, name, next(unseen, None) or next(above, None)))
            self.passed.append(node)

    def _note(self, node: Node, kind: str) -> None:
        if kind in SELECTIONS:
            self.selections.append(node)
        elif kind == "CheckpointFunctionBackward":
            raise UncoveredUse(
                "the model runs a block under torch.utils.checkpoint with use_reentrant=True, which hides the "
                "block's parameters; pass use_reentrant=False"
            )
        elif kind == "torch::autograd::CopySlices" or is_custom(node):
            self.hidden += node.next_functions


def observed_before() -> Undefined:
    """The error for a second backward pass through a forward."""
    return Undefined(
        "this backward pass runs through a forward that was observed before (retain_graph), so its samples "
        "would count twice; add the losses up and call backward once, or run the forward again"
    )


def hides(node: Node) -> bool:
    """Whether a node is the backward of something whose calls cannot be seen."""
    return is_custom(node) or "DifferentiableGraph" in node.name()


def _enters(what: str, how: str) -> str:
    return (
        f"{what} enters the loss directly, {how}, and no call there takes it together with the data of "
        "single samples: a term that all of them share (a penalty on weights, a log-determinant, a learned scale of "
        "the loss), of which no sample has a part. Where each sample's term should hold it, add it before the mean, "
        "(terms + it).mean() with terms of shape [N]; else leave it out of the observed backward pass and add its "
        "gradient yourself. A batch made inside the context by torch.zeros or empty_like counts as a constant, with "
        "random numbers written to it, too: make it by torch.randn_like, or outside"
    )


def _uncovered(tape: Tape, name: str, via: Node | None) -> str:
    """Why no recorded call stands between the loss and a parameter, as far as can be seen."""
    node = "the loss" if via is None else f"the autograd node {via.name()}"
    text = f"parameter {name!r} is reached from the loss through {node}, and no recorded call lies between: "
    if via is not None and is_custom(via):
        return text + (
            f"that is a function of your own{written_at(via)}, and what it does with the parameter cannot be seen. "
            "Write it with torch calls, give it no parameter but the output of a layer, or freeze the parameter"
        )
    if via is not None and "DifferentiableGraph" in via.name():
        return text + "it is a scripted block, whose calls cannot be seen. Use the module that was scripted"
    if tape.derives(name):
        return text + (
            "calls read it, but none together with data. A batch made inside the context by torch.eye, ones or arange "
            "counts as a constant: make it outside. A model without an input has no samples"
        )
    return text + (
        "no call read it inside the context. Forwards outside of it, in another thread, in a scripted block or under "
        "torch.func (vmap, grad, jvp) are invisible: run the forward inside, with plain torch calls, or freeze the "
        "parameter"
    )


def _seen(tape: Tape) -> str:
    return ", ".join(str(loss) for loss in tape.losses) or "no known loss call"
