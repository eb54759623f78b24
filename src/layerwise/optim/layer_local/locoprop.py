"""LocoProp: every layer is fitted to its own target."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, NonFinite, SquaredInstead
from layerwise.local.layers.layer import Layer
from layerwise.local.layers.record import Recorded, problem_of, record
from layerwise.local.problem import LocalProblem, Pull
from layerwise.local.regularizers import Elastic, Proximal, Regularizer, WeightDecay
from layerwise.local.solvers.run import Task, solve
from layerwise.local.solvers.steps import Workspace, linear_steps
from layerwise.local.solvers.tf_rmsprop import TFRMSProp
from layerwise.local.solvers.values import LocalSteps, Solver, name_of
from layerwise.local.targets import GradientStep, Target, factor, fill_in
from layerwise.local.transfer import IDENTITY, Transfer
from layerwise.optim.layer_local.base import LayerLocal, check_common
from layerwise.optim.layer_local.choices import Choice, Choices, implied
from layerwise.optim.layer_local.jobs import Job, Rest, operations
from layerwise.optim.layer_local.owners import Parallel, crew_over
from layerwise.optim.layer_local.sweeps import Sweep
from layerwise.optim.layer_local.undo import Undo
from layerwise.optim.layer_local.workers import Workers
from layerwise.replay.state import Buffers, RandomState
from layerwise.tape.uses import named_parameters_of

__all__ = ["LocoProp"]

_PUBLISHED: dict[str, Any] = {
    "lr": 1e-5, "gamma": 10.0, "steps": 10, "rows": "all", "decay": 0.9, "momentum": 0.999, "eps": 1e-5,
}  # fmt: skip
# The published rate over 1 − momentum is 1e-2. With matching losses a shorter memory and half of that learn well from
# the first batches, on problems small and large (benchmarks/training/defaults.py); squared losses keep the long one.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "matching": {**_PUBLISHED, "lr": 5e-5, "momentum": 0.99, "rows": "auto", "loss": "matching"},
    "squared": {**_PUBLISHED, "rows": "auto", "loss": "squared"},
}
_PRESETS: dict[str, dict[str, Any]] = {
    "M": _DEFAULTS["matching"],
    "S": _DEFAULTS["squared"],
    "published-M": {**_PUBLISHED, "loss": "matching"},
    "published-S": {**_PUBLISHED, "loss": "squared"},
}
_REST = LocalSteps()  # what parameters without a local problem take where the solver takes no local steps
_ORDERS = ("together", "output_to_input", "input_to_output")


class _Plan(NamedTuple):
    """A layer with everything its problem is made of."""

    layer: Layer
    transfer: Transfer
    choice: Choice
    pulls: tuple[Pull, ...]


class LocoProp(LayerLocal):
    """Fit each layer `z = W a + b` to its own target, all layers at once.

        matching (M):  target y = f(z) - γ g,   min_W  sum_r F(W a_r) - y_r·(W a_r)  + R(W)
        squared (S):   target y = z - γ g,      min_W  sum_r ½ |W a_r - y_r|²        + R(W)

    with g = dL/dz from one run of the model and f = F' the layer's transfer function, both found by the tape.
    The first local gradient is γ times backprop's. By default T local steps of TFRMSProp follow, with rate
    `lr·max(1 - t/T, 1/4)`; its state lives on from batch to batch.

        opt = LocoProp(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    model: an nn.Module, or a mapping of names to tensors. params: as for any torch optimizer, with names
    (`model.named_parameters()` or groups of it); default all.

    Three values and a solver, from `lw.local`, each also by layer:
    loss: "matching", "squared", or a transfer function whose matching loss is taken in place of the found one's. A
    function without a matching loss (GELU, SiLU) is treated as S, with a `SquaredInstead` warning, once.
    target: `GradientStep` (default), `Mirror`, or a function `(z, g, transfer) -> y`. regularizer: None, `Proximal`,
    `WeightDecay`, `Elastic`, a function, or several. solver: `LocalSteps` (default), `ProximalSolve`,
    `ConjugateGradient`, `Spectral`, `Anderson`, `Newton`, or a function `problem -> (ΔW, Δb)`, whose update is
    multiplied by lr, then 1 by default. layers: `{"encoder.*": {"loss": "squared", "lr": 1e-4}}`, patterns (fnmatch)
    on the names of parameters or of modules that hold them; the first match wins; parameters with numbers of their own
    get a
    parameter group of their own.

    order: "together"; or "output_to_input" or "input_to_output", where layers are solved in turn for the same fixed
    targets, and each reads its inputs anew from a run of the closure (same random numbers and buffers) through the
    layers already moved. On a chain the first of the two equals "together". write: "weights", or "grad" to leave the
    weights and put `W_old − W_new` into `.grad` for any outer optimizer (None on a skipped batch). workers: None, n or
    ("thread", n), or ("process", n): how many layers are solved at once, with the same bits; processes are spawned, so
    a script needs its `if __name__ == "__main__":`. parallel: True (all ranks of `torch.distributed`) or a process
    group: every rank runs the closure on the same batch, solves the layers it owns and shares their weights, with the
    same bits (docs/distributed.md).

    The default solver's settings in short: lr and momentum (5e-5 and 0.99 with the matching loss, the published 1e-5
    and 0.999 with the squared one); gamma: γ, against the gradient of the loss as written; steps: T; rows: as in
    `LocalSteps`; decay and eps of TFRMSProp. preset: "M" or "S" for these defaults, "published-M" or "published-S" for
    exactly the published settings; other arguments override it.

    Weights with one orientation have a local problem, at all their uses together: of linear and convolution layers,
    embeddings, norms and other scales, attention and recurrent projections, shared layers. The other parameters (lone
    biases, transposed convolutions, weights tied to their transpose, derived weights) take T steps along γ times their
    gradient; with a solver without local steps, ten of TFRMSProp at 5e-5 times lr. `describe()` says which.
    Raises BadInput, UncoveredUse; NonFinite with `on_nonfinite="raise"` (default: skip the batch, count it).
    Source: Amid, Anil and Warmuth, "LocoProp: Enhancing BackProp via Local Loss Optimization" (2022), section 3.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        lr: float | None = None,
        loss: Literal["matching", "squared"] | Transfer | None = None,
        target: Target | None = None,
        regularizer: Regularizer | Sequence[Regularizer] | None = None,
        solver: Solver | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        order: Literal["together", "output_to_input", "input_to_output"] = "together",
        write: Literal["weights", "grad"] = "weights",
        workers: Workers = None,
        parallel: Parallel = None,
        gamma: float | None = None,
        steps: int | None = None,
        rows: int | Literal["auto", "all"] | None = None,
        decay: float | None = None,
        momentum: float | None = None,
        eps: float | None = None,
        preset: Literal["M", "S", "published-M", "published-S"] | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        if preset is not None and preset not in _PRESETS:
            raise BadInput(f"LocoProp knows the presets {', '.join(_PRESETS)}; got {preset!r}")
        if order not in _ORDERS or write not in ("weights", "grad"):
            raise BadInput(f'order is one of {", ".join(_ORDERS)}, write "weights" or "grad"; got {order!r}, {write!r}')
        values = {"loss": loss, "target": target, "regularizer": regularizer, "solver": solver}
        self._choices = Choices(
            values, layers or {}, list(named_parameters_of(model)), {k: v["lr"] for k, v in _DEFAULTS.items()}
        )
        self._order, self._write, self._workspace = order, write, Workspace()
        if order != "together" and not (workers is None and parallel is None):
            asked = f"workers={workers!r}, parallel={parallel!r}"
            raise BadInput(f"layers in turn (order={order!r}) cannot be solved at once ({asked})")
        self._said: set[str] = set()
        self._last: list[tuple[tuple[str, ...], str]] | None = None
        kind = loss if isinstance(loss, str) else "squared" if getattr(solver, "squared_only", False) else "matching"
        chosen = dict(_PRESETS[preset] if preset else _DEFAULTS.get(kind, _DEFAULTS["matching"]))
        if isinstance(loss, str) or preset is None:
            chosen["loss"] = kind
        chosen |= implied(self._choices.default, {**values, "lr": lr})
        given = {
            "lr": lr,
            "gamma": gamma,
            "steps": steps,
            "rows": rows,
            "decay": decay,
            "momentum": momentum,
            "eps": eps,
        }
        chosen |= {k: v for k, v in given.items() if v is not None}
        said = {**values, "layers": layers, "order": order, "write": write}
        super().__init__(model, params, chosen, on_nonfinite, crew_over(parallel, workers), said)

    # -- groups ------------------------------------------------------------------------------------------------

    def _patterns(self) -> Mapping[str, Mapping[str, Any]]:
        return self._choices.numbers

    def _check(self, group: Mapping[str, Any]) -> None:
        check_common("LocoProp", group)
        if not 0 < group["gamma"] < float("inf"):
            raise BadInput(f"LocoProp needs a finite gamma > 0; got gamma={group['gamma']}")
        if not (0 <= group["decay"] < 1 and 0 <= group["momentum"] < 1 and group["eps"] >= 0):
            raise BadInput(
                f"LocoProp needs decay and momentum in [0, 1) and eps ≥ 0; got decay={group['decay']}, "
                f"momentum={group['momentum']}, eps={group['eps']}"
            )
        if group["loss"] not in ("matching", "squared"):
            raise BadInput(f'LocoProp\'s loss is "matching" or "squared"; got {group["loss"]!r}')

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Run the closure, move every parameter or write what it would move by, and return the loss before the step."""
        skipped = self.skipped
        loss = super().step(closure)
        if self._write == "grad" and self.skipped > skipped:  # nothing for an outer optimizer
            self.zero_grad()
        return loss

    def _run(self, closure: Callable[[], Tensor]) -> Recorded:
        if self._order != "together":
            devices = {p.device for group in self.param_groups for p in group["params"]}
            self._sweep = Sweep(self._model, closure, self._ours, RandomState(devices), Buffers(self._model),
                                self._kinds)  # fmt: skip
        return record(self._model, closure, self._ours, kinds=self._kinds)

    def _gamma(self, recorded: Recorded, name: str) -> float:
        gamma = float(self._group_of(recorded, name)["gamma"])
        return factor(self._choices.of(name).target, gamma, recorded.samples)

    def _move(self, run: Recorded) -> str | None:
        recorded = run
        averages: dict[str, Tensor] = {}
        plans = [self._plan(recorded, layer, averages) for layer in recorded.layers]
        undo = self._undo(recorded, plans)
        where = self._guarded(undo, lambda: self._solve(recorded, plans))
        if where is not None:
            return where
        self._averages |= averages
        if undo is not None and self._write == "grad":
            self.zero_grad()
            undo.to_gradients()
        steps = [int(self._group_of(recorded, plan.layer.name)["steps"]) for plan in plans]
        self._last = [(plan.layer.names, _form(plan, count)) for plan, count in zip(plans, steps, strict=True)]
        self._last += [((name,), "no local problem: steps along its gradient") for name in recorded.gradients]
        return None

    def _solve(self, recorded: Recorded, plans: list[_Plan]) -> None:
        """Move every parameter."""
        if self._order == "together":
            jobs = [self._job(recorded, plan) for plan in plans]
        else:
            jobs = []
            problems = [self._problem(recorded, plan) for plan in plans]
            turns = range(len(plans)) if self._order == "input_to_output" else range(len(plans) - 1, -1, -1)
            for count, n in enumerate(turns):
                problem = self._sweep.refreshed(problems[n], plans[n].layer) if count else problems[n]
                solve(self._task(recorded, plans[n], problem)[0], self._workspace)
        parameters = recorded.tape.parameters
        rest = [Rest({name: parameters[name]}, g.numel, partial(self._step_along, recorded, name, g))
                for name, g in recorded.gradients.items()]  # fmt: skip
        self._crew.run(jobs, rest, self.state)

    def _job(self, recorded: Recorded, plan: _Plan) -> Job:
        params = {name: recorded.tape.parameters[name] for name in plan.layer.names}
        group = self._group_of(recorded, plan.layer.name)
        return Job(params, lambda: operations(self._solver_of(plan, group), plan.layer),
                   lambda: self._task(recorded, plan, self._problem(recorded, plan)))  # fmt: skip

    def _plan(self, recorded: Recorded, layer: Layer, averages: dict[str, Tensor]) -> _Plan:
        """What a layer's problem is made of; new running averages go into `averages`."""
        choice, group = self._choices.of(layer.name), self._group_of(recorded, layer.name)
        transfer = choice.transfer
        if transfer is None:
            transfer = layer.transfer if group["loss"] == "matching" else IDENTITY
            if transfer.stand_in:
                self._say(layer)
        if getattr(choice.solver, "squared_only", False) and not transfer.is_squared:
            raise BadInput(
                f"{name_of(choice.solver)} solves the squared loss, and {layer.name} has {transfer.name}'s matching "
                'loss: choose loss="squared" for it, or Newton, Anderson or LocalSteps'
            )
        gamma = self._gamma(recorded, layer.name)
        return _Plan(layer, transfer, choice, tuple(
            self._pull(recorded, layer, term, gamma, averages) for term in choice.regularizers
        ))  # fmt: skip

    def _say(self, layer: Layer) -> None:
        """Warn once of a function that has no matching loss."""
        f = layer.transfer
        if f.name not in self._said:
            self._said.add(f.name)
            why = "has no tabulated matching loss" if f.monotone else "is not monotone and has no matching loss"
            warnings.warn(
                f"{f.name}, behind {layer.name}, {why}: such layers take the squared loss before it (LocoProp-S)",
                SquaredInstead,
                stacklevel=6,
            )

    def _problem(self, recorded: Recorded, plan: _Plan) -> LocalProblem:
        layer, target = plan.layer, plan.choice.target
        gamma = self._gamma(recorded, layer.name)
        plain = isinstance(target, GradientStep) and target.clip is None
        made = (
            None if plain else fill_in(target, float(self._group_of(recorded, layer.name)["gamma"]), recorded.samples)
        )
        problem = problem_of(recorded, layer, gamma, plan.transfer, made, plan.pulls)
        if not plain and not bool(torch.isfinite(problem.target).all()):
            raise NonFinite(f"the target of {layer.name} holds NaN or infinity")
        return problem

    def _task(self, recorded: Recorded, plan: _Plan, problem: LocalProblem) -> tuple[Task, Callable[[], Any]]:
        """A layer's task, and what tells the kind of its local optimizer."""
        params = [recorded.tape.parameters[name] for name in plan.layer.names]
        groups = [self._group_at[id(p)] for p in params]
        solver = self._solver_of(plan, groups[0])
        optimizer = self._local_optimizer(params) if isinstance(solver, LocalSteps) else None
        rates = [float(group["lr"]) for group in groups]
        task = Task(problem, solver, params, rates, optimizer, plan.layer.fold)
        return task, lambda: self._rates(groups[0], params[0])[0]

    def _solver_of(self, plan: _Plan, group: Mapping[str, Any]) -> Solver:
        """A layer's solver, with the numbers of its group."""
        solver = plan.choice.solver
        if isinstance(solver, LocalSteps) and (solver.steps, solver.rows) != (group["steps"], group["rows"]):
            solver = replace(solver, steps=group["steps"], rows=group["rows"])
        return solver

    def _step_along(self, recorded: Recorded, name: str, g: Tensor) -> None:
        """T steps on the linear local loss `γ g·w`."""
        p = recorded.tape.parameters[name]
        solver, group = self._choices.of(name).solver, self._group_at[id(p)]
        solver = solver if isinstance(solver, LocalSteps) else _REST
        optimizer = self._local_optimizer([p])
        linear_steps(p, self._gamma(recorded, name) * g, optimizer, group["steps"], schedule=solver.rule)
        if solver.state == "fresh":
            self.state.pop(p, None)

    def _undo(self, recorded: Recorded, plans: list[_Plan]) -> Undo | None:
        """Copies to go back to, where the weights are to stay or a solution may turn out not finite."""
        choices = [plan.choice for plan in plans]
        safe = all(_safe(choice) for choice in choices) and all(_safe(choice) for choice in self._choices.every())
        if safe and self._write == "weights" and self._order == "together":
            return None
        names = [name for plan in plans for name in plan.layer.names] + list(recorded.gradients)
        return Undo(((name, recorded.tape.parameters[name]) for name in names), self.state)

    # -- local optimizers --------------------------------------------------------------------------------------

    def _rates(self, group: Mapping[str, Any], owner: Tensor) -> tuple[Any, dict[str, Any]]:
        solver = self._choices.of(self._names[id(owner)]).solver
        if isinstance(solver, LocalSteps) and solver.optimizer is not TFRMSProp:
            return solver.optimizer, {"lr": group["lr"]}
        rates = {key: group[key] for key in ("lr", "decay", "momentum", "eps")}
        if not isinstance(solver, LocalSteps):
            rates["lr"] = _DEFAULTS["matching"]["lr"] * group["lr"]
        return TFRMSProp, rates

    def _make(self, groups: list[dict[str, Any]], kind: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(groups, lr=0.0)
        return optimizer

    # -- what it did, and its state ------------------------------------------------------------------------------

    def describe(self) -> dict[str, str]:
        """How each parameter moved in the last step that was not skipped, by name. Raises BadInput before the first."""
        if self._last is None:
            raise BadInput("describe() tells how parameters moved in the last step, and there was none yet")
        found = dict.fromkeys(self._names.values(), "does not move: the loss does not depend on it")
        for names, form in self._last:
            found[names[0]] = form
            found |= dict.fromkeys(names[1:], f"with {names[0]}")
        return found


def _safe(choice: Choice) -> bool:
    """Whether a finite batch gives a finite step, so that there is nothing to go back from."""
    steps = isinstance(choice.solver, LocalSteps) and choice.solver.optimizer is TFRMSProp
    plain = isinstance(choice.target, GradientStep) and choice.target.clip is None and choice.transfer is None
    return steps and plain and all(isinstance(term, Proximal | WeightDecay | Elastic) for term in choice.regularizers)


def _form(plan: _Plan, steps: int) -> str:
    """A layer's loss and solver in words."""
    transfer, solver = plan.transfer, plan.choice.solver
    loss = f"matching loss of {transfer.name}"
    if transfer.is_squared:
        loss = f"squared loss ({transfer.name} has no matching loss)" if transfer.stand_in else "squared loss"
    uses = f", {len(plan.layer.parts)} uses together" if plan.layer.others else ""
    return f"{loss}, {name_of(replace(solver, steps=steps) if isinstance(solver, LocalSteps) else solver)}{uses}"
