"""The entries of a tape: uses of parameters, and losses."""

from __future__ import annotations

import os.path
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules._functions import BackwardHookFunction
from torch.nn.parameter import is_lazy

from layerwise import losses, ops
from layerwise.errors import BadInput, SlowPath, Undefined
from layerwise.ops.base import Call, DenseSlot, Slot
from layerwise.tape.origins import Origin
from layerwise.tensors import is_finite

__all__ = [
    "Carried", "Derived", "LossUse", "OwnUse", "Reader", "Use", "bad_call", "boundary_of", "called_at", "describe_func",
    "edge_of", "first_bad_call", "is_hook", "named_buffers_of", "named_modules_of", "named_parameters_of", "place",
    "unhooked",
]  # fmt: skip

_NAMES = 4  # parameters that a text names
_INTERNAL = {"layerwise", "torch", "contextlib", "functools"}


def is_hook(node: Node | None) -> bool:
    """Whether a node stands for the backward hooks of a module, whose call returns its arguments."""
    return getattr(node, "_forward_cls", None) is BackwardHookFunction


def edge_of(tensor: Tensor) -> GradientEdge:
    """As `get_gradient_edge` of torch, for the common node without its checks."""
    node = tensor.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def unhooked(edge: GradientEdge) -> GradientEdge:
    """The edge of a tensor before modules with backward hooks handed it on."""
    while is_hook(edge.node):
        below, number = edge.node.next_functions[edge.output_nr]
        if below is None:  # an input without a gradient
            break
        edge = GradientEdge(below, number)
    return edge


class Derived(NamedTuple):
    """A tensor computed from parameters and constants only, and the parameters it depends on."""

    tensor: Tensor
    names: frozenset[str]


class Reader(NamedTuple):
    """A call that reads a use's output: its function and further arguments, and the nodes of its results.

    kept: the result and its version, where autograd keeps it too. carried: the result, where that is the output's
    elements in other places; readers: the calls that read it.
    """

    func: Any
    args: Any
    kwargs: Any
    nodes: tuple[Node, ...]
    kept: tuple[Tensor, int] | None
    carried: Carried | None
    readers: list[Reader]

    @property
    def result(self) -> Tensor | None:
        """What the call returned; None where it was not kept or was overwritten since."""
        return _unchanged(self.kept)


class Carried(NamedTuple):
    """A tensor that holds a use's output in other places: its gradient edge and its shape."""

    output: weakref.ref[Tensor]
    edge: GradientEdge
    shape: torch.Size


