"""Settings of LocoProp: the values of its keywords, and the choices of single layers by patterns on names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch

from layerwise.errors import BadInput, SquaredInstead
from layerwise.local.layers.layer import Layer
from layerwise.local.norms import ColumnNorm, FrobeniusNorm, MaxNorm, RowNorm, SpectralNorm
from layerwise.local.regularizers import Proximal, Regularizer
from layerwise.local.solvers.tf_rmsprop import TFRMSProp
from layerwise.local.solvers.values import ConditionalGradient, LocalSteps, ProximalSolve, Solver, default_lr, name_of
from layerwise.local.targets import GradientStep, NaturalStep, Target
from layerwise.local.transfer import Transfer
from layerwise.optim.keywords import Effects, refuse_idle
from layerwise.tape.binding import check_matched, matches

__all__ = [
    "DEFAULTS",
    "NUMBERS",
    "PRESETS",
    "RECOVERIES",
    "VALUES",
    "ByPattern",
    "Choice",
    "Choices",
    "LocalUpdate",
    "Objective",
    "Preset",
    "check_common",
    "check_patterns",
    "first_match",
    "implied",
    "in_words",
    "matches",
    "settings_for",
    "several",
    "warn_of_stand_ins",
    "with_preset",
]  # fmt: skip

T = TypeVar("T")

NUMBERS = ("lr", "gamma", "steps", "rows", "decay", "momentum", "eps")
VALUES = ("loss", "target", "regularizer", "solver")
_PUBLISHED: dict[str, Any] = {
    "lr": 1e-5, "gamma": 10.0, "steps": 10, "rows": "all", "decay": 0.9, "momentum": 0.999, "eps": 1e-5,
}  # fmt: skip
# The published rate over 1 − momentum is 1e-2. With matching losses a shorter memory and half of that learn well from
# the first batches, on problems small and large (benchmarks/training/defaults.py); squared losses keep the long one.
DEFAULTS: dict[str, dict[str, Any]] = {
    "matching": {**_PUBLISHED, "lr": 5e-5, "momentum": 0.99, "rows": "auto", "loss": "matching"},
    "squared": {**_PUBLISHED, "rows": "auto", "loss": "squared"},
}
PRESETS: dict[str, dict[str, Any]] = {
    "M": DEFAULTS["matching"],
    "S": DEFAULTS["squared"],
    "published-M": {**_PUBLISHED, "loss": "matching"},
    "published-S": {**_PUBLISHED, "loss": "squared"},
}
Preset = Literal[
    "M", "S", "published-M", "published-S", "gradient-descent", "normalized", "sign", "muon", "row-normalized",
    "column-normalized", "proxprop", "foof", "gradient-descent-on-neurons", "kfac", "target-propagation", "oja",
]  # fmt: skip
_LINEAR = {"target": GradientStep(1.0), "solver": ConditionalGradient(), "lr": 1e-3}
_DESCENT = {"target": GradientStep(1.0), "solver": LocalSteps(1, torch.optim.SGD, "all")}
# Known algorithms as choices of this one: each is the keywords that it stands for, and nothing else.
RECOVERIES: dict[str, dict[str, Any]] = {
    "gradient-descent": _DESCENT,
    "normalized": {**_LINEAR, "regularizer": FrobeniusNorm()},
    "sign": {**_LINEAR, "regularizer": MaxNorm()},
    "muon": {**_LINEAR, "regularizer": SpectralNorm(adjust="original")},
    "row-normalized": {**_LINEAR, "regularizer": RowNorm()},
    "column-normalized": {**_LINEAR, "regularizer": ColumnNorm()},
    "proxprop": {"target": GradientStep(1.0), "regularizer": Proximal(1.0), "solver": ProximalSolve()},
    "foof": {"target": GradientStep(1.0, per="sample"), "solver": ProximalSolve(1.0)},
    "gradient-descent-on-neurons": {"target": GradientStep(1.0, per="sample"), "solver": ProximalSolve(1e15)},
    "kfac": {"target": NaturalStep(1.0), "solver": ProximalSolve(1.0)},
    "target-propagation": {**_DESCENT, "loss": "squared"},  # with cotangents that lw.nn.TargetPropagation sends
    "oja": {**_DESCENT, "loss": "squared"},  # of a decoder with the encoder's weights
}


def with_preset(given: Mapping[str, Any], preset: str | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The keywords, beside those that a recovered algorithm stands for; and the numbers of another preset.

    What is given wins. Raises BadInput for an unknown preset.
    """
    if preset is not None and preset not in [*PRESETS, *RECOVERIES]:
        raise BadInput(f"LocoProp knows the presets {', '.join([*PRESETS, *RECOVERIES])}; got {preset!r}")
    meant = RECOVERIES.get(preset or "", {})
    spelled = {key: meant.get(key) if value is None else value for key, value in given.items()}
    return spelled, PRESETS.get(preset or "")


