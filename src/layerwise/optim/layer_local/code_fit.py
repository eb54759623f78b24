"""Layers fitted to codes: the weight updates of alternating minimization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.local.codes.code_step import CodeStep, Terms
from layerwise.local.codes.coupling import Coupling
from layerwise.local.codes.gauss_newton import WrongCodes
from layerwise.local.layers.layer import Layer
from layerwise.local.layers.record import problem_of, single_count
from layerwise.local.layers.term_weights import TermWeights
from layerwise.local.problem import LocalProblem, predict
from layerwise.local.solvers.memory import Memory
from layerwise.local.solvers.steps import constant, linear_steps
from layerwise.local.solvers.task import Task
from layerwise.local.solvers.values import LocalSteps, Solver
from layerwise.local.transfer import IDENTITY
from layerwise.optim.base import NamedOptimizer
from layerwise.optim.deferred import Late, completed
from layerwise.optim.keywords import refuse_idle
from layerwise.optim.layer_local.base import Fitting, LayerLocal
from layerwise.optim.layer_local.coding import Coded
from layerwise.optim.layer_local.executors import Executor, GradientJob, LayerJob, operations
from layerwise.optim.layer_local.snapshot import Snapshot, solved
from layerwise.optim.layer_local.stale import Stale
from layerwise.optim.layer_local.trace import Trace
from layerwise.optim.layer_local.updates import (
    DEFAULTS,
    PRESETS,
    RECOVERIES,
    CodeUpdate,
    LayerPlan,
    LayerPlans,
    Minibatch,
    Updates,
    WeightUpdate,
    filled,
    other_weights,
    rate_of,
    share,
    with_coupling,
)  # fmt: skip
from layerwise.optim.saved_state import Fit
from layerwise.replay.state import RandomState, RunState
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import Verdict, WrongAssumption, without_grad

__all__ = ["CodeFitter", "FittedToCodes"]


class CodeFitter:
    """Fits layers to their codes, for `AltMin` and for a stage of a `Pipeline`.

    defaults: the numbers of a parameter group. said: the settings that must be equal in all processes. Raises BadInput.
    """

    def __init__(
        self, codes: CodeUpdate, weights: WeightUpdate, minibatch: Minibatch, names: Sequence[str], lr: float | None,
        layers: Mapping[str, Mapping[str, Any]] | None, trace: Trace | None, preset: str | None,
    ) -> None:  # fmt: skip
        if preset is not None and preset not in [*PRESETS, *RECOVERIES]:
            raise BadInput(f"AltMin knows the presets {', '.join([*PRESETS, *RECOVERIES])}; got {preset!r}")
        chosen = {"weights": "adam", **PRESETS.get(preset or "", {})}
        meant = RECOVERIES.get(preset or "", {})
        codes, weights = filled(codes, meant), filled(weights, meant)
        way = chosen["weights"] if weights.weights is None else weights.weights
        self.updates = Updates(way, weights.regularizer, layers or {}, names)
        self._plans = LayerPlans(self.updates)
        kind = self.updates.default.kind
        if kind != chosen["weights"]:
            chosen.pop("lr", None)  # which is the other kind's
        self._given = said = {**vars(codes), **vars(weights), **vars(minibatch)}
        given = {key: value for key, value in {**said, "lr": lr}.items() if key in DEFAULTS[kind] and value is not None}
        chosen = {**DEFAULTS[kind], "lr": rate_of(self.updates.default), **chosen, **given, "weights": kind}
        self.codes = chosen.pop("codes")
        self.defaults = with_coupling(chosen)
        self.said = {**said, "codes": self.codes, "layers": layers}
        if codes.multipliers and (self.codes != "sweep" or minibatch.repeats < 2):
            raise BadInput(
                'multipliers belong to the samples of a minibatch: they need codes="sweep" and repeats ≥ 2 (codes made '
                f"from the outputs at once cancel them); got codes={self.codes!r}, repeats={minibatch.repeats}"
            )
        self.code_step = CodeStep() if codes.code_step is None else codes.code_step
        self.repeats, self.trace, self._reduction = minibatch.repeats, trace, minibatch.reduction
        self.multipliers: dict[int, Tensor] | None = {} if codes.multipliers else None
        staleness = 2 if minibatch.staleness is None else minibatch.staleness
        self._weights = TermWeights()
        self._assuming: Verdict | None = None  # what memories of the present step are judged by
        self.stale = Stale(staleness) if minibatch.schedule == "async" else None

    def refuse_idle(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Raise BadInput for a keyword that changes nothing. groups: the optimizer's."""
        refuse_idle(self._given, self.updates.effects(self.codes, groups))

    # -- the numbers of the objective --------------------------------------------------------------------------

    def gamma(self, fitting: Fitting, name: str) -> float:
        """γ = B/μ of a parameter, by which its cotangents are multiplied."""
        return self._batch(fitting.run.counted) / float(fitting.group(name)["coupling"])

    def threshold(self, fitting: Fitting, layer: Layer) -> float:
        """λ/μ of a layer's code; 0 where there is none."""
        group = fitting.group(layer.name)
        return 0.0 if layer.likelihood is not None else float(group["code_l1"] / group["coupling"])

    def terms(self, groups: Mapping[int, Mapping[str, Any]], counted: int | str) -> Terms:
        """The numbers of the relaxed objective for codes at some uses, from the groups of their layers' weights.

        counted: the samples, as `Recorded.counted`.
        """
        coupling = {i: float(group["coupling"]) for i, group in groups.items()}
        sparsity = {i: float(group["code_l1"]) for i, group in groups.items()}
        return Terms(coupling, self._batch(counted), sparsity, self.multipliers)

    def _batch(self, counted: int | str) -> float:
        return float(single_count(counted)) if self._reduction == "mean" else 1.0

    def solvers(self, fitting: Fitting) -> Iterator[Any]:
        """The solver of each layer; None where more is done with its problem."""
        plain = self.stale is None and self.trace is None
        for layer in fitting.run.layers:
            yield self._plans.of(fitting, layer).update.solver or LocalSteps() if plain else None

    # -- problems, solved or taken back ------------------------------------------------------------------------

    def fit(
        self, fitting: Fitting, coded: Coded, layers: Sequence[Layer], optimizer: NamedOptimizer,
        executor: Executor, finish: Callable[[], None], refit: bool = False, late: Late | None = None,
    ) -> str | Late | None:  # fmt: skip
        """Fit layers to their codes, and return None; or move nothing, and return the first tensor that is not finite.

        finish: the last thing that the step does, once it is decided. refit: only these layers move, without staleness
        or trace.
        """
        snapshot = self.snapshot(fitting, layers)
        stale = None if refit else self.stale
        trace = self.trace if self.trace is not None and self.trace.due() and not refit else None
        made: dict[str, LocalProblem] = {}
        if stale is not None or trace is not None:
            made = {layer.name: self._problem(fitting, layer)() for layer in layers}
            made = made if stale is None else stale.exchange(made)  # after an error, `_repeated` takes it back
        if trace is not None:
            params = {layer.name: fitting.run.tape.parameters[layer.name].detach() for layer in layers}
            before = {name: p.clone() for name, p in params.items()}
            outputs = {name: predict(problem) for name, problem in made.items()}

        spoiled, jobs = list[str](), list[LayerJob | GradientJob]()

        def solve_all() -> None:
            fits = [self._job(fitting, layer, partial(made.__getitem__, layer.name) if made else
                              self._problem(fitting, layer)) for layer in layers]  # fmt: skip
            rest = [] if refit else fitting.gradient_jobs(partial(self._step_along, fitting), self.updates.is_free)
            jobs[:] = *fits, *rest
            spoiled.extend(made)  # where it raises, nothing tells which
            executor.run(fits, rest, fitting.state)
            fitting.round_off()
            spoiled[:] = [] if stale is None else snapshot.spoiled_names()

        def note() -> Callable[[], None]:
            multipliers = self._raised_multipliers(layers, coded.codes)
            write = None
            if trace is not None:
                has_code = {layer.name: layer.likelihood is None or not self._plans.of(fitting, layer).takes_steps
                            for layer in layers}  # fmt: skip
                problems = {n: (made[n], outputs[n], has_code[n]) for n in made}
                write = trace.noted(before, params, coded.slopes(), problems)
            passed = 0 if self.trace is None else self.trace.passed + (not refit)

            def commit() -> None:
                self.multipliers = multipliers
                if write is not None:
                    write()
                if self.trace is not None:
                    self.trace.passed = passed
                finish()

            return commit

        self._weights.verdict = None if late is None or late.deferred else late.verdict
        self._assuming = None if late is None or late.again else late.verdict
        try:
            where = solved(solve_all, snapshot, executor, note, optimizer, late, jobs)
        except WrongCodes:
            raise
        except WrongAssumption:
            assert late is not None
            return self.fit(fitting, coded, layers, optimizer, executor, finish, refit, late.anew())
        finally:
            self._weights.verdict = self._assuming = None
        if isinstance(where, str) and stale is not None:
            stale.blame([*spoiled, *snapshot.too_far])
        return where

    def _problem(self, fitting: Fitting, layer: Layer) -> Callable[[], LocalProblem]:
        """A function that makes a layer's local problem, whose gradient is γ times the relaxed objective's.

        A hidden layer has γ = B/μ and the squared loss; the layer that makes a loss's logits has the loss itself,
        which is its matching loss with γ = 1/w for terms of one weight w.
        """
        plan, gamma, transfer = self._plans.of(fitting, layer), self.gamma(fitting, layer.name), IDENTITY
        if plan.takes_steps and layer.likelihood is not None and not layer.transfer.stand_in:
            weight = self._weights.of(layer)
            if weight:
                gamma, transfer = 1 / weight, layer.transfer
        terms = tuple([fitting.term(layer, asked, gamma) for asked in plan.update.regularizers])
        return partial(problem_of, fitting.run, layer, gamma, transfer, terms=terms)

    def _job(self, fitting: Fitting, layer: Layer, problem: Callable[[], LocalProblem]) -> LayerJob:
        """A layer to be fitted."""
        plan = self._plans.of(fitting, layer)

        def cost() -> float:
            group, solver = plan.groups[0], plan.update.solver
            return operations(LocalSteps(group["steps"], rows=group["rows"]) if solver is None else solver, layer)

        params = dict(zip(layer.names, plan.params, strict=True))
        return LayerJob(params, cost, lambda: self._task(fitting, layer, plan, problem()), plan.free)

    def _task(self, fitting: Fitting, layer: Layer, plan: LayerPlan, problem: LocalProblem) -> Task:
        """A layer's problem with its solver, and its optimizer for local steps."""
        params, group, scale = plan.params, plan.groups[0], 1 / problem.gamma
        solver: Solver | None = plan.update.solver
        if solver is None:
            solver = share(group["steps"], group["rows"], problem.a.shape[0])
        kind, optimizer = plan.optimizer(fitting) if plan.takes_steps else (None, None)
        if plan.takes_steps and group["normalise"]:
            scale *= fitting.run.samples / problem.a.shape[0]
        rates, state = [float(g["lr"]) for g in plan.groups], fitting.moments(solver, params[0])
        l1, late = float(group["l1"]), self._assuming
        return Task(problem, solver, layer.name, params, rates, optimizer, layer.fold, scale, state, l1, kind, late)

    def _step_along(self, fitting: Fitting, name: str, p: Tensor, g: Tensor) -> None:
        """Take T steps along the gradient, for a parameter without a code."""
        fitting.forget_moments(p)
        _, optimizer = fitting.local_optimizer([name], partial(self.updates.rates, name, [p]))
        linear_steps(p, g, optimizer, fitting.group(name)["steps"], schedule=constant)

    def snapshot(self, fitting: Fitting, layers: Sequence[Layer]) -> Snapshot:
        """A snapshot to roll back to."""
        memories = [layer.name for layer in layers if isinstance(self._plans.of(fitting, layer).update.solver, Memory)]
        return fitting.snapshot(layers, memories)

    @without_grad
    def _raised_multipliers(self, layers: Sequence[Layer], codes: Mapping[int, Tensor]) -> dict[int, Tensor] | None:
        """`u + c − W a`, with the weights after their update."""
        if self.multipliers is None:
            return None
        found = dict(self.multipliers)
        for part in (part for layer in layers for part in layer.parts if part.use.index in codes):
            index = part.use.index
            gap = codes[index] - part.again()
            old = found.get(index)
            found[index] = gap if old is None else old + gap
        return found

    # -- state -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For `state_dict`: the minibatches kept for stale layers."""
        return {} if self.stale is None else {"stale": self.stale.state()}

    def differences(self, saved: Mapping[str, Any], model: nn.Module | Mapping[str, Tensor]) -> list[str]:
        """What of a saved state does not fit stale layers."""
        if self.stale is None:
            return []
        if "stale" not in saved:
            return ['it lacks the minibatches of stale layers (schedule="async")']
        return self.stale.differences(saved["stale"], named_parameters_of(model))

    def restore(self, state_dict: Mapping[str, Any], model: nn.Module | Mapping[str, Tensor]) -> None:
        """From `state_dict`."""
        if self.stale is not None and "stale" in state_dict:
            self.stale.restore(state_dict["stale"], named_parameters_of(model))


