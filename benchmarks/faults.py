"""Faults injected into steps: whatever raises, a step is whole or has not happened.

    python -m benchmarks.faults [--every 31] [--lines 400]

Operations of a step raise in turn (and with --lines Ctrl-C comes in front of lines of the library's code), as out of
memory would; also in one of two ranks, while the other one waits, and in passes that `opt.watch()` records.
Survived: parameters, buffers, the optimizer's state and settings, and the generators are afterwards those of
before the step, or of after a whole one; no mode and no hook is left; and the next step gives the bits that it gives
without the fault.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from linecache import getline
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import layerwise as lw

__all__ = [
    "OPTIMIZERS", "RANKS", "WATCHED", "Counted", "Lines", "Operations", "left_over", "same", "tried", "tried_in_rank",
    "tried_in_workers", "watched",
]  # fmt: skip

_EVERY_STEP: dict[str, Any] = {"update_factors_every": 1, "update_inverses_every": 1}
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
    "AltMin adam, repeated": lambda m: lw.AltMin(m, repeats=2, regularizer=lw.local.Elastic(0.1)),
    "AltMin async": lambda m: lw.AltMin(m, schedule="async"),
    "K-FAC": lambda m: lw.optim.KFAC(m, **_EVERY_STEP, weight_decay=0.1),
    "K-FAC quadratic": lambda m: lw.optim.KFAC(m, **_EVERY_STEP, step_size="quadratic", adapt_damping_every=1),
    "EKFAC": lambda m: lw.optim.KFAC(m, kind="ekfac", **_EVERY_STEP),
    "DiagNewton": lambda m: lw.optim.DiagNewton(m, update_every=1),
}


RESULTS = Path(__file__).parent / "results"
WORKERS = "LocoProp, in a worker"
Batch = tuple[Tensor, Tensor]
Step = Callable[[nn.Module, Any, Batch], Any]  # of a model and its optimizer


def by_closure(model: nn.Module, opt: Any, batch: Batch) -> Any:
    """A step with a closure."""
    return opt.step(lambda: F.cross_entropy(model(batch[0]), batch[1]))


def watched(model: nn.Module, opt: Any, batch: Batch) -> Any:
    """A step from the passes of a trainer, which drops its gradients."""
    try:
        with opt.watch():
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        return opt.step()
    finally:
        opt.zero_grad()


# Optimizers that also step from the passes of a trainer.
WATCHED = ("LocoProp", "LocoProp, 2 threads", "LocoProp, into .grad", "K-FAC", "EKFAC", "DiagNewton")

# Two ranks, one of which fails: how each makes its optimizer, and makes a step.
RANKS: dict[str, tuple[Callable[[nn.Module], Any], Step]] = {
    "LocoProp": (lambda m: lw.LocoProp(m, parallel=True), by_closure),
    "LocoProp, into .grad": (lambda m: lw.LocoProp(m, parallel=True, write="grad"), by_closure),
    "LocoProp, watched": (lambda m: lw.LocoProp(m, parallel=True), watched),
    "AltMin adam": (lambda m: lw.AltMin(m, parallel=True), by_closure),
    "AltMin adam, repeated": (
        lambda m: lw.AltMin(m, repeats=2, regularizer=lw.local.Elastic(0.1), parallel=True),
        by_closure,
    ),
    "AltMin sweep, repeated": (lambda m: lw.AltMin(m, codes="sweep", repeats=2, parallel=True), by_closure),
    "K-FAC": (lambda m: _kfac(m, "inverses"), by_closure),
    "K-FAC, owners only": (lambda m: _kfac(m, "updates"), by_closure),
    "K-FAC, watched": (lambda m: _kfac(m, "inverses"), watched),
    "Pipeline": (lambda m: lw.distributed.Pipeline(m), lambda m, opt, batch: _staged(opt, *batch)),
}


def _kfac(model: nn.Module, share: Any) -> Any:
    return lw.optim.KFAC(model, update_factors_every=1, parallel=lw.optim.DataParallel(share=share))


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)


def _staged(opt: Any, x: Tensor, y: Tensor) -> Any:
    return opt.step(x, lambda out: F.cross_entropy(out, y))


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


class Operations(TorchDispatchMode):
    """Counts operations, and raises in place of one of them."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "profiler" or _in_message():  # the profiler's stand around torch's `Optimizer.step`
            return func(*args, **(kwargs or {}))
        self.seen += 1
        if self.seen == self.at:
            raise torch.OutOfMemoryError(f"at operation {self.at}")
        return func(*args, **(kwargs or {}))


def _in_message() -> bool:
    """Whether torch.distributed is at work: a message that is not sent is a lost rank, and ends the run."""
    frame: Any = sys._getframe(2)
    for _ in range(12):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith("distributed_c10d.py"):
            return True
        frame = frame.f_back
    return False


@cache
def _is_with(file: str, line: int) -> bool:
    return getline(file, line).lstrip().startswith("with ")


