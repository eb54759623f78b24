"""The tensors of a call by their kind, and what a use keeps of it: arguments, a tensor for each occurrence, output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from layerwise import losses, ops
from layerwise.errors import UnsupportedCall
from layerwise.tape.calls import CARRIES
from layerwise.tape.uses import Derived, Reader, Use, bad_call, describe_func, is_hook, unhooked
from layerwise.tensors import is_out_of_memory

__all__ = [
    "Hollow", "Known", "Readable", "classify", "distinct", "is_view", "kept", "note_readers", "own_output", "run",
    "sort", "tensors_in",
]  # fmt: skip


class Hollow(NamedTuple):
    """A constant without elements, until it is given memory of another: unpickling fills what `torch.empty` made so."""

    tensor: Tensor


Known = MutableMapping[int, Derived | Hollow | Tensor]  # derived tensors and constants, by id
_LISTS = (list, tuple)
_SIMPLE = (int, str, type(None))  # arguments that enter the signature of a run; floats (rates, temperatures) may change


def is_view(t: Any) -> bool:
    """Whether a write onto a tensor would go to another tensor's part of the graph, where its own edge ends."""
    return isinstance(t, Tensor) and t._base is not None


def sort(known: Known, calls: list[Any], args: Any, kwargs: Any) -> tuple[list[Derived], list[Tensor], int]:
    """The used tensors, the data tensors and the number of tensors among the arguments of a call.

    calls: the signature of the run, to which the simple arguments are appended.
    """
    used: list[Derived] = []
    data: list[Tensor] = []
    count = 0
    if kwargs:
        calls += kwargs
        args = (*args, *kwargs.values())
    for arg in args:
        if isinstance(arg, Tensor):
            count += 1
            kind = known.get(id(arg))
            if type(kind) is Derived:
                used.append(kind)
            elif kind is None:
                if arg.requires_grad or arg.dim():
                    data.append(arg)
            elif type(kind) is Hollow and arg.numel():
                data.append(arg)
        elif isinstance(arg, _SIMPLE):
            calls.append(arg)
        elif isinstance(arg, _LISTS):
            u, d, c = sort(known, calls, arg, None)
            used += u
            data += d
            count += c
        elif isinstance(arg, slice):
            calls.append((arg.start, arg.stop, arg.step))
    return used, data, count


def classify(known: Known, out: Any, used: list[Derived]) -> None:
    """Note the results of a call without data: derived where they need grad, constants otherwise."""
    names = frozenset().union(*(d.names for d in used)) if used else frozenset()
    for tensor in tensors_in(out):
        if tensor.requires_grad:
            if names and not tensor.is_leaf:  # fused in-place calls return the parameters themselves
                known[id(tensor)] = Derived(tensor, names)
        else:
            known[id(tensor)] = tensor if tensor.numel() else Hollow(tensor)


def tensors_in(out: Any) -> Sequence[Tensor]:
    """A tensor, or those of a list."""
    if isinstance(out, Tensor):
        return (out,)
    if isinstance(out, _LISTS):
        return [t for t in out if isinstance(t, Tensor)]
    return ()


def distinct(known: Known, args: Any, kwargs: Any, used: list[Derived]) -> tuple[Any, Any, list[Derived]]:
    """The arguments and the used tensors of a call, with a view for each further occurrence of the same tensor.

    Each occurrence then has a slot, and a gradient, of its own. The views are noted in `known`.
    """
    if len({id(d.tensor) for d in used}) == len(used):
        return args, kwargs, used
    found: list[Derived] = []
    seen: set[int] = set()

    def own(t: Tensor) -> Tensor:
        d = known.get(id(t))
        if type(d) is not Derived:
            return t
        if id(t) in seen:
            t = t.view_as(t)
            known[id(t)] = d = Derived(t, d.names)
        seen.add(id(t))
        found.append(d)
        return t

    return ops.replace(args, own), ops.replace(kwargs, own), found


