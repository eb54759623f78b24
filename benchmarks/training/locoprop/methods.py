"""The methods of LocoProp's study; ranges of rates span two to three decades for all, and no rate changes in a run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import layerwise as lw
from benchmarks.training.method import Batch, Factory, Method, Parameters, Range, Space, Step, Stepping, stepping
from layerwise import local

__all__ = ["METHODS"]


# -- factories ------------------------------------------------------------------------------------------


def _torch(kind: Callable[..., torch.optim.Optimizer]) -> Factory:
    """A class of torch.optim, with the hyperparameters as its keywords."""

    def make(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
        return stepping(kind(params, **hyper))

    return make


def _rmsprop(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    return stepping(torch.optim.RMSprop(params, **hyper))


def _adam(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    betas = (hyper["beta1"], 0.999)
    return stepping(torch.optim.Adam(params, lr=hyper["lr"], betas=betas, eps=hyper["eps"], fused=True))


def _shampoo(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    """Blocked Shampoo with RMSProp's step lengths (grafting)."""
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    return stepping(
        ScalableShampoo(
            params,
            lr=hyper["lr"],
            betas=(hyper["beta1"], hyper["beta2"]),
            matrix_eps=hyper["matrix_eps"],
            start_preconditioning_step=_PERIOD,
            preconditioning_compute_steps=_PERIOD,
            graft_type=LayerWiseGrafting.RMSPROP,
        )
    )


