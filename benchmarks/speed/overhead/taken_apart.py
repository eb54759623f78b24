"""What a step is made of: torch's calls by kind, their multiply-adds, bytes and CPU time, in plain steps.

    python -m benchmarks.speed.overhead.taken_apart [--rows kfac norms first parameters] [--repeats 3]

kfac: the first steps of K-FAC on ResNet-18. norms: squared norms of its per-sample gradients. first: the products that
the first observation of a layout sends, GPT. parameters: calls and objects for each of 1000 small parameters.
Multiply-adds are those of matrix products, convolutions and factorisations; bytes those of all tensors that calls read
and write, views left out. A plain step is the forward and the backward pass, with SGD's update for K-FAC. CPU times are
taken call by call, so that small ones count for more than they take; what no call of torch takes is "between calls".
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import layerwise as lw
from benchmarks import probe
from benchmarks.speed.first_steps import resnet18
from benchmarks.speed.larger import QUANTITIES, Many, observed_step, plain_step
from benchmarks.speed.overhead.bounds import multiply_adds_of
from benchmarks.speed.overhead.nets import NETS

__all__ = ["Cost", "taken_apart", "tracked"]

_KINDS = {
    "convolution": "convolutions", "convolution_backward": "convolutions",
    "mm": "products", "addmm": "products", "bmm": "products", "baddbmm": "products", "addbmm": "products",
    "linalg_cholesky_ex": "Cholesky factors, inverses", "cholesky_inverse": "Cholesky factors, inverses",
    "linalg_inv_ex": "Cholesky factors, inverses", "linalg_solve_triangular": "Cholesky factors, inverses",
    "im2col": "windows", "copy_": "copies", "clone": "copies", "_to_copy": "copies", "cat": "copies",
    "native_batch_norm": "norms, activations, pools", "native_batch_norm_backward": "norms, activations, pools",
    "relu": "norms, activations, pools", "relu_": "norms, activations, pools",
    "threshold_backward": "norms, activations, pools",
}  # fmt: skip


@dataclass
class Cost:
    """Of some calls."""

    calls: int = 0
    multiply_adds: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(
            self.calls + other.calls, self.multiply_adds + other.multiply_adds, self.bytes + other.bytes,
            self.seconds + other.seconds,
        )  # fmt: skip


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: defaultdict[str, Cost] = defaultdict(Cost)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        out = func(*args, **(kwargs or {}))
        seconds = time.process_time() - start
        name = func._overloadpacket.__name__
        moved = 0 if func.is_view else sum(map(_size, tree_leaves((args, kwargs, out))))
        cost = Cost(1, _factored(name, args) or multiply_adds_of(func, args, kwargs or {}, out), moved, seconds)
        self.found[_KINDS.get(name, "other calls")] += cost
        return out


def _size(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0


def _factored(name: str, args: Any) -> int:
    """Multiply-adds of a factorisation: n³/6 for Cholesky's factor, n³/3 for the inverse by it, n³ for one without."""
    if name in ("linalg_cholesky_ex", "cholesky_inverse", "linalg_inv_ex"):
        *batch, n, _ = args[0].shape
        each = {"linalg_cholesky_ex": n**3 // 6, "cholesky_inverse": n**3 // 3, "linalg_inv_ex": n**3}[name]
        return int(torch.Size(batch).numel() * each)
    if name == "linalg_solve_triangular":
        return int(args[1].numel() * args[0].shape[-1] // 2)
    return 0


def taken_apart(run: Callable[[], object]) -> dict[str, Cost]:
    """The cost of one run by kind of call; all of it is "all", and what no call takes "between calls"."""
    gc.collect()
    start = time.process_time()
    with _Calls() as calls:
        run()
    whole = time.process_time() - start
    found = dict(sorted(calls.found.items(), key=lambda item: -item[1].seconds))
    every = sum(found.values(), Cost())
    found["between calls"] = Cost(seconds=whole - every.seconds)
    return found | {"all": every + found["between calls"]}


# -- what is taken apart ------------------------------------------------------------------------------------

Found = tuple[str, dict[str, Cost], Cost]  # what, by kind, the plain step


def _images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(8, 3, 64, 64), torch.arange(8) % 10


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), y)


def kfac(repeats: int) -> Iterator[Found]:
    """The first three steps of K-FAC."""
    for _ in range(repeats):
        optimizer, plain = _optimizers(*_images())
        plain()
        for i in range(3):
            yield f"K-FAC's step {i + 1}", taken_apart(optimizer), taken_apart(plain)["all"]


