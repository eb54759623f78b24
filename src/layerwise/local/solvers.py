"""Solvers of a layer's local problem: local steps of any optimizer, and closed forms for the squared loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem, predict
from layerwise.local.tf_rmsprop import TFRMSProp
from layerwise.operators.ridge import ridge

__all__ = [
    "Workspace", "constant", "linear_floor", "linear_steps", "local_steps", "prox_step", "row_slices", "spectral_step",
]  # fmt: skip

Form = Literal["auto", "plain", "gram"]
Side = Literal["auto", "inputs", "rows"]
Schedule = Callable[[int, int], float]
Cut = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def linear_floor(t: int, steps: int) -> float:
    """The published factor of the local rate at step t of `steps`: `max(1 − t/T, 0.25)`."""
    return max(1 - t / steps, 0.25)


def constant(t: int, steps: int) -> float:
    """The factor 1 at every step."""
    return 1.0


class Workspace:
    """Scratch memory for layers solved one after another: a flat buffer per name, grown as needed."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of a shape, with the type and device of `like`."""
        key, size = (name, like.dtype, like.device), torch.Size(shape).numel()
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            flat = self._flat[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return flat[:size].view(shape)


def row_slices(total: int, rows: int, step: int, offset: int = 0) -> list[tuple[int, int]]:
    """The rows of local step number `step`, as one or (where they wrap around) two ranges `(low, high)`.

    Consecutive steps take consecutive slices, cyclically. A shuffled minibatch makes them random; a
    uniform `offset` makes each row's chance exactly rows/total, so the scaled gradient is unbiased.
    """
    low = (offset + step * rows) % total
    high = low + rows
    return [(low, high)] if high <= total else [(low, total), (0, high - total)]


@torch.no_grad()
def local_steps(
    problem: LocalProblem,
    optimizer: torch.optim.Optimizer,
    steps: int = 10,
    *,
    rows: int | None = None,
    form: Form = "auto",
    schedule: Schedule = linear_floor,
    scale: float = 1.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    fold: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Take T steps of an optimizer on one layer's local problem, in place.

    The optimizer owns `weight` and `bias`, the parameters in their own shapes, of which `problem.weight`
    and `problem.bias` are views (the default: these tensors themselves). `fold` carries a gradient `[K,O,I]`
    to the shape of `weight`; default, a reshape. The optimizer's state lives on from batch to batch. It may
    own other parameters if their `.grad` is None. Its rates are multiplied by `schedule(t, T)` and, as the
    `.grad`s, put back at the end.

    rows: None for all R rows at every step, or the number of rows each step takes for itself
    (`row_slices`, with a random offset from `generator` if given), its gradient multiplied by R/rows;
    R or more means all. With rows = R/T all T steps cost 4/6 of an ordinary training step.
    scale: multiplies the whole objective; 1/γ makes the first gradient backprop's own.
    form: "plain" runs rows through the layer; "gram", for the squared loss on all rows alone, takes
    `g_t = γG + (W_t − W₀)AᵀA`, the same steps up to rounding; "auto" the one with fewer operations.
    Raises BadInput for an impossible form, rows or steps below 1, or tensors that share no memory.
    """
    if steps < 1 or (rows is not None and rows < 1):
        raise BadInput(f"local_steps needs steps ≥ 1 and rows ≥ 1 (or None): got steps={steps}, rows={rows}")
    weight = problem.weight if weight is None else weight
    bias = problem.bias if bias is None else bias
    _check_shared("weight", weight, problem.weight)
    _check_shared("bias", bias, problem.bias)
    total = problem.a.shape[0]
    rows = total if rows is None else min(rows, total)
    workspace = Workspace() if workspace is None else workspace
    layer = _Layer(problem, workspace, scale)
    if _use_gram(problem, form, rows, steps):
        gradients = layer.gram(steps)
    else:
        offset = 0
        if generator is not None and rows < total:
            offset = int(torch.randint(total, (), generator=generator, device=generator.device))
        gradients = layer.plain(steps, rows, offset)
    grad_w = layer.dw.reshape(weight.shape) if fold is None else fold(layer.dw)
    grad_b = None if bias is None else layer.db.view(bias.shape)  # type: ignore[union-attr]
    # a view of the scratch serves all steps; torch's fused optimizers need it contiguous as the weight is
    serves = grad_w.untyped_storage().data_ptr() == layer.dw.untyped_storage().data_ptr()
    serves &= grad_w.is_contiguous() or not weight.is_contiguous()
    with _stepping(optimizer, [weight] if bias is None else [weight, bias], steps, schedule) as step:
        weight.grad = grad_w
        if bias is not None:
            bias.grad = grad_b
        for t, _ in enumerate(gradients):
            if not serves and fold is not None:
                weight.grad = fold(layer.dw).contiguous()
            step(t)


@torch.no_grad()
def linear_steps(
    p: Tensor, g: Tensor, optimizer: torch.optim.Optimizer, steps: int, *, schedule: Schedule = linear_floor
) -> None:
    """Take T steps of an optimizer along one gradient `g`, that is on the linear local loss `g·p`, in place."""
    with _stepping(optimizer, [p], steps, schedule) as step:
        for t in range(steps):
            p.grad = g.contiguous() if p.is_contiguous() else g
            step(t)


@contextmanager
def _stepping(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, schedule: Schedule
) -> Iterator[Callable[[int], None]]:
    """A function that takes step t at the rate of the schedule; on exit the rates and `.grad`s are put back."""
    rates = [group["lr"] for group in optimizer.param_groups]
    saved = [p.grad for p in params]
    # our own optimizer without torch's profiling hooks, which cost more than a small layer's step
    advance = optimizer.advance if isinstance(optimizer, TFRMSProp) else optimizer.step

    def step(t: int) -> None:
        factor = schedule(t, steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        advance()

    try:
        yield step
    finally:
        for p, grad in zip(params, saved, strict=True):
            p.grad = grad
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _check_shared(name: str, owned: Tensor | None, used: Tensor | None) -> None:
    if (owned is None) != (used is None):
        raise BadInput(f"local_steps: the layer's {name} and the problem's must both be given or both be None")
    if owned is not None and used is not None and owned.data_ptr() != used.data_ptr():
        raise BadInput(
            f"local_steps works in place: problem.{name} {tuple(used.shape)} must be a view of the {name} "
            f"{tuple(owned.shape)} that the optimizer owns, and they share no memory"
        )


def _use_gram(problem: LocalProblem, form: Form, rows: int, steps: int) -> bool:
    (r, _, i), o = problem.a.shape, problem.weight.shape[1]
    possible = problem.transfer.is_squared and rows == r
    if form == "gram" and not possible:
        raise BadInput(
            'form="gram" holds for the squared loss on all rows: got '
            f'{problem.transfer.name} and {rows} of {r} rows; use form="plain"'
        )
    # Over 2i operations, beyond G_w: the Gram matrix and a product a step, or two products a step.
    cheaper = r * i + (steps - 1) * o * i < 2 * (steps - 1) * r * o
    return form == "gram" or (form == "auto" and possible and cheaper)


class _Layer:
    """A local problem laid out for plain matrix products: K in front, or dropped where it is 1."""

    def __init__(self, problem: LocalProblem, workspace: Workspace, scale: float = 1.0) -> None:
        self.problem, self.workspace, self.scale = problem, workspace, scale
        self.single = problem.weight.shape[0] == 1
        lay = (lambda x: x[:, 0]) if self.single else (lambda x: x.transpose(0, 1))
        self.a, self.y = lay(problem.a), lay(problem.target)
        self.g = None if problem.g is None else lay(problem.g)
        self.rest = None if problem.rest is None else lay(problem.rest)
        self.w = problem.weight[0] if self.single else problem.weight
        self.b = problem.bias if problem.bias is None or self.single else problem.bias.unsqueeze(1)
        like = problem.weight
        self.dw = workspace.take("dw", like.shape, like)
        self.db = None if problem.bias is None else workspace.take("db", problem.bias.shape, like)
        self.out_w = self.dw[0] if self.single else self.dw
        self.out_b = None if self.db is None else self.db[0] if self.single else self.db
        self.wt = self.w.mT
        self._constants: dict[tuple[float, int], Tensor] = {}
        self.fma = torch.addmm if self.single else torch.baddbmm
        self.mul = torch.mm if self.single else torch.bmm

    def plain(self, steps: int, rows: int, offset: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Gradients of T steps from slices of rows; each is read before the next is made."""
        problem = self.problem
        total = problem.a.shape[0]
        factor, held = self.scale * total / rows, self.scale / (problem.prox or 1.0)
        anchors = self._anchors() if problem.prox is not None else ()
        scratch = self.workspace.take("z", (*self.a.shape[:-2], rows, self.w.shape[-2]), self.a)
        parts = self._parts(rows) if offset == 0 and total % rows == 0 else None
        for t in range(steps):
            cuts = [parts[t % len(parts)]] if parts else [self._cut(*r) for r in row_slices(total, rows, t, offset)]
            for piece, (a, y, rest, g) in enumerate(cuts):
                if t == 0 and g is not None:
                    delta, scale = g, problem.gamma * factor
                else:
                    delta, scale = self._delta(a, y, rest, scratch), factor
                self._contract(delta, a, scale, first=piece == 0)
            for grad, now, start in anchors if t > 0 else ():
                grad.add_(now, alpha=held).sub_(start, alpha=held)
            yield self.dw, self.db

    def _cut(self, low: int, high: int) -> Cut:
        """Inputs, targets, further terms and cotangents of a range of rows."""
        a, y, rest, g = (None if x is None else x[..., low:high, :] for x in (self.a, self.y, self.rest, self.g))
        return a, y, rest, g  # type: ignore[return-value]

    def _parts(self, rows: int) -> list[Cut]:
        """All rows in equal cuts, by one call for each tensor: slicing costs as much as a small layer's products."""
        count = self.problem.a.shape[0] // rows
        columns = ((None,) * count if x is None else x.split(rows, -2) for x in (self.a, self.y, self.rest, self.g))
        return list(zip(*columns, strict=True))

    def _delta(self, a: Tensor, y: Tensor, rest: Tensor | None, scratch: Tensor) -> Tensor:
        """`f(W a + b) − target` of some rows, in scratch."""
        z = scratch if a.shape[-2] == scratch.shape[-2] else scratch[..., : a.shape[-2], :]
        if self.b is None:
            self.mul(a, self.wt, out=z)
        else:
            self.fma(self.b, a, self.wt, out=z)
        if rest is not None:
            z.add_(rest)
        return self.problem.transfer.apply_(z).sub_(y)

    def _contract(self, delta: Tensor, a: Tensor, scale: float, first: bool) -> None:
        across = delta.mT
        self.fma(self.out_w, across, a, beta=0.0 if first else 1.0, alpha=scale, out=self.out_w)
        if self.out_b is None:
            return
        if not first:
            self.out_b.add_(delta.sum(-2), alpha=scale)
        elif self.single:
            torch.mv(across, self._constant(scale, delta), out=self.out_b)
        else:
            torch.sum(delta, -2, out=self.out_b).mul_(scale)

    def _constant(self, value: float, delta: Tensor) -> Tensor:
        """A vector of one number for each row, kept from step to step."""
        key = (value, delta.shape[-2])
        if key not in self._constants:
            self._constants[key] = delta.new_full(key[1:], value)
        return self._constants[key]

    def _anchors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per tensor: its gradient, the tensor, and a copy of where it starts."""
        pairs = [(self.dw, self.problem.weight)]
        if self.db is not None and self.problem.bias is not None:
            pairs.append((self.db, self.problem.bias))
        return [(grad, now, self.workspace.take(f"start{n}", now.shape, now).copy_(now))
                for n, (grad, now) in enumerate(pairs)]  # fmt: skip

    def gram(self, steps: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Gradients of T squared-loss steps, `g_0 + (W_t − W₀)(AᵀA + I/η) + (b_t − b₀)(Σ_r a)ᵀ`."""
        problem, take = self.problem, self.workspace.take
        # Differences, not `C + W_t AᵀA` with one product less: W_t − W₀ is tiny against W_t in float32.
        anchors = self._anchors()
        yield from self.plain(1, problem.a.shape[0], 0)
        held = 0.0 if problem.prox is None else 1 / problem.prox
        gram = take("gram", (*self.w.shape[:-2], self.w.shape[-1], self.w.shape[-1]), self.w)
        self.mul(self.a.mT, self.a, out=gram)
        gram.diagonal(dim1=-2, dim2=-1).add_(held)
        gram.mul_(self.scale)
        start_w = take("g0", self.out_w.shape, self.w).copy_(self.out_w)
        moved = take("moved", self.out_w.shape, self.w)
        w0 = anchors[0][2].view(self.w.shape)
        if self.out_b is not None:
            sums, start_b = self.a.sum(-2).mul_(self.scale), self.out_b.clone()
            count = self.scale * (problem.a.shape[0] + held)
            b, b0 = problem.bias.view(self.out_b.shape), anchors[1][2].view(self.out_b.shape)  # type: ignore[union-attr]
        for _ in range(1, steps):
            torch.sub(self.w, w0, out=moved)
            self.fma(start_w, moved, gram, out=self.out_w)
            if self.out_b is not None:
                shift = b - b0
                self.out_w.addcmul_(shift.unsqueeze(-1), sums.unsqueeze(-2))
                torch.add(start_b, shift, alpha=count, out=self.out_b)
                self.out_b.add_((moved @ sums.unsqueeze(-1)).squeeze(-1))
            yield self.dw, self.db


@torch.no_grad()
def prox_step(problem: LocalProblem, side: Side = "auto") -> tuple[Tensor, Tensor | None]:
    """The exact minimiser of the squared local problem with its proximal term, as `(ΔW, Δb)`.

        ΔW = −γ G_w (AᵀA + I/η)⁻¹,    G_w = Σ_r g_r a_rᵀ    (side "inputs": I x I)
           = −γ Gᵀ (AAᵀ + I/η)⁻¹ A                          (side "rows": R x R, by push-through)

    A bias is solved for jointly, as one more input that is always 1. "auto" takes the smaller matrix.
    This is K-FAC with the input factor alone, FOOF (Benzing, 2022) and, for γ = 1, ProxProp (Frerix et
    al., 2018). Raises BadInput without a proximal term or for another loss.
    """
    if problem.prox is None:
        raise BadInput("prox_step needs the proximal term: give the problem prox=η, a positive number")
    a, d = _squared_rows(problem, "prox_step")
    if _by_rows(a, side):
        return _split(problem, -ridge(a @ a.mT, d.mT, 1 / problem.prox) @ a)
    return _split(problem, -ridge(a.mT @ a, d.mT @ a, 1 / problem.prox))


@torch.no_grad()
def spectral_step(problem: LocalProblem, rates: Sequence[float], side: Side = "auto") -> tuple[Tensor, Tensor | None]:
    """Where gradient descent on the squared local problem stands after `len(rates)` steps, as `(ΔW, Δb)`.

        ΔW = −γ G_w h(AᵀA + I/η),   h ← h + rate·(1 − s·h) from 0;  equal rates: h(s) = (1 − (1 − rate·s)ᵀ)/s

    so T steps act as a spectral filter, much as damping by 1/(rate·T) does. `1/η` is 0 without a
    proximal term; `side` and the bias as in `prox_step`. Raises BadInput for another loss.
    """
    a, d = _squared_rows(problem, "spectral_step")
    shift = 0.0 if problem.prox is None else 1 / problem.prox
    by_rows = _by_rows(a, side)
    s, v = torch.linalg.eigh(a @ a.mT if by_rows else a.mT @ a)
    h = torch.zeros_like(s)
    for rate in rates:
        h = h + rate * (1 - (s + shift) * h)
    if by_rows:
        return _split(problem, -((d.mT @ v) * h.unsqueeze(-2)) @ (v.mT @ a))
    return _split(problem, -((d.mT @ a @ v) * h.unsqueeze(-2)) @ v.mT)


def _squared_rows(problem: LocalProblem, asker: str) -> tuple[Tensor, Tensor]:
    """Inputs `[K,R,I]`, with a 1 for the bias, and `z − target` at the starting weights, `[K,R,O]`."""
    if not problem.transfer.is_squared:
        raise BadInput(
            f"{asker} is a closed form for the squared loss, and the problem has {problem.transfer.name}'s "
            "matching loss: use local_steps, or the identity with target_s"
        )
    a = problem.a.transpose(0, 1)
    if problem.bias is not None:
        a = torch.cat((a, a.new_ones(*a.shape[:-1], 1)), -1)
    d = predict(problem) - problem.target if problem.g is None else problem.gamma * problem.g
    return a, d.transpose(0, 1)


def _by_rows(a: Tensor, side: Side) -> bool:
    return side == "rows" or (side == "auto" and a.shape[-2] < a.shape[-1])


def _split(problem: LocalProblem, moved: Tensor) -> tuple[Tensor, Tensor | None]:
    return (moved, None) if problem.bias is None else (moved[..., :-1], moved[..., -1])
