"""LocoProp: every layer is fitted to its own target by a few local first-order steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem
from layerwise.local.record import Layer, Recorded, problem_of
from layerwise.local.solvers import Workspace, linear_floor, local_steps
from layerwise.local.tf_rmsprop import TFRMSProp
from layerwise.local.transfer import IDENTITY
from layerwise.optim.base import LayerLocal

__all__ = ["LocoProp"]

_PUBLISHED: dict[str, Any] = {
    "lr": 1e-5, "gamma": 10.0, "steps": 10, "rows": "all", "decay": 0.9, "momentum": 0.999, "eps": 1e-5,
}  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    "published-M": {**_PUBLISHED, "loss": "matching"},
    "published-S": {**_PUBLISHED, "loss": "squared"},
}
_DEFAULTS: dict[str, Any] = {**_PUBLISHED, "rows": "auto", "loss": "matching"}


class LocoProp(LayerLocal):
    """Fit each layer `z = W a + b` to its own target by T local steps, all layers at once.

        matching (M):  target y = f(z) - γ g,   min_W  sum_r F(W a_r) - y_r·(W a_r)
        squared (S):   target y = z - γ g,      min_W  sum_r ½ |W a_r - y_r|²

    with g = dL/dz from one run of the model and f = F' the layer's transfer function, both found by the tape.
    The first local gradient is γ times backprop's. Local steps are TFRMSProp's, with rate
    `lr·max(1 - t/T, 1/4)`; its state lives on from batch to batch. Parameters without a local problem (scales,
    lone biases, tied, reused or derived weights) take the same T steps along γ times their gradient.

        opt = LocoProp(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    model: an nn.Module, or a mapping of names to tensors. params: as for any torch optimizer, with names
    (`model.named_parameters()` or groups of it); default all. loss: "matching" or "squared". gamma: γ, against the
    gradient of the loss as written. steps: T. rows: rows for each local step: "all", "auto" for R/T with
    the matching loss (all T steps then read the batch once) and all with the squared one. preset:
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
        chosen = dict(_PRESETS[preset] if preset else _DEFAULTS)
        chosen.update({k: v for k, v in given.items() if v is not None})
        super().__init__(model, params, chosen, on_nonfinite)
        for group in self.param_groups:
            _check(group)
        self._workspace = Workspace()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Run the closure, move every parameter, and return the loss before the step."""
        recorded = self._record(closure)
        if self._refuse_nonfinite(recorded.finite()):
            return recorded.loss
        problems = [(layer, self._problem(recorded, layer)) for layer in recorded.layers]
        for layer, problem in problems:
            self._solve(recorded, layer, problem)
        for _, p, g, group in self._rest(recorded):
            self._along(p, g, group)
        return recorded.loss

    def _problem(self, recorded: Recorded, layer: Layer) -> LocalProblem:
        group = self._group_of(recorded, layer)
        matching = group["loss"] == "matching" and not layer.transfer.stand_in
        return problem_of(recorded, layer, group["gamma"], layer.transfer if matching else IDENTITY)

    def _solve(self, recorded: Recorded, layer: Layer, problem: LocalProblem) -> None:
        group = self._group_of(recorded, layer)
        params = [recorded.tape.parameters[name] for name in layer.names]
        rows = group["rows"]
        if rows == "auto":
            rows = None if problem.transfer.is_squared else max(1, problem.a.shape[0] // group["steps"])
        local_steps(
            problem,
            self._local_optimizer(params, group),
            group["steps"],
            rows=None if rows == "all" else rows,
            weight=params[0],
            bias=params[1] if len(params) > 1 else None,
            fold=layer.weight.fold,
            workspace=self._workspace,
        )

    def _along(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        """T steps on the linear local loss `γ g·w`, for a parameter without a local problem."""
        optimizer = self._local_optimizer([p], group)
        before, p.grad = p.grad, g.detach() * group["gamma"]
        for t in range(group["steps"]):
            optimizer.param_groups[0]["lr"] = group["lr"] * linear_floor(t, group["steps"])
            optimizer.step()
        p.grad = before

    def _local_optimizer(self, params: list[Tensor], group: dict[str, Any]) -> TFRMSProp:
        """A TFRMSProp on these parameters whose state is ours."""
        optimizer = TFRMSProp(params, group["lr"], group["decay"], group["momentum"], group["eps"])
        optimizer.state = self.state
        return optimizer


def _check(group: dict[str, Any]) -> None:
    rows = group["rows"]
    ok_rows = rows in ("auto", "all") or (isinstance(rows, int) and rows >= 1)
    if not (group["lr"] >= 0 and group["gamma"] > 0 and group["steps"] >= 1 and ok_rows):
        raise BadInput(
            f"LocoProp needs lr ≥ 0, gamma > 0, steps ≥ 1 and rows ≥ 1, 'all' or 'auto'; got lr={group['lr']}, "
            f"gamma={group['gamma']}, steps={group['steps']}, rows={rows!r}"
        )
    if group["loss"] not in ("matching", "squared"):
        raise BadInput(f'LocoProp\'s loss is "matching" or "squared"; got {group["loss"]!r}')
