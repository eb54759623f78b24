"""The methods of AltMin's study, and the spaces that its baselines have in it.

Gradient methods and AltMin search two hyperparameters each: the same Sobol points of the square. What the library
does not take yet is unavailable, and says what it answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import layerwise as lw
from benchmarks.training.method import Factory, Method, Parameters, Range, Space, Step, Stepping, stepping
from layerwise import local

from .admm import admm
from .nets import Elman, Sign
from .offline import offline_am
from .target_propagation import target_propagation

__all__ = ["METHODS", "SHARED", "with_library_signs"]

FAMILIES = ("dense", "conv", "recurrent", "tabular", "binary")
WINDOW = 20  # minibatches, of AM-mem: what makes it a memory
SWEEPS = 5  # of an offline method over all rows, an epoch

# -- factories ------------------------------------------------------------------------------------------


def with_library_signs(model: nn.Module) -> nn.Module:
    """The model, changed in place to `layerwise.nn.Sign` for this study's: the same values, crossed as AltMin does."""
    for name, part in list(model.named_children()):
        if isinstance(part, Sign):
            setattr(model, name, lw.nn.Sign())  # type: ignore[attr-defined, unused-ignore]
        else:
            with_library_signs(part)
    return model


def _altmin(**settings: Any) -> Factory:
    def make(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
        if any(isinstance(m, Sign) for m in model.modules()):
            with_library_signs(model)
        optimizer = lw.AltMin(model, **settings, **hyper)
        return Stepping(optimizer.step, optimizer)

    return make


def _memory(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    """AM-mem: running moments of inputs and codes, with a window of 1/forget minibatches."""
    settings = dict(hyper)
    weights = local.Memory(forget=settings.pop("forget")) if "forget" in settings else local.Memory()
    return _altmin(weights=weights)(model, params, settings)


def _adam(times: int) -> Factory:
    def make(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
        optimizer = torch.optim.Adam(params, lr=hyper["lr"], betas=(hyper["beta1"], 0.999), fused=True)
        return stepping(optimizer, times)

    return make


def _momentum_twice(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    return stepping(torch.optim.SGD(params, **hyper), times=2)


# -- what the library takes -----------------------------------------------------------------------------


def _takes(name: str, make: Factory, space: Space) -> Callable[[], str]:
    """Why AltMin does not take a method's settings, or ""."""

    @cache
    def reason() -> str:
        model, hyper = nn.Linear(2, 2), {n: r.at(0.5) for n, r in space.ranges.items()}
        try:
            make(model, list(model.parameters()), {**space.fixed, **hyper})
        except (AttributeError, TypeError, ValueError) as error:  # BadInput is a ValueError
            return f"layerwise does not take what {name} needs yet: {error}"
        return ""

    return reason


@cache
def _needs_sign() -> str:
    found = hasattr(lw, "nn") and hasattr(lw.nn, "Sign")
    return "" if found else "layerwise has no nn.Sign yet"


@cache
def _needs_recurrent_codes() -> str:
    """A layer with several uses has codes where its first step depends on the coupling."""
    moved = []
    for coupling in (1e-2, 1e2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, x = Elman(2, 3, 2), torch.randn(8, 4, 2)
        optimizer = lw.AltMin(model, weights="sgd", lr=0.1, coupling=coupling)
        optimizer.step(lambda: F.cross_entropy(model(x), torch.arange(8) % 2))  # noqa: B023
        moved.append(model.cell.weight.detach())
    return "layerwise.AltMin gives a recurrent layer no codes yet" if torch.equal(*moved) else ""


# -- spaces ---------------------------------------------------------------------------------------------

_ADAM_RATE, _SGD_RATE = Range(1e-3, 3e-2), Range(3e-3, 0.3)
_AVERAGE = Range(0.5, 0.99, "one-minus")
_COUPLING = Range(1e-2, 1.0)
_STEPS = {"steps": 8}  # T on recurrent nets, each on 25 of 200 rows


def _spaces(families: tuple[str, ...] = FAMILIES, fixed: Mapping[str, Any] | None = None, **ranges: Range) -> Any:
    return dict.fromkeys(families, Space(ranges, fixed or {}))


_ADAM = _spaces(fixed={"eps": 1e-8}, lr=_ADAM_RATE, beta1=_AVERAGE)
_MOMENTUM = _spaces(fixed={"nesterov": True}, lr=_SGD_RATE, momentum=_AVERAGE)

SHARED: dict[str, Mapping[str, Space]] = {  # of LocoProp's methods; batch 100 is B/T here, too: 200 rows, two steps
    "adam": _ADAM, "adam-100": _ADAM, "momentum": _MOMENTUM, "momentum-100": _MOMENTUM,
}  # fmt: skip


def _am(
    name: str,
    make: Factory,
    fixed: Mapping[str, Any] | None = None,
    revision: int = 1,
    recurrent: Mapping[str, Any] | None = None,
    period: int = 1,
    **ranges: Range,
) -> Method:
    """recurrent: what is fixed besides on recurrent nets."""
    needs = {"binary": _needs_sign, "recurrent": _needs_recurrent_codes}
    everywhere = dict.fromkeys(FAMILIES, Space(ranges, fixed or {}, period))
    spaces = everywhere | {"recurrent": Space(ranges, {**(fixed or {}), **(recurrent or {})}, period)}
    return Method(name, make, spaces, unavailable=_takes(name, make, spaces["dense"]), needs=needs, revision=revision)


def _offline(name: str, make: Callable[[nn.Module, Parameters, Mapping[str, Any]], Any], **ranges: Range) -> Method:
    spaces = _spaces(("dense", "tabular"), {"sweeps": SWEEPS}, **ranges)
    return Method(name, make, spaces, whole=True)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("adam-twice", _adam(2), _spaces(lr=_ADAM_RATE, beta1=_AVERAGE), first_order=True),
        Method("momentum-twice", _momentum_twice, _MOMENTUM, first_order=True),
        Method("adam-25", _adam(1), {"recurrent": _ADAM["recurrent"]}, batch=25, first_order=True),
        _am("am-adam", _altmin(weights="adam"), recurrent=_STEPS, lr=_ADAM_RATE, coupling=_COUPLING),
        _am("am-sgd", _altmin(weights="sgd"), recurrent=_STEPS, lr=Range(3e-4, 0.3), coupling=_COUPLING),
        _am(
            "am-mem",
            _memory,
            {"forget": 1 / WINDOW},
            revision=2,
            period=local.Memory().every,
            lr=Range(0.5, 5.0),
            coupling=Range(0.3, 10.0),
        ),
        _am("am-published", _altmin(preset="published"), lr=_ADAM_RATE, coupling=Range(1e-3, 0.1)),
        _am("am-async", _altmin(weights="adam", schedule="async"), lr=_ADAM_RATE, coupling=_COUPLING),
        Method(
            "target-propagation",
            target_propagation,
            _spaces(("binary",), {"noise": 0.3}, lr=Range(1e-4, 1e-2), target_rate=Range(0.01, 10.0)),
        ),
        _offline("offline-am", offline_am, coupling=Range(1e-3, 1.0), ridge=Range(1e-4, 1.0)),
        _offline("admm", admm, beta=Range(0.1, 10.0), gamma=Range(1.0, 100.0)),
    )
}
