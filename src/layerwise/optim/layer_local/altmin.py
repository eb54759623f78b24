"""Online alternating minimization: codes first, then every layer on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.local.codes.code_step import CodeStep, Terms
from layerwise.local.codes.coupling import Coupling
from layerwise.local.layers.layer import Layer
from layerwise.local.layers.record import Recorded, problem_of, record
from layerwise.local.problem import LocalProblem, predict
from layerwise.local.regularizers import Regularizer
from layerwise.local.solvers.memory import Memory
from layerwise.local.solvers.run import Task
from layerwise.local.solvers.steps import constant, linear_steps
from layerwise.local.solvers.values import LocalSteps, Solver
from layerwise.local.transfer import IDENTITY
from layerwise.optim.layer_local import updates
from layerwise.optim.layer_local.base import LayerLocal
from layerwise.optim.layer_local.coding import coded_layers, gauss_newton, hidden_uses, sparse, swept, weight_gradients
from layerwise.optim.layer_local.jobs import Job, Rest, operations
from layerwise.optim.layer_local.owners import Parallel, crew_over
from layerwise.optim.layer_local.stale import Stale
from layerwise.optim.layer_local.trace import Trace
from layerwise.optim.layer_local.undo import Undo
from layerwise.optim.layer_local.updates import DEFAULTS, Update, Updates, rate_of, rates_of, share
from layerwise.optim.layer_local.workers import Workers
from layerwise.replay.coded import CodedModel
from layerwise.replay.state import Buffers, RandomState
from layerwise.tape.uses import named_parameters_of

__all__ = ["AltMin"]

_PRESETS: dict[str, dict[str, Any]] = {
    "published": {"codes": "sweep", "weights": "adam", "lr": 8e-3, "coupling": 3e-3, "steps": 1, "rows": "all"},
}


class AltMin(LayerLocal):
    """Give every layer a code, move the codes, then fit each layer to its code on its own.

    The objective of a minibatch of B samples relaxes the model at the output of every hidden layer:

        L + (1/B) Σ_l (μ ½ ‖c_l − W_l N_l(c)‖² + code_l1 ‖c_l‖₁) + l1 Σ_l ‖W_l‖₁

    model, params: as for LocoProp.

        opt = AltMin(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    **Codes.** codes="jacobi" (default): `c = z − (B/μ) dL/dz` for all layers at once, from one backward pass; layers
    are fitted on the inputs they had. "gauss-newton" (default of a memory): the minimum of the loss's Gauss-Newton
    model with `μ ½ ‖c − z‖²`, for each sample; needs a loss whose Hessian's root is known. "sweep": from the output to
    the input, each code moves on its own terms (`code_step`, a `lw.local.CodeStep`) through one block only, with no
    global backward pass; layers are fitted on the moved codes. Batch-norm statistics stand still during code updates.
    Functions without a derivative (`lw.nn.Sign`, `lw.nn.Hard`) are crossed by their rules.

    **Weights.** "adam" (betas, eps) or "sgd" (Nesterov momentum): each hidden layer descends `(μ/B) ½ ‖c − W a‖²` and
    the output layer the loss, by T local steps (`steps`) at rate lr, each on its own share of the `rows`, "auto" for
    R/T, or "all". Local SGD needs about `lr·μ·λmax(Σ aaᵀ/B) < 2`, positions and time steps counted; normalise=True
    divides a layer's gradient by its rows per sample. "memory" or a `lw.local.Memory`: AM-mem; any other solver of
    `lw.local`: its update times lr. With these the output layer, too, is fitted to a code. Parameters without a code
    (scales, lone biases, tables, derived weights) take T steps along their gradient; beside a solver, of Adam at 6e-3
    times lr over its default.
    regularizer, layers, workers, parallel: as for LocoProp; `layers` sets lr, coupling, steps, rows, betas, eps,
    momentum, l1, code_l1, normalise, weights and regularizer by name pattern.

    **Coupling.** coupling: μ, the same at every layer, in units of a sample's loss; a number, or a
    `lw.local.Coupling` that grows. multipliers: an augmented Lagrangian with codes="sweep": `repeats` of a minibatch
    share scaled multipliers `u ← u + c − W a`. repeats: full steps on each minibatch, with its random numbers.
    schedule="async": each layer is fitted to inputs and codes up to `staleness` minibatches old (default 2), as when
    nobody waits for anybody; a simulation, drawn by step and layer name.

    trace: a `lw.optim.Trace` to fill. reduction: what the loss does over the samples, "mean" (B = dim 0 of the batch)
    or "sum" (B = 1). preset: "published" for the released program's settings (sweep, five Nesterov steps of 0.3,
    μ 0.003, Adam 0.008).
    Raises BadInput, UncoveredUse, Undefined (a sweep through a forward that depends on the codes), UnknownLoss and
    SamplesMixed (Gauss-Newton codes); NonFinite with `on_nonfinite="raise"` (default: skip the batch and count it).
    Source: Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables" (2019).
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        codes: Literal["jacobi", "gauss-newton", "sweep"] | None = None,
        weights: Literal["adam", "sgd", "memory"] | Solver | None = None,
        lr: float | None = None,
        coupling: float | Coupling | None = None,
        steps: int | None = None,
        rows: int | Literal["auto", "all"] | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        momentum: float | None = None,
        l1: float | None = None,
        code_l1: float | None = None,
        normalise: bool | None = None,
        regularizer: Regularizer | Sequence[Regularizer] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        code_step: CodeStep | None = None,
        repeats: int = 1,
        multipliers: bool = False,
        workers: Workers = None,
        parallel: Parallel = None,
        schedule: Literal["together", "async"] = "together",
        staleness: int | None = None,
        trace: Trace | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        preset: Literal["published"] | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        if preset is not None and preset not in _PRESETS:
            raise BadInput(f"AltMin knows the presets {', '.join(_PRESETS)}; got {preset!r}")
        if reduction not in ("mean", "sum"):
            raise BadInput(f'AltMin\'s reduction is "mean" or "sum"; got {reduction!r}')
        base = dict(_PRESETS[preset]) if preset else {}
        self._updates = Updates(
            base.pop("weights", "adam") if weights is None else weights, regularizer, layers or {},
            list(named_parameters_of(model)),
        )  # fmt: skip
        kind = self._updates.default.kind
        given = {"codes": codes, "lr": lr, "coupling": coupling, "steps": steps, "rows": rows, "betas": betas,
                 "eps": eps, "momentum": momentum, "l1": l1, "code_l1": code_l1, "normalise": normalise}  # fmt: skip
        chosen = {**DEFAULTS[kind], "lr": rate_of(self._updates.default), "weights": kind, **base}
        chosen.update({k: v for k, v in given.items() if v is not None})
        if isinstance(chosen["coupling"], Coupling):
            chosen.update(chosen["coupling"].numbers())
        self._codes = chosen.pop("codes")
        self._code_step = code_step if code_step is not None else CodeStep()
        self._reduction, self._repeats, self._trace = reduction, repeats, trace
        self._multipliers: dict[int, Tensor] | None = {} if multipliers else None
        updates.check_run(self._codes, repeats, multipliers, schedule, staleness)
        self._stale = Stale(2 if staleness is None else staleness) if schedule == "async" else None
        self._only: Callable[[Layer], bool] | None = None
        self._proofs: dict[Any, bool] = {}
        self._swept: dict[int, Tensor] = {}
        self._slopes: Callable[[], Mapping[str, Tensor]] = dict
        said = {"weights": weights, "codes": self._codes, "layers": layers, "code_step": self._code_step,
                "repeats": repeats, "regularizer": regularizer, "multipliers": multipliers, "schedule": schedule,
                "staleness": staleness, "reduction": reduction}  # fmt: skip
        super().__init__(model, params, chosen, on_nonfinite, crew_over(parallel, workers), said)

    def _check(self, group: Mapping[str, Any]) -> None:
        updates.check_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group's coupling may be a `Coupling`, too. Settings by pattern make groups of their own."""
        coupling = param_group.get("coupling")
        more = coupling.numbers() if isinstance(coupling, Coupling) else {}
        super().add_param_group({**param_group, **more})

    def _patterns(self) -> Mapping[str, Mapping[str, Any]]:
        return self._updates.numbers

    # -- a step ------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Run the closure, move codes and weights, and return the loss before the step."""
        skipped = self.skipped
        self._multipliers = None if self._multipliers is None else {}
        before = RandomState(self._devices()) if self._repeats > 1 else None
        loss = super().step(closure)
        if before is not None and self.skipped == skipped:
            after, buffers = RandomState(self._devices()), Buffers(self._model)
            try:
                for _ in range(self._repeats - 1):
                    before.put_back()
                    super().step(closure)
                    if self.skipped > skipped:
                        break
            finally:  # as after one run: batch statistics advance once a minibatch
                after.put_back()
                buffers.put_back()
        if self.skipped == skipped:
            for group in self.param_groups:
                Coupling.advance(group)
        return loss

    def refit(self, closures: Iterable[Callable[[], Tensor]]) -> float:
        """Fit the layers that make a loss's logits alone, a step for each closure; returns the mean of the losses.

        For the end of a training: one pass over closures of many minibatches. μ, hidden layers and parameters without
        codes stand still; batch statistics advance, where the model is left in training. Raises BadInput where no
        layer makes a known loss's logits, or without closures.
        """
        found: list[Tensor] = []
        self._only = lambda layer: layer.likelihood is not None
        try:
            for closure in closures:
                found.append(super().step(closure))
        finally:
            self._only = None
        if not found:
            raise BadInput("refit needs at least one closure that returns a loss")
        return float(torch.stack(found).mean())

    def _devices(self) -> set[torch.device]:
        return {p.device for group in self.param_groups for p in group["params"]}

    # -- what each layer is fitted to -------------------------------------------------------------------

    def _run(self, closure: Callable[[], Tensor]) -> Recorded:
        if self._codes == "sweep":
            return self._run_sweep(closure)
        if self._codes == "gauss-newton":
            run, plain = gauss_newton(self._model, closure, self._ours, self._gamma, self._kinds)
        else:
            run = plain = record(self._model, closure, self._ours, matrices=True, crosses=True, kinds=self._kinds)
        self._slopes = partial(weight_gradients, plain)
        if any(group["code_l1"] for group in self.param_groups):
            run = sparse(run, lambda name: self._gamma(run, name), lambda layer: self._threshold(run, layer))
        return run

    def _run_sweep(self, closure: Callable[[], Tensor]) -> Recorded:
        """Move the codes, and record the layers on them."""
        coded = CodedModel(self._model, closure, self._proofs)
        layers = coded_layers(coded, self._ours, self._kinds)
        if not layers:
            return Recorded(coded.loss.detach(), coded.tape, [], {}, {})
        groups = {i: self._group_at[id(layer.parameter)] for i, layer in hidden_uses(coded, layers).items()}
        terms = Terms(
            {i: float(group["coupling"]) for i, group in groups.items()}, self._batch(coded.samples),
            {i: float(group["code_l1"]) for i, group in groups.items()}, self._multipliers,
        )  # fmt: skip
        params = {layer.name: layer.parameter for layer in layers}
        if self._trace is not None and self._trace.due():
            found = torch.autograd.grad(coded.loss, list(params.values()), retain_graph=True, allow_unused=True)
            slopes = {name: g for name, g in zip(params, found, strict=True) if g is not None}
            self._slopes = lambda: slopes
        run, self._swept = swept(coded, layers, terms, self._code_step, self._ours)
        return run

    def _batch(self, samples: int) -> float:
        return float(samples) if self._reduction == "mean" else 1.0

    def _gamma(self, recorded: Recorded, name: str) -> float:
        return self._batch(recorded.samples) / float(self._group_of(recorded, name)["coupling"])

    def _threshold(self, recorded: Recorded, layer: Layer) -> float:
        group = self._group_of(recorded, layer.name)
        return 0.0 if layer.likelihood is not None else float(group["code_l1"] / group["coupling"])

    def _update_of(self, recorded: Recorded, layer: Layer) -> Update:
        return self._updates.of(layer.name, self._group_of(recorded, layer.name))

    def _steps(self, recorded: Recorded, layer: Layer) -> bool:
        """Whether a layer takes local steps, which fit an output layer to the loss itself."""
        solver = self._update_of(recorded, layer).solver
        return solver is None or isinstance(solver, LocalSteps)

    def _problem(self, recorded: Recorded, layer: Layer, averages: dict[str, Tensor]) -> Callable[[], LocalProblem]:
        """Makes the local problem of a layer; its gradient times 1/γ is that of the relaxed objective.

        A hidden layer has γ = B/μ and the squared loss; the layer that makes a loss's logits has the loss itself,
        which is its matching loss with γ = 1/w for terms of one weight w.
        """
        update = self._update_of(recorded, layer)
        gamma, transfer = self._gamma(recorded, layer.name), IDENTITY
        if self._steps(recorded, layer) and layer.likelihood is not None and not layer.transfer.stand_in:
            weight = layer.likelihood.uniform_weight()
            if weight:
                gamma, transfer = 1 / weight, layer.transfer
        pulls = tuple(self._pull(recorded, layer, term, gamma, averages) for term in update.regularizers)
        return partial(problem_of, recorded, layer, gamma, transfer, pulls=pulls)

    def _task(self, recorded: Recorded, layer: Layer, problem: LocalProblem) -> tuple[Task, Callable[[], Any]]:
        """A layer's task, and what tells the kind of its local optimizer."""
        params = [recorded.tape.parameters[name] for name in layer.names]
        groups = [self._group_at[id(p)] for p in params]
        update, group = self._update_of(recorded, layer), groups[0]
        solver, optimizer, state = update.solver, None, None
        if solver is None:
            solver = share(group["steps"], group["rows"], problem.a.shape[0])
        if isinstance(solver, LocalSteps):
            optimizer = self._local_optimizer(params)
        elif isinstance(solver, Memory):
            state = self.state[params[0]]
        rates = [float(g["lr"]) for g in groups]
        scale, l1 = 1 / problem.gamma, float(group["l1"])
        if group["normalise"] and optimizer is not None:
            scale *= recorded.samples / problem.a.shape[0]
        return Task(problem, solver, params, rates, optimizer, layer.fold, scale, state, l1), lambda: updates.fused(
            self._rates(group, params[0])[0], params
        )  # fmt: skip

    # -- moving -----------------------------------------------------------------------------------------------

    def _move(self, run: Recorded) -> str | None:
        layers = [layer for layer in run.layers if self._only is None or self._only(layer)]
        if self._only is not None and not layers:
            raise BadInput("refit moves layers that make a known loss's logits, and the closure's loss has none")
        averages: dict[str, Tensor] = {}
        noting = self._trace is not None and self._trace.due() and self._only is None
        made: dict[str, LocalProblem] | None = None
        if noting or self._stale is not None:
            made = {layer.name: self._problem(run, layer, averages)() for layer in layers}
        if made is not None and self._stale is not None and self._only is None:
            made = self._stale.exchange(made)
        before = {layer.name: layer.parameter.detach().clone() for layer in layers} if noting else {}
        outputs = {name: predict(problem) for name, problem in (made or {}).items()} if noting else {}

        def move() -> None:
            parameters = run.tape.parameters
            rest = [Rest({name: parameters[name]}, g.numel, partial(self._along, parameters[name], g))
                    for name, g in run.gradients.items()]  # fmt: skip
            jobs = [self._job(run, layer, averages, made) for layer in layers]
            self._crew.run(jobs, rest if self._only is None else [], self.state)

        where = self._guarded(self._undo(run, layers), move)
        if where is not None:
            if self._stale is not None and self._only is None:
                self._stale.forget()
            return where
        self._averages |= averages
        if self._multipliers is not None:
            self._raise_multipliers(layers)
        if noting and made is not None and self._trace is not None:
            coded = {layer.name: layer.likelihood is None or not self._steps(run, layer) for layer in layers}
            self._trace.note(
                before, {layer.name: layer.parameter.detach() for layer in layers}, self._slopes(),
                {name: (made[name], outputs[name], coded[name]) for name in made},
            )  # fmt: skip
        if self._trace is not None and self._only is None:
            self._trace.passed()
        return None

    def _job(
        self, run: Recorded, layer: Layer, averages: dict[str, Tensor], made: Mapping[str, LocalProblem] | None
    ) -> Job:
        """A layer to be fitted. averages: takes the new running averages; made: the problems, where they are made."""

        def cost() -> float:
            group, solver = self._group_of(run, layer.name), self._update_of(run, layer).solver
            return operations(LocalSteps(group["steps"], rows=group["rows"]) if solver is None else solver, layer)

        problem = self._problem(run, layer, averages) if made is None else partial(made.__getitem__, layer.name)
        params = {name: run.tape.parameters[name] for name in layer.names}
        return Job(params, cost, lambda: self._task(run, layer, problem()))

    def _along(self, p: Tensor, g: Tensor) -> None:
        """T steps along the gradient, for a parameter without a code."""
        linear_steps(p, g, self._local_optimizer([p]), self._group_at[id(p)]["steps"], schedule=constant)

    @torch.no_grad()
    def _raise_multipliers(self, layers: list[Layer]) -> None:
        """`u ← u + c − W a`, with the weights after their update."""
        assert self._multipliers is not None
        for layer in layers:
            for part in layer.parts:
                index = part.use.index
                if index in self._swept:
                    gap = self._swept[index] - part.again()
                    old = self._multipliers.get(index)
                    self._multipliers[index] = gap if old is None else old + gap

    def _undo(self, run: Recorded, layers: list[Layer]) -> Undo | None:
        """Copies to go back to, where a finite batch may have a solution that is not finite."""
        by_layer = {layer.name: self._update_of(run, layer) for layer in layers}
        if all(update.solver is None and not update.regularizers for update in by_layer.values()):
            return None
        names = [name for layer in layers for name in layer.names] + list(run.gradients)
        replaced = {name for name, update in by_layer.items() if isinstance(update.solver, Memory)}
        return Undo(((name, run.tape.parameters[name]) for name in names), self.state, replaced)

    # -- local optimizers --------------------------------------------------------------------------------------

    def _rates(self, group: Mapping[str, Any], owner: Tensor) -> tuple[Any, dict[str, Any]]:
        return rates_of(self._updates.of(self._names[id(owner)], group), group)

    def _make(self, groups: list[dict[str, Any]], kind: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = updates.fused(kind, [p for g in groups for p in g["params"]])(groups, lr=0.0)
        return optimizer

    # -- state ---------------------------------------------------------------------------------------------------

    def local_state_dict(self) -> dict[str, Any]:
        """torch's, with names, the number of skipped batches, running averages, and what stale layers have heard."""
        stale = {} if self._stale is None else {"stale": self._stale.state()}
        return {**super().local_state_dict(), **stale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, parameters by name; goes on bitwise where it stopped. Raises as LocoProp's."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "stale"})
        if self._stale is not None and "stale" in state_dict:
            self._stale.restore(state_dict["stale"], named_parameters_of(self._model))