@dataclass(frozen=True)
class Objective:
    """What `LocoProp` fits each layer to; None: the preset's, or the default.

    loss: "matching", "squared", or a transfer function of `lw.local` whose matching loss is taken.
    target: `GradientStep` (default), `Mirror`, `NaturalStep`, or a function `(z, g, transfer) -> y`.
    gamma: γ, against the gradient of the loss as written; default 10.
    regularizer: None, `Proximal`, `WeightDecay`, `Elastic`, a norm ball (`SpectralNorm`), a function, or several.
    Raises BadInput for a gamma beside a target with another one.
    """

    loss: Literal["matching", "squared"] | Transfer | None = None
    target: Target | None = None
    gamma: float | None = None
    regularizer: Regularizer | Sequence[Regularizer] | None = None

    def __post_init__(self) -> None:
        theirs = getattr(self.target, "gamma", None)
        if self.gamma is not None and theirs not in (None, self.gamma):
            raise BadInput(f"target={self.target} has another gamma than gamma={self.gamma}: give one of the two")


@dataclass(frozen=True)
class LocalUpdate:
    """How `LocoProp` moves a layer's weights towards its target; None: the preset's, the solver's, or the default.

    solver: `LocalSteps` (default), another solver of `lw.local`, or a function `problem -> (ΔW, Δb)`.
    steps: T local steps, default 10, at the rate `lr·max(1 - t/T, 1/4)`.
    rows: rows of each local step, a number, "auto" for R/T, or "all".
    decay: of TFRMSProp's mean square.
    momentum: of TFRMSProp; default 0.99 with the matching loss, 0.999 with the squared one.
    eps: of TFRMSProp.
    """

    solver: Solver | None = None
    steps: int | None = None
    rows: int | Literal["auto", "all"] | None = None
    decay: float | None = None
    momentum: float | None = None
    eps: float | None = None


class Choice(NamedTuple):
    """The values of one layer. transfer: in place of the one the tape found; None keeps that."""

    transfer: Transfer | None = None
    target: Target = GradientStep()
    regularizers: tuple[Regularizer, ...] = ()
    solver: Solver = LocalSteps()

    def __repr__(self) -> str:
        return f"Choice({self.target}, {self.regularizers}, {self.solver})"


def first_match(patterns: Sequence[str], name: str) -> str | None:
    """The first pattern that a name matches."""
    return next((pattern for pattern in patterns if matches(pattern, name)), None)


def check_common(method: str, group: Mapping[str, Any]) -> None:
    """Raise BadInput for a learning rate, number of steps or number of rows that cannot be."""
    rows, steps, lr = group["rows"], group["steps"], group["lr"]
    counts = [steps] if rows in ("auto", "all") else [steps, rows]
    if not (0 <= lr < float("inf") and all(isinstance(n, int) and n is not True and n >= 1 for n in counts)):
        raise BadInput(
            f"{method} needs a finite lr ≥ 0, whole steps ≥ 1, and whole rows ≥ 1, 'all' or 'auto'; got lr={lr}, "
            f"steps={steps}, rows={rows!r}"
        )


