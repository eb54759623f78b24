"""torch's fused Adam and SGD without the overhead around their kernels, which exceeds a small layer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.tensors import one_on

__all__ = ["FusedAdam", "FusedSGD"]


class _Batch(NamedTuple):
    """Parameters of equal settings, which one kernel moves, and their state by key.

    held: each parameter's state as it was when the batch was made.
    """

    group: dict[str, Any]
    params: list[Tensor]
    kept: list[list[Tensor]]
    held: list[tuple[Tensor, ...]]


class _Fused(torch.optim.Optimizer):
    """An optimizer whose `ready()` has the bits of `step()`, for dense parameters of one type on one device."""

    _kept: tuple[str, ...]
    _shared: tuple[str, ...]
    _batches: list[_Batch] | None = None  # of the last step

    def ready(self) -> Callable[[], None]:
        """A step without torch's hooks; the first one, which makes the state, goes through `step`.

        Call it under no_grad, with gradients on the same parameters in the same groups each time.
        """
        found = self._batches
        known = found is not None and self._stands(found)

        def advance() -> None:
            nonlocal found, known
            if not known:
                if not self._has_state():
                    self.step()
                    return
                self._batches = found = [self._batch(group, some) for group, some in self._alike()]
                known = True
            for group, params, kept, _ in found:  # type: ignore[union-attr]
                self._kernel(params, [p.grad for p in params], kept, group)

        return advance

    def _stands(self, batches: list[_Batch]) -> bool:
        """Whether the batches are still those that there would be: the same parameters, state and equal settings."""
        mine = [group for group in self.param_groups for p in group["params"] if p.grad is not None]
        if len(mine) != sum(len(batch.params) for batch in batches):
            return False
        for _, params, _, held in batches:
            for p, tensors in zip(params, held, strict=True):
                own = self.state.get(p)
                if p.grad is None or own is None:
                    return False
                for key, t in zip(self._kept, tensors, strict=True):
                    if own.get(key) is not t:
                        return False
        if len(batches) == 1:
            first = batches[0].group
            return all(group is first or self._equal(group, first) for group in mine)
        return len(batches) == len(mine)

    def _equal(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        return [one[key] for key in self._shared] == [other[key] for key in self._shared]

    def _has_state(self) -> bool:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        states = [self.state.get(p, {}) for p in params]
        return all(state.get(key) is not None for state in states for key in self._kept)

    def _batch(self, group: dict[str, Any], params: list[Tensor]) -> _Batch:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            for key in self._kept:  # a saved or an older state may count steps on the CPU
                if state[key].device != p.device:
                    state[key] = state[key].to(p.device)
        held = [tuple(state[key] for key in self._kept) for state in states]
        return _Batch(group, params, [list(column) for column in zip(*held, strict=True)], held)

    def _alike(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Parameters with a gradient, grouped by equal settings."""
        found: list[tuple[dict[str, Any], list[Tensor]]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for other, some in found:
                if self._equal(other, group):
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
        if steps[0].device.type == "cpu":
            for step in steps:  # a call for the list costs more than one for each
                step.add_(one_on(step.device))
        else:
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
