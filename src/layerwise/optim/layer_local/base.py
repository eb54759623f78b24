"""Base of the layer-local optimizers: a step records one run of the closure and fits every layer to it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.graph.samples import said_count
from layerwise.local.layers.kinds import Kinds
from layerwise.local.layers.layer import Layer, shaped
from layerwise.local.layers.overflow import ask_safe, unsafe
from layerwise.local.layers.record import Recorded
from layerwise.local.layers.wide_copies import WideCopies, keep_digits
from layerwise.local.metric import Metric
from layerwise.local.problem import Term
from layerwise.local.regularizers import Average, Regularizer
from layerwise.local.running import RunningMeans
from layerwise.local.solvers.memory import Memory, moments_misfit
from layerwise.local.solvers.values import LocalSteps, Solver, made_optimizer
from layerwise.local.targets import NaturalStep, Target, outer_moment
from layerwise.optim.base import NamedOptimizer, refuse_unreached
from layerwise.optim.deferred import Late
from layerwise.optim.group_settings import GroupSettings
from layerwise.optim.layer_local.choices import first_match
from layerwise.optim.layer_local.executors import Executor, GradientJob, LocalExecutor, State
from layerwise.optim.layer_local.owners import described
from layerwise.optim.layer_local.snapshot import Backups, Snapshot
from layerwise.optim.saved_state import Fit, averaged_name, is_average, non_finite, of_local_optimizer
from layerwise.ranks.group import facts_of
from layerwise.replay.state import Buffers
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import Verdict, wide_type, without_grad

__all__ = ["Fitting", "LayerLocal", "forms_of_state"]

Rates = Callable[[Mapping[str, Any]], tuple[Any, dict[str, Any]]]


@dataclass
class Fitting:
    """A recorded run with the parameters' groups and optimizer state, from which its layers are fitted.

    run: on float32 copies of parameters in half precision, which are written back by `round_off`.
    groups: by id of the parameter; settings: theirs. optimizers: the layers' own, by kind and parameters. means: the
    running ones before the step and after it. unit: of γ, by name. decided: how layers are fitted, by name. judging:
    what LocoProp's memories leave to be read at the end; None: they wait.
    """

    run: Recorded
    groups: Mapping[int, dict[str, Any]]
    settings: GroupSettings
    state: State
    optimizers: dict[Any, torch.optim.Optimizer]
    means: RunningMeans
    backups: Backups = field(default_factory=Backups)
    unit: Callable[[str], float] = lambda name: 1.0
    decided: dict[str, Any] = field(default_factory=dict)
    judging: Verdict | None = None

    def params(self, layer: Layer) -> list[Tensor]:
        """A layer's weight, and its bias where that is fitted, or what stands for them."""
        return [self.run.parameter(name) for name in layer.names]

    def group(self, name: str) -> dict[str, Any]:
        """The parameter group of a parameter, by name."""
        return self.groups[id(self.run.tape.parameters[name])]

    def local_optimizer(self, names: Sequence[str], rates: Rates) -> tuple[Any, torch.optim.Optimizer]:
        """The class of a layer's local optimizer and the instance, which is kept, with present settings by `rates`."""
        params, groups = [self.run.parameter(name) for name in names], [self.group(name) for name in names]
        owner = groups[0]
        kind, settings = rates(owner)
        key = (kind, *map(id, params))
        optimizer = self.optimizers.get(key)
        if optimizer is None:
            optimizer = self.optimizers[key] = made_optimizer(kind, params, settings.get("lr", 0.0), names)
        optimizer.state = self.state
        for mine, group in zip(groups, optimizer.param_groups, strict=True):
            group.update(settings if mine is owner else rates(mine)[1])
        return kind, optimizer

    def moments(self, solver: Solver, weight: Tensor) -> dict[str, Any] | None:
        """What a `Memory` keeps from batch to batch, in the state of a layer's weight; None for another solver.

        The state of another solver, which a saved state may bring, is no memory's: it starts anew.
        """
        if not isinstance(solver, Memory):
            return None
        if "A" not in self.state[weight]:
            self.state[weight] = {}
        return self.state[weight]

    def forget_moments(self, p: Tensor) -> None:
        """Delete the moments of a parameter that a `Memory` moved and that has no local problem any more."""
        if p in self.state and not moments_misfit(p, self.state[p]):
            del self.state[p]

    @without_grad
    def term(self, layer: Layer, regularizer: Regularizer, gamma: float) -> Term:
        """A regularizer's term for a layer; updates the running averages that it asks for."""
        matrix = layer.matrix()
        shape = matrix.shape[:2]
        params = [p.detach() for p in self.params(layer)]
        bias = params[1].view(shape) if len(params) > 1 else None
        decay = getattr(regularizer, "decay", None)
        average: Average | None = None
        if decay is not None and getattr(regularizer, "averages", "weights") == "inputs":
            rows = layer.join([part.input() for part in layer.parts])
            every = getattr(regularizer, "every", 1)
            average = self.means.of_inputs(layer.name, rows, matrix, bias is not None, decay, every), None
            term = regularizer(matrix, bias, gamma, average)
            return term if every == 1 else self.means.kept(layer.name, term)
        if decay is not None:
            found = [self.means.updated(name, p, decay) for name, p in zip(layer.names, params, strict=True)]
            average = shaped(found[0], matrix), found[1].view(shape) if len(found) > 1 else None
        return regularizer(matrix, bias, gamma, average)

    @without_grad
    def target(self, layer: Layer, target: Target) -> Target:
        """A layer's target; updates the running mean of second moments that a `NaturalStep` asks for."""
        if not isinstance(target, NaturalStep) or target.decay is None:
            return target
        second = outer_moment(self.run.cotangent_rows(layer))
        return replace(target, second=self.means.updated(f"{layer.name} outputs", second, target.decay))

    def snapshot(self, layers: Sequence[Layer], replaced: Collection[str] = ()) -> Snapshot:
        """A snapshot of all parameters that the step moves. replaced: as for `Snapshot`."""
        names = [name for layer in layers for name in layer.names] + list(self.run.gradients)
        params = [(name, self.run.tape.parameters[name]) for name in names]
        return Snapshot(params, self.state, replaced, self.backups, self.means.after)

    def gradient_jobs(
        self,
        move: Callable[[str, Tensor, Tensor], None],
        free: Callable[[str, Mapping[str, Any]], bool] = lambda name, group: False,
    ) -> list[GradientJob]:
        """A job for each parameter outside the layers.

        move: called with its name, itself and its gradient. free: whether by steps of any size, by name and group.
        """
        params = {name: self.run.parameter(name) for name in self.run.gradients}
        return [GradientJob({n: params[n]}, g.numel, partial(move, n, params[n], g), free(n, self.group(n)),
                            (self.run.loss, g)) for n, g in self.run.gradients.items()]  # fmt: skip

    def round_off(self) -> None:
        """Write what has moved in copies to the parameters, rounded to their types."""
        if copies := self.run.copies:
            torch._foreach_copy_([self.run.tape.parameters[name] for name in copies], list(copies.values()))