def _optimizers(x: Tensor, y: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """A step of K-FAC, and one of SGD."""
    models = resnet18(), resnet18()
    optimizer, sgd = lw.optim.KFAC(models[0]), torch.optim.SGD(models[1].parameters(), 1e-3)
    plain = plain_step(models[1], _loss(models[1], x, y))

    def step() -> object:
        plain()
        return sgd.step()

    return lambda: optimizer.step(_loss(models[0], x, y)), step


def norms(repeats: int) -> Iterator[Found]:
    """Squared norms of ResNet-18's per-sample gradients, with autograd's gradients and with sums of rows."""
    model = resnet18()
    loss = _loss(model, *_images())
    plain = plain_step(model, loss)
    for _ in range(repeats):
        yield "plain step", taken_apart(plain), taken_apart(plain)["all"]
    for grad in ("autograd", "rows"):
        observed = observed_step(model, loss, QUANTITIES["norms"], grad)
        for _ in range(3):
            plain(), observed()
        for _ in range(repeats):
            yield f"norms, gradients by {grad}", taken_apart(observed), taken_apart(plain)["all"]


def first(repeats: int) -> Iterator[Found]:
    """The first and the second observation of a new GPT, two sequences."""
    for _ in range(repeats):
        torch.manual_seed(0)
        model = NETS["gpt"].make()
        loss = _loss(model, *NETS["gpt"].data(2))
        plain, observed = plain_step(model, loss), observed_step(model, loss, QUANTITIES["norms"], "autograd")
        plain()
        for what in ("first", "second"):
            yield f"GPT, norms, {what} call", taken_apart(observed), taken_apart(plain)["all"]


def parameters(count: int = 1000) -> Iterator[list[object]]:
    """Calls of Python and of torch, and the objects that its collector tracks, for each of many small parameters."""
    torch.manual_seed(0)
    model, x, y = Many(count), torch.randn(8, 16), torch.randn(8, count)

    def loss() -> Tensor:
        return F.mse_loss(model(x), y)

    runs = {"plain": plain_step(model, loss)}
    runs |= {what: observed_step(model, loss, QUANTITIES[what], "autograd") for what in ("nothing", "norms")}
    for what, run in runs.items():
        for _ in range(3):
            run()
        with cProfile.Profile() as profile:
            run()
        made = tracked(run)
        calls = pstats.Stats(profile).total_calls, taken_apart(run)["all"].calls, made  # type: ignore[attr-defined]
        yield [what, *[f"{number / count:.1f}" for number in calls]]


def tracked(run: Callable[[], object]) -> int:
    """Objects that Python's collector was told of, less those that were gone before it ran, in collections of 700."""
    gc.collect()
    ran = 0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal ran
        ran += phase == "start"

    before = gc.get_threshold()
    gc.set_threshold(700, 10**6, 10**6)
    gc.callbacks.append(note)
    try:
        run()
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
    return 700 * ran


def _rows(found: Iterator[Found]) -> list[list[object]]:
    """A row for each part and kind; of several runs the lower quartile of the times."""
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    counted: dict[tuple[str, str], tuple[Cost, Cost]] = {}
    for what, kinds, plain in found:
        for kind, cost in kinds.items():
            seconds[what, kind].append(cost.seconds / plain.seconds)
            counted[what, kind] = cost, plain
    return [
        [what, kind, cost.calls, f"{cost.multiply_adds / plain.multiply_adds:.2f}", f"{cost.bytes / plain.bytes:.2f}",
         f"{probe.lower_quartile(seconds[what, kind]):.2f}"]
        for (what, kind), (cost, plain) in counted.items()
    ]  # fmt: skip


PARTS: dict[str, Callable[[int], Iterator[Found]]] = {"kfac": kfac, "norms": norms, "first": first}


def main(argv: list[str] | None = None) -> None:
    """Print a table for each part."""
    made = probe.parser("benchmarks.speed.overhead.taken_apart", __doc__ or "", rows=[*PARTS, "parameters"], repeats=3)
    options = probe.parsed(made, argv)
    for name in options.rows:
        if name == "parameters":
            head, rows = ["a parameter", "Python", "torch", "tracked objects"], list(parameters())
        else:
            head = ["what", "calls of", "number", "multiply-adds", "bytes", "CPU time"]
            rows = _rows(PARTS[name](options.repeats))
        print(probe.table(head, rows), flush=True)
        print()


if __name__ == "__main__":
    main()
