"""Base of all optimizers of the library: named parameters, one closure a step, refusal of NaN, state by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, NonFinite
from layerwise.replay.state import Buffers
from layerwise.tape.uses import named_parameters_of

__all__ = ["Attempt", "Closure", "NamedOptimizer"]

Closure = Callable[[], Tensor]
Attempt = Callable[[Closure, Buffers], tuple[Tensor, str | None]]


class NamedOptimizer(torch.optim.Optimizer):
    """Base of optimizers that know their parameters by name and move them from one run of a closure.

    A batch with NaN or infinity changes no parameter, no state and no buffer: it is counted in `skipped`, or raises
    NonFinite with `on_nonfinite="raise"`. A closure that raises leaves everything as it was, too.
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
        self._group_at: dict[int, dict[str, Any]] = {}
        self.skipped = 0
        super().__init__(given, defaults)

    # -- what a method implements ------------------------------------------------------------------------

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise BadInput for settings that cannot be."""
        raise NotImplementedError

    def _attempt(self, closure: Closure, buffers: Buffers) -> tuple[Tensor, str | None]:
        """Run the closure and move the parameters; returns the loss before the step, and None.

        A step that must not be taken moves nothing, and its reason is returned in place of None.
        buffers: a snapshot from before the run.
        """
        raise NotImplementedError

    # -- a step --------------------------------------------------------------------------------------------

    def step(self, closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """Run the closure, move every parameter, and return the loss before the step."""
        return self._guarded(closure, self._attempt)

    def _guarded(self, closure: Closure | None, attempt: Attempt) -> Tensor:
        """Attempt a step and return the loss; roll back where it is skipped or raises."""
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
            loss, where = attempt(closure, buffers)
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
        return loss

    def _ours(self, p: Tensor) -> bool:
        """Whether a parameter is in one of this optimizer's groups."""
        return id(p) in self._group_at

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

        Raises BadInput where the saved groups hold other parameters.
        """
        saved = {k: v for k, v in state_dict.items() if k != "skipped"}
        super().load_state_dict({**saved, "param_groups": self._in_our_order(saved["param_groups"])})
        self.skipped = state_dict.get("skipped", 0)

    def _in_our_order(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved groups with their parameters in this optimizer's order."""
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
