"""Steps that make a layer's own loss larger, as those of SGD on one huge batch do: they are not taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.local.layers.overflow import norms_of
from layerwise.local.problem import LocalProblem, predict
from layerwise.tensors import without_grad

__all__ = ["StepTaken", "has_bounded_steps", "overshot", "sizes_of"]

GROWTH = 1.25  # of the norm of a layer's parameters: a step that grows them by less is not looked at
GROWTH_ALONE = 10.0  # of a parameter that has no loss of its own
REACH = 4.0  # |g·Δ| / |L| from which a quadratic loss with the minimum 0 grows along its gradient g
# Each entry moves by the rate times a constant at most, whatever the gradient is.
_BOUNDED = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RMSprop", "Rprop", "TFRMSProp")


class StepTaken(NamedTuple):
    """Parameters that a step has moved together, by name, with their values before it.

    problem: makes their local problem at their present values; None where they have none. slope: then the batch's loss
    and its gradient in the only parameter.
    """

    params: Mapping[str, Tensor]
    before: Sequence[Tensor]
    problem: Callable[[], LocalProblem] | None
    slope: tuple[Tensor, Tensor] | None = None


def has_bounded_steps(kind: object) -> bool:
    """Whether a class of local optimizers bounds its steps, so that no batch can carry parameters away."""
    return isinstance(kind, type) and any(each.__name__ in _BOUNDED for each in kind.__mro__)


def sizes_of(moved: Sequence[StepTaken]) -> Tensor:
    """Norms of what has moved, of all parameters after the step and then before it, on their device."""
    after = [p.detach() for each in moved for p in each.params.values()]
    return norms_of([*after, *(t for each in moved for t in each.before)])


def overshot(moved: Sequence[StepTaken], sizes: Sequence[float] | None = None) -> Iterator[tuple[StepTaken, str]]:
    """What has moved too far, with the words for it. sizes: `sizes_of` it, where the host has them.

    Those whose norm has grown by a quarter, and with it their own loss `Σ_r [F(z_r) − y_r·z_r]` on the rows of the
    step; or which have no such loss, and whose norm has grown tenfold in a step Δ with `|g·Δ| > 4 |L|`, L the batch's
    loss and g its gradient: a quadratic loss with the minimum 0 would be larger. Either is only computed where the norm
    has grown; the host waits for that, and for the sizes.
    """
    if not moved:
        return
    found = sizes_of(moved).tolist() if sizes is None else sizes
    after, before = iter(found[: len(found) // 2]), iter(found[len(found) // 2 :])
    for each in moved:
        name = next(iter(each.params))
        new, old = (sum(next(some) ** 2 for _ in each.params) ** 0.5 for some in (after, before))
        if new <= GROWTH * old:
            continue
        if each.problem is None:
            if new > GROWTH_ALONE * old and each.slope is not None and _reach(each, *each.slope) > REACH:
                yield each, f"the step of {name}, which grew its norm from {old:.3g} to {new:.3g}"
            continue
        first, last = _losses(each, each.problem)
        if not last <= first:
            yield each, f"the step of {name}, which raised its own loss from {first:.3g} to {last:.3g}"


def _reach(moved: StepTaken, loss: Tensor, gradient: Tensor) -> float:
    """`|g·Δ| / |L|` of the step of one parameter, in float64."""
    (p,), (old,) = moved.params.values(), moved.before
    descent = ((p.detach().cpu().double() - old.cpu().double()) * gradient.cpu().double()).sum()
    return float(descent.abs() / loss.detach().cpu().double().abs())


@without_grad
def _losses(moved: StepTaken, problem: Callable[[], LocalProblem]) -> tuple[float, float]:
    """A layer's own loss before and after its step, on the targets from before it, in float64."""
    params = [p.detach() for p in moved.params.values()]
    after = [p.detach().clone() for p in params]
    try:
        torch._foreach_copy_(params, list(moved.before))
        made = problem()
        made = replace(made, target=made.target.clone())
        first = _loss(made)
    finally:
        torch._foreach_copy_(params, after)
    return first, _loss(made)


def _loss(problem: LocalProblem) -> float:
    """The loss at the present weights, of which the problem has views."""
    wide: dict[str, Any] = {
        name: None if t is None else t.cpu().double() if t.is_floating_point() else t.cpu()
        for name in ("a", "weight", "bias", "target", "rest") for t in (getattr(problem, name),)
    }  # fmt: skip
    alone = LocalProblem(transfer=problem.transfer, **wide)
    return float(alone.transfer.matching(predict(alone), alone.target).sum())
