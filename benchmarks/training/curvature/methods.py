"""The methods of the second-order study; each searches two hyperparameters, by the same Sobol points of the square."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

import layerwise as lw
from benchmarks.training.method import Method, Parameters, Range, Space, Step, Stepping

__all__ = ["METHODS", "SHARED"]

FAMILIES = ("classes", "pixels", "characters")
PERIOD = 10  # steps between two inverses of a Kronecker factor, in the paper's update
DEFAULT = 20  # the same by the library's defaults


def _make(kind: str, model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    """K-FAC's optimizer with a kind of factors, or a diagonal one."""
    asked: Any = kind.removesuffix("-mc")
    optimizer: lw.optim.KFAC | lw.optim.DiagNewton
    if kind.startswith("diag-"):
        optimizer = lw.optim.DiagNewton(model, kind=asked, draws=1 if kind.endswith("-mc") else None, **hyper)
    else:
        optimizer = lw.optim.KFAC(model, kind=asked, **hyper)
    return Stepping(optimizer.step, optimizer)


_MOMENTUM = Range(0.5, 0.99, "one-minus")
_CURVED: Mapping[str, Range] = {"lr": Range(1e-2, 1.0), "damping": Range(1e-4, 1e1)}
# A sum over pixels is a hundred times as large as a mean, and curves as much more.
_CURVED_SUM: Mapping[str, Range] = {"lr": Range(1e-3, 1.0), "damping": Range(1e-2, 1e3)}
_PLAIN: Mapping[str, Any] = {"momentum": 0.0, "kl_clip": None}  # the paper's update, θ ← θ − α (C + λI)⁻¹ ∇L
_KRONECKER = {**_PLAIN, "update_inverses_every": PERIOD}


def _spaces(fixed: Mapping[str, Any] | None = None, **ranges: Range) -> dict[str, Space]:
    return dict.fromkeys(FAMILIES, Space(ranges, fixed or {}))


def _curved(fixed: Mapping[str, Any], period: int) -> dict[str, Space]:
    return {f: Space(_CURVED_SUM if f == "pixels" else _CURVED, fixed, period) for f in FAMILIES}


SHARED: dict[str, Mapping[str, Space]] = {  # of LocoProp's methods
    "adam": _spaces({"eps": 1e-8}, lr=Range(1e-4, 1e-2), beta1=_MOMENTUM),
    "momentum": _spaces({"nesterov": True}, lr=Range(1e-3, 1.0), momentum=_MOMENTUM)
    | {"pixels": Space({"lr": Range(1e-5, 1e-2), "momentum": _MOMENTUM}, {"nesterov": True})},
    "kfac": _curved(_KRONECKER, PERIOD),
}


def _kronecker(kind: str) -> Method:
    return Method(kind, partial(_make, kind), _curved(_KRONECKER, PERIOD))


def _with_momentum() -> Method:
    """The library's K-FAC as it comes, with momentum and a clip by the KL divergence; rate and damping are searched."""
    spaces = _curved({"update_inverses_every": DEFAULT}, DEFAULT)
    return Method("kfac-momentum", partial(_make, "kfac"), spaces)


def _diagonal(kind: str) -> Method:
    return Method(kind, partial(_make, kind), _curved(_PLAIN, PERIOD // 2))


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        _with_momentum(),
        *map(_kronecker, ("kflr", "kfra", "ekfac", "foof")),
        *map(_diagonal, ("diag-ggn", "diag-ggn-mc")),
    )
}  # fmt: skip
