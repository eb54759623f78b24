"""RMSProp as TensorFlow 1 defines it, the local optimizer of the published LocoProp runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import BadInput

__all__ = ["RMSPropStep", "TFRMSProp", "tf_rmsprop_update"]

# Elements a slice of the in-place update holds. Beyond it the four operands and the scratch of a slice
# leave the cache between two of the seven kernels; below it the calls cost more than the arithmetic.
SLICE = 1 << 18
MOST = 2.0**8  # by which state is held larger than it is: less of the type's range is left


def tf_rmsprop_update(
    param: Tensor, grad: Tensor, mean_square: Tensor, momentum_buffer: Tensor,
    lr: float, decay: float, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One step of TensorFlow 1's RMSProp, as a pure function; returns (param, mean_square, momentum_buffer).

        ms ← decay·ms + (1 − decay)·g²        m ← momentum·m + lr·g/√(ms + eps)        w ← w − m

    All four tensors have one shape. Unlike `torch.optim.RMSprop`, `ms` starts at 1, `eps` stands inside
    the root, and `lr` inside the momentum buffer, so that a change of `lr` acts on new gradients only.
    Source: Tieleman and Hinton (2012), in the form of TensorFlow 1's `ApplyRMSProp`.
    """
    mean_square = decay * mean_square + (1 - decay) * grad.square()
    momentum_buffer = momentum * momentum_buffer + lr * grad / (mean_square + eps).sqrt()
    return param - momentum_buffer, mean_square, momentum_buffer


class _Numbers(NamedTuple):
    """The settings of a parameter group."""

    lr: float
    decay: float
    momentum: float
    eps: float


def _numbers(group: Mapping[str, Any]) -> _Numbers:
    return _Numbers(group["lr"], group["decay"], group["momentum"], group["eps"])


class _Factors(NamedTuple):
    """The numbers of an update that no schedule changes, as tensors where torch would make one at every call."""

    decay: Tensor
    rest: float
    eps: Tensor
    momentum: Tensor


def _factors(numbers: _Numbers) -> _Factors:
    return _Factors(_scalar(numbers.decay), 1 - numbers.decay, _scalar(numbers.eps), _scalar(numbers.momentum))


_Held = tuple[Tensor, Tensor, Tensor]  # a parameter with its mean square and its momentum buffer


class RMSPropStep:
    """A step of one optimizer, taken when it is called. move: takes parameters of equal numbers.

    small: by group, the parameters with their scratch, where all are small ones on the CPU; else None. Of their numbers
    the rate alone is read at every step, the others once.
    taken: t, where `TFRMSProp.together` holds the state as ms/decay^t and m/momentum^t, until `TFRMSProp.settle`; at
    most `longest`, 0 on the CPU.
    """

    def __init__(
        self, move: Callable[[list[_Held], _Numbers], None], groups: list[tuple[dict[str, Any], list[_Held]]],
        small: list[list[tuple[_Held, Tensor]]] | None,
    ) -> None:  # fmt: skip
        self.move, self._groups = move, groups
        self._apart = all(held[0].device.type == "cpu" for _, some in groups for held in some)  # no launches to save
        self.taken = 0
        self.longest = 0 if self._apart else min((_longest(_numbers(group)) for group, _ in groups), default=0)
        self._small = None if small is None else [
            (group, _factors(_numbers(group)), some) for (group, _), some in zip(groups, small, strict=True)
        ]  # fmt: skip

    def alike(self) -> dict[_Numbers, list[_Held]]:
        """What moves, by the present numbers."""
        found: dict[_Numbers, list[_Held]] = {}
        for group, some in self._groups:
            numbers = _numbers(group)
            found[numbers] = [*found[numbers], *some] if numbers in found else some
        return found

    def __call__(self) -> None:
        """Take the step."""
        if self._small is not None:
            for group, factors, each in self._small:
                lr = group["lr"]
                for held, root in each:
                    _update(held, held[0].grad, root, lr, factors)  # type: ignore[arg-type]
        elif self._apart:
            for group, some in self._groups:
                self.move(some, _numbers(group))
        else:
            for numbers, some in self.alike().items():
                self.move(some, numbers)