class Lines(AbstractContextManager["Lines"]):
    """Counts the lines of the library that run, and raises KeyboardInterrupt in front of one of them.

    within: a part of the paths of the files whose lines count.
    Lines of a `with` do not count: a trace is called there again before `__exit__`, which Python then leaves out.
    """

    def __init__(self, at: int, within: str = "/layerwise/") -> None:
        self.at, self.seen, self.within = at, 0, within

    def _trace(self, frame: Any, event: str, arg: Any) -> Any:
        if self.within not in frame.f_code.co_filename:
            return None
        if event == "line" and not _is_with(frame.f_code.co_filename, frame.f_lineno):
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
    x, y = _batch(seed)
    return lambda: F.cross_entropy(model(x), y)


def _everything(model: nn.Module, opt: Any) -> Any:
    """All that a step may change."""
    state = opt.state_dict()
    return copy.deepcopy((model.state_dict(), state, torch.get_rng_state(), random.getstate()))


def _compared(step: Step, everything: Any) -> Any:
    """What a step must leave whole; buffers and generators have moved in a trainer's own passes."""
    if step is not watched:
        return everything
    weights, state, *_ = everything
    return {name: t for name, t in weights.items() if "running" not in name and "tracked" not in name}, state


def same(one: Any, two: Any) -> bool:
    """Whether two states are equal, tensors bitwise."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def left_over(model: nn.Module) -> bool:
    """Whether a mode or a hook stayed behind."""
    hooks = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    modes = torch.overrides._get_current_function_mode_stack() or _get_current_dispatch_mode_stack()
    return bool(hooks or modes or not torch.is_grad_enabled())


def _start(make: Callable[[nn.Module], Any], step: Step) -> tuple[nn.Module, Any]:
    model = _Net()
    opt = make(model)
    for seed in range(2):
        step(model, opt, _batch(seed))
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
        twin = copy.deepcopy(model)
        plain = lw.LocoProp(twin, solver=lw.local.LocalSteps(optimizer=torch.optim.SGD), lr=0.1)
        with _seeded():
            before, raised = _everything(model, opt), False
            try:
                opt.step(_closure(model))
            except (MemoryError, BrokenProcessPool):
                raised = True
            good = raised and same(_everything(model, opt), before) and not left_over(model)
            local.keywords["rows"] = 0  # no layer's
            generators = torch.get_rng_state()
            opt.step(_closure(model))
            torch.set_rng_state(generators)
            plain.step(_closure(twin))
        good &= same(model.state_dict(), twin.state_dict())
        if not good:
            failed.append(place + 1)
    return Counted(len(places), failed)


def tried(
    make: Callable[[nn.Module], Any],
    lines: bool = False,
    every: int = 1,
    first: int = 1,
    step: Step = by_closure,
    most: int | None = None,
) -> Counted:
    """Raise at each place of a step in turn, or at every so many.

    first: the first place; below 0, so many before the last one. most: about how many places, in place of every so
    many.
    """
    start, batch = _start(make, step), _batch(7)
    whole = copy.deepcopy(start)
    counting = Lines(0) if lines else Operations(0)
    with _seeded():
        before = _everything(*start)
        with counting:
            step(*whole, batch)
    after = _everything(*whole)
    step(*whole, _batch(8))
    later = _everything(*whole)
    first = first if first > 0 else counting.seen + first
    places = range(first, counting.seen + 1, every if most is None else max(1, counting.seen // most))
    failed = []
    for place in places:
        model, opt = copy.deepcopy(start)
        with _seeded():
            try:
                with Lines(place) if lines else Operations(place):
                    step(model, opt, batch)
            except (torch.OutOfMemoryError, KeyboardInterrupt):
                if step is watched:
                    opt.zero_grad()  # which the fault may have cut short: nobody goes on with old gradients
            found = _everything(model, opt)
            now, old, new = (_compared(step, at) for at in (found, before, after))
            good = (same(now, old) or same(now, new)) and not left_over(model)
            if good and same(now, old):  # what is remembered beside the state does no harm, either
                if step is watched:
                    _restored(model, opt, before)
                step(model, opt, _batch(7))
            step(model, opt, _batch(8))
            good &= same(_everything(model, opt), later)
        if not good:
            failed.append(place)
    return Counted(len(places), failed)


# Ranks ------------------------------------------------------------------------------------------------------------


class _Chain(nn.Sequential):
    """As `_Net`, without random numbers, of which stages draw their own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def _restored(model: nn.Module, opt: Any, at: Any) -> None:
    """Put all that a step may change back."""
    weights, state, generators, python = copy.deepcopy(at)
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    torch.set_rng_state(generators)
    random.setstate(python)


