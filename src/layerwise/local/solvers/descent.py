"""Iterative solvers of a local problem far beyond a few steps: conjugate gradient, Anderson, Newton.

All need products with the problem's rows alone, so they serve every layer and every matching loss; conjugate gradient
needs the squared one. `W` and `b` are one vector, `x = (W, b)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem, contract, local_gradient, local_loss, predict, product, refuse_terms
from layerwise.local.solvers.closed import largest_curvature
from layerwise.tensors import without_grad

__all__ = ["anderson", "conjugate_gradient", "newton"]

Update = tuple[Tensor, Tensor | None]
HALVINGS = 40


class _Flat(NamedTuple):
    """A problem over one vector, the movement `x − x₀` of weight and bias."""

    problem: LocalProblem

    def join(self, w: Tensor, b: Tensor | None) -> Tensor:
        return w.reshape(-1) if b is None else torch.cat((w.reshape(-1), b.reshape(-1)))

    def split(self, x: Tensor) -> Update:
        w, b = self.problem.weight, self.problem.bias
        return x[: w.numel()].view(w.shape), None if b is None else x[w.numel() :].view(b.shape)

    def at(self, x: Tensor) -> Update:
        """The weights at a movement."""
        w, b = self.split(x)
        return self.problem.weight + w, None if b is None or self.problem.bias is None else self.problem.bias + b

    def zeros(self) -> Tensor:
        w, b = self.problem.weight, self.problem.bias
        return w.new_zeros(w.numel() + (0 if b is None else b.numel()))

    def gradient(self, x: Tensor) -> Tensor:
        return self.join(*local_gradient(self.problem, *self.at(x)))

    def loss(self, x: Tensor) -> Tensor:
        return local_loss(self.problem, *self.at(x))

    def curvature(self, x: Tensor, damping: float = 0.0) -> Callable[[Tensor], Tensor]:
        """Products with the Hessian at a movement, `Σ_r J_f(z_r) V a_r a_rᵀ + (c + damping) V`."""
        problem = self.problem
        z = predict(problem, *self.at(x))
        held = problem.stiffness + damping
        if not problem.transfer.is_squared:
            with torch.enable_grad():
                z.requires_grad_()
                y = problem.transfer.f(z)

        def apply(v: Tensor) -> Tensor:
            w, b = self.split(v)
            dz = product(problem.a, w)
            dz = dz if b is None else dz + b
            if not problem.transfer.is_squared:
                # f = ∇F has a symmetric Jacobian: a vector-Jacobian product serves (forward mode is not thread-safe)
                (dz,) = torch.autograd.grad(y, z, dz, retain_graph=True)
            out = self.join(contract(dz, problem.a, w.shape[-1]), None if b is None else dz.sum(0))
            return out + held * v

        return apply


def _solve(curvature: Callable[[Tensor], Tensor], g: Tensor, iterations: int, tol: float) -> Tensor:
    """`−H⁻¹ g` by conjugate gradient from 0, until the residual is `tol` of `|g|`, or curvature runs out.

    Along a direction without curvature the loss is linear; the solution has no component there.
    """
    x, r = torch.zeros_like(g), -g
    largest, flat = 0.0, torch.finfo(g.dtype).eps ** (2 / 3)  # of the largest curvature met so far
    p, rr = r.clone(), r @ r
    enough = tol**2 * rr
    for _ in range(iterations):
        if rr <= enough:
            break
        hp = curvature(p)
        bend, length = p @ hp, p @ p
        largest = max(largest, float(bend / length))
        if not bend > flat * largest * length:
            break
        step = rr / bend
        x, r = x + step * p, r - step * hp
        rr, old = r @ r, rr
        p = r + rr / old * p
    return x


@without_grad
def conjugate_gradient(problem: LocalProblem, iterations: int = 50, tol: float = 1e-6) -> Update:
    """The squared local problem's minimiser by conjugate gradient on its normal equations, as `(ΔW, Δb)`.

    Stops after `iterations` products, or where the gradient has fallen to `tol` times the first one. Without a
    quadratic term it tends to the minimiser nearest to the start, and stopping early acts as damping. Raises BadInput
    for another loss. Source: Hestenes and Stiefel (1952).
    """
    refuse_terms(problem, "conjugate gradient")
    if not problem.transfer.is_squared:
        raise BadInput(
            f"conjugate gradient solves the squared local problem, and this one has {problem.transfer.name}'s "
            "matching loss: use Newton or Anderson, or the squared loss"
        )
    flat = _Flat(problem)
    start = flat.zeros()
    return flat.split(_solve(flat.curvature(start), flat.gradient(start), iterations, tol))


@without_grad
def newton(
    problem: LocalProblem, iterations: int = 10, damping: float = 0.0, inner: int = 50, tol: float = 1e-8
) -> Update:
    """Newton's method on a local problem of any matching loss, as `(ΔW, Δb)`; no step raises the local loss.

        H v = −∇,   H = Σ_r J_f(z_r) ⊗ a_r a_rᵀ + (c + damping) I,   x ← x + 2⁻ʲ v   with Armijo's rule for j

    Conjugate gradient needs products with H alone; its tolerance falls with the gradient (superlinear).
    Stops after `iterations` steps, or where the gradient has fallen to `tol` times the first one. The loss is bounded
    below only for targets in the range of f or with a quadratic term. Source: Dembo, Eisenstat and Steihaug (1982).
    """
    refuse_terms(problem, "Newton's method")
    flat = _Flat(problem)
    x = flat.zeros()
    loss, g = flat.loss(x), flat.gradient(x)
    first = g.norm()
    for _ in range(iterations):
        size = g.norm()
        if not size > tol * first:
            break
        v = _solve(flat.curvature(x, damping), g, inner, min(0.1, float(size / first)))
        fall = g @ v
        if not fall < 0:
            v, fall = -g, -(g @ g)
        for j in range(HALVINGS):
            there = x + 0.5**j * v
            new = flat.loss(there)
            if new <= loss + 1e-4 * 0.5**j * fall:
                x, loss = there, new
                break
        else:  # no step lowers the loss: it is at rounding level
            break
        g = flat.gradient(x)
    return flat.split(x)


@without_grad
def anderson(problem: LocalProblem, steps: int = 20, memory: int = 5, tol: float = 1e-8) -> Update:
    """Gradient descent at the rate 1/L, extrapolated from its last `memory` steps, as `(ΔW, Δb)`.

        x⁺ = x − τ∇ − (ΔX − τΔG) θ,   θ = argmin ‖∇ − ΔG θ‖,   τ = 1/(λ_max(AᵀA) max f' + c)

    with the last differences of x and ∇ as columns of ΔX and ΔG. A step that would raise the local loss is
    replaced by a plain one, and the memory is cleared: no step raises the loss. Raises BadInput where f' is unbounded.
    Source: Anderson (1965), in the form of Walker and Ni (2011).
    """
    refuse_terms(problem, "Anderson")
    slope = problem.transfer.slope
    if not slope < float("inf"):
        raise BadInput(f"Anderson needs a bounded slope of the transfer function; {problem.transfer.name}'s is not: "
                       "use Newton or LocalSteps")  # fmt: skip
    flat = _Flat(problem)
    c = problem.stiffness
    bound = (largest_curvature(problem) - c) * slope + c
    if not bound > 0:
        return flat.split(flat.zeros())
    x = flat.zeros()
    loss, g = flat.loss(x), flat.gradient(x)
    first, xs, gs = g.norm(), [x], [g]
    for _ in range(steps):
        if not g.norm() > tol * first:
            break
        there = x - g / bound
        if len(xs) > 1:
            dx, dg = (torch.stack(v, 1).diff(dim=1) for v in (xs, gs))
            scale = dg.norm(dim=0).clamp_min(torch.finfo(g.dtype).tiny)
            theta = torch.linalg.pinv(dg / scale) @ g / scale
            far = there - (dx - dg / bound) @ theta
            if flat.loss(far) <= loss:
                there = far
            else:
                xs, gs = [x], [g]
        x = there
        loss, g = flat.loss(x), flat.gradient(x)
        xs, gs = [*xs[-memory:], x], [*gs[-memory:], g]
    return flat.split(x)