class TFRMSProp(torch.optim.Optimizer):
    """TensorFlow 1's RMSProp; defaults are LocoProp's published local optimizer.

    The update is `tf_rmsprop_update`, in place; but a group whose lr is 0 stands still, as with every optimizer of
    `torch.optim`, while its state advances (TensorFlow's goes on by its momentum). On the CPU the update runs in
    slices that stay in the cache: each parameter then costs 28 bytes of memory traffic in float32 (read g; read and
    write ms, m, w) where seven kernels over whole tensors cost 72. On other devices all tensors of a group go through
    `torch._foreach_*` kernels. State: `mean_square` (starts at 1) and `momentum_buffer` (starts at 0).
    Raises BadInput for a negative lr or eps, or a decay or momentum outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        decay: float = 0.9,
        momentum: float = 0.999,
        eps: float = 1e-5,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and 0 <= decay < 1 and 0 <= momentum < 1):
            raise BadInput(
                f"TFRMSProp(lr={lr}, decay={decay}, momentum={momentum}, eps={eps}): lr and eps must be "
                "at least 0, decay and momentum in [0, 1)"
            )
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps})
        self._roots: dict[int, Tensor] = {}

    def state_of(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """The mean square and the momentum buffer of a parameter, made where it has none yet."""
        if p.grad is not None and p.grad.is_sparse:
            raise BadInput("TFRMSProp got a sparse gradient: it moves every element at every step; use grad.to_dense()")
        state = self.state[p]
        if not state:
            state["mean_square"] = torch.ones_like(p)
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["mean_square"], state["momentum_buffer"]

    def _root(self, p: Tensor) -> Tensor:
        """Scratch for a slice of a parameter (in its shape, if it is one slice), shared by all parameters."""
        root = self._roots.get(id(p))
        if root is None or root.dtype != p.dtype:
            most = max(q.numel() for group in self.param_groups for q in group["params"])
            shared = next((r for r in self._roots.values() if r.dtype == p.dtype), None)
            if shared is None or shared.untyped_storage().nbytes() < min(SLICE, most) * p.element_size():
                shared = torch.empty(min(SLICE, most), dtype=p.dtype)
            size = min(SLICE, p.numel())
            root = self._roots[id(p)] = shared.as_strided((size,), (1,), 0).view(p.shape if size == p.numel() else -1)
        return root

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Move every parameter that has a gradient; returns the closure's loss, if a closure is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.ready()()
        return loss

    def ready(self) -> RMSPropStep:
        """A step without torch's hooks.

        Call it under no_grad, with gradients on the same parameters in the same groups each time.
        """
        found = [(group, [(p, *self.state_of(p)) for p in group["params"] if p.grad is not None])
                 for group in self.param_groups]  # fmt: skip
        small = all(p.device.type == "cpu" and p.numel() <= SLICE for _, some in found for p, *_ in some)
        roots = [[(held, self._root(held[0])) for held in some] for _, some in found] if small else None
        return RMSPropStep(self._move, found, roots)

    @staticmethod
    def together(steps: Sequence[RMSPropStep]) -> None:
        """Take steps of several optimizers, in a few launches where their numbers are equal.

        On an accelerator their state is another until `settle`: five launches at a step then do for seven.
        """
        TFRMSProp.settle([step for step in steps if step.taken and step.taken == step.longest])
        alike: dict[tuple[_Numbers, int], list[_Held]] = {}
        for step in steps:
            step.taken += step.longest > 1
            for numbers, some in step.alike().items():
                alike[numbers, step.taken] = [*alike.get((numbers, step.taken), ()), *some]
        for (numbers, taken), some in alike.items():
            if taken:
                _update_scaled(some, numbers, taken)
            else:
                steps[0].move(some, numbers)

    @staticmethod
    @torch.no_grad()
    def settle(steps: Sequence[RMSPropStep]) -> None:
        """Hold the state as it is again, after steps by `together`."""
        alike: dict[tuple[float, float], list[_Held]] = {}
        for step in steps:
            for numbers, some in step.alike().items() if step.taken else ():
                factors = numbers.decay**step.taken, numbers.momentum**step.taken
                alike[factors] = [*alike.get(factors, ()), *some]
            step.taken = 0
        for (decay, momentum), some in alike.items():
            _, squares, buffers = (list(column) for column in zip(*some, strict=True))
            torch._foreach_mul_(squares, decay)
            torch._foreach_mul_(buffers, momentum)

    def _move(self, some: list[_Held], numbers: _Numbers) -> None:
        whole: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for p, mean_square, momentum_buffer in some:
            assert p.grad is not None
            tensors = p, p.grad, mean_square, momentum_buffer
            if p.device.type != "cpu":
                whole.append(tensors)
            elif p.numel() <= SLICE:
                _update((p, mean_square, momentum_buffer), p.grad, self._root(p), numbers.lr, _factors(numbers))
            elif _sliceable(tensors):
                _update_in_slices(*tensors, self._root(p), numbers)
            else:
                whole.append(tensors)
        if whole:
            _update_foreach(whole, numbers)


def _sliceable(tensors: tuple[Tensor, ...]) -> bool:
    # Any dense layout serves if the four agree: slices then read memory in order.
    strides = tensors[0].stride()
    agree = all(t.stride() == strides and t.dtype == tensors[0].dtype and not t.is_complex() for t in tensors)
    return agree and _dense(tensors[0])


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.dim() == 2 and t.t().is_contiguous())


def _flat(t: Tensor) -> Tensor:
    return (t if t.is_contiguous() else t.t()).view(-1)


def _update_in_slices(
    param: Tensor, grad: Tensor, mean_square: Tensor, momentum_buffer: Tensor, root: Tensor, numbers: _Numbers
) -> None:
    pieces = (_flat(t).split(SLICE) for t in (param, grad, mean_square, momentum_buffer))
    factors = _factors(numbers)
    for w, g, ms, m in zip(*pieces, strict=True):
        _update((w, ms, m), g, root[: w.numel()], numbers.lr, factors)


def _update(held: _Held, grad: Tensor, root: Tensor, lr: float, factors: _Factors) -> None:
    param, mean_square, momentum_buffer = held
    decay, rest, eps, momentum = factors
    mean_square.mul_(decay).addcmul_(grad, grad, value=rest)
    torch.add(mean_square, eps, out=root).rsqrt_()  # a product costs less than a division
    momentum_buffer.mul_(momentum).addcmul_(grad, root, value=lr)
    if lr:
        param.sub_(momentum_buffer)


@lru_cache(maxsize=64)
def _scalar(value: float) -> Tensor:
    """A number as a tensor: torch takes 2 µs to make one of a number, more than a small layer's kernel."""
    return torch.tensor(value, dtype=torch.float64)