def check_patterns(layers: Mapping[str, Mapping[str, Any]], keys: Sequence[str], names: Sequence[str]) -> None:
    """Raise BadInput for `layers=` of another form, unknown keys, and a pattern that no parameter's name matches."""
    if not (isinstance(layers, Mapping) and all(isinstance(settings, Mapping) for settings in layers.values())):
        raise BadInput(f"layers= maps patterns to settings, {{'encoder.*': {{'lr': 1e-4}}}}; got {layers!r}")
    for pattern, settings in layers.items():
        unknown = sorted(set(settings) - set(keys))
        if unknown:
            raise BadInput(f"layers[{pattern!r}] sets {', '.join(unknown)}; a layer has {', '.join(keys)}")
        check_matched("layers", [pattern], names)


def several(method: str, regularizer: Any) -> tuple[Regularizer, ...]:
    """One regularizer or a sequence of them, as a tuple. Raises BadInput for anything else."""
    terms = tuple(regularizer) if isinstance(regularizer, list | tuple) else (regularizer,)
    form = "(weight, bias, gamma, average) -> Pull or norm ball, or a sequence of such"
    return tuple(_callable(method, "regularizer", t, form) for t in terms)


class ByPattern(Generic[T]):
    """What is chosen for each parameter: that of the first pattern that its name matches, else the default."""

    def __init__(self, default: T) -> None:
        self.default = default
        self._chosen: dict[str, T] = {}
        self._of_name: dict[str, T] = {}  # as they were asked for

    def choose(self, pattern: str, value: T) -> None:
        """Choose a value for a pattern, behind those that were chosen before."""
        self._chosen[pattern] = value
        self._of_name.clear()

    def of(self, name: str) -> T:
        """The value for a name."""
        found = self._of_name.get(name)
        if found is None:
            pattern = first_match(tuple(self._chosen), name)
            found = self._of_name[name] = self.default if pattern is None else self._chosen[pattern]
        return found

    def every(self) -> list[T]:
        """The default and those of the patterns."""
        return [self.default, *self._chosen.values()]