class Use:
    """One call of parameters with data.

    call: function and arguments, data detached. used: the parameters and derived tensors among them.
    edge: gradient edge of the output. inputs: gradient edges of the data arguments, read before the call.
    batch: the tensor that the data was made from by maps that keep the samples. origin: where the rows of the data come
    from, and the data's shape; None where the data requires a gradient. made_from: where the data comes from even so.
    at: the file and line of the user's code that made the call. names: those of all parameters that it depends on.
    readers: the calls that read the output, where the tape keeps outputs, on the way to the loss or beside it.
    """

    __slots__ = (
        "_kept",
        "_released",
        "_slots",
        "at",
        "batch",
        "call",
        "edge",
        "index",
        "inputs",
        "made_from",
        "names",
        "origin",
        "output",
        "readers",
        "used",
    )

    def __init__(
        self,
        index: int,
        call: Call,
        used: list[Derived],
        inputs: Sequence[GradientEdge],
        output: Tensor,
        batch: Tensor,
        keep: bool,
    ) -> None:
        self.index, self.at = index, called_at()
        self.call = call
        self.used = used
        self.names = sorted(used[0].names if len(used) == 1 else used[0].names.union(*(d.names for d in used[1:])))
        self.inputs = inputs
        self.batch = batch
        self.origin: tuple[Origin, torch.Size] | None = None
        self.made_from: Origin | None = None
        self.edge = edge_of(output)
        self.output = weakref.ref(output)
        self.readers: Sequence[Reader] = ()
        self._slots: list[Slot] | None = None
        self._released = False
        self._kept = (output.detach(), output._version) if keep else None

    @property
    def value(self) -> Tensor | None:
        """The output's value; None where the tape keeps no outputs or the output was overwritten since."""
        return _unchanged(self._kept)

    def read_by(
        self, func: Any, args: Any, kwargs: Any, results: Sequence[Tensor], carries: bool, by: Reader | None = None
    ) -> Reader:  # fmt: skip
        """Note a call that reads the output, or what a reader carried. A result is kept where autograd saves it."""
        nodes = tuple(t.grad_fn for t in results if t.grad_fn is not None)
        kept, out = None, results[0]
        if by is None and self._kept is not None and hasattr(type(nodes[0]), "_saved_result"):
            alike = out.shape == self.call.out_shape and out.dtype == self._kept[0].dtype
            kept = (out.detach(), out._version) if alike else None
        carried = Carried(weakref.ref(out), edge_of(out), out.shape) if carries else None
        reader = Reader(func, args, kwargs, nodes, kept, carried, [])
        if by is None:
            self.readers = [*self.readers, reader]
        else:
            by.readers.append(reader)
        return reader

    @property
    def slots(self) -> list[Slot]:
        """One `Slot` for each of `used`, built at the first access and cached."""
        if self._released:
            raise Undefined(
                f"asked for a quantity at {self}, but an earlier backward pass through this forward was observed, or "
                "failed while it was; run the forward again"
            )
        if self._slots is None:
            self._slots = ops.slots(self.call, [d.tensor for d in self.used])
            if sum(len(d.names) for d in self.used) > len(self.names):  # a parameter enters more than once
                for slot in self._slots:
                    slot.linear = False
            for slot in self._slots:
                if isinstance(slot, DenseSlot):
                    slot.use = repr(self)
            if not all(slot.factored for slot in self._slots):
                warnings.warn(
                    f"{describe_func(self.call.func)} of {', '.join(self.names)} has no row form: its per-sample "
                    "gradients are exact, but take one vector-Jacobian product a sample",
                    SlowPath,
                    stacklevel=_users_frame()[0] + 1,
                )
        return self._slots

    def exchange(self, changes: Callable[[Tensor], bool]) -> None:
        """Keep copies of those of the used tensors that a call is about to write onto."""
        copies = {id(d.tensor): d.tensor.clone() for d in self.used if changes(d.tensor)}
        if not copies:
            return

        def kept(t: Tensor) -> Tensor:
            return copies.get(id(t), t)

        self.used = [Derived(kept(d.tensor), d.names) for d in self.used]
        args, kwargs = ops.replace(self.call.args, kept), ops.replace(self.call.kwargs, kept)
        self.call, self._slots = self.call._replace(args=args, kwargs=kwargs), None

    def release(self) -> None:
        """Drop the call's arguments, which are not read any more, so that autograd's own freeing takes effect."""
        self._released, self._slots = True, None
        self.call = Call(self.call.func, (), {}, self.call.out_shape)
        self.readers = ()

    def __repr__(self) -> str:
        names = ", ".join(self.names[:_NAMES]) + (f" and {more} more" if (more := len(self.names) - _NAMES) > 0 else "")
        return f"Use {self.index}: {describe_func(self.call.func)} of {names}{place(self.at)}"


def _unchanged(kept: tuple[Tensor, int] | None) -> Tensor | None:
    """The tensor of a pair (tensor, version) if it still has that version."""
    return kept[0] if kept is not None and kept[0]._version == kept[1] else None


def _users_frame() -> tuple[int, FrameType]:
    """The frame of the user's code that runs now, and its level above the function that calls this."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level, frame


@cache
def _is_internal(module: str) -> bool:
    """Whether code of a module is not the user's."""
    return module.split(".")[0] in _INTERNAL


def called_at() -> tuple[str, int]:
    """The file and line of the user's code that runs now."""
    frame = _users_frame()[1]
    return frame.f_code.co_filename, frame.f_lineno


def place(at: tuple[str, int]) -> str:
    """A file and line in words; nothing where there is none."""
    return f" (line {at[1]} of {os.path.basename(at[0])})" if at[0] else ""


class LossUse(NamedTuple):
    """A call that makes a loss: its bound arguments, the edges of its logits and of its value.

    target: where the rows of its target come from, and the target's shape; None where that is unknown.
    """

    call: losses.LossCall | losses.OwnCall
    logits: GradientEdge
    value: GradientEdge
    target: tuple[Origin, torch.Size] | None = None

    def __str__(self) -> str:
        return f"{self.call.name}{self.call.place}"


