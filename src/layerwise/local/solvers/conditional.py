"""The conditional gradient method (Frank-Wolfe): a local problem within a norm ball, by its linear parts alone."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem, contract, local_gradient, refuse_terms
from layerwise.local.solvers.steps import Schedule
from layerwise.tensors import without_grad

__all__ = ["conditional_gradient", "harmonic"]


def harmonic(t: int, steps: int) -> float:
    """The classic step sizes `2/(t + 2)`, with which the local loss falls to its least as 1/T."""
    return 2 / (t + 2)


@without_grad
def conditional_gradient(problem: LocalProblem, steps: int, schedule: Schedule) -> tuple[Tensor, Tensor | None]:
    """T steps towards the vertices of the problem's ball where its linear part is least, as `(ΔW, Δb)`.

        V_t = argmin over the ball of ⟨∇D(W_t), V⟩,      W_{t+1} = W_t + α_t (V_t − W_t),      α_t the schedule

    W_t never leaves the ball that it is in. At T = 1 with α = 1 the linear problem is solved: steepest descent in the
    ball's norm. Quadratic terms are part of D. Raises BadInput without a ball.
    Source: Frank and Wolfe (1956); Jaggi, "Revisiting Frank-Wolfe" (2013), algorithm 1.
    """
    refuse_terms(problem, "conditional_gradient", balls=True)
    ball = problem.ball
    if ball is None:
        raise BadInput(
            "the conditional gradient method moves within a norm ball: give a regularizer such as lw.local.SpectralNorm"
        )
    weight, bias = problem.weight, problem.bias
    moved_w, moved_b = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    for t in range(steps):
        now_w, now_b = weight + moved_w, None if bias is None or moved_b is None else bias + moved_b
        dw, db = _first_gradient(problem) if t == 0 else local_gradient(problem, now_w, now_b)
        part = schedule(t, steps)
        moved_w += part * (ball.lowest(dw, weight) - moved_w)
        if bias is not None and moved_b is not None and db is not None:
            moved_b += part * (ball.lowest(db, bias) - moved_b)
    return moved_w, moved_b


def _first_gradient(problem: LocalProblem) -> tuple[Tensor, Tensor | None]:
    """The gradient at the start; of cotangents where the problem has them, without a forward product."""
    if problem.g is None or problem.pulls:
        return local_gradient(problem)
    delta = problem.gamma * problem.g
    return contract(delta, problem.a, problem.weight.shape[-1]), None if problem.bias is None else delta.sum(0)
