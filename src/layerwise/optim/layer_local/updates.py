"""Settings of AltMin: how codes and weights are updated, for all layers or by pattern, and the use of a minibatch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import is_
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.codes.code_step import CodeStep
from layerwise.local.codes.coupling import Coupling
from layerwise.local.layers.layer import Layer
from layerwise.local.layers.overshoot import has_bounded_steps
from layerwise.local.regularizers import Regularizer, WeightDecay
from layerwise.local.solvers.fused import FusedAdam, FusedSGD
from layerwise.local.solvers.memory import Memory
from layerwise.local.solvers.values import LocalSteps, ProximalSolve, Solver, default_lr
from layerwise.optim.keywords import Effects
from layerwise.optim.layer_local.base import Fitting, forms_of_state
from layerwise.optim.layer_local.choices import ByPattern, check_common, check_patterns, several
from layerwise.optim.saved_state import Fit

__all__ = [
    "DEFAULTS", "PRESETS", "RECOVERIES", "CodeKind", "CodeUpdate", "LayerPlan", "LayerPlans", "Minibatch", "Update",
    "Updates", "WeightUpdate", "check_group", "filled", "fused", "other_weights", "rate_of", "rates_of", "share",
    "with_coupling",
]  # fmt: skip

_COMMON: dict[str, Any] = {
    "lr": 6e-3, "coupling": 0.05, "coupling_add": 0.0, "coupling_factor": 1.0, "coupling_most": float("inf"),
    "steps": 2, "rows": "auto", "betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.9, "l1": 0.0, "code_l1": 0.0,
    "normalise": False,
}  # fmt: skip
# What goes with each way to update weights. Gauss-Newton codes know how far to go, so that μ can be of the order of a
# sample's loss, as a memory's small steps on codes of their own scale ask for.
DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {**_COMMON, "codes": "jacobi"},
    "sgd": {**_COMMON, "codes": "jacobi", "lr": 0.05, "coupling": 0.1},
    "memory": {**_COMMON, "codes": "gauss-newton", "lr": 2.0, "coupling": 1.0},
    "solver": {**_COMMON, "codes": "jacobi", "lr": 1.0, "coupling": 1.0},
}
_NUMBERS = ("lr", "coupling", "steps", "rows", "betas", "eps", "momentum", "l1", "code_l1", "normalise")
PRESETS: dict[str, dict[str, Any]] = {
    "published": {"codes": "sweep", "weights": "adam", "lr": 8e-3, "coupling": 3e-3, "steps": 1, "rows": "all"},
}
# Known algorithms as choices of this one: each is the keywords that it stands for, and nothing else.
RECOVERIES: dict[str, dict[str, Any]] = {
    "mac": {"codes": "sweep", "coupling": 1.0, "code_step": CodeStep(momentum=0.0), "weights": ProximalSolve(),
            "regularizer": WeightDecay(1e-4)},
    "predictive-coding": {"codes": "sweep", "coupling": 1.0, "code_step": CodeStep(lr=0.1, momentum=0.0),
                          "weights": "sgd", "momentum": 0.0, "steps": 1, "rows": "all"},
}  # fmt: skip


def filled(value: Any, meant: Mapping[str, Any]) -> Any:
    """A value with fields that are None replaced by those of a recovered algorithm."""
    return replace(value, **{k: v for k, v in meant.items() if getattr(value, k, v) is None})


CodeKind = Literal["jacobi", "gauss-newton", "sweep"]


@dataclass(frozen=True)
class CodeUpdate:
    """How `AltMin` moves the codes of hidden layers; None: the preset's, or the default.

    codes: "jacobi" (default, `c = z − (B/μ) dL/dz` at once), "gauss-newton" (default of a memory), or "sweep".
    coupling: μ, the same at every layer, in units of a sample's loss; a number, or a `lw.local.Coupling`.
    code_l1: λ of ‖c‖₁.
    code_step: a `lw.local.CodeStep`, how the codes of a sweep move.
    multipliers: an augmented Lagrangian, `u ← u + c − W a` over the repeats of a minibatch; with codes="sweep".
    Raises BadInput for codes of another name.
    """

    codes: CodeKind | None = None
    coupling: float | Coupling | None = None
    code_l1: float | None = None
    code_step: CodeStep | None = None
    multipliers: bool = False

    def __post_init__(self) -> None:
        if self.codes is not None and self.codes not in get_args(CodeKind):
            raise BadInput(f"AltMin's codes are {', '.join(get_args(CodeKind))}; got {self.codes!r}")


@dataclass(frozen=True)
class WeightUpdate:
    """How `AltMin` fits the weights of a layer to its code; None: the preset's, or the default.

    weights: "adam" (default), "sgd", "memory" (AM-mem), a `lw.local.Memory`, or another solver of `lw.local`.
    steps: T local steps of a layer on a minibatch; default 2.
    rows: rows of each local step, a number, "auto" (default) for R/T, or "all".
    betas: of Adam.
    eps: of Adam.
    momentum: Nesterov's, of "sgd".
    l1: λ of ‖W‖₁.
    normalise: whether a layer's gradient is divided by its rows per sample.
    regularizer: None, `Proximal`, `WeightDecay`, `Elastic`, a function, or several.
    """

    weights: Literal["adam", "sgd", "memory"] | Solver | None = None
    steps: int | None = None
    rows: int | Literal["auto", "all"] | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    momentum: float | None = None
    l1: float | None = None
    normalise: bool | None = None
    regularizer: Regularizer | Sequence[Regularizer] | None = None


@dataclass(frozen=True)
class Minibatch:
    """What a step of `AltMin` does with its minibatch.

    repeats: full steps on it, with its random numbers.
    schedule: "together", or "async": layers are fitted to data of earlier minibatches, a simulation.
    staleness: how many minibatches old at most, with schedule="async"; default 2.
    reduction: what the loss does over the samples, "mean" (B = dim 0 of the batch) or "sum" (B = 1).
    Raises BadInput for settings that cannot be.
    """

    repeats: int = 1
    schedule: Literal["together", "async"] = "together"
    staleness: int | None = None
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.repeats, int) or self.repeats < 1:
            raise BadInput(f"AltMin repeats a minibatch a whole number of times ≥ 1; got repeats={self.repeats!r}")
        if self.schedule not in ("together", "async") or (self.staleness is not None and self.schedule != "async"):
            raise BadInput(f'AltMin\'s schedule is "together", or "async" with a staleness; got {self}')
        if self.reduction not in ("mean", "sum"):
            raise BadInput(f'AltMin\'s reduction is "mean" or "sum"; got {self.reduction!r}')


class Update(NamedTuple):
    """How one layer's weights are updated. kind: "adam", "sgd", "memory" or "solver"; solver: of the last two."""

    kind: str = "adam"
    solver: Solver | None = None
    regularizers: tuple[Regularizer, ...] = ()


