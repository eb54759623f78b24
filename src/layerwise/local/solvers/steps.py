"""Local steps of any optimizer on a layer's local problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem, contract, predict, pulled
from layerwise.local.solvers.stopping import Judge, Stop
from layerwise.local.solvers.workspace import Frame, Owned, Workspace, frame_of
from layerwise.local.whitening import projected
from layerwise.tensors import without_grad

__all__ = [
    "Schedule", "StepPlan", "constant", "linear_floor", "linear_steps", "local_steps",
    "row_slices", "taken_steps",
]  # fmt: skip

Form = Literal["auto", "plain", "gram"]
Schedule = Callable[[int, int], float]
Cut = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def linear_floor(t: int, steps: int) -> float:
    """The published factor of the local rate at step t of `steps`: `max(1 − t/T, 0.25)`."""
    return max(1 - t / steps, 0.25)


def constant(t: int, steps: int) -> float:
    """The factor 1 at every step."""
    return 1.0


def row_slices(total: int, rows: int, step: int, offset: int = 0) -> list[tuple[int, int]]:
    """The rows of local step number `step`, as one or (where they wrap around) two ranges `(low, high)`.

    Consecutive steps take consecutive slices, cyclically. A shuffled minibatch makes them random; a
    uniform `offset` makes each row's chance exactly rows/total, so the scaled gradient is unbiased.
    """
    low = (offset + step * rows) % total
    high = low + rows
    return [(low, high)] if high <= total else [(low, total), (0, high - total)]


@dataclass(frozen=True)
class StepPlan:
    """T local steps of an optimizer.

    steps: T. rows: None for all R rows at every step, or the number of rows each step takes for itself (`row_slices`,
    with a random offset from `generator` if given), its gradient multiplied by R/rows; R or more means all. With
    rows = R/T all T steps cost 4/6 of an ordinary training step.
    form: "plain" runs rows through the layer; "gram", for the squared loss on all rows alone, takes
    `g_t = γG + (W_t − W₀)AᵀA`, the same steps up to rounding; "auto" the one with fewer operations.
    schedule: multiplies the optimizer's rates at step t of T. scale: multiplies the whole objective; 1/γ makes the
    first gradient backprop's own. l1: λ of a term λ|W|₁ beside it, by a soft threshold of the step's rate times λ after
    each step (proximal gradient; with momentum or Adam, a heuristic). stop: a rule by which fewer than T steps may be
    enough, judged without the term λ|W|₁. Raises BadInput for rows or steps below 1.
    """

    steps: int = 10
    rows: int | None = None
    form: Form = "auto"
    schedule: Schedule = linear_floor
    scale: float = 1.0
    l1: float = 0.0
    stop: Stop | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.rows is not None and self.rows < 1):
            raise BadInput(
                f"local_steps needs steps ≥ 1 and rows ≥ 1 (or None): got steps={self.steps}, rows={self.rows}"
            )


@without_grad
def local_steps(
    problem: LocalProblem,
    optimizer: torch.optim.Optimizer,
    plan: StepPlan,
    owned: Owned | None = None,
    workspace: Workspace | None = None,
) -> None:
    """Take T steps of an optimizer on one layer's local problem, in place.

    The optimizer owns the parameters, by default the problem's weight and bias themselves, and keeps its state from
    batch to batch. It may own other parameters if their `.grad` is None. Rates and `.grad`s are restored at the end.
    Within a norm ball, a projection follows every step (projected gradient; a heuristic for other optimizers than SGD),
    but one at a rate of 0. Raises BadInput for an impossible form, or tensors that share no memory.
    """
    for advance in taken_steps(problem, optimizer, plan, owned, workspace):
        advance()


def taken_steps(
    problem: LocalProblem, optimizer: torch.optim.Optimizer, plan: StepPlan, owned: Owned | None = None,
    workspace: Workspace | None = None,
) -> Iterator[Callable[[], Any]]:  # fmt: skip
    """`local_steps` one at a time: yields what moves the parameters, which the caller runs; all under no_grad."""
    owned = owned or Owned(problem.weight, problem.bias)
    weight, bias, fold, _ = owned
    total, steps = problem.a.shape[0], plan.steps
    rows = total if plan.rows is None else min(plan.rows, total)
    workspace = Workspace() if workspace is None else workspace
    frame = frame_of(problem, owned, workspace)
    layer: _Layer | _Table = (_Table if problem.indexed else _Layer)(problem, workspace, plan.scale, frame)
    if isinstance(layer, _Layer) and _use_gram(problem, plan.form, rows, steps):
        gradients = layer.gram(steps)
    else:
        offset = 0
        if plan.generator is not None and rows < total:
            offset = int(torch.randint(total, (), generator=plan.generator, device=plan.generator.device))
        gradients = layer.plain(steps, rows, offset)
    within = () if problem.ball is None else (problem.weight, problem.bias)
    starts = [(now, now.clone()) for now in within if now is not None]
    with _Stepping(optimizer, [weight] if bias is None else [weight, bias], steps, plan.schedule) as stepping:
        weight.grad = frame.grad_w
        if bias is not None:
            bias.grad = frame.grad_b
        judge = None if plan.stop is None else Judge(problem, plan.stop, rows, workspace)
        for t, _ in enumerate(gradients):
            last = judge is not None and judge.enough(layer.dw, layer.db)
            if not frame.serves and fold is not None:
                weight.grad = fold(layer.dw).contiguous()
            yield stepping.at(t)
            if plan.l1:
                weight.copy_(F.softshrink(weight, plan.l1 * optimizer.param_groups[0]["lr"]))
            nearest = projected(problem, starts) if starts else []
            for (now, _), to, p in zip(starts, nearest, (weight, bias), strict=False):
                if p is not None and _moves(optimizer, p):
                    now.copy_(to)
            if last:  # its gradient was there already
                return


def _moves(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    """Whether a parameter's rate is not 0."""
    return any(group["lr"] != 0 and any(p is q for q in group["params"]) for group in optimizer.param_groups)


