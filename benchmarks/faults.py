"""Faults injected into steps: whatever raises, a step is whole or has not happened.

    python -m benchmarks.faults [--lines] [--every 1]

Each operation of a step (or, with --lines, each line of the library's code) raises in turn, as out of memory or Ctrl-C
would. Survived: parameters, buffers, the optimizer's state and settings, and the generators are afterwards those of
before the step, or of after a whole one; no mode and no hook is left; and the next step gives the bits that it gives
without the fault.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from linecache import getline
from multiprocessing import parent_process
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import layerwise as lw

__all__ = ["OPTIMIZERS", "Counted", "Lines", "count", "left_over", "tried", "tried_in_workers"]

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "LocoProp": lambda m: lw.LocoProp(m),
    "LocoProp S": lambda m: lw.LocoProp(m, preset="S"),
    "LocoProp, 2 threads": lambda m: lw.LocoProp(m, workers=2),
    "LocoProp, in turn": lambda m: lw.LocoProp(m, order="input_to_output"),
    "LocoProp, into .grad": lambda m: lw.LocoProp(m, write="grad"),
    "LocoProp, elastic": lambda m: lw.LocoProp(m, regularizer=lw.local.Elastic(0.1)),
    "AltMin adam": lambda m: lw.AltMin(m),
    "AltMin sgd": lambda m: lw.AltMin(m, weights="sgd"),
    "AltMin memory": lambda m: lw.AltMin(m, weights="memory", codes="jacobi", coupling=0.1),
    "AltMin sweep": lambda m: lw.AltMin(m, codes="sweep"),
    "AltMin sweep, repeated": lambda m: lw.AltMin(m, codes="sweep", repeats=2, multipliers=True),
    "AltMin async": lambda m: lw.AltMin(m, schedule="async"),
    "K-FAC": lambda m: lw.optim.KFAC(m, update_factors_every=1, weight_decay=0.1),
    "K-FAC quadratic": lambda m: lw.optim.KFAC(m, update_factors_every=1, step_size="quadratic", adapt_damping_every=1),
    "EKFAC": lambda m: lw.optim.KFAC(m, kind="ekfac", update_factors_every=1),
    "DiagNewton": lambda m: lw.optim.DiagNewton(m, update_every=1),
}


WORKERS = "LocoProp, in a worker"


class Counted(NamedTuple):
    """How many faults were tried, and the places of those that were not survived."""

    tried: int
    failed: list[int]


class _Net(nn.Module):
    """Two layers with batch norm and dropout: buffers and random numbers are part of a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.c = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.dropout(self.b(self.norm(self.a(x)).tanh()).relu(), 0.2))