class Updates(ByPattern[Update]):
    """The updates of all layers: a default, and `layers`, a mapping of patterns to settings; the first match wins.

    names: of the model's parameters. Raises BadInput for values of the wrong kind, unknown keys, and patterns that no
    parameter matches.
    """

    def __init__(
        self, weights: Any, regularizer: Any, layers: Mapping[str, Mapping[str, Any]], names: Sequence[str]
    ) -> None:
        super().__init__(_update(Update(), weights, regularizer))
        check_patterns(layers, (*_NUMBERS, "weights", "regularizer"), names)
        self.numbers: dict[str, dict[str, Any]] = {}
        for pattern, settings in layers.items():
            update = _update(self.default, settings.get("weights"), settings.get("regularizer"))
            self.choose(pattern, update)
            own = {k: settings[k] for k in _NUMBERS if k in settings}
            if settings.get("weights") is not None:
                own = {"lr": rate_of(update), "weights": update.kind, **own}
            if isinstance(own.get("coupling"), Coupling):
                own |= own["coupling"].numbers()
            self.numbers[pattern] = own

    def of_group(self, name: str, group: Mapping[str, Any]) -> Update:
        """The update of a weight, in a group that may say another kind than the default's.

        Raises BadInput for a group that asks for a solver where none was given.
        """
        found, kind = self.of(name), group["weights"]
        if found.kind == kind:
            return found
        if kind == "solver":
            raise BadInput(f'the group of {name} asks for weights="solver": give the solver by weights= or layers=')
        return found._replace(kind=kind, solver=Memory() if kind == "memory" else None)

    def fits(self, p: Tensor, name: str, groups: Sequence[Mapping[str, Any]]) -> Iterator[Fit]:
        """The forms that a parameter's saved state may have: of all updates, since a bias has that of its weight's."""
        for group in groups:
            for update in (*self.every(), self.of_group(name, group)):
                yield from forms_of_state(update.solver, rates_of(update, group), p)

    def rates(self, name: str, params: Sequence[Tensor], group: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The class of a layer's local optimizer, and its settings from a group."""
        kind, settings = rates_of(self.of_group(name, group), group)
        return fused(kind, params), settings

    def is_free(self, name: str, group: Mapping[str, Any]) -> bool:
        """Whether a local optimizer takes steps of any size."""
        return not has_bounded_steps(rates_of(self.of_group(name, group), group)[0])

    def effects(self, codes: str, groups: Iterable[Mapping[str, Any]]) -> Effects:
        """Which numbers move something; Adam also moves what has no code beside a memory or a solver."""
        asked = {group["weights"] for group in groups} - {self.default.kind, "solver"}
        updates = [*self.every(), *(Update(kind) for kind in asked)]
        own = any(isinstance(update.solver, LocalSteps) for update in updates)
        steps = any(update.kind in ("adam", "sgd") for update in updates)
        adam = any(update.kind != "sgd" and not isinstance(update.solver, LocalSteps) for update in updates)
        return {
            "code_step": (codes == "sweep", 'codes="sweep"'),
            "betas": (adam, 'weights="adam"'), "eps": (adam, 'weights="adam"'),
            "momentum": (any(update.kind == "sgd" for update in updates), 'weights="sgd"'),
            "rows": (steps, 'weights="adam" and "sgd"'),
            "normalise": (steps or own, 'weights="adam" and "sgd", and LocalSteps'),
        }  # fmt: skip


class LayerPlan:
    """How a layer is fitted, decided once for all steps in which its calls, parameters and settings are the same.

    params, groups: those of its weight, and of its bias if that is fitted. takes_steps: whether by local steps; an
    output layer then descends the loss itself. free: whether by steps of any size.
    """

    def __init__(self, updates: Updates, fitting: Fitting, layer: Layer) -> None:
        self._facts = _facts(fitting, layer)
        self.params, self.groups = fitting.params(layer), [fitting.group(name) for name in layer.names]
        self.update = updates.of_group(layer.name, self.groups[0])
        self.takes_steps = self.update.solver is None or isinstance(self.update.solver, LocalSteps)
        self._names, self._rates = layer.names, partial(updates.rates, layer.name, self.params)
        self._made: tuple[Any, torch.optim.Optimizer] | None = None
        self.free = self.takes_steps and updates.is_free(layer.name, self.groups[0])

    def stands(self, fitting: Fitting, layer: Layer) -> bool:
        """Whether the same would be decided again."""
        return all(map(is_, self._facts, _facts(fitting, layer)))

    def optimizer(self, fitting: Fitting) -> tuple[Any, torch.optim.Optimizer]:
        """The class of the layer's local optimizer, and the instance, with the present settings."""
        if self._made is None:
            self._made = fitting.local_optimizer(self._names, self._rates)
        self._made[1].state = fitting.state  # type: ignore[assignment]
        return self._made


def _facts(fitting: Fitting, layer: Layer) -> list[Any]:
    found = [layer.kind, len(layer.names)]
    for name in layer.names:
        group = fitting.group(name)
        found += [fitting.run.parameter(name), group, fitting.settings.of(group)]
    return found


class LayerPlans:
    """The plans of all layers, each made anew where it does not stand any more."""

    def __init__(self, updates: Updates) -> None:
        self._updates = updates
        self._plans: dict[str, LayerPlan] = {}

    def of(self, fitting: Fitting, layer: Layer) -> LayerPlan:
        """The plan of a layer in the present step."""
        name = layer.names[0]
        found = fitting.decided.get(name)
        if found is None:
            found = self._plans.get(name)
            if found is None or not found.stands(fitting, layer):
                found = self._plans[name] = LayerPlan(self._updates, fitting, layer)
            fitting.decided[name] = found
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy makes its own."""
        return LayerPlans, (self._updates,)


def rate_of(update: Update) -> float:
    """The default rate of an update."""
    if update.kind != "solver":
        return float(DEFAULTS[update.kind]["lr"])
    found = default_lr(update.solver)
    return DEFAULTS["adam"]["lr"] if found is None else found


def rates_of(update: Update, group: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of local optimizer that goes with an update, and its settings from a parameter group."""
    if update.kind == "sgd":
        momentum = group["momentum"]
        return torch.optim.SGD, {"lr": group["lr"], "momentum": momentum, "nesterov": momentum > 0}
    rates = {key: group[key] for key in ("lr", "betas", "eps")}
    if isinstance(update.solver, LocalSteps):
        return update.solver.optimizer, {"lr": group["lr"]}
    if update.kind != "adam":
        rates["lr"] = DEFAULTS["adam"]["lr"] * group["lr"] / rate_of(update)
    return torch.optim.Adam, rates


def _update(base: Update, weights: Any, regularizer: Any) -> Update:
    """An update with the values of settings in the place of its own."""
    if weights in ("adam", "sgd"):
        base = base._replace(kind=weights, solver=None)
    elif weights == "memory":
        base = base._replace(kind="memory", solver=Memory())
    elif isinstance(weights, Memory):
        base = base._replace(kind="memory", solver=weights)
    elif callable(weights) and not isinstance(weights, type):
        base = base._replace(kind="solver", solver=weights)
    elif weights is not None:
        raise BadInput(
            f'AltMin\'s weights are updated by "adam", "sgd", "memory" or a solver of lw.local; got {weights!r}'
        )
    if regularizer is not None:
        base = base._replace(regularizers=several("AltMin", regularizer))
    return base


def with_coupling(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group with a `Coupling` replaced by its numbers."""
    coupling = group.get("coupling")
    return {**group, **(coupling.numbers() if isinstance(coupling, Coupling) else {})}


def check_group(group: Mapping[str, Any]) -> None:
    """Raise BadInput for a parameter group's settings that cannot be."""
    check_common("AltMin", group)
    Coupling.check(group)
    if group["weights"] not in DEFAULTS:
        raise BadInput(f"AltMin's weights are updated by {', '.join(DEFAULTS)}; got {group['weights']!r}")
    betas = group["betas"]
    two = isinstance(betas, list | tuple) and len(betas) == 2 and all(0 <= b < 1 for b in betas)
    if not (two and 0 <= group["eps"] < float("inf") and 0 <= group["momentum"] < 1):
        raise BadInput(
            f"AltMin needs two betas and a momentum in [0, 1) and a finite eps ≥ 0; got betas={betas}, "
            f"momentum={group['momentum']}, eps={group['eps']}"
        )
    if not isinstance(group["normalise"], bool):
        raise BadInput(f"AltMin's normalise is True or False; got {group['normalise']!r}")
    if not all(0 <= group[key] < float("inf") for key in ("l1", "code_l1")):
        raise BadInput(f"AltMin needs finite l1 and code_l1 ≥ 0; got {group['l1']} and {group['code_l1']}")


def other_weights(saved: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> list[str]:
    """The parameter groups of a saved state whose weights are updated in another way than ours."""
    return [
        f"parameter group {number} was saved with weights={theirs['weights']!r}, and ours has {own['weights']!r}"
        for number, (theirs, own) in enumerate(zip(saved, ours, strict=True))
        if theirs.get("weights", own["weights"]) != own["weights"]
    ]


_FUSED: dict[Any, Any] = {
    torch.optim.Adam: partial(FusedAdam, fused=True), torch.optim.SGD: partial(FusedSGD, fused=True),
}  # fmt: skip


def fused(kind: Any, params: Sequence[Tensor]) -> Any:
    """The fused form of an optimizer class, for contiguous parameters: the kernels ignore strides.

    Its state lies with the parameters, Adam's count of steps too.
    """
    ours = _FUSED.get(kind)
    able = ours is not None and all(_has_fused(kind, p.device, p.dtype) and p.is_contiguous() for p in params)
    return ours if able else kind


@cache
def _has_fused(kind: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a fused kernel of an optimizer for a device and type, which moves parameters as the plain one.

    It raises where it has none. That of SGD on the CPU leaves most of a tensor in half precision as it was.
    """
    found = []
    try:
        for each in (kind, _FUSED[kind]):
            p = torch.ones(257, device=device, dtype=dtype).requires_grad_()
            p.grad = torch.ones_like(p)
            each([p], lr=0.1).step()
            found.append(p.detach())
    except RuntimeError:
        return False
    return torch.allclose(found[0], found[1], rtol=4 * torch.finfo(dtype).eps, atol=0.0)


@cache
def share(steps: int, rows: int | str, total: int) -> LocalSteps:
    """T plain steps at a constant rate, each on its own share of all rows: R/T with "auto"."""
    count: Any = -(-total // steps) if rows == "auto" else rows
    return LocalSteps(steps, rows=count, schedule="constant", form="plain")
