"""Vector-Jacobian products through a recorded graph, by torch's own autograd.

No derivative rule is written here or anywhere: `torch.autograd.grad` from the logits' edges to the edges of the uses
knows every activation, pooling and residual sum.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from layerwise import tensors
from layerwise.errors import BadInput, Undefined, UnsupportedCall
from layerwise.tape.uses import Use

__all__ = [
    "OnePass",
    "Place",
    "accumulated",
    "backward_arguments",
    "differentiated",
    "hooked",
    "pull",
    "pull_stack",
    "silent",
    "stopped",
    "without_autocast",
]

Place = Tensor | GradientEdge  # where a reverse pass starts or ends


class _State(threading.local):
    pulling = False


_STATE = _State()  # whether this thread is inside `pull`: hooks must not mistake that for the user's backward pass


@contextmanager
def _pulling(inputs: Sequence[Place]) -> Iterator[None]:
    """Without the user's hooks on the leaves among the inputs (masks, scaling), which torch would run."""
    leaves = (x if isinstance(x, Tensor) else getattr(x.node, "variable", None) for x in inputs)
    tables = [p._backward_hooks for p in leaves if p is not None and p.is_leaf and p._backward_hooks]
    kept, before = [dict(table) for table in tables], _STATE.pulling
    try:
        for table in tables:
            table.clear()
        _STATE.pulling = True
        yield
    finally:
        _STATE.pulling = before
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def pull(
    outputs: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    batched: bool = False,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Vector-Jacobian products of `outputs` with `cotangents` at `inputs` (edges or tensors).

    batched: each cotangent has a leading axis V, and so does each result; where a checkpointed block draws random
    numbers again, or torch cannot batch a derivative, they are computed one by one. The graph is retained. An input
    that no output depends on gives None. Raises UnsupportedCall where the cotangent of a call's output is sparse.
    """
    try:
        with _pulling(inputs):
            return _strided(
                inputs,
                torch.autograd.grad(
                    list[Any](outputs),
                    list[Any](inputs),
                    list(cotangents),
                    retain_graph=True,
                    create_graph=create_graph,
                    allow_unused=True,
                    is_grads_batched=batched,
                ),
            )
    except RuntimeError as error:
        if "should_execute() == task_should_compute_output" in str(error):
            raise Undefined(
                "asked for the gradient at a view that the model writes onto after it was read, which torch cannot "
                "give: make a new tensor there (z = z + y for z += y)"
            ) from error
        if not batched or isinstance(error, torch.OutOfMemoryError):
            raise  # else: a derivative that torch cannot batch, or an error that shows again one by one
    rows = [
        pull(outputs, [c[v] for c in cotangents], inputs, create_graph=create_graph) for v in range(len(cotangents[0]))
    ]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


def _strided(inputs: Sequence[Place], found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The cotangents found; raise UnsupportedCall where that of a call's output is sparse, which has no rows."""
    for place, g in zip(inputs, found, strict=True):
        if g is not None and g.layout != torch.strided and not isinstance(place, Tensor):
            raise UnsupportedCall(
                f"a parameter enters a call that gives a sparse tensor, in {place.node.name()}: its cotangent is "
                "sparse too, which has no rows of samples. Write the values into a dense tensor (`w = "
                "torch.zeros(shape)`, `w[rows, columns] = values`), or freeze them"
            )
    return list(found)


def pull_stack(
    outputs: Sequence[Place], stacks: Sequence[Tensor], inputs: Sequence[Place],
    holds: Callable[[Tensor], bool] = bool,
) -> list[Tensor | None]:  # fmt: skip
    """`pull` of V cotangents at once, `[V, *output]` to `[V, *input]` each; None for an input without a path.

    Torch batches some derivatives wrongly, so the results are compared with that of one combination of them. holds:
    reads a flag `[]`.
    """
    count = len(stacks[0])
    if count == 1:
        return _single(stacks, pull(outputs, [s[0] for s in stacks], inputs))
    if count > 2:  # below that the check costs as much as it saves
        with suppress(RuntimeError):  # an operation without a batching rule
            batched = pull(outputs, stacks, inputs, batched=True)
            mix = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
            mix[::2] *= -1
            single = pull(outputs, [_combine(mix, s) for s in stacks], inputs)
            agree = [_agree(mix, b, s) for b, s in zip(batched, single, strict=True)]
            flags = [flag for flag in agree if isinstance(flag, Tensor)]
            if all(flag is not False for flag in agree) and (not flags or holds(torch.stack(flags).all())):
                return batched
    rows = [pull(outputs, [s[v] for s in stacks], inputs) for v in range(count)]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


def _single(stacks: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Results with a leading axis; copied where autograd hands on a cotangent, or one tensor to several inputs."""
    seen = {s.data_ptr() for s in stacks}
    rows: list[Tensor | None] = []
    for g in found:
        if g is not None:
            g = g.clone() if g.data_ptr() in seen else g
            seen.add(g.data_ptr())
            g = g.unsqueeze(0)
        rows.append(g)
    return rows


def _combine(mix: Tensor, stack: Tensor) -> Tensor:
    return torch.tensordot(mix.to(stack), stack, 1)


def _agree(mix: Tensor, batched: Tensor | None, single: Tensor | None) -> bool | Tensor:
    """Whether the combination of batched results is the result of the combination, up to rounding; a flag `[]`."""
    if batched is None or single is None:
        return batched is single
    if not batched.numel():
        return True
    scale = _combine(mix.abs(), batched.abs()).max()
    return (_combine(mix, batched) - single).abs().max() <= 1e4 * torch.finfo(batched.dtype).eps * scale


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast; nothing where none is active.

    It stands beside `torch._C.DisableTorchFunction()`, whose end, as no Python code, no interrupt cuts short.
    """
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def silent(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """A user's tensor hook that runs in the user's backward passes but not inside `pull`."""
    return lambda g: None if _STATE.pulling else hook(g)


class OnePass:
    """Tells the backward pass that starts from a tensor, inside the context, from others that run meanwhile."""

    def __init__(self, total: Tensor) -> None:
        self._root = get_gradient_edge(total).node if total.requires_grad else None
        self._handle: Any = None
        self._number: int | None = None  # torch's number of the pass; torch gives no number twice
        self._threads: set[int] = set()
        self._others: set[tuple[int, str]] = set()

    def __enter__(self) -> OnePass:
        if self._root is not None:
            begin = weakref.WeakMethod(self._begin)  # the node is held here: a hook that holds it back is never freed
            self._handle = self._root.register_prehook(lambda grads: None if (call := begin()) is None else call(grads))
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _begin(self, grads: Any) -> None:
        if self._number is None and not _STATE.pulling:
            self._number = torch._C._current_graph_task_id()

    @property
    def running(self) -> bool:
        """Whether a hook was called by this pass."""
        return self._number == torch._C._current_graph_task_id()

    def reaches(self, name: str) -> bool:
        """As `running`, for a hook at a parameter."""
        running, thread = self.running, threading.get_ident()
        if running:
            self._threads.add(thread)
        else:
            self._others.add((thread, name))
        return running

    @property
    def strangers(self) -> list[str]:
        """Parameters that another pass reached on a thread of this one, so that it began inside it, in a hook."""
        return sorted({name for thread, name in self._others if thread in self._threads})


def _accumulator(leaf: Tensor) -> Any:
    view: Any = leaf.view_as(leaf)
    return view.grad_fn.next_functions[0][0]


@contextmanager
def accumulated(
    parameters: Mapping[str, Tensor], before_hooks: bool = False, within: OnePass | None = None
) -> Iterator[dict[str, Tensor]]:
    """Collect the gradients that a backward pass inside the context adds to each parameter's `.grad`, by name.

    They are read by node pre-hooks: a difference of `.grad` would be inexact, and a trainer's hooks may put something
    else into it, such as the average over ranks. Memory is shared with `.grad` until either is written to.
    before_hooks: collect them as they are before the hooks on the parameters themselves (masks, scaling). within: the
    pass whose gradients are collected, default all.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, grads: Sequence[Tensor | None]) -> None:
        g = grads[0]
        if g is not None and not _STATE.pulling and (within is None or within.reaches(name)):
            new = tensors.lazy_copy(g.detach())
            found[name] = found[name] + new if name in found else new

    def first(name: str, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def noted(g: Tensor) -> Any:
            note(name, (g,))
            return hook(g)

        return noted

    changed = {name: p._backward_hooks for name, p in parameters.items() if before_hooks and p._backward_hooks}
    parameters = {name: p for name, p in parameters.items() if name not in changed}
    own = [(hooks, *next(iter(hooks.items()))) for hooks in changed.values()]
    _STATE.pulling = False  # an interrupt can leave a product without its end
    with torch.enable_grad():  # as `get_gradient_edge`, which enters a context for each; the list keeps them alive
        nodes: list[tuple[str, Any]] = [(name, p.grad_fn or _accumulator(p)) for name, p in parameters.items()]
    handles = []
    try:
        for name, node in nodes:
            handles.append(node.register_prehook(partial(note, name)))
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
def hooked(
    uses: Sequence[Use], receive: Callable[[Use, Tensor], None], within: OnePass | None = None
) -> Iterator[None]:
    """Deliver each use's cotangent to `receive` while a backward pass runs inside the context.

    The hooks sit on the autograd nodes, ignore the products of `pull`, and are removed on exit, also after an
    exception. within: the pass whose cotangents are delivered, default all.
    """
    handles = []

    def deliver(use: Use, grads: Sequence[Tensor | None]) -> None:
        g = grads[use.edge.output_nr]
        if g is not None and not _STATE.pulling and (within is None or within.running):
            receive(use, g)

    _STATE.pulling = False
    try:
        for use in uses:
            handles.append(use.edge.node.register_prehook(partial(deliver, use)))
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