def _longest(numbers: _Numbers) -> int:
    """The number of steps after which neither state is held more than `MOST` times too large."""
    least = min(numbers.decay, numbers.momentum)
    return int(math.log(MOST) / -math.log(least)) if least else 0


def _update_scaled(some: list[_Held], numbers: _Numbers, taken: int) -> None:
    """The step number `taken` of a state that is held as ms/decay^t and m/momentum^t: t grows by one."""
    lr, decay, momentum, eps = numbers
    params, squares, buffers = (list(column) for column in zip(*some, strict=True))
    grads, scale, held = [p.grad for p in params], decay**-taken, momentum**taken
    torch._foreach_addcmul_(squares, grads, grads, value=(1 - decay) * scale)
    roots = torch._foreach_add(squares, eps * scale)
    torch._foreach_rsqrt_(roots)
    torch._foreach_addcmul_(buffers, grads, roots, value=lr * math.sqrt(scale) / held)
    if lr:
        torch._foreach_sub_(params, buffers, alpha=held)


def _update_foreach(tensors: list[tuple[Tensor, Tensor, Tensor, Tensor]], numbers: _Numbers) -> None:
    lr, decay, momentum, eps = numbers
    params, grads, squares, buffers = (list(column) for column in zip(*tensors, strict=True))
    torch._foreach_mul_(squares, decay)
    torch._foreach_addcmul_(squares, grads, grads, value=1 - decay)
    roots = torch._foreach_add(squares, eps)
    torch._foreach_rsqrt_(roots)
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_addcmul_(buffers, grads, roots, value=lr)
    if lr:
        torch._foreach_sub_(params, buffers)