@without_grad
def linear_steps(
    p: Tensor, g: Tensor, optimizer: torch.optim.Optimizer, steps: int, *, schedule: Schedule = linear_floor
) -> None:
    """Take T steps of an optimizer along one gradient `g`, that is on the linear local loss `g·p`, in place."""
    with _Stepping(optimizer, [p], steps, schedule) as stepping:
        for t in range(steps):
            p.grad = g.contiguous() if p.is_contiguous() else g
            stepping.at(t)()


class _Stepping:
    """Gives what takes step t of T, at the schedule's rate; on exit rates and `.grad`s are restored."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: int, schedule: Schedule
    ) -> None:
        self._optimizer, self._params, self._steps, self._schedule = optimizer, params, steps, schedule
        self._rates = [(group, group["lr"]) for group in optimizer.param_groups]
        self._saved = [p.grad for p in params]
        self._advance: Callable[[], Any] | None = None

    def __enter__(self) -> _Stepping:
        return self

    def at(self, t: int) -> Callable[[], Any]:
        """What takes step t."""
        if self._advance is None:  # optimizers with `ready` skip torch's hooks
            optimizer = self._optimizer
            self._advance = optimizer.ready() if hasattr(optimizer, "ready") else optimizer.step
        factor = self._schedule(t, self._steps)
        for group, rate in self._rates:
            group["lr"] = rate * factor
        return self._advance

    def __exit__(self, *exc: object) -> None:
        for p, grad in zip(self._params, self._saved, strict=True):
            p.grad = grad
        for group, rate in self._rates:
            group["lr"] = rate


def _use_gram(problem: LocalProblem, form: Form, rows: int, steps: int) -> bool:
    if form == "plain":
        return False
    r, (_, o, i) = problem.a.shape[0], problem.weight.shape
    possible = problem.transfer.is_squared and rows == r and problem.metric is None
    if form == "gram" and not possible:
        metric = "" if problem.metric is None else ", in a metric"
        raise BadInput(
            'form="gram" holds for the squared loss on all rows: got '
            f'{problem.transfer.name} and {rows} of {r} rows{metric}; use form="plain"'
        )
    # Over 2i operations, beyond G_w: the Gram matrix and a product a step, or two products a step.
    cheaper = r * i + (steps - 1) * o * i < 2 * (steps - 1) * r * o
    return form == "gram" or (form == "auto" and possible and cheaper)


def _first(x: Tensor) -> Tensor:
    return x.select(1, 0)


def _ahead(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


class _Layer:
    """A local problem in the layout of matrix products: K in front, or dropped where it is 1."""

    def __init__(
        self, problem: LocalProblem, workspace: Workspace, scale: float = 1.0, frame: Frame | None = None
    ) -> None:
        frame = frame_of(problem, Owned(problem.weight, problem.bias), workspace) if frame is None else frame
        self.problem, self.workspace, self.scale = problem, workspace, scale
        self.single, self.w, self.b, self.wt = frame.single, frame.w, frame.b, frame.wt
        self.dw, self.db, self.out_w, self.out_b = frame.dw, frame.db, frame.out_w, frame.out_b
        lay = _first if self.single else _ahead
        self.a, self.y = lay(problem.a), lay(problem.target)
        self.g = None if problem.g is None else lay(problem.g)
        self.rest = None if problem.rest is None else lay(problem.rest)
        self.fma = torch.addmm if self.single else torch.baddbmm
        self.mul = torch.mm if self.single else torch.bmm
        self._ones: tuple[float, int, Tensor] | None = None  # the last constant vector that rows were summed with

    def plain(self, steps: int, rows: int, offset: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the gradients of T steps from slices of rows; a later one overwrites an earlier one."""
        problem = self.problem
        total = problem.a.shape[0]
        factor = self.scale * total / rows
        pulls = pulled(problem, self._tensors(), self.scale, self._kept)
        scratch = self.workspace.take("z", (*self.a.shape[:-2], rows, self.w.shape[-2]), self.a)
        parts = self._parts(rows) if offset == 0 and total % rows == 0 else None
        metric = problem.metric
        of_rows, of_gradient = (metric, None) if rows < self.w.shape[-2] else (None, metric)  # whichever is less work
        for t in range(steps):
            cuts = [parts[t % len(parts)]] if parts else [self._range(*r) for r in row_slices(total, rows, t, offset)]
            for piece, (a, y, rest, g) in enumerate(cuts):
                if t == 0 and g is not None:
                    delta, scale = g, problem.gamma * factor
                else:
                    delta, scale = self._delta(a, y, rest, scratch), factor
                inputs, ones = (a, None) if of_rows is None else of_rows.raised_rows(a, self.b is not None)
                self._contract(delta, inputs, ones, scale, first=piece == 0)
            if of_gradient is not None:
                of_gradient.raise_(self.dw, self.db)
            for pull in pulls:
                pull.add_gradient(at_start=t == 0)
            yield self.dw, self.db

    def _range(self, low: int, high: int) -> Cut:
        """Inputs, targets, further terms and cotangents of a range of rows."""
        a, y, rest, g = (None if x is None else x[..., low:high, :] for x in (self.a, self.y, self.rest, self.g))
        return a, y, rest, g  # type: ignore[return-value]

    def _parts(self, rows: int) -> list[Cut]:
        """All rows in equal parts, by one `split` a tensor: slicing costs as much as a small layer's products."""
        count = self.problem.a.shape[0] // rows
        sizes = (rows,) * count
        columns = ((None,) * count if x is None else x.split_with_sizes(sizes, -2)
                   for x in (self.a, self.y, self.rest, self.g))  # fmt: skip
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
        return self.problem.transfer.residual_(z, y)

    def _contract(self, delta: Tensor, a: Tensor, column: Tensor | None, scale: float, first: bool) -> None:
        """Add `Σ_r δ_r a_rᵀ` to the weight's gradient, and to the bias's that with a column of inputs, or with ones."""
        across = delta.mT
        self.fma(self.out_w, across, a, beta=0.0 if first else 1.0, alpha=scale, out=self.out_w)
        if self.out_b is None:
            return
        if column is not None:
            found = (across @ column.unsqueeze(-1)).squeeze(-1)
            torch.mul(found, scale, out=self.out_b) if first else self.out_b.add_(found, alpha=scale)
        elif not first:
            self.out_b.add_(delta.sum(-2), alpha=scale)
        elif self.single or delta.device.type != "cpu":  # one launch
            ones, rows = self._ones, delta.shape[-2]
            if ones is None or ones[0] != scale or ones[1] != rows:
                ones = self._ones = scale, rows, self.workspace.constant(scale, rows, delta)
            if self.single:
                torch.mv(across, ones[2], out=self.out_b)
            else:
                torch.bmm(across, ones[2].expand(len(across), 1, rows).mT, out=self.out_b.unsqueeze(-1))
        else:
            torch.sum(delta, -2, out=self.out_b).mul_(scale)

    def _tensors(self) -> list[tuple[Tensor, Tensor]]:
        """The gradient of the weight and the weight, and those of the bias."""
        pairs = [(self.dw, self.problem.weight)]
        if self.db is not None and self.problem.bias is not None:
            pairs.append((self.db, self.problem.bias))
        return pairs

    def _kept(self, number: int, now: Tensor) -> Tensor:
        """A copy of the weight (0) or the bias (1)."""
        return self.workspace.take(f"start{number}", now.shape, now).copy_(now)

    def gram(self, steps: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Gradients of T squared-loss steps, `g_0 + (W_t − W₀)(AᵀA + I/η) + (b_t − b₀)(Σ_r a)ᵀ`."""
        problem, take = self.problem, self.workspace.take
        # Differences, not `C + W_t AᵀA` with one product less: W_t − W₀ is tiny against W_t in float32.
        starts = [self._kept(n, now) for n, (_, now) in enumerate(self._tensors())]
        yield from self.plain(1, problem.a.shape[0], 0)
        held = problem.stiffness
        gram = take("gram", (*self.w.shape[:-2], self.w.shape[-1], self.w.shape[-1]), self.w)
        self.mul(self.a.mT, self.a, out=gram)
        gram.diagonal(dim1=-2, dim2=-1).add_(held)
        gram.mul_(self.scale)
        start_w = take("g0", self.out_w.shape, self.w).copy_(self.out_w)
        moved = take("moved", self.out_w.shape, self.w)
        w0 = starts[0].view(self.w.shape)
        if self.out_b is not None:
            sums, start_b = self.a.sum(-2).mul_(self.scale), self.out_b.clone()
            count = self.scale * (problem.a.shape[0] + held)
            b, b0 = problem.bias.view(self.out_b.shape), starts[1].view(self.out_b.shape)  # type: ignore[union-attr]
        for _ in range(1, steps):
            torch.sub(self.w, w0, out=moved)
            self.fma(start_w, moved, gram, out=self.out_w)
            if self.out_b is not None:
                shift = b - b0
                self.out_w.addcmul_(shift.unsqueeze(-1), sums.unsqueeze(-2))
                torch.add(start_b, shift, alpha=count, out=self.out_b)
                self.out_b.add_((moved @ sums.unsqueeze(-1)).squeeze(-1))
            yield self.dw, self.db


class _Table:
    """The local problem of a looked-up table: its rows are indices, so a product is a look-up."""

    def __init__(self, problem: LocalProblem, workspace: Workspace, scale: float, frame: Frame) -> None:
        self.problem, self.scale = problem, scale
        self.dw, self.db = frame.dw, frame.db

    def plain(self, steps: int, rows: int, offset: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Gradients of T steps from slices of rows."""
        problem, total, size_in = self.problem, self.problem.a.shape[0], self.problem.weight.shape[-1]
        pairs = [(grad, now) for grad, now in ((self.dw, problem.weight), (self.db, problem.bias))
                 if grad is not None and now is not None]  # fmt: skip
        pulls = pulled(problem, pairs, self.scale, lambda _, now: now.clone())
        for t in range(steps):
            index = (torch.arange(rows, device=problem.a.device) + offset + t * rows) % total
            part = problem if rows == total else _rows_of(problem, index)
            delta = problem.transfer.f(predict(part)) - part.target
            found = contract(delta, part.a, size_in), delta.sum(0)
            for (grad, _), value in zip(pairs, found, strict=False):
                torch.mul(value, self.scale * total / rows, out=grad)
            if problem.metric is not None:
                problem.metric.raise_(self.dw, self.db)
            for pull in pulls:
                pull.add_gradient(at_start=t == 0)
            yield self.dw, self.db


def _rows_of(problem: LocalProblem, index: Tensor) -> LocalProblem:
    """Some rows of a problem."""
    g, rest = (None if x is None else x[index] for x in (problem.g, problem.rest))
    return replace(problem, a=problem.a[index], target=problem.target[index], g=g, rest=rest)