class OwnUse(NamedTuple):
    """A loss of the user's own: the part of the graph between the total and tensors of the model, its boundary.

    boundary: each tensor as a `LossUse` whose value is itself. value: the edge of the marked call's value; None
    where the loss is the total itself, less its known and marked losses.
    bypassed: a use that feeds the loss past the model's output, so that the boundary is not what the model returned.
    """

    call: losses.OwnCall
    boundary: list[LossUse]
    value: GradientEdge | None = None
    bypassed: Use | None = None

    def __str__(self) -> str:
        return f"{self.call.name}{self.call.place}"


def boundary_of(name: str, value: Any, reduction: str | None = None, hold: bool = True) -> list[LossUse]:
    """The differentiable tensors in a value that the model made, as the boundary of a loss; hold: with their values."""
    found: list[LossUse] = []
    for z in losses.tensors_in(value):
        if z.requires_grad and not z.is_leaf and z.is_floating_point():
            edge = edge_of(z)
            if any(part.logits[:2] == edge[:2] for part in found):
                continue
            logits = z.detach()
            if not hold:
                with torch._C.DisableTorchFunction():
                    logits = torch.zeros((), dtype=z.dtype, device=z.device).expand(z.shape)
            found.append(LossUse(losses.OwnCall(name, logits, reduction), edge, edge))
    return found


def describe_func(func: Any) -> str:
    """A readable name of a torch function."""
    return getattr(func, "__name__", None) or repr(func)


def named_parameters_of(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a module, or of a functional model given as a mapping, by name."""
    if isinstance(model, nn.Module):
        found = _named_parameters(model)
        unmade = [name for name, p in found.items() if type(p) is not nn.Parameter and is_lazy(p)]
        if unmade:
            raise BadInput(
                f"the parameters {', '.join(unmade[:_NAMES])} of lazy modules have no shape before the model has run: "
                "run it once on a batch (`model(x)`) first"
            )
        return found
    if isinstance(model, Mapping) and all(isinstance(p, Tensor) for p in model.values()):
        return dict(model)
    raise BadInput(
        f"asked for the parameters of {type(model).__name__}; give an nn.Module, or a mapping of names to tensors"
    )


def named_modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """`model.named_modules()`, in the same order, by one loop: each of its nested generators hands on every module."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        prefix, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((prefix, module))
        if module._modules:
            start = prefix and prefix + "."
            below = [(start + name, part) for name, part in module._modules.items() if part is not None]
            stack += below[::-1]
    return found


def _named_parameters(model: nn.Module) -> dict[str, Tensor]:
    if type(model).named_parameters is not nn.Module.named_parameters:
        return dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in named_modules_of(model):
        start = prefix and prefix + "."
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                found[start + name] = p
    return found


def named_buffers_of(model: Any) -> dict[str, Tensor]:
    """The buffers of a module by name, each once; a functional model has none."""
    if not isinstance(model, nn.Module):
        return {}
    if type(model).named_buffers is not nn.Module.named_buffers:
        return dict(model.named_buffers())
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in named_modules_of(model):
        for name, b in module._buffers.items():
            if b is not None and id(b) not in seen:
                seen.add(id(b))
                found[f"{prefix}.{name}" if prefix else name] = b
    return found


def bad_call(func: Any, used: list[Derived], data: list[Tensor], error: Exception | None = None) -> Exception:
    """The error for a call that torch refuses, naming the parameters and the data."""
    names = sorted(set().union(*(d.names for d in used)))
    ours, theirs = used[0].tensor, data[0]
    seen = (
        f"{describe_func(func)} of {', '.join(names)} (shape {tuple(ours.shape)}, {ours.dtype}, {ours.device}) with "
        f"an input of shape {tuple(theirs.shape)}, {theirs.dtype}, {theirs.device}"
    )
    if ours.device != theirs.device:
        return BadInput(f"{seen}: move the model or the batch, they lie on two devices")
    return BadInput(f"{seen}: {str(error).splitlines()[0]}")


def first_bad_call(uses: Iterable[Use]) -> str | None:
    """The first call in order whose data or output holds NaN or infinity, by its parameters' names."""
    for use in uses:
        name = ", ".join(use.names)
        for value in (*use.call.args, *use.call.kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and not is_finite(value):
                known = next((d for d in use.used if d.tensor is value), None)
                return f"the input of {name}" if known is None else ", ".join(sorted(known.names))
        if use.value is not None and not is_finite(use.value):
            return f"the output of {name}"
    return None