class Choices(ByPattern[Choice]):
    """The choices of all layers: a default, and `layers`, a mapping of patterns to settings; the first match wins.

    default: the keywords. names: of the model's parameters. rates: the default rate of TFRMSProp, by loss. numbers: the
    settings of parameter groups, by pattern. Raises BadInput for a value of the wrong kind, for a number that changes
    nothing, and as `check_patterns`.
    """

    def __init__(self, default: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], names: Sequence[str],
                 rates: Mapping[str, float]) -> None:  # fmt: skip
        super().__init__(_choice(Choice(), default))
        self.numbers: dict[str, dict[str, Any]] = {}
        check_patterns(layers, (*NUMBERS, *VALUES), names)
        for pattern, settings in layers.items():
            choice = _choice(self.default, settings)
            refuse_idle(settings, _effects([choice]), f"in layers[{pattern!r}], ")
            self.numbers[pattern] = {**implied(choice, settings), **{k: settings[k] for k in NUMBERS if k in settings}}
            loss, solver = settings.get("loss"), settings.get("solver")
            brings = loss is None and getattr(solver, "squared_only", False)
            loss = "squared" if brings else loss
            self.choose(pattern, choice._replace(transfer=None) if brings else choice)
            if loss is not None:
                self.numbers[pattern]["loss"] = loss if isinstance(loss, str) else "matching"
            foreign = default_lr(choice.solver) is None and default_lr(self.default.solver) is not None
            if foreign and settings.get("lr") is None:  # the default's rate is of another optimizer
                self.numbers[pattern]["lr"] = rates[self.numbers[pattern].get("loss", "matching")]
        refuse_idle(default, _effects(self.every()))

    def unsolved(self, saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[str]:
        """The saved groups with the matching loss, where a solver of the squared one has brought that along."""
        asked = [(self.of(ours["param_names"][0]).solver, theirs.get("loss"), ours["loss"])
                 for theirs, ours in zip(saved, groups, strict=True)]  # fmt: skip
        return [f'it asks for loss="matching", and {name_of(solver)} solves the squared loss'
                for solver, *losses in asked
                if getattr(solver, "squared_only", False) and losses == ["matching", "squared"]]  # fmt: skip


def implied(choice: Choice, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group that a given solver or target sets."""
    found: dict[str, Any] = {}
    if settings.get("solver") is not None:
        solver = choice.solver
        if isinstance(solver, LocalSteps):
            found |= {"steps": solver.steps, "rows": solver.rows}
        if "lr" not in settings or settings["lr"] is None:
            found |= {"lr": default_lr(solver)}
    gamma = getattr(settings.get("target"), "gamma", None)
    if gamma is not None:
        found["gamma"] = gamma
    return {k: v for k, v in found.items() if v is not None}


def _effects(choices: Sequence[Choice]) -> Effects:
    """The numbers of local steps, and of TFRMSProp, which also moves what has no local problem beside other solvers."""
    solvers = [choice.solver for choice in choices]
    steps = any(isinstance(solver, LocalSteps) for solver in solvers)
    ours = any(not isinstance(solver, LocalSteps) or solver.optimizer is TFRMSProp for solver in solvers)
    owner = "TFRMSProp, the default optimizer of LocalSteps; another's numbers are arguments of its own"
    return {"rows": (steps, "LocalSteps"), **dict.fromkeys(("decay", "momentum", "eps"), (ours, owner))}


def _choice(base: Choice, settings: Mapping[str, Any]) -> Choice:
    """A choice with the values of settings in the place of its own."""
    loss, target = settings.get("loss"), settings.get("target")
    if isinstance(loss, Transfer):
        base = base._replace(transfer=loss)
    elif loss in ("matching", "squared"):
        base = base._replace(transfer=None)
    elif loss is not None:
        raise BadInput(f'LocoProp\'s loss is "matching", "squared" or a transfer function of lw.local; got {loss!r}')
    if target is not None:
        base = base._replace(target=_callable("LocoProp", "target", target, "(z, g, transfer) -> target"))
    if settings.get("regularizer") is not None:
        base = base._replace(regularizers=several("LocoProp", settings["regularizer"]))
    if settings.get("solver") is not None:
        base = base._replace(solver=_callable("LocoProp", "solver", settings["solver"], "problem -> (ΔW, Δb)"))
    return base


def _callable(method: str, what: str, value: Any, form: str) -> Callable[..., Any]:
    if not callable(value) or isinstance(value, type):
        raise BadInput(f"{method}'s {what} is a value of lw.local or a function {form}; got {value!r}")
    return value


def in_words(layer: Layer, transfer: Transfer, solver: Solver) -> str:
    """A layer's loss and solver in words."""
    loss = f"matching loss of {transfer.name}"
    if transfer.is_squared:
        loss = f"squared loss ({transfer.name} has no matching loss)" if transfer.stand_in else "squared loss"
    return f"{loss}, {name_of(solver)}" + (f", {len(layer.parts)} uses together" if layer.others else "")


def settings_for(solver: Solver, group: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The kind of local optimizer that goes with a solver, and its settings from a parameter group."""
    if isinstance(solver, LocalSteps) and solver.optimizer is not TFRMSProp:
        return solver.optimizer, {"lr": group["lr"]}
    rates = {key: group[key] for key in ("lr", "decay", "momentum", "eps")}
    if not isinstance(solver, LocalSteps):
        rates["lr"] = DEFAULTS["matching"]["lr"] * group["lr"]
    return TFRMSProp, rates


def warn_of_stand_ins(transfers: Iterable[tuple[str, Transfer]], warned: set[str]) -> None:
    """Warn, once for each transfer function, that it has no matching loss. transfers: with the layer before each."""
    for name, f in transfers:
        if f.stand_in and f.name not in warned:
            warned.add(f.name)
            why = "has no tabulated matching loss" if f.monotone else "is not monotone and has no matching loss"
            warnings.warn(
                f"{f.name}, behind {name}, {why}: such layers take the squared loss before it (LocoProp-S)",
                SquaredInstead,
                stacklevel=8,
            )