def tried_in_rank(
    rank: int, name: str, failing: int, most: int | None = None, every: int = 1
) -> tuple[int, list[tuple[int, str]]]:
    """Let one rank of the group raise at places of a step in turn; how many, and what was not survived on this rank.

    most: about how many places, in place of every so many.

    Run by all ranks. Survived: both ranks are as before the step, or both as after it; the other one raised RankFailed
    or made the step; and both go on together with the bits of an undisturbed run.
    """
    make, step = RANKS[name]
    model: nn.Module = lw.distributed.split(_Chain(), 2)[rank] if name == "Pipeline" else _Net()
    opt = make(model)
    parts = name.startswith("K-FAC")  # ranks have their own parts of a batch
    first, second, third, fourth = (_batch(2 * seed + rank if parts else seed) for seed in range(4))
    step(model, opt, first)
    step(model, opt, second)
    before = _everything(model, opt)
    counting = Operations(0)
    with counting:
        step(model, opt, third)
    after = _everything(model, opt)
    step(model, opt, fourth)
    later = _everything(model, opt)
    counts: list[Any] = [None, None]
    dist.all_gather_object(counts, counting.seen)
    places = range(1, counts[failing] + 1, every if most is None else max(1, counts[failing] // most))
    failed = []
    for place in places:
        _restored(model, opt, before)
        said = "went on"
        try:
            with Operations(place if rank == failing else 0):
                step(model, opt, third)
        except (torch.OutOfMemoryError, lw.errors.RankFailed) as error:
            said = type(error).__name__
        now, old, new = (_compared(step, at) for at in (_everything(model, opt), before, after))
        found: list[Any] = [None, None]
        mine = "before" if same(now, old) else "after" if same(now, new) else "between"
        dist.all_gather_object(found, (mine, said))
        good = found[0][0] == found[1][0] != "between" and not left_over(model)
        if good:
            good = found[1 - failing][1] == ("RankFailed" if mine == "before" else "went on")
        if good and mine == "before":
            if step is watched:
                _restored(model, opt, before)
            step(model, opt, third)
        if good:
            step(model, opt, fourth)
            good = same(_everything(model, opt), later)
        if not good:
            failed.append((place, str(found)))
    return len(places), failed


class _Group:
    """Two processes of one group, which serve functions until they are stopped; one that hangs ends both."""

    def __init__(self, wait: float) -> None:
        self._wait = wait
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(2)]
        self._pipes = [here for here, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, f"{self._folder.name}/store", there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send(args)
        if not all(pipe.poll(self._wait) for pipe in self._pipes):
            self.stop()
            raise SystemExit(f"the ranks gave no answer within {self._wait} s at {args}")
        return [pipe.recv() for pipe in self._pipes]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    while True:
        name, failing, every = pipe.recv()
        torch.manual_seed(0)
        pipe.send(tried_in_rank(rank, name, failing, every=every))


def _of_ranks(every: int, only: str) -> Iterator[Row]:
    """The rows of two ranks, of which each fails in turn."""
    names = [name for name in RANKS if only in f"two ranks: {name}"]
    group = _Group(600) if names else None
    for name in names:
        assert group is not None
        for failing in range(2):
            (number, here), (_, there) = group(name, failing, every)
            failed = sorted({place for place, _ in (*here, *there)})
            yield Row(f"two ranks: {name}", f"operations of rank {failing}", number, failed)
    if group is not None:
        group.stop()


class Row(NamedTuple):
    """A row of the table."""

    name: str
    place: str
    tried: int
    failed: list[int]


def rows(every: int, lines: int | None, only: str) -> Iterator[Row]:
    """The rows of the table. every: of the operations; lines: of the library's lines, or None for none."""
    for name, make in OPTIMIZERS.items():
        if only not in name:
            continue
        for step, said in ((by_closure, name), (watched, f"{name}, watched")):
            if step is watched and name not in WATCHED:
                continue
            yield Row(said, "operations", *tried(make, False, every, step=step))
            if lines is not None:
                yield Row(said, "lines", *tried(make, True, lines, step=step))
    if only in WORKERS:
        yield Row(WORKERS, "the worker raises or dies", *tried_in_workers())
    yield from _of_ranks(every, only)


def table(found: Sequence[Row], every: int, lines: int | None) -> str:
    """The table as a page of Markdown."""
    said = "" if lines is None else f" --lines {lines}"
    text = ["# Faults tried and survived", "", f"One in {every} of the operations of a step raised in turn"
            + ("." if lines is None else f", and Ctrl-C came in front of one in {lines} of the library's lines.")
            + f" Written by `python -m benchmarks.faults --every {every}{said}`.", "",
            "| optimizer | what raised | tried | survived |", "| --- | --- | ---: | ---: |"]  # fmt: skip
    text += [f"| {row.name} | {row.place} | {row.tried} | {row.tried - len(row.failed)} |" for row in found]
    total = sum(row.tried for row in found)
    text.append(f"| all | | {total} | {total - sum(len(row.failed) for row in found)} |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Print the table of faults tried and survived, and write it where all optimizers were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, help="also interrupt every so many of the library's lines")
    parser.add_argument("--every", type=int, default=31, help="let every so many operations raise")
    parser.add_argument("--only", default="", help="optimizers whose name holds this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(given.every, given.lines, given.only):
        found.append(row)
        print(f"{row.name:34}{row.place:28}{row.tried:6}{row.tried - len(row.failed):6}  {row.failed[:12] or ''}",
              flush=True)  # fmt: skip
    if not given.only:
        (RESULTS / "faults.md").write_text(table(found, given.every, given.lines))


if __name__ == "__main__":
    main()