class FittedToCodes(LayerLocal):
    """A layer-local optimizer whose layers are fitted to codes, with what its fitter holds in the saved state."""

    _fitter: CodeFitter

    def local_state_dict(self) -> dict[str, Any]:
        """As `LayerLocal.local_state_dict`, with the minibatches that stale layers may still be fitted to."""
        return {**super().local_state_dict(), **self._fitter.state()}

    def _differences(self, saved: Mapping[str, Any]) -> list[str]:
        found = other_weights(saved["param_groups"], self.param_groups) + super()._differences(saved)
        return found + self._fitter.differences(saved, self._model)

    def _take(self, saved: Mapping[str, Any]) -> None:
        super()._take(saved)
        self._fitter.restore(saved, self._model)

    def _fits(self, p: Tensor, name: str, groups: Sequence[Mapping[str, Any]]) -> Iterator[Fit]:
        return self._fitter.updates.fits(p, name, groups)

    def _defers(self) -> bool:
        """Repeats, multipliers, and a μ that grows are the host's."""
        grows = any(Coupling.grown(group) != group["coupling"] for group in self.param_groups)
        once = self._fitter.repeats == 1 and self._fitter.multipliers is None
        return once and not grows

    def _repeated(self, once: Callable[[], Tensor]) -> Tensor:
        """Repeat the step `once` with the same random numbers, then let μ grow; returns the first loss.

        All repeats are one step, made with the last: where one raises before, all are taken back, on all ranks.
        """
        fitter, skipped, repeats = self._fitter, self._skips.known, self._fitter.repeats
        stale = None if fitter.stale is None else fitter.stale.held()
        fitter.multipliers = None if fitter.multipliers is None else {}
        undo = self._undo() if repeats > 1 else []
        random = RandomState({p.device for p in named_parameters_of(self._model).values()}) if repeats > 1 else None
        after: RunState | None = None
        left, ended = repeats - 1, False
        try:
            first = once()
            if random is not None and self._skips.known == skipped:
                after = RunState(self._model)  # as after one run: batch statistics advance once a minibatch
                while left:
                    self.was_made = False
                    left -= 1
                    random.put_back()
                    once()
                    if self._skips.known > skipped:
                        break
            ended = True
            if after is not None:
                completed(after.put_back)
        except BaseException:
            if ended or (self.was_made and not left):
                if after is not None:
                    after.put_back()
            else:
                self.was_made = False  # so that other ranks are told
                for back in undo:
                    back()
                if fitter.stale is not None and stale is not None:
                    fitter.stale.hold(stale)
            raise
        if self._skips.known > skipped:
            if fitter.stale is not None and stale is not None:
                fitter.stale.hold(stale)
        else:
            grown = [Coupling.grown(group) for group in self.param_groups]
            completed(partial(self._couple, grown))
        return first

    def _couple(self, grown: Sequence[float]) -> None:
        for group, mu in zip(self.param_groups, grown, strict=True):
            group["coupling"] = mu

    def _undo(self) -> list[Callable[[], None]]:
        """What takes back all that steps change, but for the minibatches of stale layers."""
        named = [(n, p) for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)]
        averages, trace = self._averages, self._fitter.trace
        return [
            Snapshot(named, self.state).put_back,
            RunState(self._model).put_back,
            partial(setattr, self, "_averages", averages),
            *([] if trace is None else [partial(trace.hold, trace.held())]),
        ]