def forms_of_state(solver: Solver | None, rates: tuple[Any, dict[str, Any]], p: Tensor) -> Iterator[Fit]:
    """The forms that a parameter's saved state has beside a solver: a local optimizer's, or a memory's moments."""
    for dtype in dict.fromkeys((wide_type(p.dtype), p.dtype)):  # earlier releases kept that of half precision in it
        like = p.detach().to(dtype)
        yield from of_local_optimizer(*rates, like)
        if isinstance(solver, Memory):
            yield partial(moments_misfit, like)


class LayerLocal(NamedOptimizer):
    """Base of optimizers that fit each layer to a local target from one run of the model.

    Activations, cotangents and gradients that overflow count as a batch with NaN or infinity. A layer whose bias is in
    another group than its weight takes rates from both, and the rest from the weight's.
    executor: solves the layers. choices: settings that must be equal in all processes. patterns: numbers by name
    pattern, for parameter groups of their own.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        on_nonfinite: str,
        executor: Executor,
        choices: Mapping[str, Any],
        patterns: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._executor = executor
        self._patterns = patterns
        self._kinds = Kinds()
        self._local: dict[Any, torch.optim.Optimizer] = {}
        self._names: dict[int, str] = {}
        self._averages: dict[str, Tensor] = {}
        self._metrics: dict[str, Metric] = {}
        self._backups, self._copies = Backups(), WideCopies()
        super().__init__(model, params, defaults, on_nonfinite)
        executor.meet({
            **facts_of(named_parameters_of(model)),
            **{key: described(value) for key, value in {**choices, "on_nonfinite": on_nonfinite}.items()},
            **self._settings(),
        })  # fmt: skip

    # -- groups ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters for which `layers` has numbers get groups of their own."""
        names = {id(p): name for name, p in named_parameters_of(self._model).items()}
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        patterns = self._patterns
        parts: dict[str | None, list[Any]] = {}
        for p in params:
            name = names.get(id(p[1] if isinstance(p, tuple) else p))
            pattern = None if name is None else first_match(tuple(patterns), name)
            if name is not None:
                self._names[id(p[1] if isinstance(p, tuple) else p)] = name
            parts.setdefault(pattern if pattern and patterns[pattern] else None, []).append(p)
        for pattern, some in (parts or {None: params}).items():
            own = {} if pattern is None else patterns[pattern]
            super().add_param_group({**param_group, **own, "params": some})

    # -- a step --------------------------------------------------------------------------------------------

    def _fitting(self, run: Recorded, samples: int | Tensor | None = None) -> Fitting:
        """A `Fitting` of this optimizer's groups and state. Raises BadInput where parameters were replaced.

        samples: what the user says of them, in place of what the run does.
        """
        count = said_count(samples, f"samples of {type(self).__name__}.step")
        run = run if count is None else replace(run, counted=count)
        self._check_parameters(run.tape.parameters)
        self._forms.follow(self.param_groups, self.state, wide_type)
        run, state = self._copies.of(run, self.state)
        means = RunningMeans(self._averages, self._metrics)
        return Fitting(run, self._group_at, self._group_settings, state, self._local, means, self._backups)

    def _tell(self, error: BaseException) -> None:
        self._executor.fail(error)

    def _late(self, run: Recorded, buffers: Buffers, solvers: Iterable[Any], assumes: bool = False) -> Late | None:
        """What judges a batch with its solution, where an accelerator would wait, or the verdict is deferred.

        None where a layer's solver may not be judged at the end, or another process takes part. assumes: whether a step
        is computed again where a solver assumed wrongly.
        """
        here, deferred = run.loss.device.type == "cpu", self._on_nonfinite == "defer"
        alone = isinstance(self._executor, LocalExecutor) and bool(run.layers or run.gradients)
        assumes = assumes and not here
        late = alone and (deferred or not here) and all(
            isinstance(s, LocalSteps) or (assumes and getattr(s, "judged_late", False)) for s in solvers
        )  # fmt: skip
        return Late(buffers, deferred and self._defers()) if late else None

    def _unsafe(self, run: Recorded, gamma: Callable[[str], float], buffers: Buffers, late: Late | None) -> str | None:
        """The reason not to step on a batch, or None, also where it is judged late."""
        if late is None:
            return self._agreed(run, unsafe(run, gamma) or buffers.spoiled())
        ask_safe(late.verdict, run, gamma)
        return None

    def _defers(self) -> bool:
        """Whether a device can take back a step, with nothing of it on the host."""
        return True

    def _agreed(self, run: Recorded, where: str | None) -> str | None:
        """The first reason to skip the step, in this process or another that takes part; None where there is none.

        Raises BadInput where the loss depends on nothing that moves.
        """
        found = self._executor.agreed(where, run.loss, lambda: self._facts(run), self._tensors)
        if found is None:
            refuse_unreached([*run.layers, *run.gradients])
        return found

    def _tensors(self) -> dict[str, Tensor]:
        buffers = dict(self._model.named_buffers()) if isinstance(self._model, nn.Module) else {}
        return {**named_parameters_of(self._model), **buffers}

    def _facts(self, run: Recorded) -> dict[str, str]:
        """Descriptions that must be equal in all processes that take part in a step."""
        first = run.tape.first
        return {
            "the batch": "none" if first is None else f"{first.dtype} {tuple(first.shape)}",
            "the layers": ", ".join(name for layer in run.layers for name in layer.names),
            "the other parameters": ", ".join(run.gradients),
            **self._settings(),
        }

    def _settings(self) -> dict[str, str]:
        return {
            f"parameter group {number}": described(
                {key: value for key, value in group.items() if key != "params"}
            ) for number, group in enumerate(self.param_groups)
        }  # fmt: skip

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's, with names, the number of skipped batches, and running averages by name.

        With several ranks a collective: each gets the whole state from the layers' owners.
        """
        mine: Any = self.state
        ours = {self._names[id(p)]: p for group in self.param_groups for p in group["params"]}
        whole: Any = self._executor.whole(mine, ours)
        self.state = whole
        try:
            return self.local_state_dict()
        finally:
            self.state = mine

    def local_state_dict(self) -> dict[str, Any]:
        """As `state_dict`, without communication: the state of layers that other ranks own is missing."""
        return super().state_dict()

    def _content(self) -> dict[str, Any]:
        params = named_parameters_of(self._model)
        averages = {key: t for key, t in self._averages.items() if averaged_name(key) in params}
        return {**super()._content(), "averages": averages}

    _saved_keys = ("state", "param_groups", "skipped", "averages")

    def _differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What of a saved state does not fit; running averages are of our parameters."""
        averages, params = saved["averages"], named_parameters_of(self._model)
        if not (isinstance(averages, Mapping) and all(isinstance(key, str) for key in averages)):
            return [f"the running averages are a {type(averages).__name__}, not a dict by names"]
        found = [
            f"the saved averages are of other parameters than ours: {key}" for key, t in averages.items()
            if not is_average(key, t, params.get(averaged_name(key)))
        ]  # fmt: skip
        return [*super()._differences(saved), *(found or non_finite("the running averages", averages))]

    def _held(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        averages: dict[str, dict[str, Any]] = {}
        for key, t in saved.get("averages", {}).items():
            averages.setdefault(averaged_name(key), {})["average" + key.removeprefix(averaged_name(key))] = t
        return {name: {**own, **averages.pop(name, {})} for name, own in super()._held(saved).items()} | averages

    def _take(self, saved: Mapping[str, Any]) -> None:
        params = named_parameters_of(self._model)
        averages: dict[str, Tensor] = {}
        for key, t in saved["averages"].items():
            p = params[averaged_name(key)]
            averages[key] = t.to(p.device, wide_type(p.dtype), copy=True) if t.is_floating_point() else t.clone()
        super()._take(saved)
        for theirs, ours in zip(saved["param_groups"], self.param_groups, strict=True):
            for number, p in zip(theirs["params"], ours["params"], strict=True):
                keep_digits(p, self.state.get(p, {}), saved["state"].get(number, {}))
        self._executor.loaded()
        self._averages = averages

    # -- copies ------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and pickle; what is remembered by the identity of tensors is found anew."""
        return {**super().__getstate__(), "_local": {}, "_names": {}, "_metrics": {}, "_kinds": Kinds()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._names = {id(p): name for group in self.param_groups
                       for p, name in zip(group["params"], group["param_names"], strict=True)}  # fmt: skip