class _Operations(TorchDispatchMode):
    """Counts operations, and raises in place of one of them."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.at:
            raise MemoryError(f"at operation {self.at}")
        return func(*args, **(kwargs or {}))


class Lines(AbstractContextManager["Lines"]):
    """Counts the lines of the library that run, and raises KeyboardInterrupt in front of one of them.

    Lines of a `with` do not count: a trace is called there again before `__exit__`, which Python then leaves out.
    """

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        if "/layerwise/" not in frame.f_code.co_filename:
            return None
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._trace

    def __enter__(self) -> Lines:
        self._old = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.settrace(self._old)


def _closure(model: nn.Module, seed: int = 7) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    return lambda: F.cross_entropy(model(x), y)


def _everything(model: nn.Module, opt: Any) -> Any:
    """All that a step may change."""
    state = opt.state_dict()
    return copy.deepcopy((model.state_dict(), state, torch.get_rng_state(), random.getstate()))


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


def left_over(model: nn.Module) -> bool:
    """Whether a mode or a hook stayed behind."""
    hooks = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    modes = torch.overrides._get_current_function_mode_stack() or _get_current_dispatch_mode_stack()
    return bool(hooks or modes or not torch.is_grad_enabled())


def _start(make: Callable[[nn.Module], Any]) -> tuple[nn.Module, Any]:
    model = _Net()
    opt = make(model)
    for seed in range(2):
        opt.step(_closure(model, seed))
    return model, opt


@contextmanager
def _seeded() -> Iterator[None]:
    torch.manual_seed(11)
    random.seed(11)
    yield


class Fails(torch.optim.SGD):
    """A local optimizer that raises, or ends its process, in a worker at the layer whose weight has this many rows."""

    def __init__(self, params: Any, lr: float, rows: int, dies: bool) -> None:
        super().__init__(params, lr)
        self._rows, self._dies = rows, dies

    def step(self, closure: Any = None) -> Any:
        if parent_process() is not None and len(self.param_groups[0]["params"][0]) == self._rows:
            if self._dies:
                os._exit(1)
            raise MemoryError("in a worker process")
        return super().step(closure)


def tried_in_workers() -> Counted:
    """Let a worker process raise or end at each kind of layer in turn; the next step, without fault, is whole."""
    failed, places = [], [(rows, dies) for dies in (False, True) for rows in (5, 3)]
    for place, (rows, dies) in enumerate(places):
        model = _Net()
        local = partial(Fails, rows=rows, dies=dies)
        solver = lw.local.LocalSteps(optimizer=local)
        opt = lw.LocoProp(model, solver=solver, lr=0.1, workers=("process", 2))
        same = copy.deepcopy(model)
        plain = lw.LocoProp(same, solver=lw.local.LocalSteps(optimizer=torch.optim.SGD), lr=0.1)
        with _seeded():
            before, raised = _everything(model, opt), False
            try:
                opt.step(_closure(model))
            except (MemoryError, BrokenProcessPool):
                raised = True
            good = raised and _same(_everything(model, opt), before) and not left_over(model)
            local.keywords["rows"] = 0  # no layer's
            generators = torch.get_rng_state()
            opt.step(_closure(model))
            torch.set_rng_state(generators)
            plain.step(_closure(same))
        good &= _same(model.state_dict(), same.state_dict())
        if not good:
            failed.append(place + 1)
    return Counted(len(places), failed)


def count(make: Callable[[nn.Module], Any], lines: bool = False) -> int:
    """The number of places of a step at which something can raise."""
    model, opt = copy.deepcopy(_start(make))
    fault = Lines(0) if lines else _Operations(0)
    with _seeded(), fault:
        opt.step(_closure(model))
    return fault.seen


def tried(make: Callable[[nn.Module], Any], lines: bool = False, every: int = 1, first: int = 1) -> Counted:
    """Raise at each place of a step in turn, or at every so many."""
    start = _start(make)
    whole = copy.deepcopy(start)
    with _seeded():
        before = _everything(*start)
        whole[1].step(_closure(whole[0]))
    after = _everything(*whole)
    whole[1].step(_closure(whole[0], 8))
    later = _everything(*whole)
    places = range(first, count(make, lines) + 1, every)
    failed = []
    for place in places:
        model, opt = copy.deepcopy(start)
        with _seeded():
            try:
                with Lines(place) if lines else _Operations(place):
                    opt.step(_closure(model))
            except (MemoryError, KeyboardInterrupt):
                pass
            now = _everything(model, opt)
            good = (_same(now, before) or _same(now, after)) and not left_over(model)
            if good and _same(now, before):  # what is remembered beside the state does no harm, either
                opt.step(_closure(model))
            opt.step(_closure(model, 8))
            good &= _same(_everything(model, opt), later)
        if not good:
            failed.append(place)
    return Counted(len(places), failed)


def main() -> None:
    """Print the table of faults tried and survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", action="store_true", help="interrupt the library's lines, not its operations")
    parser.add_argument("--every", type=int, default=1, help="try every so many places only")
    parser.add_argument("--only", default="", help="optimizers whose name holds this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    total = survived = 0
    print(f"{'optimizer':28}{'tried':>8}{'survived':>10}")
    for name, make in OPTIMIZERS.items():
        if given.only in name:
            found = tried(make, given.lines, given.every)
            good = found.tried - len(found.failed)
            total, survived = total + found.tried, survived + good
            print(f"{name:28}{found.tried:8}{good:10}  {found.failed[:12] or ''}", flush=True)
    if given.only in WORKERS:
        found = tried_in_workers()
        good = found.tried - len(found.failed)
        total, survived = total + found.tried, survived + good
        print(f"{WORKERS:28}{found.tried:8}{good:10}  {found.failed[:12] or ''}", flush=True)
    print(f"{'all':28}{total:8}{survived:10}")


if __name__ == "__main__":
    main()