def kept(known: Known, func: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments to keep: data detached (the first cloned, where the call overwrites it), parameters themselves.

    Sparse data of a linear map is kept dense, as its rows are.
    """
    clone, dense = ops.writes_first(func), func in ops.LINEAR
    first = tuple([_kept(known, arg, dense, clone and i == 0) for i, arg in enumerate(args)])
    return first, {key: _kept(known, value, dense) for key, value in kwargs.items()} if kwargs else {}


def _kept(known: Known, arg: Any, dense: bool, clone: bool = False) -> Any:
    if isinstance(arg, Tensor):
        if type(known.get(id(arg))) is Derived:
            return arg
        if dense and arg.layout is not torch.strided:
            return arg.detach().to_dense()
        return arg.detach().clone() if clone else arg.detach()
    if isinstance(arg, (list, tuple)):
        return type(arg)(_kept(known, a, dense) for a in arg)
    return arg


def run(func: Any, args: Any, kwargs: Any, used: list[Derived], data: list[Tensor]) -> tuple[Any, Tensor | None]:
    """What a call returns, and the tensor that it made or wrote onto; where torch refuses, the parameters are named.

    The second is None where no gradient flows through the call, which compares tensors, for one.
    """
    if ops.writes_first(func) and args and any(args[0] is d.tensor for d in used):
        args = (args[0].clone(), *args[1:])
    try:
        out = func(*args, **kwargs)
    except (RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise bad_call(func, used, data, error) from error
    result = args[0] if out is None and args and ops.writes_first(func) else out
    if not isinstance(result, Tensor):
        if not any(t.requires_grad for t in losses.tensors_in(out)):
            return out, None
        names = sorted(set().union(*(d.names for d in used)))
        raise UnsupportedCall(
            f"{describe_func(func)} uses the parameters {', '.join(names)} and returns "
            f"{type(result).__name__}, not one tensor; write it with calls that return one tensor each"
        )
    return out, result


def own_output(func: Any, result: Tensor, given: Sequence[Tensor]) -> Tensor:
    """The output of a call as a tensor that is no view, so that its gradient edge outlives writes onto it.

    It shares the output's memory where no backward pass reads the output again; there, a write would go unnoticed.
    given: the tensors among the arguments; a view of one of them stays as it is.
    """
    base = result._base
    if base is None or not result.requires_grad or any(base is t or base is t._base for t in given):
        return result
    if func not in ops.LINEAR:
        return result.clone()
    whole = base.numel() == result.numel() and base.is_contiguous() and result.is_contiguous()
    return torch.ops.aten._unsafe_view.default(base if whole else result, result.shape)


class Readable(NamedTuple):
    """A tensor whose readers are noted: a use's output, or what a reader of it returned with its elements."""

    use: Use
    reader: Reader | None = None

    def tensor(self) -> Tensor | None:
        """The tensor, while there is one."""
        if self.reader is None:
            return self.use.output()
        return None if self.reader.carried is None else self.reader.carried.output()


def _output_of(tensor: Tensor, outputs: Mapping[int, Readable], uses: Sequence[Use]) -> Readable | None:
    """The output that a tensor is, also where a module with backward hooks handed it on. outputs: by `id`."""
    found = outputs.get(id(tensor))
    if found is not None and found.tensor() is tensor:
        return found
    if not is_hook(tensor.grad_fn):
        return None
    below = unhooked(get_gradient_edge(tensor))[:2]
    made = (each for use in reversed(uses) for each in _places(use))
    return next((output for output, edge in made if edge[:2] == below), None)


def _places(use: Use) -> Iterator[tuple[Readable, GradientEdge]]:
    """A use's output and what readers returned with its elements, with their gradient edges."""
    yield Readable(use), use.edge
    readers = list(use.readers)
    while readers:
        reader = readers.pop()
        if reader.carried is not None:
            yield Readable(use, reader), reader.carried.edge
            readers += reader.readers


def note_readers(
    outputs: dict[int, Readable], uses: Sequence[Use], func: Any, args: Any, kwargs: Any, data: list[Tensor], out: Any
) -> None:
    """Note a call with the uses whose outputs it reads. out: what it returned, or wrote onto.

    A call that no gradient comes back from (of a shape, of detached values) is no reader; nor is one that the loss does
    not reach, which only a proved graph tells, or one that returns what it was given. outputs: by `id`, to which are
    added results that hold an output's elements in other places.
    """
    results = [t for t in tensors_in(out) if t.requires_grad and not t.is_leaf] if outputs else []
    for tensor in data if results else ():
        read = _output_of(tensor, outputs, uses)
        if read is None:
            continue
        carries = bool(args) and args[0] is tensor and func in CARRIES
        if carries and out is tensor:
            continue
        reader = read.use.read_by(func, args[1:], kwargs, results, carries, read.reader)
        if out is tensor:
            outputs.pop(id(tensor), None)  # overwritten in place: it holds another value from now on
        elif carries:
            outputs[id(out)] = Readable(read.use, reader)
