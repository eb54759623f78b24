"""LocoProp: every layer is fitted to its own target by a few local first-order steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem
from layerwise.local.record import Layer, Recorded, problem_of, record
from layerwise.local.solvers import linear_steps, local_steps
from layerwise.local.tf_rmsprop import TFRMSProp
from layerwise.local.transfer import IDENTITY
from layerwise.optim.base import LayerLocal, check_common

__all__ = ["LocoProp"]

_PUBLISHED: dict[str, Any] = {
    "lr": 1e-5, "gamma": 10.0, "steps": 10, "rows": "all", "decay": 0.9, "momentum": 0.999, "eps": 1e-5,
}  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    "published-M": {**_PUBLISHED, "loss": "matching"},
    "published-S": {**_PUBLISHED, "loss": "squared"},
}
# The published rate over 1 − momentum is 1e-2. With matching losses a shorter memory and half of that learn well from
# the first batches, on small and large problems alike (benchmarks/defaults.py); squared losses keep the long one.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "matching": {**_PUBLISHED, "lr": 5e-5, "momentum": 0.99, "rows": "auto", "loss": "matching"},
    "squared": {**_PUBLISHED, "rows": "auto", "loss": "squared"},
}


class LocoProp(LayerLocal):
    """Fit each layer `z = W a + b` to its own target by T local steps, all layers at once.

        matching (M):  target y = f(z) - γ g,   min_W  sum_r F(W a_r) - y_r·(W a_r)
        squared (S):   target y = z - γ g,      min_W  sum_r ½ |W a_r - y_r|²

    with g = dL/dz from one run of the model and f = F' the layer's transfer function, both found by the tape.
    The first local gradient is γ times backprop's. Local steps are TFRMSProp's, with rate
    `lr·max(1 - t/T, 1/4)`; its state lives on from batch to batch. Parameters without a local problem (scales,
    lone biases, embeddings, transposed convolutions, tied, reused or derived weights) take the same T steps along γ
    times their gradient. A transfer function without a matching loss (GELU, SiLU) is treated as S.

        opt = LocoProp(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    model: an nn.Module, or a mapping of names to tensors. params: as for any torch optimizer, with names
    (`model.named_parameters()` or groups of it); default all. loss: "matching" or "squared"; lr and momentum default to
    5e-5 and 0.99 with the first, to the published 1e-5 and 0.999 with the second. gamma: γ, against the
    gradient of the loss as written. steps: T. rows: rows for each local step: a number, "all", or "auto" for R/T,
    rounded up, with the matching loss (all T steps then read the batch once) and all with the squared one. preset:
    "published-M" or "published-S" for exactly the published settings; other arguments override it.
    Raises BadInput, UncoveredUse; NonFinite with `on_nonfinite="raise"` (default: skip the batch, count it).
    Source: Amid, Anil and Warmuth, "LocoProp: Enhancing BackProp via Local Loss Optimization" (2022), section 3.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        lr: float | None = None,
        loss: Literal["matching", "squared"] | None = None,
        gamma: float | None = None,
        steps: int | None = None,
        rows: int | Literal["auto", "all"] | None = None,
        decay: float | None = None,
        momentum: float | None = None,
        eps: float | None = None,
        preset: Literal["published-M", "published-S"] | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        if preset is not None and preset not in _PRESETS:
            raise BadInput(f"LocoProp knows the presets {', '.join(_PRESETS)}; got {preset!r}")
        given = {"lr": lr, "loss": loss, "gamma": gamma, "steps": steps, "rows": rows,
                 "decay": decay, "momentum": momentum, "eps": eps}  # fmt: skip
        chosen = dict(_PRESETS[preset] if preset else _DEFAULTS.get(loss or "matching", _DEFAULTS["matching"]))
        chosen.update({k: v for k, v in given.items() if v is not None})
        super().__init__(model, params, chosen, on_nonfinite)

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

    def _run(self, closure: Callable[[], Tensor]) -> Recorded:
        return record(self._model, closure, self._ours)

    def _gamma(self, recorded: Recorded, name: str) -> float:
        return float(self._group_of(recorded, name)["gamma"])

    def _problem(self, recorded: Recorded, layer: Layer) -> LocalProblem:
        group = self._group_of(recorded, layer.name)
        matching = group["loss"] == "matching" and not layer.transfer.stand_in
        return problem_of(recorded, layer, group["gamma"], layer.transfer if matching else IDENTITY)

    def _fit(self, recorded: Recorded, layer: Layer) -> None:
        group, problem = self._group_of(recorded, layer.name), self._problem(recorded, layer)
        params = [recorded.tape.parameters[name] for name in layer.names]
        share = None if problem.transfer.is_squared else -(-problem.a.shape[0] // group["steps"])
        local_steps(
            problem,
            self._local_optimizer(params),
            group["steps"],
            rows={"auto": share, "all": None}.get(group["rows"], group["rows"]),
            weight=params[0],
            bias=params[1] if len(params) > 1 else None,
            fold=layer.weight.fold,
            workspace=self._workspace,
        )

    def _along(self, p: Tensor, g: Tensor) -> None:
        """T steps on the linear local loss `γ g·w`."""
        group = self._group_at[id(p)]
        linear_steps(p, group["gamma"] * g, self._local_optimizer([p]), group["steps"])

    def _rates(self, group: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        return TFRMSProp, {key: group[key] for key in ("lr", "decay", "momentum", "eps")}

    def _make(self, groups: list[dict[str, Any]], kind: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(groups)
        return optimizer
