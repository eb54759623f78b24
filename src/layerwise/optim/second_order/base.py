"""Base of the second-order optimizers: a preconditioned step, its length, momentum, and adaptive damping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput, NonFinite
from layerwise.optim.base import NamedOptimizer, refuse_unreached
from layerwise.optim.deferred import Late
from layerwise.optim.keywords import of_numbers
from layerwise.optim.recording import Samples
from layerwise.optim.saved_state import Fit, like
from layerwise.optim.second_order import trust
from layerwise.optim.second_order.preconditioner import Preconditioner
from layerwise.optim.second_order.watched_batch import Watched, WatchedBatch, gradients_in_grad, gradients_of
from layerwise.replay.rerun import Rerun
from layerwise.replay.state import Buffers, check_loss
from layerwise.tape.pull import without_autocast
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import WrongAssumption, all_finite, dense, is_finite, norms, without_grad

__all__ = ["CurvatureOptimizer"]

Values = dict[str, Tensor]
Product = Callable[[Values], Values]


@dataclass
class _Run:
    """One run of a closure: loss, gradients by name, measured curvature, and the closure to run again.

    named: the optimizer's parameters that require grad, in the model's order. groups: of all its parameters. Loss and
    gradients become those of the whole batch over all ranks. adapts: whether this step adapts the damping.
    """

    named: Values
    groups: Mapping[str, dict[str, Any]]
    loss: Tensor
    gradients: Values
    watched: Watched
    rerun: Rerun | None
    adapts: bool

    def damping(self, name: str) -> float:
        """λ of a parameter."""
        return float(self.groups[name]["damping"])


class CurvatureOptimizer(NamedOptimizer):
    """Base of the optimizers that descend along a preconditioned gradient.

    Groups have `lr`, `damping` (which adapts in place), `momentum` and `weight_decay`.
    lr: None for 0.03, or 1 with step_size="quadratic". kl_clip: "auto" for 3e-4, or 1 with step_size="quadratic".
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        params: Iterable[Any] | None,
        lr: float | None,
        momentum: float,
        weight_decay: float,
        kl_clip: float | Literal["auto"] | None,
        step_size: str,
        adapt_damping_every: int | None,
    ) -> None:
        fixed = step_size == "lr"
        if kl_clip == "auto":
            kl_clip = 3e-4 if fixed else 1.0  # where a batch has little curvature, its model goes too far
        if kl_clip is not None and not (isinstance(kl_clip, int | float) and 0 < kl_clip < float("inf")):
            raise BadInput(f"{type(self).__name__}'s kl_clip must be None or a finite number > 0, got {kl_clip!r}")
        if step_size not in ("lr", "quadratic"):
            raise BadInput(f'step_size must be "lr" or "quadratic", got {step_size!r}')
        if adapt_damping_every is not None and (not isinstance(adapt_damping_every, int) or adapt_damping_every < 1):
            raise BadInput(f"adapt_damping_every must be None or a whole number ≥ 1, got {adapt_damping_every!r}")
        self.preconditioner = preconditioner
        self.kl_clip, self.step_size, self.adapt_damping_every = kl_clip, step_size, adapt_damping_every
        group = {
            "lr": lr if lr is not None else 0.03 if fixed else 1.0, "damping": preconditioner.damping,
            "momentum": momentum, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(preconditioner.model, params, group, preconditioner.on_nonfinite)
        self.preconditioner.agree({
            "kl_clip": kl_clip, "step_size": step_size, "adapt_damping_every": adapt_damping_every,
            **{f"group {number}": sorted((key, value) for key, value in group.items() if key != "params")
               for number, group in enumerate(self.param_groups)},
        })  # fmt: skip

    @of_numbers
    def _check(self, group: Mapping[str, Any]) -> None:
        method = type(self).__name__
        self.preconditioner.check()
        lr, damping, momentum, decay = (group[key] for key in ("lr", "damping", "momentum", "weight_decay"))
        if not (0 <= lr < float("inf") and 0 < damping < float("inf") and 0 <= momentum < 1):
            raise BadInput(
                f"{method} needs a finite lr ≥ 0 and damping > 0 and momentum in [0, 1); got lr={lr}, "
                f"damping={damping}, momentum={momentum}"
            )
        if not 0 <= decay < float("inf"):
            raise BadInput(f"{method} needs a finite weight_decay ≥ 0; got weight_decay={decay}")

    # -- a step --------------------------------------------------------------------------------------------

    def _named(self) -> Values:
        """The optimizer's parameters that require grad, by name, in the model's order, and with a state of their type.

        Raises BadInput where they are no longer those that the optimizer was made for.
        """
        named = {name: p for name, p in named_parameters_of(self._model).items() if p.requires_grad}
        self._check_parameters(named)
        self._forms.follow(self.param_groups, self.state)
        return {name: p for name, p in named.items() if self._ours(p)}

    def _attempt(
        self, closure: Callable[[], Tensor], buffers: Buffers, samples: Samples = None
    ) -> tuple[Tensor, str | Late | None]:
        return self._follow(self._run(closure, samples), buffers)

    def _follow(self, run: _Run, buffers: Buffers) -> tuple[Tensor, str | Late | None]:
        """Move along a run, or give the reason not to."""
        run.watched.whole.check()
        if self._reads_late(run):
            late = Late(buffers, self._on_nonfinite == "defer" and not self._in_period(run))
            with suppress(WrongAssumption):  # else the step is made again, and each is read
                return run.loss, self._move(run, late)
        if not is_finite(run.loss) and run.watched.bad is None:
            run.watched.bad = "the loss"
        where = self._agreed(run, trust.unsafe(run.watched, run.gradients, run.damping) or buffers.spoiled())
        if where is None:
            refuse_unreached(run.gradients)
            return run.loss, self._move(run, None)
        return run.loss, where

    def _reads_late(self, run: _Run) -> bool:
        """Whether a step is judged after it is computed: on an accelerator, or deferred outside the periods.

        Another rank is waited for.
        """
        waits = run.rerun is not None or self.preconditioner.exchange.size > 1
        found = run.watched.bad is None and run.watched.suspect is None and bool(run.gradients)
        late = run.loss.device.type != "cpu" or (self._on_nonfinite == "defer" and not self._in_period(run))
        return late and found and not waits

    def _in_period(self, run: _Run) -> bool:
        """Whether the step measures factors, or computes inverses."""
        return run.watched.due or self.preconditioner.inverts_next

    def _recorder(self) -> WatchedBatch:
        if self.step_size == "quadratic" or self.adapt_damping_every is not None:
            raise BadInput(
                f'{type(self).__name__} with step_size="quadratic" or adapt_damping_every runs the model again in a '
                'step, which passes recorded `with opt.watch()` cannot give: call step(closure), or use step_size="lr"'
            )
        return self.preconditioner.new_batch(self._named(), needs_pass=False)

    def _attempt_recorded(self, batch: WatchedBatch, buffers: Buffers) -> tuple[Tensor, str | Late | None]:
        named, watched = self._named(), batch.watched
        found = {name: dense(p.grad.detach()) for name, p in named.items() if p.grad is not None}
        left = None if watched.left_in_grad is None else watched.left_in_grad.factor()
        if left not in (None, 1.0):  # step() was not called by the scaler
            found = {name: g / left for name, g in found.items()}
        if watched.loss is None or not found:
            raise BadInput(
                "step() follows a backward pass `with opt.watch()`, and its gradients in .grad; "
                f"{watched.passes} passes were recorded, and {len(found)} parameters have a gradient. Call "
                "loss.backward() there, in the same thread (torch.autograd.grad is no such pass)"
            )
        return self._follow(_Run(named, self._groups(), watched.loss, found, watched, None, False), buffers)

    def _run(self, closure: Callable[[], Tensor], samples: Samples) -> _Run:
        named = self._named()
        every = self.adapt_damping_every
        adapts = every is not None and (self.preconditioner.steps + 1) % every == 0
        rerun = Rerun(self._model, closure) if self.step_size == "quadratic" or adapts else None
        before = {name: (p.grad, -1 if p.grad is None else p.grad._version) for name, p in named.items()}
        batch = self.preconditioner.new_batch(named, needs_pass=False)
        batch.say(samples)
        with batch as watched, torch.enable_grad():
            loss = closure()
            check_loss(loss)
            with torch._C.DisableTorchFunction(), without_autocast(loss.device.type):
                found = batch.unscaled(gradients_in_grad(named, before))
                watched.in_grad = bool(found)
                if not found and watched.bad is None:
                    found = gradients_of(loss, named, watched)
        return _Run(named, self._groups(), loss.detach(), found, watched, rerun, adapts)

    def _groups(self) -> dict[str, dict[str, Any]]:
        """The group of each parameter, by name; also of frozen ones, which may still have a block."""
        named = named_parameters_of(self._model)
        return {name: self._group_at[id(p)] for name, p in named.items() if self._ours(p)}

    def _agreed(self, run: _Run, where: str | None) -> str | None:
        joint = self.preconditioner.join(run.watched, run.gradients, where, run.named, run.damping, run.loss)
        assert joint.loss is not None
        run.gradients, run.loss = joint.gradients, joint.loss
        return joint.where

    def _tell(self, error: BaseException) -> None:
        self.preconditioner.exchange.fail(error)

    @without_grad
    def _move(self, run: _Run, late: Late | None) -> str | Late | None:
        before, dampings = self.preconditioner.snapshot(), [group["damping"] for group in self.param_groups]
        named = run.named
        old = {} if run.rerun is None else {name: p.clone() for name, p in named.items()}
        states = {p: self.state.get(p) for p in named.values()}
        try:
            made = self._made(run, late)
            where = self.preconditioner.exchange.anywhere(made if isinstance(made, str) else None)
            if where is None and not isinstance(made, str):
                self.complete(made)
        except BaseException:
            if not self.was_made:
                _write(named, old)
                self._put_back(states)
                self.preconditioner.restore(before)
                for group, damping in zip(self.param_groups, dampings, strict=True):
                    group["damping"] = damping
            raise
        if where is not None:
            _write(named, old)
            self.preconditioner.restore(before)
            return where
        return None if late is None or late.good is None else late

    def _made(self, run: _Run, late: Late | None) -> str | Callable[[], None]:
        """What writes a step, or the reason not to make it, where it is not judged later than that."""
        asked = None
        if late is not None and self._in_period(run):
            asked = late.verdict
            trust.ask_safe(asked, run.watched, run.loss, run.gradients, run.damping)
        try:
            self.preconditioner.advance(run.watched, run.damping, asked)
        except NonFinite as error:
            if asked is None:
                raise
            return str(error)
        directions = self.preconditioner.precondition(run.gradients)
        groups = {name: run.groups[name] for name in directions}
        if run.rerun is None:
            return self._step_at_rate(run, groups, directions, late, asked is not None)
        with run.rerun:
            return self._step_by_quadratic_model(run.named, groups, run, directions)

    def _step_at_rate(
        self, run: _Run, groups: dict[str, dict[str, Any]], directions: Values, late: Late | None, asked: bool
    ) -> str | Callable[[], None]:
        """M ← β m + ν d, W ← (1 - lr·weight_decay) W - lr m: what writes them, or the reason not to.

        late: what has not been judged before, or None. asked: whether the batch is asked about in it.
        """
        named, gradients = run.named, run.gradients
        factor = trust.clip_factor(gradients, directions, _each(groups, "lr"), self.kl_clip, late is not None)
        before = {name: self.state.get(named[name], {}).get("momentum") for name in directions}
        values, buffers = trust.descend(named, directions, before, factor, groups)
        after = list(values.values())  # a momentum that is not finite leaves no parameter finite
        if late is None and not all_finite(after):
            return trust.AFTER_STEP
        if late is not None:
            verdict = late.verdict
            sizes = (
                norms(after) if asked else trust.ask_safe(verdict, run.watched, run.loss, gradients, run.damping, after)
            )
            trust.ask_after(verdict, after, sizes)
            if (where := late.reason()) is not None or late.deferred:
                return where or partial(trust.write_late, late, self.state, named, values, buffers)

        def commit() -> None:
            for name in values:
                self.state[named[name]] = {"momentum": buffers[name]}
            if values:
                torch._foreach_copy_([named[name] for name in values], list(values.values()))

        return commit

    def _put_back(self, states: Mapping[Tensor, Any]) -> None:
        """Restore the state of parameters."""
        for p, state in states.items():
            self.state.pop(p, None)
            if state is not None:
                self.state[p] = state

    def _step_by_quadratic_model(
        self, named: Values, groups: dict[str, dict[str, Any]], run: _Run, directions: Values
    ) -> str | Callable[[], None]:
        """Move by products with the exact GGN; gives what writes the momentum, or the reason to take it back."""
        rerun = run.rerun
        assert rerun is not None
        rates, decays = _each(groups, "lr"), _each(groups, "weight_decay")
        ggn = self._ggn_over_ranks(trust.ExactGGN(rerun), run.watched)
        new = self._new_momentum(named, groups, run.gradients, directions, ggn)
        moves = {name: -rates[name] * (m + decays[name] * named[name]) for name, m in new.items()}
        if not all(is_finite(move) for move in moves.values()):
            return "the quadratic model of the step"
        model = trust.predicted_change(run.gradients, moves, ggn, _each(groups, "damping")) if run.adapts else None
        del ggn
        for name, move in moves.items():
            named[name].add_(move)
        if not all_finite([named[name] for name in moves]):
            return trust.AFTER_STEP
        if model is not None:
            here = torch.tensor(rerun.loss(), dtype=torch.float64, device=run.loss.device)
            after = float(self.preconditioner.total(run.watched, {"loss": here})["loss"])
            if model < 0:  # otherwise there is no reduction to compare with
                self._adapt((after - float(run.loss)) / model if math.isfinite(after) else math.nan)
            if not math.isfinite(after):
                return "the loss after the step"
        return lambda: self.state.update({named[name]: {"momentum": m} for name, m in new.items()})

    def _adapt(self, ratio: float) -> None:
        assert self.adapt_damping_every is not None
        for group in self.param_groups:
            group["damping"] = trust.levenberg_marquardt(float(group["damping"]), ratio, self.adapt_damping_every)

    def _ggn_over_ranks(self, ggn: trust.ExactGGN, watched: Watched) -> Product:
        """Products with the exact GGN of all ranks' batches."""
        return lambda direction: self.preconditioner.total(watched, ggn.times(direction))

    def _new_momentum(
        self, named: Values, groups: dict[str, dict[str, Any]], gradients: Values, directions: Values, ggn: Product
    ) -> Values:
        """New momentum buffers m: β m + ν d, or with step_size="quadratic" α d + μ m of the best quadratic model."""
        buffers = {name: self.state.get(named[name], {}).get("momentum") for name in directions}
        betas = _each(groups, "momentum")
        if self.step_size == "lr":
            factor = trust.clip_factor(gradients, directions, _each(groups, "lr"), self.kl_clip, late=False)
            return {
                name: d * factor if (m := buffers[name]) is None or not betas[name] else m * betas[name] + d * factor
                for name, d in directions.items()
            }
        last = {n: m for n, m in buffers.items() if m is not None and betas[n]}
        last |= {n: torch.zeros_like(d) for n, d in directions.items() if n not in last}
        tried = [directions, last] if trust.dot(last, last) > 0 else [directions]
        products = [ggn(d) for d in tried]
        chosen = [-c for c in trust.best_step(gradients, tried, products, _each(groups, "damping"))]
        new = trust.combined(chosen, tried)
        factor = trust.bound(trust.dot(new, trust.combined(chosen, products)), self.kl_clip)
        return {name: m * factor for name, m in new.items()}

    # -- state -----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """How the gradient of each parameter is treated, by name."""
        return self.preconditioner.describe()

    @property
    def counters(self) -> dict[str, int]:
        """Blocks whose inverse needed more damping, is an older one, or is the identity."""
        return self.preconditioner.counters

    def state_dict(self) -> dict[str, Any]:
        """torch's, with names, the number of skipped batches, and the preconditioner's state."""
        return {**super().state_dict(), "preconditioner": self.preconditioner.state_dict()}

    _saved_keys = ("state", "param_groups", "skipped", "preconditioner")

    def _differences(self, saved: Mapping[str, Any]) -> list[str]:
        return [*super()._differences(saved), *self.preconditioner.differences(saved["preconditioner"])]

    def _take(self, saved: Mapping[str, Any]) -> None:
        prepared = self.preconditioner.prepared(saved["preconditioner"])
        super()._take(saved)
        self.preconditioner.restore(prepared)

    def _fits(self, p: Tensor, name: str, groups: Sequence[Mapping[str, Any]]) -> Iterator[Fit]:
        yield like({"momentum": p})


def _each(groups: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float]:
    return {name: float(group[key]) for name, group in groups.items()}


def _write(named: Values, values: Values) -> None:
    for name, value in values.items():
        named[name].copy_(value)
