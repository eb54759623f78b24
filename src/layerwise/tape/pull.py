"""Vector-Jacobian products through a recorded graph, by torch's own autograd.

No derivative rule is written here or anywhere: `torch.autograd.grad` from the logits' edges to the edges of the uses
knows every activation, pooling and residual sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from layerwise import tensors
from layerwise.errors import BadInput
from layerwise.tape.uses import Use

__all__ = ["accumulated", "alone", "backward_arguments", "differentiated", "hooked", "pull", "silent", "stopped"]


class _State(threading.local):
    pulling = False


_STATE = _State()  # whether this thread is inside `pull`: hooks must not mistake that for the user's backward pass


@contextmanager
def _pulling() -> Iterator[None]:
    before, _STATE.pulling = _STATE.pulling, True
    try:
        yield
    finally:
        _STATE.pulling = before


def pull(
    outputs: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    batched: bool = False,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Vector-Jacobian products of `outputs` with `cotangents` at `inputs` (edges or tensors).

    batched: each cotangent has a leading axis V, and so does each result; where a checkpointed block draws random
    numbers again, they are computed one by one. The graph is retained. An input that no output depends on gives None.
    """
    try:
        with _pulling():
            return list(
                torch.autograd.grad(
                    list[Any](outputs),
                    list[Any](inputs),
                    list(cotangents),
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
            )
    except RuntimeError as error:
        if not batched or "random operations inside of vmap" not in str(error):
            raise
    rows = [
        pull(outputs, [c[v] for c in cotangents], inputs, create_graph=create_graph) for v in range(len(cotangents[0]))
    ]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


@contextmanager
def alone(device: str) -> Iterator[None]:
    """Run the library's own computations outside the user's torch-function modes and without autocast."""
    lowered = torch.is_autocast_enabled(device)
    with torch._C.DisableTorchFunction(), torch.autocast(device, enabled=False) if lowered else nullcontext():
        yield


def silent(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A user's tensor hook that runs in the user's backward passes but not inside `pull`."""
    return lambda g: None if _STATE.pulling else hook(g)


@contextmanager
def accumulated(parameters: Mapping[str, Tensor], before_hooks: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect the gradients that a backward pass inside the context adds to each parameter's `.grad`, by name.

    They are read by node pre-hooks: a difference of `.grad` would be inexact, and a trainer's hooks may put something
    else into it, such as the average over ranks. Memory is shared with `.grad` until either is written to.
    before_hooks: collect them as they are before the hooks on the parameters themselves (masks, scaling).
    """
    found: dict[str, Tensor] = {}

    def note(name: str, g: Tensor | None) -> None:
        if g is not None and not _STATE.pulling:
            new = tensors.lazy_copy(g.detach())
            found[name] = found[name] + new if name in found else new

    def hook_for(name: str) -> Callable[[Sequence[Tensor | None]], None]:
        return lambda grads: note(name, grads[0])

    def first(name: str, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def noted(g: Tensor) -> Any:
            note(name, g)
            return hook(g)

        return noted

    changed = {name: p._backward_hooks for name, p in parameters.items() if before_hooks and p._backward_hooks}
    parameters = {name: p for name, p in parameters.items() if name not in changed}
    own = [(hooks, *next(iter(hooks.items()))) for hooks in changed.values()]
    _STATE.pulling = False  # an interrupt can leave a product without its end
    nodes = [(name, get_gradient_edge(p).node) for name, p in parameters.items()]  # the list keeps them alive
    handles = []
    try:
        for name, node in nodes:
            handles.append(node.register_prehook(hook_for(name)))
        for name, (hooks, key, hook) in zip(changed, own, strict=True):
            hooks[key] = first(name, hook)
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for hooks, key, hook in own:
            if key in hooks:  # the user's own hook may have removed itself
                hooks[key] = hook


@contextmanager
def hooked(uses: Sequence[Use], receive: Callable[[Use, Tensor], None]) -> Iterator[None]:
    """Deliver each use's cotangent to `receive` while a backward pass runs inside the context.

    The hooks sit on the autograd nodes, ignore the products of `pull`, and are removed on exit, also after an
    exception.
    """
    handles = []

    def hook_for(use: Use) -> Callable[[Sequence[Tensor | None]], None]:
        index = use.edge.output_nr

        def hook(grads: Sequence[Tensor | None]) -> None:
            g = grads[index]
            if g is not None and not _STATE.pulling:
                receive(use, g)

        return hook

    _STATE.pulling = False
    try:
        for use in uses:
            handles.append(use.edge.node.register_prehook(hook_for(use)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stopped(nodes: Iterable[Node]) -> Iterator[None]:
    """Inside the context, `pull` sends zeros past certain nodes; the cotangents that arrive there can still be read."""

    def zeros(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else torch.zeros_like(g) for g in grads)

    handles = []
    try:
        for node in set(nodes):
            handles.append(node.register_prehook(zeros))
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward_arguments(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The tensor that a backward pass starts from and its weights."""
    total = args[0] if args else kwargs.get("tensors", kwargs.get("self"))
    weight = args[1] if len(args) > 1 else kwargs.get("gradient", kwargs.get("grad_tensors"))
    if isinstance(total, (list, tuple)):
        if len(total) != 1:
            raise BadInput(f"asked to observe a backward pass from {len(total)} tensors at once; add them up first")
        total = total[0]
        weight = weight[0] if isinstance(weight, (list, tuple)) else weight
    return total, weight


def differentiated(total: Tensor, weight: Tensor | None) -> Tensor:
    """The number that a backward pass from a total differentiates, detached. weight: the pass's `gradient`."""
    value = total.detach()
    return value if weight is None else (value * weight.detach()).sum()
