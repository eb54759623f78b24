"""LocoProp: every layer is fitted to its own target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, NonFinite, Undefined
from layerwise.graph.coverage import prove
from layerwise.local.layers.layer import Layer, layers_of
from layerwise.local.layers.overshoot import has_bounded_steps
from layerwise.local.layers.record import Recorded, RunRecorder, problem_of, refreshed
from layerwise.local.layers.units import Units
from layerwise.local.problem import LocalProblem, Term
from layerwise.local.regularizers import Regularizer
from layerwise.local.solvers.run import solve
from layerwise.local.solvers.steps import linear_steps
from layerwise.local.solvers.task import Task
from layerwise.local.solvers.values import LocalSteps, Solver, name_of
from layerwise.local.solvers.workspace import Workspace
from layerwise.local.targets import GradientStep, Target, fill_in
from layerwise.local.transfer import IDENTITY, Transfer
from layerwise.optim.base import Closure
from layerwise.optim.deferred import Late
from layerwise.optim.keywords import Keywords, of_numbers, refuse_unknown
from layerwise.optim.layer_local.base import Fitting, LayerLocal, forms_of_state
from layerwise.optim.layer_local.choices import (
    DEFAULTS,
    NUMBERS,
    VALUES,
    Choice,
    Choices,
    LocalUpdate,
    Objective,
    Preset,
    check_common,
    implied,
    in_words,
    settings_for,
    warn_of_stand_ins,
    with_preset,
)  # fmt: skip
from layerwise.optim.layer_local.executors import GradientJob, LayerJob, Workers, operations
from layerwise.optim.layer_local.owners import Execution, Parallel, executor_over
from layerwise.optim.layer_local.snapshot import solved
from layerwise.optim.recording import Samples, factor_left, withhold
from layerwise.optim.saved_state import Fit
from layerwise.replay.rerun import Rerun
from layerwise.replay.state import Buffers, check_loss
from layerwise.tape.tape import Tape
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import WrongAssumption, without_grad

__all__ = ["LocoProp"]

_DEFAULT_STEPS = LocalSteps()  # of parameters without a local problem, beside a solver without local steps
_ORDERS = ("together", "output_to_input", "input_to_output")
_KEYWORDS = Keywords({"objective": Objective, "local_update": LocalUpdate, "execution": Execution})


class LocoPropWords(TypedDict, total=False):
    """`Objective`, `LocalUpdate` and `Execution`, or their fields as keywords."""

    objective: Objective | None
    local_update: LocalUpdate | None
    execution: Execution | None
    loss: Literal["matching", "squared"] | Transfer | None
    target: Target | None
    gamma: float | None
    regularizer: Regularizer | Sequence[Regularizer] | None
    solver: Solver | None
    steps: int | None
    rows: int | Literal["auto", "all"] | None
    decay: float | None
    momentum: float | None
    eps: float | None
    workers: Workers
    parallel: Parallel


class LocoProp(LayerLocal):
    """Fit each layer `z = W a + b` to its own target, all layers at once.

        matching (M):  target y = f(z) - γ g,   min_W  sum_r F(W a_r) - y_r·(W a_r)  + R(W)
        squared (S):   target y = z - γ g,      min_W  sum_r ½ |W a_r - y_r|²        + R(W)

    with g = dL/dz from one run of the model and f = F' the layer's transfer function, both found by the tape.

        opt = LocoProp(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    Args:
        model: an nn.Module, or a mapping of names to tensors.
        params: as for any torch optimizer, with names (`model.named_parameters()` or groups of it); default all.
        lr: default 5e-5 with the matching loss, 1e-5 with the squared one; with a solver, the optimizer's own, or 1.
        layers: settings by pattern on parameter or module names, `{"encoder.*": {"lr": 1e-4}}`; the first match wins.
        order: "together", or one layer after another: "output_to_input", "input_to_output".
        write: "weights", or "grad" to put `W_old − W_new` into `.grad` for an outer optimizer.
        preset: "M" or "S" for these defaults, "published-M" or "published-S", or a known algorithm (Recoveries' page).
        on_nonfinite: "skip" a batch with NaN or infinity and count it in `skipped`; "raise"; or "defer" (page Devices).
        objective: an `Objective`, or its fields: loss, target, gamma, regularizer.
        local_update: a `LocalUpdate`, or its fields: solver, steps, rows, decay, momentum, eps.
        execution: an `Execution`, or its fields: workers, parallel.

    More of each choice, and of which parameters have a local problem: the LocoProp page. `describe()` says it of yours.
    Raises BadInput, UncoveredUse; NonFinite with `on_nonfinite="raise"`.
    Source: Amid, Anil and Warmuth, "LocoProp: Enhancing BackProp via Local Loss Optimization" (2022), section 3.
    """

    @_KEYWORDS.spelled_out(LocoPropWords)
    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        lr: float | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        order: Literal["together", "output_to_input", "input_to_output"] = "together",
        write: Literal["weights", "grad"] = "weights",
        preset: Preset | None = None,
        on_nonfinite: Literal["skip", "raise", "defer"] = "skip",
        **words: Unpack[LocoPropWords],
    ) -> None:
        refuse_unknown(LocoProp.__init__, words)
        if order not in _ORDERS or write not in ("weights", "grad"):
            raise BadInput(f'order is one of {", ".join(_ORDERS)}, write "weights" or "grad"; got {order!r}, {write!r}')
        if write == "grad" and on_nonfinite == "defer":
            raise BadInput('write="grad" has another optimizer behind it: on_nonfinite is "skip" or "raise" there')
        found = _KEYWORDS.values(words)
        given, published = with_preset({**_KEYWORDS.of(found), "lr": lr}, preset)
        execution = found["execution"]
        values = {name: given[name] for name in VALUES}
        self._choices = Choices(
            given, layers or {}, list(named_parameters_of(model)), {k: v["lr"] for k, v in DEFAULTS.items()}
        )
        self._order, self._write, self._workspace = order, write, Workspace()
        if order != "together" and execution != Execution():
            raise BadInput(f"layers in turn (order={order!r}) cannot be solved at once ({execution})")
        self._left: Any = None  # in `.grad`, where a gradient scaler multiplied the loss of the present step
        self._warned: set[str] = set()  # functions without a matching loss
        self._last: list[tuple[tuple[str, ...], str]] | None = None
        loss, squared = values["loss"], getattr(values["solver"], "squared_only", False)
        kind = loss if isinstance(loss, str) else "squared" if squared else "matching"
        chosen = dict(published or DEFAULTS.get(kind, DEFAULTS["matching"]))
        if loss is not None or squared or published is None:
            chosen["loss"] = kind
        chosen |= implied(self._choices.default, {**values, "lr": given["lr"]})
        chosen |= {name: given[name] for name in NUMBERS if given[name] is not None}
        said = {**values, "layers": layers, "order": order, "write": write}
        super().__init__(model, params, chosen, on_nonfinite, executor_over(execution), said, self._choices.numbers)

    # -- groups ------------------------------------------------------------------------------------------------

    _kind = "LocoProp"

    def _fits(self, p: Tensor, name: str, groups: Sequence[Mapping[str, Any]]) -> Iterator[Fit]:
        """The state of the local optimizers of all choices; a bias has that of its weight's."""
        for choice in self._choices.every():
            for group in groups:
                yield from forms_of_state(choice.solver, settings_for(choice.solver, group), p)

    def _differences(self, saved: Mapping[str, Any]) -> list[str]:
        return super()._differences(saved) + self._choices.unsolved(saved["param_groups"], self.param_groups)

    @of_numbers
    def _check(self, group: Mapping[str, Any]) -> None:
        check_common("LocoProp", group)
        if not 0 < group["gamma"] < float("inf"):
            raise BadInput(f"LocoProp needs a finite gamma > 0; got gamma={group['gamma']}")
        if not (0 <= group["decay"] < 1 and 0 <= group["momentum"] < 1 and 0 <= group["eps"] < float("inf")):
            raise BadInput(
                f"LocoProp needs decay and momentum in [0, 1) and a finite eps ≥ 0; got decay={group['decay']}, "
                f"momentum={group['momentum']}, eps={group['eps']}"
            )
        if group["loss"] not in ("matching", "squared"):
            raise BadInput(f'LocoProp\'s loss is "matching" or "squared"; got {group["loss"]!r}')

    # -- a step ------------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, samples: Samples = None
    ) -> Tensor:
        """Run the closure, fit every layer (or write `.grad`), and return the loss before the step.

        samples: as for every optimizer; a target per sample reads their number N.
        """
        skipped = self._skips.known
        loss = super().step(closure, samples=samples)
        if self._write == "grad" and self._skips.known > skipped:
            withhold((p for group in self.param_groups for p in group["params"]), self._left)
        self._left = None
        return loss

    def _attempt(self, closure: Closure, buffers: Buffers, samples: Samples = None) -> tuple[Tensor, str | Late | None]:
        """Record a run, and solve the layers' problems; roll back where a solution is not finite."""
        rerun = None if self._order == "together" else Rerun(self._model, closure, gradients=False)
        recorder = self._new_recorder()
        recorder.say(samples)
        with torch.enable_grad(), recorder:
            loss = closure()
        check_loss(loss)
        return self._fit(recorder, recorder.run(loss), rerun, buffers)

    def _recorder(self) -> RunRecorder:
        if self._order != "together":
            raise BadInput(
                f"LocoProp(order={self._order!r}) runs the model again in a step, which passes recorded "
                '`with opt.watch()` cannot give: call step(closure), or use order="together"'
            )
        return self._new_recorder()

    def _new_recorder(self) -> RunRecorder:
        per_sample = any(getattr(choice.target, "per", "batch") == "sample" for choice in self._choices.every())
        return RunRecorder(self._model, self._ours, kinds=self._kinds, counted=per_sample)

    def _attempt_recorded(self, recorder: RunRecorder, buffers: Buffers) -> tuple[Tensor, str | Late | None]:
        return self._fit(recorder, recorder.run(), None, buffers)

    @without_grad
    def _fit(
        self, recorder: RunRecorder, recorded: Recorded, rerun: Rerun | None, buffers: Buffers
    ) -> tuple[Tensor, str | Late | None]:
        fitting, choices, self._left = self._fitting(recorded), self._choices, recorder.left
        run = fitting.run
        targets = {layer.name: fitting.target(layer, choices.of(layer.name).target) for layer in run.layers}
        fitting.unit = Units(run, lambda name: targets.get(name, choices.of(name).target)).of
        solvers = [choices.of(layer.name).solver if rerun is None else rerun for layer in run.layers]
        late = self._late(run, buffers, solvers, assumes=rerun is None and self._on_nonfinite != "defer")
        if (where := self._unsafe(run, partial(_gamma, fitting), buffers, late)) is not None:
            return run.loss, where
        plans = [_plan(fitting, choices.of(layer.name), targets[layer.name], layer) for layer in run.layers]
        own = ((plan.layer.name, plan.transfer) for plan in plans if plan.choice.transfer is None)
        warn_of_stand_ins(own, self._warned)

        judged: list[LayerJob | GradientJob] = []

        def solve_all() -> None:
            jobs = [_job(fitting, plan) for plan in plans] if rerun is None else []
            solved_in_turn = [] if rerun is None else self._solve_in_turn(fitting, plans, rerun)
            rest = fitting.gradient_jobs(
                partial(_step_along, fitting, choices), lambda name, group: _is_free(choices.of(name).solver, group)
            )
            judged[:] = [*jobs, *solved_in_turn, *rest]
            self._executor.run(jobs, rest, fitting.state)
            fitting.round_off()

        def finish() -> Callable[[], None]:
            last = [(plan.layer.names, in_words(plan.layer, plan.transfer, plan.solver)) for plan in plans]
            last += [((name,), "no local problem: steps along its gradient") for name in run.gradients]
            averages = self._averages | fitting.means.after
            write = snapshot.as_gradients(factor_left(self._left), run.copies) if self._write == "grad" else None

            def commit() -> None:
                if write is not None:
                    self.zero_grad()
                    write()
                self._last, self._averages = last, averages

            return commit

        snapshot = fitting.snapshot(run.layers)
        fitting.judging = None if late is None else late.verdict
        try:
            return run.loss, solved(solve_all, snapshot, self._executor, finish, self, late, judged)
        except WrongAssumption:
            assert late is not None
            fitting.judging, snapshot = None, fitting.snapshot(run.layers)
            return run.loss, solved(solve_all, snapshot, self._executor, finish, self, late.anew(), judged)

    def _solve_in_turn(self, fitting: Fitting, plans: list[_Plan], rerun: Rerun) -> list[LayerJob]:
        """Solve one layer after another, all but the first in new runs of the closure; returns what was solved."""
        done: list[LayerJob] = []
        problems = [_problem(fitting, plan) for plan in plans]
        turns = range(len(plans)) if self._order == "input_to_output" else range(len(plans) - 1, -1, -1)
        for count, n in enumerate(turns):
            layer, problem = plans[n].layer, problems[n]
            if count:
                problem = refreshed(problem, layer, self._run_again(layer, rerun))
            solve(_task(fitting, plans[n], problem), self._workspace)
            fitting.round_off()
            done.append(_job(fitting, plans[n], problem))
        return done

    def _run_again(self, layer: Layer, rerun: Rerun) -> Layer:
        """The same layer in a new run of the closure, whose backward pass is left out."""
        with rerun:
            rerun.rewind()
            tape = Tape(self._model, lambda tape, total, weight, run: None, keep_outputs=True)
            with torch.enable_grad(), tape:
                loss = rerun.run()
            found = layers_of(tape, prove(tape, loss, None, need_loss=False), self._ours, kinds=self._kinds)
        wanted = [part.use.index for part in layer.parts]
        for other in found:
            if other.names == layer.names and [part.use.index for part in other.parts] == wanted:
                return other
        raise Undefined(
            f"run again for order={self._order!r}, the closure made other calls with {layer.name}: make the same ones "
            'in each run, or use order="together"'
        )

    # -- what it did -------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """How each parameter moved in the last step that was not skipped, by name. Raises BadInput before the first."""
        if self._last is None:
            raise BadInput("describe() tells how parameters moved in the last step, and there was none yet")
        found = dict.fromkeys(self._names.values(), "does not move: the loss does not depend on it")
        for names, form in self._last:
            found[names[0]] = form
            found |= dict.fromkeys(names[1:], f"with {names[0]}")
        return found


class _Plan(NamedTuple):
    """A layer with the ingredients of its problem, and the parameter group of its weight."""

    layer: Layer
    group: Mapping[str, Any]
    choice: Choice
    gamma: float
    transfer: Transfer
    terms: tuple[Term, ...]

    @property
    def solver(self) -> Solver:
        """The layer's solver, with the numbers of its group."""
        solver, steps, rows = self.choice.solver, self.group["steps"], self.group["rows"]
        if isinstance(solver, LocalSteps) and (solver.steps, solver.rows) != (steps, rows):
            return replace(solver, steps=steps, rows=rows)
        return solver


def _is_free(solver: Solver, group: Mapping[str, Any]) -> bool:
    """Whether a parameter takes several local steps of any size; one alone is a step of gradient descent."""
    return isinstance(solver, LocalSteps) and group["steps"] > 1 and not has_bounded_steps(solver.kind)


def _gamma(fitting: Fitting, name: str) -> float:
    """γ of a parameter, by which its cotangents are multiplied."""
    return float(fitting.group(name)["gamma"]) * fitting.unit(name)


def _plan(fitting: Fitting, choice: Choice, target: Target, layer: Layer) -> _Plan:
    """The plan of a layer. Raises BadInput for another loss with a solver of the squared one."""
    group, gamma, choice = fitting.group(layer.name), _gamma(fitting, layer.name), choice._replace(target=target)
    found = layer.transfer if group["loss"] == "matching" else IDENTITY
    transfer = found if choice.transfer is None else choice.transfer
    if getattr(choice.solver, "squared_only", False) and not transfer.is_squared:
        raise BadInput(
            f"{name_of(choice.solver)} solves the squared loss, and {layer.name} has {transfer.name}'s matching "
            'loss: choose loss="squared" for it, or Newton, Anderson or LocalSteps'
        )
    terms = tuple(fitting.term(layer, asked, gamma) for asked in choice.regularizers)
    return _Plan(layer, group, choice, gamma, transfer, terms)


def _problem(fitting: Fitting, plan: _Plan) -> LocalProblem:
    """A layer's local problem. Raises NonFinite where the target of a user's function is not finite."""
    target = plan.choice.target
    plain = isinstance(target, GradientStep) and target.clip is None
    made = None if plain else fill_in(target, plan.gamma, plan.layer.name)
    problem = problem_of(fitting.run, plan.layer, plan.gamma, plan.transfer, made, plan.terms)
    if not plain and not bool(torch.isfinite(problem.target).all()):
        raise NonFinite(f"the target of {plan.layer.name} holds NaN or infinity")
    return problem


def _job(fitting: Fitting, plan: _Plan, problem: LocalProblem | None = None) -> LayerJob:
    """A layer to be fitted. problem: where it is known."""
    params = dict(zip(plan.layer.names, fitting.params(plan.layer), strict=True))
    return LayerJob(params, lambda: operations(plan.solver, plan.layer),
                    lambda: _task(fitting, plan, problem or _problem(fitting, plan)),
                    _is_free(plan.choice.solver, plan.group))  # fmt: skip


def _task(fitting: Fitting, plan: _Plan, problem: LocalProblem) -> Task:
    """A layer's problem with its solver and, for local steps, its optimizer."""
    params, solver = fitting.params(plan.layer), plan.solver
    kind = optimizer = None
    if isinstance(solver, LocalSteps):
        kind, optimizer = fitting.local_optimizer(plan.layer.names, partial(settings_for, solver))
    rates, state = [float(fitting.group(n)["lr"]) for n in plan.layer.names], fitting.moments(solver, params[0])
    return Task(problem, solver, plan.layer.name, params, rates, optimizer, plan.layer.fold, state=state, kind=kind,
                verdict=fitting.judging)  # fmt: skip


def _step_along(fitting: Fitting, choices: Choices, name: str, p: Tensor, g: Tensor) -> None:
    """Take T steps on the linear loss `γ g·w`, for a parameter without a local problem."""
    solver = choices.of(name).solver
    steps = solver if isinstance(solver, LocalSteps) else _DEFAULT_STEPS
    fitting.forget_moments(p)
    _, optimizer = fitting.local_optimizer([name], partial(settings_for, solver))
    linear_steps(p, _gamma(fitting, name) * g, optimizer, fitting.group(name)["steps"], schedule=steps.rule)
    if steps.state == "fresh":
        fitting.state.pop(p, None)
