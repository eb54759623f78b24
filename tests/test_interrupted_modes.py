"""Ctrl-C inside torch's own code that enters and leaves modes: ours do nothing after it, and the next step works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

import layerwise as lw

# Where modes, and what switches gradients on and off, are entered and left.
_FILES = ("torch/overrides.py", "_python_dispatch.py", "contextlib.py", "grad_mode.py", "hooks.py", "tape/modes.py")


class _Interrupt:
    """Raises KeyboardInterrupt in front of an instruction in these files, and counts them."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.seen, self.place = at, 0, ""

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(_FILES):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.seen += 1
            if self.seen == self.at:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self) -> _Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(None)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


X, Y = torch.linspace(-1, 1, 12).view(4, 3), torch.tensor([0, 1, 2, 0])


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def observed(*quantities: Any) -> Callable[[nn.Module, Any], Any]:
    def run(model: nn.Module, _: Any) -> list[Tensor]:
        with lw.observe(model, *quantities) as seen:
            loss(model).backward()
        return list(seen.grad.values())

    return run


def watched(model: nn.Module, opt: Any) -> Any:
    opt.zero_grad()
    with opt.watch():
        loss(model).backward()
    return opt.step()


def in_front(model: nn.Module, pre: Any) -> Any:
    model.zero_grad()
    with pre.watch():
        loss(model).backward()
    pre.step()
    return [p.grad for p in model.parameters()]


def closed(model: nn.Module, opt: Any) -> Any:
    return opt.step(lambda: loss(model))


def monitored(model: nn.Module, monitor: Any) -> Any:
    model.zero_grad()
    with monitor.step():
        loss(model).backward()
    return [p.grad for p in model.parameters()]


Run = Callable[[nn.Module, Any], Any]
CASES: dict[str, tuple[Callable[[nn.Module], Any], Run]] = {
    "observe": (lambda m: None, observed(lw.Variance())),
    "observe, twice": (lambda m: None, observed(lw.DiagHessian())),
    "K-FAC, watch": (lambda m: lw.optim.KFAC(m, kind="kflr"), watched),
    "K-FAC, watch, counts alone": (lambda m: lw.optim.KFAC(m, kind="kflr", update_factors_every=100), watched),
    "K-FAC": (lambda m: lw.optim.KFAC(m, kind="kflr"), closed),
    "DiagNewton, watch": (lambda m: lw.optim.DiagNewton(m, draws=None), watched),
    "LocoProp, watch": (lw.LocoProp, watched),
    "LocoProp": (lw.LocoProp, closed),
    "AltMin": (lw.AltMin, closed),
    "Preconditioner": (lambda m: lw.optim.Preconditioner(m, "kflr"), in_front),
    "Monitor": (lambda m: lw.monitor.Monitor(m, lw.monitor.History()), monitored),
}
_WARM = 2


def started(name: str) -> tuple[nn.Module, Any]:
    make, run = CASES[name]
    model = net()
    opt = make(model)
    for _ in range(_WARM):
        run(model, opt)
    model.zero_grad()
    return model, opt


def left_over(model: nn.Module) -> bool:
    """Whether a hook, a mode that does anything, or gradients that are off, stayed behind."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    everywhere = torch.nn.modules.module
    hooks += [*everywhere._global_forward_hooks.values(), *everywhere._global_forward_pre_hooks.values()]
    modes = [m for m in _get_current_function_mode_stack() if not getattr(m, "ended", False)]
    modes += [m for m in _get_current_dispatch_mode_stack() if not getattr(m, "ended", False)]
    return bool(hooks or modes) or not torch.is_grad_enabled() or not torch._C._is_torch_function_enabled()


def tried(name: str, most: int | None = None) -> tuple[int, list[str]]:
    """The number of interrupts, at most so many, evenly spread, and where one did harm."""
    run = CASES[name][1]
    model, opt = started(name)
    with _Interrupt() as total:
        wanted = run(model, opt)
    after = [p.detach().clone() for p in model.parameters()]
    count, harm = 0, list[str]()
    for place in range(1, total.seen + 1, 1 if most is None else -(-total.seen // most)):
        model, opt = started(name)
        before = [p.detach().clone() for p in model.parameters()]
        interrupt = _Interrupt(place)
        try:
            with interrupt:
                run(model, opt)
        except KeyboardInterrupt:
            count += 1

        if left_over(model):
            harm.append(f"{place} left over: {interrupt.place} {_get_current_function_mode_stack()}")
            torch.nn.modules.module._global_forward_hooks.clear()
            torch.nn.modules.module._global_forward_pre_hooks.clear()
            torch.set_grad_enabled(True)
        now = [p.detach() for p in model.parameters()]
        if all(map(torch.equal, now, before)):  # not made
            try:
                found = run(model, opt)
            except Exception as error:
                harm.append(f"{place} no step: {interrupt.place} {error!r}")
                torch.set_grad_enabled(True)
                continue
            same = [p.detach() for p in model.parameters()]
            if not (torch.equal(_flat(found), _flat(wanted)) and all(map(torch.equal, same, after))):
                harm.append(f"{place} another step: {interrupt.place}")
        elif not all(map(torch.equal, now, after)):
            harm.append(f"{place} a half step: {interrupt.place}")
        with lw.observe(model, lw.SecondMoment()):
            pass
        if _get_current_function_mode_stack() or _get_current_dispatch_mode_stack() or is_in_torch_dispatch_mode():
            harm.append(f"{place} still a mode: {interrupt.place}")
    return count, harm


def _flat(found: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in (found if isinstance(found, list) else [found])])


@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_where_modes_begin_and_end_leaves_nothing_that_acts(name: str) -> None:
    count, harm = tried(name, 60)
    assert count >= 10 and not harm, harm


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_interrupt_where_modes_begin_and_end_leaves_nothing_that_acts(name: str) -> None:
    _, harm = tried(name)
    assert not harm, harm
