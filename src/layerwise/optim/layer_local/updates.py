"""How alternating minimization updates weights: by name or by a solver, for all layers or by pattern."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.codes.coupling import Coupling
from layerwise.local.regularizers import Regularizer
from layerwise.local.solvers.fused import FusedAdam, FusedSGD
from layerwise.local.solvers.memory import Memory
from layerwise.local.solvers.values import LocalSteps, Solver, default_lr
from layerwise.optim.layer_local.base import check_common
from layerwise.optim.layer_local.choices import check_patterns, first_match, several

__all__ = [
    "DEFAULTS", "Update", "Updates", "check_group", "check_run", "fused", "rate_of", "rates_of",
    "share",
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
_CODES = ("jacobi", "gauss-newton", "sweep")
_NUMBERS = ("lr", "coupling", "steps", "rows", "betas", "eps", "momentum", "l1", "code_l1", "normalise")


class Update(NamedTuple):
    """A layer's way. kind: "adam", "sgd", "memory" or "solver"; solver: of the last two."""

    kind: str = "adam"
    solver: Solver | None = None
    regularizers: tuple[Regularizer, ...] = ()


class Updates:
    """The updates of all layers: a default, and `layers`, a mapping of patterns to settings; the first match wins.

    names: of the model's parameters. Raises BadInput for values of the wrong kind, unknown keys, and patterns that no
    parameter matches.
    """

    def __init__(
        self, weights: Any, regularizer: Any, layers: Mapping[str, Mapping[str, Any]], names: Sequence[str]
    ) -> None:
        self.default = _update(Update(), weights, regularizer)
        check_patterns(layers, (*_NUMBERS, "weights", "regularizer"), names)
        self._by_pattern: dict[str, Update] = {}
        self.numbers: dict[str, dict[str, Any]] = {}
        for pattern, settings in layers.items():
            update = _update(self.default, settings.get("weights"), settings.get("regularizer"))
            self._by_pattern[pattern] = update
            own = {k: settings[k] for k in _NUMBERS if k in settings}
            if settings.get("weights") is not None:
                own = {"lr": rate_of(update), "weights": update.kind, **own}
            if isinstance(own.get("coupling"), Coupling):
                own |= own["coupling"].numbers()
            self.numbers[pattern] = own

    def of(self, name: str, group: Mapping[str, Any]) -> Update:
        """The update of a weight, in a group that may say another kind than the default's.

        Raises BadInput for a group that asks for a solver where none was given.
        """
        pattern = first_match(tuple(self._by_pattern), name)
        found = self.default if pattern is None else self._by_pattern[pattern]
        if found.kind != group["weights"]:
            if group["weights"] == "solver":
                raise BadInput(f'the group of {name} asks for weights="solver": give the solver by weights= or layers=')
            solver = Memory() if group["weights"] == "memory" else None
            found = found._replace(kind=group["weights"], solver=solver)
        return found

    def every(self) -> list[Update]:
        """The default and those of the patterns."""
        return [self.default, *self._by_pattern.values()]


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
    """An update with the values that settings give."""
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


def check_group(group: Mapping[str, Any]) -> None:
    """Raise BadInput for a parameter group's settings that cannot be."""
    check_common("AltMin", group)
    Coupling.check(group)
    if group["weights"] not in DEFAULTS:
        raise BadInput(f"AltMin's weights are updated by {', '.join(DEFAULTS)}; got {group['weights']!r}")
    if not (all(0 <= b < 1 for b in group["betas"]) and group["eps"] >= 0 and 0 <= group["momentum"] < 1):
        raise BadInput(
            f"AltMin needs betas and momentum in [0, 1) and eps ≥ 0; got betas={group['betas']}, "
            f"momentum={group['momentum']}, eps={group['eps']}"
        )
    if not all(0 <= group[key] < float("inf") for key in ("l1", "code_l1")):
        raise BadInput(f"AltMin needs finite l1 and code_l1 ≥ 0; got {group['l1']} and {group['code_l1']}")


def check_run(codes: Any, repeats: Any, multipliers: bool, schedule: str, staleness: int | None) -> None:
    """Raise BadInput for ways to run that cannot be."""
    if codes not in _CODES:
        raise BadInput(f"AltMin's codes are {', '.join(_CODES)}; got {codes!r}")
    if not isinstance(repeats, int) or repeats < 1:
        raise BadInput(f"AltMin repeats a minibatch a whole number of times ≥ 1; got repeats={repeats!r}")
    if schedule not in ("together", "async") or (staleness is not None and schedule != "async"):
        raise BadInput(
            f'AltMin\'s schedule is "together", or "async" with a staleness; got {schedule!r}, {staleness!r}'
        )
    if multipliers and (codes != "sweep" or repeats < 2):
        raise BadInput(
            'multipliers belong to the samples of a minibatch: they need codes="sweep" and repeats ≥ 2 (codes made '
            f"from the outputs at once cancel them); got codes={codes!r}, repeats={repeats}"
        )


_FUSED: dict[Any, Any] = {
    torch.optim.Adam: partial(FusedAdam, fused=True), torch.optim.SGD: partial(FusedSGD, fused=True),
}  # fmt: skip


def fused(kind: Any, params: Sequence[Tensor]) -> Any:
    """The kind in its fused form: torch's kernels read memory in order whatever the strides; gradients are so, too."""
    ours = _FUSED.get(kind)
    able = ours is not None and all(p.device.type == "cpu" and p.is_contiguous() for p in params)
    return ours if able else kind


@cache
def share(steps: int, rows: int | str, total: int) -> LocalSteps:
    """T plain steps at a constant rate, each on its own rows of a total: R/T with "auto"."""
    count: Any = -(-total // steps) if rows == "auto" else rows
    return LocalSteps(steps, rows=count, schedule="constant", form="plain")