def _soap(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    from pytorch_optimizer import SOAP

    betas = (hyper["beta1"], hyper["beta2"])
    return stepping(SOAP(params, lr=hyper["lr"], betas=betas, weight_decay=0.0, precondition_frequency=_PERIOD))


def _muon(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    """Muon for matrices (a convolution's as `[o, i·k·k]`), Adam for embeddings and vectors.

    The package's orthogonalisation, in float32: its own class and torch.optim.Muon run it in bfloat16, for which
    a CPU takes 14 s where this takes under one. Source: Jordan et al., "Muon" (2024).
    """
    from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5

    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in params if p.dim() > 1 and id(p) not in tables]
    rest = [p for p in params if p.dim() < 2 or id(p) in tables]
    averages = [torch.zeros_like(p) for p in matrices]
    adam = torch.optim.Adam(rest, lr=hyper["adam_lr"], betas=(0.9, 0.95))
    lr, momentum = hyper["lr"], hyper["momentum"]

    @torch.no_grad()
    def move(p: nn.Parameter, average: Tensor) -> None:
        assert p.grad is not None
        average.lerp_(p.grad, 1 - momentum)
        ahead = p.grad.lerp(average, momentum).flatten(1)
        update = zero_power_via_newton_schulz_5(ahead, dtype=torch.float32)
        rows, columns = update.shape
        p.add_(update.view_as(p), alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def step(batch: Batch) -> Tensor:
        for p in params:
            p.grad = None
        loss = batch()
        loss.backward()
        for p, average in zip(matrices, averages, strict=True):
            move(p, average)
        adam.step()
        return loss.detach()

    return step


def _kfac(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    optimizer = lw.optim.KFAC(model, **hyper)  # type: ignore[attr-defined, unused-ignore]
    return Stepping(optimizer.step, optimizer)


def _locoprop(model: nn.Module, params: Parameters, hyper: Mapping[str, Any]) -> Step:
    """LocoProp; `inner` names another local optimizer of torch.optim, for the ablation."""
    settings = dict(hyper)
    inner = settings.pop("inner", None)
    if inner:
        kind = getattr(torch.optim, inner)
        settings["solver"] = local.LocalSteps(steps=settings.pop("steps"), optimizer=kind)  # type: ignore[attr-defined, unused-ignore]
    optimizer = lw.LocoProp(model, **settings)
    return Stepping(optimizer.step, optimizer)


def _needs_package() -> str:
    found = importlib.util.find_spec("pytorch_optimizer")
    return "" if found else "needs pytorch_optimizer: make benchmarks"


# -- the ranges -----------------------------------------------------------------------------------------

_PERIOD = 10  # steps between two preconditioners, for all that amortise them
_MOMENTUM = Range(0.5, 0.995, "one-minus")
_BETA2 = Range(0.9, 0.999, "one-minus")
_KFAC = {"lr": Range(3e-2, 1.0), "damping": Range(1e-3, 1e1), "momentum": Range(0.0, 0.9, "linear")}


def _same(fixed: Mapping[str, Any] | None = None, period: int = 1, **ranges: Range) -> dict[str, Space]:
    """One space for all families: for methods whose step does not scale with the loss."""
    return dict.fromkeys(("autoencoder", "convnet", "transformer"), Space(ranges, fixed or {}, period))


def _by_loss(autoencoder: dict[str, Range], classifier: dict[str, Range], **fixed: Any) -> dict[str, Space]:
    """Spaces of methods whose step scales with the loss: hundreds of nats for an image, or a few for a class."""
    wide = Space(classifier, fixed)
    return {"autoencoder": Space(autoencoder, fixed), "convnet": wide, "transformer": wide}


def _local(rates: Range, **fixed: Any) -> dict[str, Space]:
    """LocoProp: γ against the mean loss, so for classifiers from 3 to 100 times the terms that the mean is over."""
    deep = {"lr": rates, "momentum": Range(0.9, 0.999, "one-minus"), "gamma": Range(3, 100)}
    few = {"lr": Range(3e-5, 3e-3), "momentum": Range(0.5, 0.99, "one-minus")}
    return {
        "autoencoder": Space(deep, {"steps": 10, **fixed}),
        "convnet": Space({**few, "gamma": Range(500, 20_000)}, {"steps": 4, **fixed}),
        "transformer": Space({**few, "gamma": Range(6400, 200_000)}, {"steps": 4, **fixed}),
    }


_SGD = Method(
    "sgd",
    _torch(torch.optim.SGD),
    _by_loss({"lr": Range(1e-5, 1e-2)}, {"lr": Range(3e-3, 3.0)}),
    first_order=True,
)
_HEAVY_BALL = Method(
    "momentum",
    _torch(torch.optim.SGD),
    _by_loss(
        {"lr": Range(1e-5, 1e-2), "momentum": _MOMENTUM},
        {"lr": Range(1e-3, 1.0), "momentum": _MOMENTUM},
        nesterov=True,
    ),
    first_order=True,
)
_ADAGRAD = Method("adagrad", _torch(torch.optim.Adagrad), _same(lr=Range(3e-4, 1e-1)), first_order=True)
_RMSPROP = Method(
    "rmsprop",
    _rmsprop,
    _same(lr=Range(1e-5, 1e-2), momentum=Range(0.0, 0.95, "linear"), alpha=_BETA2),
    first_order=True,
)
_ADAM = Method(
    "adam",
    _adam,
    _same(lr=Range(1e-4, 1e-2), beta1=_MOMENTUM, eps=Range(1e-8, 1e-3)),
    first_order=True,
)
_FIRST_ORDER = (_SGD, _HEAVY_BALL, _ADAGRAD, _RMSPROP, _ADAM)

_LOCOPROP_M = Method("locoprop-m", _locoprop, _local(Range(5e-6, 5e-4), loss="matching"))

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        *_FIRST_ORDER,
        *(
            replace(m, name=f"{m.name}-100", batch=100, spaces={"autoencoder": m.spaces["autoencoder"]})
            for m in _FIRST_ORDER
        ),
        Method(
            "shampoo",
            _shampoo,
            _same({"beta2": 0.999}, _PERIOD, lr=Range(1e-5, 1e-2), beta1=_MOMENTUM, matrix_eps=Range(1e-8, 1e-3)),
            unavailable=_needs_package,
        ),
        Method(
            "soap",
            _soap,
            _same(period=_PERIOD, lr=Range(1e-4, 3e-2), beta1=_MOMENTUM, beta2=_BETA2),
            unavailable=_needs_package,
        ),
        Method(
            "muon",
            _muon,
            _same(lr=Range(1e-4, 1e-1), momentum=_MOMENTUM, adam_lr=Range(1e-4, 1e-2)),
            unavailable=_needs_package,
        ),
        Method(  # as many inverses an epoch as with batches of 1000
            "kfac-250",
            _kfac,
            {"autoencoder": Space(_KFAC, {"kl_clip": 10.0, "update_factors_every": 1, "update_inverses_every": 4}, 4)},
            batch=250,
            revision=3,
        ),
        Method(
            "kfac",  # factors and inverses of every batch: at this batch size a step is four of Adam's
            _kfac,
            {
                family: Space(_KFAC, {"kl_clip": most, "update_factors_every": 1, "update_inverses_every": 1})
                for family, most in (("autoencoder", 10.0), ("convnet", 0.1), ("transformer", 0.1))
            },
            revision=3,
        ),
        _LOCOPROP_M,
        replace(
            _LOCOPROP_M,
            name="locoprop-m-250",
            batch=250,
            spaces={"autoencoder": _LOCOPROP_M.spaces["autoencoder"]},
        ),
        Method("locoprop-m-all-rows", _locoprop, _local(Range(5e-6, 5e-4), loss="matching", rows="all")),
        Method("locoprop-s", _locoprop, _local(Range(1e-6, 1e-4), loss="squared")),
    )
}
