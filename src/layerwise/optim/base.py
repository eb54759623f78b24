"""What the layer-local optimizers share: named parameters, one recorded run a step, refusal of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, NonFinite
from layerwise.local.record import Layer, Recorded, record
from layerwise.uses import named_parameters_of

__all__ = ["LayerLocal"]


class LayerLocal(torch.optim.Optimizer):
    """Base of optimizers that fit each layer to a local target from one run of the model.

    A batch with NaN or infinity in its loss or cotangents changes no parameter and no state: it is counted
    in `skipped`, or raises NonFinite with `on_nonfinite="raise"`.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        on_nonfinite: str,
    ) -> None:
        if on_nonfinite not in ("skip", "raise"):
            raise BadInput(f'on_nonfinite must be "skip" or "raise", got {on_nonfinite!r}')
        named = named_parameters_of(model)
        given = [(n, p) for n, p in named.items() if p.requires_grad] if params is None else list(params)
        if not given:
            raise BadInput(f"{type(self).__name__} got a model without a parameter that requires grad")
        super().__init__(given, defaults)
        self._model = model
        self._on_nonfinite = on_nonfinite
        self.skipped = 0
        ours = {id(p) for group in self.param_groups for p in group["params"]}
        names = {id(p) for p in named.values()}
        if not ours <= names:
            raise BadInput(f"{type(self).__name__} got {len(ours - names)} parameters that are not the model's")

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the number of skipped batches."""
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state; goes on bitwise where it stopped."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "skipped"})
        self.skipped = state_dict.get("skipped", 0)

    def group_of(self, p: Tensor) -> dict[str, Any] | None:
        """The parameter group that holds a parameter, or None where it is not ours to move."""
        return next((g for g in self.param_groups if any(q is p for q in g["params"])), None)

    def _group_of(self, recorded: Recorded, layer: Layer) -> dict[str, Any]:
        """The parameter group of a layer; `_ours` has made sure that there is one."""
        group = self.group_of(recorded.tape.parameters[layer.name])
        assert group is not None
        return group

    def _record(self, closure: Callable[[], Tensor] | None) -> Recorded:
        if closure is None:
            raise BadInput(
                f"{type(self).__name__}.step needs a closure that runs the model and returns the loss: "
                "opt.step(lambda: F.cross_entropy(model(x), y))"
            )
        return record(self._model, closure, self._ours)

    def _ours(self, layer: Layer) -> bool:
        """Whether all of a layer's parameters are in one of our groups."""
        named = named_parameters_of(self._model)
        groups = [self.group_of(named[name]) for name in layer.names]
        return groups[0] is not None and all(g is groups[0] for g in groups)

    def _refuse_nonfinite(self, where: str | None) -> bool:
        """Count, or raise, where a batch is not finite."""
        if where is None:
            return False
        if self._on_nonfinite == "raise":
            raise NonFinite(f"{where} holds NaN or infinity; the batch changed no parameter")
        self.skipped += 1
        return True

    def _rest(self, recorded: Recorded) -> Sequence[tuple[str, Tensor, Tensor, dict[str, Any]]]:
        """(name, parameter, gradient, group) of our parameters that belong to no layer."""
        found = []
        for name, g in recorded.gradients.items():
            p = recorded.tape.parameters[name]
            group = self.group_of(p)
            if group is not None:
                found.append((name, p, g, group))
        return found
