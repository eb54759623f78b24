"""What the layer-local optimizers share: named parameters, one recorded run a step, refusal of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, NonFinite
from layerwise.local.finite import unsafe
from layerwise.local.record import Layer, Recorded
from layerwise.local.solvers import Workspace
from layerwise.program import Buffers
from layerwise.uses import named_parameters_of

__all__ = ["LayerLocal", "check_common"]

Closure = Callable[[], Tensor]


class LayerLocal(torch.optim.Optimizer):
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
        if on_nonfinite not in ("skip", "raise"):
            raise BadInput(f'on_nonfinite must be "skip" or "raise", got {on_nonfinite!r}')
        named = named_parameters_of(model)
        given = [p for p in named.values() if p.requires_grad] if params is None else list(params)
        if not given:
            raise BadInput(f"{type(self).__name__} got a model without a parameter that requires grad")
        self._model = model
        self._on_nonfinite = on_nonfinite
        self._workspace = Workspace()
        self._local: dict[Any, torch.optim.Optimizer] = {}
        self._group_at: dict[int, dict[str, Any]] = {}
        self.skipped = 0
        super().__init__(given, defaults)

    # -- what a method says ----------------------------------------------------------------------------

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise BadInput for settings that cannot be."""
        raise NotImplementedError

    def _run(self, closure: Closure) -> Recorded:
        """Run the closure and record what the layers are to be fitted to."""
        raise NotImplementedError

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

    def _rates(self, group: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The kind of local optimizer that a group asks for, and its settings."""
        raise NotImplementedError

    # -- a step --------------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Run the closure, move every parameter, and return the loss before the step."""
        if closure is None:
            raise BadInput(
                f"{type(self).__name__}.step needs a closure that runs the model and returns the loss: "
                "opt.step(lambda: F.cross_entropy(model(x), y))"
            )
        for group in self.param_groups:
            self._check(group)
        self._group_at = {id(p): group for group in self.param_groups for p in group["params"]}
        buffers = Buffers(self._model)
        try:
            recorded = self._run(closure)
            where = unsafe(recorded, lambda name: self._gamma(recorded, name)) or buffers.spoiled()
            if where is not None and self._on_nonfinite == "raise":
                raise NonFinite(
                    f"{where} holds NaN or infinity, or overflows; the batch changed no parameter. Look at the batch, "
                    'or leave on_nonfinite="skip" to pass over such batches'
                )
        except BaseException:
            buffers.put_back()
            raise
        if where is not None:
            buffers.put_back()
            self.skipped += 1
            return recorded.loss
        for layer in recorded.layers:
            self._fit(recorded, layer)
        for name, g in recorded.gradients.items():
            self._along(recorded.tape.parameters[name], g)
        return recorded.loss

    def _ours(self, p: Tensor) -> bool:
        """Whether a parameter is in one of our groups."""
        return id(p) in self._group_at

    def _group_of(self, recorded: Recorded, name: str) -> dict[str, Any]:
        """The group of a parameter of ours."""
        return self._group_at[id(recorded.tape.parameters[name])]

    def _local_optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of a layer's parameters: kept from step to step, with our state and present settings."""
        kind = self._rates(self._group_at[id(params[0])])[0]
        key = (kind, *map(id, params))
        optimizer = self._local.get(key)
        if optimizer is None:
            optimizer = self._local[key] = self._make([{"params": [p]} for p in params], kind)
        optimizer.state = self.state
        for p, group in zip(params, optimizer.param_groups, strict=True):
            group.update(self._rates(self._group_at[id(p)])[1])
        return optimizer

    # -- groups and state ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters must be the model's, and are known by their names in it.

        Raises BadInput for a parameter that the model does not have, and for settings that cannot be.
        """
        names = {id(p): name for name, p in named_parameters_of(self._model).items()}
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        strangers = sum(id(p) not in names for p in tensors)
        if strangers:
            raise BadInput(f"{type(self).__name__} got {strangers} parameters that are not the model's")
        group = {**self.defaults, **param_group, "params": [(names[id(p)], p) for p in tensors]}
        self._check(group)
        super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the names of the parameters and the number of skipped batches."""
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, parameters by name; goes on bitwise where it stopped.

        Raises BadInput where the saved groups hold other parameters than ours.
        """
        saved = {k: v for k, v in state_dict.items() if k != "skipped"}
        super().load_state_dict({**saved, "param_groups": self._in_our_order(saved["param_groups"])})
        self.skipped = state_dict.get("skipped", 0)

    def _in_our_order(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved groups with their parameters in the order of ours."""
        if len(groups) != len(self.param_groups):
            raise BadInput(f"the saved state has {len(groups)} parameter groups, and ours {len(self.param_groups)}")
        ordered = []
        for number, (theirs, ours) in enumerate(zip(groups, self.param_groups, strict=True)):
            ids = dict(zip(theirs.get("param_names", ours["param_names"]), theirs["params"], strict=False))
            wrong = sorted(set(ids) ^ set(ours["param_names"]))
            if wrong or len(theirs["params"]) != len(ours["params"]):
                raise BadInput(
                    f"group {number} of the saved state holds {len(theirs['params'])} parameters and ours "
                    f"{len(ours['params'])}; in one of them only: {', '.join(wrong[:5]) or 'none'}"
                )
            names = ours["param_names"]
            ordered.append({**theirs, "params": [ids[n] for n in names], "param_names": list(names)})
        return ordered


def check_common(method: str, group: Mapping[str, Any]) -> None:
    """Raise BadInput for a learning rate, number of steps or number of rows that cannot be."""
    rows, steps, lr = group["rows"], group["steps"], group["lr"]
    counts = [steps] if rows in ("auto", "all") else [steps, rows]
    if not (0 <= lr < float("inf") and all(isinstance(n, int) and n >= 1 for n in counts)):
        raise BadInput(
            f"{method} needs a finite lr ≥ 0, whole steps ≥ 1, and whole rows ≥ 1, 'all' or 'auto'; got lr={lr}, "
            f"steps={steps}, rows={rows!r}"
        )
