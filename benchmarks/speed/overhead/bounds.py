"""What bounds a step: its multiply-adds at the plain gradient's rate, and its results in memory that is fresh.

Counted, not fitted: matrix products and convolutions as torch counts them, the bytes of all results, and the CPU time
to write as many into fresh memory. What is left over are passes over memory and calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["multiply_adds", "multiply_adds_of", "results", "text", "writing"]

FILLS = 3


class _Counter(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += multiply_adds_of(func, args, kwargs or {}, out)
        return out


def multiply_adds_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Of one call, which a dispatch mode sees: a matrix product or a convolution."""
    if func._overloadpacket is torch.ops.aten.addbmm:  # torch knows no count of it
        _, left, right = args
        return int(left.numel() * right.shape[2])
    if func._overloadpacket is torch.ops.aten.convolution_backward:  # torch's count is wrong with groups
        return _convolution_backward(*args)
    if func._overloadpacket in flop_registry:
        return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) // 2)
    return 0


def _convolution_backward(g: Tensor, x: Tensor, w: Tensor, *options: Any) -> int:
    """As many for each of the two gradients as the convolution has: every output (of a transposed one, input) times
    the kernel's elements that it meets."""
    transposed, wanted = options[4], options[7]
    places = x if transposed else g
    return (int(wanted[0]) + int(wanted[1])) * places.numel() * w[0].numel()


def multiply_adds(run: Callable[[], object]) -> int:
    """Of the matrix products and convolutions in one run."""
    with _Counter() as counter:
        run()
    return counter.total


def results(value: object) -> int:
    """Bytes of the tensors that a result holds, each memory once; operators are read by their blocks."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(value)}
    return sum(held.values())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from _tensors(inner)
    elif hasattr(value, "blocks"):
        yield from _tensors([(b.A, b.B) for b in value.blocks.values()])


def writing(size: int) -> float:
    """CPU seconds to write so many bytes into fresh memory, the least of a few times."""
    seconds = []
    for _ in range(FILLS):
        start = time.process_time()
        kept = torch.ones(size, dtype=torch.uint8)
        seconds.append(time.process_time() - start)
        del kept
    return min(seconds)


def text(cell: Mapping[str, Any]) -> str:
    """What the ratio of ours is made of: 1.90 = 1.33 arithmetic + 0.20 fresh results + 0.37 passes and calls."""
    if "work" not in cell:
        return "not counted"
    work, ratio = cell["work"], cell["contenders"]["ours"]["ratio"]
    arithmetic = work["multiply-adds"] / work["plain multiply-adds"]
    fresh = work["writing results"] / cell["plain seconds"]
    rest = ratio - arithmetic - fresh
    return f"{arithmetic:.2f} arithmetic + {fresh:.2f} fresh results + {rest:.2f} passes and calls"
