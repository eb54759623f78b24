"""What the layer-local optimizers share: one recorded run a step, from which every layer is fitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.local.finite import unsafe
from layerwise.local.layers import Layer
from layerwise.local.record import Recorded
from layerwise.local.steps import Workspace
from layerwise.optim.named import NamedOptimizer

__all__ = ["LayerLocal", "check_common"]


class LayerLocal(NamedOptimizer[Recorded]):
    """Base of optimizers that fit each layer to a local target from one run of the model.

    A batch with NaN or infinity in its loss, activations or cotangents, or whose gradients overflow, changes no
    parameter, no state and no buffer: it is counted in `skipped`, or raises NonFinite with `on_nonfinite="raise"`.
    A closure that raises leaves everything as it was, too. A layer whose bias is in another group than its
    weight takes rates from both, and the rest from the weight's.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        on_nonfinite: str,
    ) -> None:
        self._workspace = Workspace()
        self._local: dict[Any, torch.optim.Optimizer] = {}
        super().__init__(model, params, defaults, on_nonfinite)

    # -- what a method says ----------------------------------------------------------------------------

    def _gamma(self, recorded: Recorded, name: str) -> float:
        """γ of a parameter, by which its cotangents are multiplied."""
        raise NotImplementedError

    def _fit(self, recorded: Recorded, layer: Layer) -> None:
        """Solve one layer's local problem."""
        raise NotImplementedError

    def _along(self, p: Tensor, g: Tensor) -> None:
        """Move a parameter outside the layers along its gradient."""
        raise NotImplementedError

    def _make(self, groups: list[dict[str, Any]], kind: Any) -> torch.optim.Optimizer:
        """A new local optimizer of a kind on `{"params": ...}` groups."""
        raise NotImplementedError

    def _rates(self, group: Mapping[str, Any], owner: Tensor) -> tuple[Any, dict[str, Any]]:
        """The kind of local optimizer that a layer with a weight `owner` has, and its settings from a group."""
        raise NotImplementedError

    # -- a step --------------------------------------------------------------------------------------------

    def _unsafe(self, run: Recorded) -> str | None:
        return unsafe(run, lambda name: self._gamma(run, name))

    def _move(self, run: Recorded) -> str | None:
        for layer in run.layers:
            self._fit(run, layer)
        for name, g in run.gradients.items():
            self._along(run.tape.parameters[name], g)
        return None

    def _group_of(self, recorded: Recorded, name: str) -> dict[str, Any]:
        """The group of a parameter of ours."""
        return self._group_at[id(recorded.tape.parameters[name])]

    def _local_optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of a layer's parameters: kept from step to step, with our state and present settings."""
        kind = self._rates(self._group_at[id(params[0])], params[0])[0]
        key = (kind, *map(id, params))
        optimizer = self._local.get(key)
        if optimizer is None:
            optimizer = self._local[key] = self._make([{"params": [p]} for p in params], kind)
        optimizer.state = self.state
        for p, group in zip(params, optimizer.param_groups, strict=True):
            group.update(self._rates(self._group_at[id(p)], params[0])[1])
        return optimizer


def check_common(method: str, group: Mapping[str, Any]) -> None:
    """Raise BadInput for a learning rate, number of steps or number of rows that cannot be."""
    rows, steps, lr = group["rows"], group["steps"], group["lr"]
    counts = [steps] if rows in ("auto", "all") else [steps, rows]
    if not (0 <= lr < float("inf") and all(isinstance(n, int) and n >= 1 for n in counts)):
        raise BadInput(
            f"{method} needs a finite lr ≥ 0, whole steps ≥ 1, and whole rows ≥ 1, 'all' or 'auto'; got lr={lr}, "
            f"steps={steps}, rows={rows!r}"
        )
