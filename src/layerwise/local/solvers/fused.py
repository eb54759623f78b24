"""torch's fused Adam and SGD without the overhead around their kernels, which exceeds a small layer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["FusedAdam", "FusedSGD"]


class _Fused(torch.optim.Optimizer):
    """An optimizer whose `ready()` has the bits of `step()`, for dense parameters of one type on one device."""

    _kept: tuple[str, ...]
    _shared: tuple[str, ...]

    def ready(self) -> Callable[[], None]:
        """A step without torch's hooks; the first one, which makes the state, goes through `step`.

        Call it under no_grad, with gradients on the same parameters in the same groups each time.
        """
        found: list[tuple[dict[str, Any], list[Tensor], list[list[Tensor]]]] = []

        def advance() -> None:
            if not found and not self._has_state():
                self.step()
                return
            if not found:
                found.extend((group, some, self._state_of(some)) for group, some in self._alike())
            for group, some, kept in found:
                self._kernel(some, [p.grad for p in some], kept, group)

        return advance

    def _has_state(self) -> bool:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        states = [self.state.get(p, {}) for p in params]
        return all(state.get(key) is not None for state in states for key in self._kept)

    def _state_of(self, params: list[Tensor]) -> list[list[Tensor]]:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            for key in self._kept:  # a saved or an older state may count steps on the CPU
                if state[key].device != p.device:
                    state[key] = state[key].to(p.device)
        return [[state[key] for state in states] for key in self._kept]

    def _alike(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Parameters with a gradient, grouped by equal settings."""
        found: list[tuple[dict[str, Any], list[Tensor]]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for other, some in found:
                if all(other[key] == group[key] for key in self._shared):
                    some += params
                    break
            else:
                found.append((group, params))
        return iter((group, params) for group, params in found if params)

    def _kernel(self, params: list[Tensor], grads: list[Any], kept: list[list[Tensor]], group: dict[str, Any]) -> None:
        raise NotImplementedError


class FusedAdam(_Fused, torch.optim.Adam):
    """`torch.optim.Adam(fused=True)`, with `ready`."""

    _kept = ("exp_avg", "exp_avg_sq", "step")
    _shared = ("lr", "betas", "eps", "weight_decay", "maximize")

    def _kernel(self, params: list[Tensor], grads: list[Any], kept: list[list[Tensor]], group: dict[str, Any]) -> None:
        mean, square, steps = kept
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        torch._fused_adam_(
            params, grads, mean, square, [], steps, amsgrad=False, lr=group["lr"], beta1=beta1, beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"], grad_scale=None,
            found_inf=None,
        )  # fmt: skip


class FusedSGD(_Fused, torch.optim.SGD):
    """`torch.optim.SGD(fused=True)`, with `ready`."""

    _kept = ("momentum_buffer",)
    _shared = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")

    def ready(self) -> Callable[[], None]:
        """As Adam's; without momentum there is no state, and `step` serves."""
        return super().ready() if all(group["momentum"] for group in self.param_groups) else self.step

    def _kernel(self, params: list[Tensor], grads: list[Any], kept: list[list[Tensor]], group: dict[str, Any]) -> None:
        torch._fused_sgd_(
            params, grads, kept[0], weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"],
            dampening=group["dampening"], nesterov=group["nesterov"], maximize=group["maximize"], is_first_step=False,
            grad_scale=None, found_inf=None,
        )  # fmt: skip
