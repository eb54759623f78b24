"""Contractions of rows as compiled graphs: what quantities compute of one parameter, traced once for each layout.

A graph is traced with other numbers than those of the batch, and its first result is compared with the plain one, so
that no value that a function read on the host stays in it. What cannot be a graph of the rows alone is computed as
always: rows that are made when they are read (windows, gathered rows), masks, results whose shape depends on numbers,
and what several parameters share.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.errors import BadInput
from layerwise.gradient.parameter import ParameterGradient
from layerwise.gradient.parts import RowsPart
from layerwise.gradient.row_views import Remembered
from layerwise.rows.base import Rows
from layerwise.tensors import without_grad

__all__ = ["Backend", "CompiledContractions", "Contraction", "inductor"]

Backend = Callable[[GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]]
Values = list[tuple[Any, ...]]

_LONGEST = 256  # calls of a graph; one with more is a loop over many pieces, in which calls are not the cost
_ROOM = {torch.float32: 1e-4, torch.float64: 1e-10}  # between the orders of a sum, in parts of the largest entry
_SIMPLE = (bool, int, float, str, type(None))


class Contraction(Protocol):
    """A function of a parameter's gradient that depends on the numbers of its rows and on its plain attributes."""

    def compute(self, gradient: ParameterGradient) -> tuple[Any, ...]:
        """Its tensors."""


def inductor(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """The backend that `torch.compile` takes by default, without its guards: layouts are compared here."""
    from torch._inductor import compile  # an import of seconds

    given: list[Any] = list(inputs)
    found: Callable[..., Sequence[Tensor]] = compile(graph, given)
    return found


class _Refused(Exception):
    """A call whose result or whose shape no graph can hold."""


class _Unshared(dict[Any, Any]):
    """In place of what parameters share, as a weight and its bias a Gram matrix: two graphs would make it twice."""

    def __contains__(self, key: object) -> bool:
        raise _Refused(str(key))


class _NumbersUnread(TorchDispatchMode):
    """Refuse calls that read numbers on the host, whose result's shape depends on numbers, or that draw."""

    _TAGS = frozenset(
        {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._TAGS.isdisjoint(func.tags):
            raise _Refused(str(func))
        return func(*args, **(kwargs or {}))


class CompiledContractions:
    """The compiled graphs of a model's contractions by layout.

    backend: as `torch.compile` takes it, a function of a graph and its inputs that gives a function of such inputs.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._graphs: Remembered[_Graph | None] = Remembered()

    @without_grad
    def of(self, contractions: Sequence[Contraction], gradient: ParameterGradient) -> Callable[[], Values] | None:
        """A function that computes what each contraction does; None where these are no graph of rows.

        Raises BadInput where the backend compiles nothing, as without a C++ compiler.
        """
        inputs = _inputs(gradient)
        if inputs is None or (key := _key(contractions, gradient)) is None:
            return None
        if key not in self._graphs:
            self._graphs.enter(key, self._made(contractions, gradient, inputs))
        graph = self._graphs.get(key)
        return None if graph is None else partial(graph, inputs)

    def _made(
        self, contractions: Sequence[Contraction], gradient: ParameterGradient, inputs: list[Tensor]
    ) -> _Graph | None:
        found = _traced(contractions, gradient, inputs)
        if found is None:
            return None
        graph, forms = found
        try:
            made = _Graph(self._backend(graph, inputs), forms)
            values = made(inputs)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise BadInput(
                f"observe(compile=...) compiled nothing for {gradient.name!r}: its backend raised "
                f"{type(error).__name__}: {reason[0] if reason else ''}. Inductor wants a C++ compiler for the CPU and "
                "Triton for a GPU; install it, give another backend, or leave compile out"
            ) from error
        plain = [c.compute(gradient) for c in contractions]
        return made if all(map(_same, _tensors(values), _tensors(plain))) else None


class _Graph:
    """A compiled function of rows; forms: the values that it gives, with numbers of tensors in place of tensors."""

    def __init__(self, run: Callable[..., Sequence[Tensor]], forms: Sequence[Sequence[Any]]) -> None:
        self._run, self._forms = run, forms

    @without_grad
    def __call__(self, inputs: Sequence[Tensor]) -> Values:
        found = iter(self._run(*inputs))
        return [
            tuple(
                [next(found) if form is None else form.replaced([next(found) for _ in form.tensors()]) for form in some]
            )
            for some in self._forms
        ]


def _inputs(gradient: ParameterGradient) -> list[Tensor] | None:
    """The rows' tensors; None where rows are made when they are read, or are asked for more than their numbers."""
    found: list[Tensor] = []
    for part in gradient.parts:
        if type(part) is not RowsPart or type(part.rows) is not Rows or part.real is not None:
            return None
        found += [part.rows.g] if part.rows.a is None else [part.rows.g, part.rows.a]
    return None if gradient.summed or any(x.requires_grad or not x.numel() for x in found) else found


def _key(contractions: Sequence[Contraction], gradient: ParameterGradient) -> Hashable:
    """All that the values depend on but the rows' numbers; None where it is more than plain values."""
    found: list[Hashable] = [gradient.name, gradient.shape, gradient.column]
    for contraction in contractions:
        cotangent = getattr(contraction, "cotangent", None)
        own = {**vars(contraction), "cotangent": type(cotangent)}
        if not all(map(_is_plain, own.values())):
            return None
        found += [type(contraction), *own.items()]
    for part in gradient.parts:
        assert isinstance(part, RowsPart)
        laid, rows = part.layout(), part.rows
        found += [laid, laid.bias, rows.size_in]
        found += [(x.shape, x.stride(), x.dtype, x.device) for x in (rows.g, rows.a) if x is not None]
    return tuple(found)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (*_SIMPLE, type)) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _with_rows(gradient: ParameterGradient, tensors: Sequence[Tensor]) -> ParameterGradient:
    """The gradient with other numbers in rows of the same layout, and nothing computed yet."""
    given, parts = iter(tensors), []
    for part in gradient.parts:
        assert isinstance(part, RowsPart)
        g = next(given)
        parts.append(replace(part, rows=Rows(None if part.rows.a is None else next(given), g, part.rows.size_in)))
    return ParameterGradient(gradient.name, gradient.shape, parts, gradient.column, _Unshared())


def _traced(
    contractions: Sequence[Contraction], gradient: ParameterGradient, inputs: Sequence[Tensor]
) -> tuple[GraphModule, list[list[Any]]] | None:
    """The graph of all contractions together, and the forms of their values; None where there is none."""
    forms: list[list[Any]] = []

    def run(*tensors: Tensor) -> list[Tensor]:
        with _NumbersUnread():
            rows = _with_rows(gradient, tensors)  # which keeps what several of them share
            values = [c.compute(rows) for c in contractions]
        forms[:] = [[_form(value) for value in some] for some in values]
        return _tensors(values)

    try:
        graph = make_fx(run)(*map(_other_numbers, inputs))
    except Exception:  # whatever stops a trace: the plain way computes it, or raises what is to be said
        return None
    calls = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    if len(calls) > _LONGEST or any(node.op == "get_attr" for node in calls):  # numbers that came by another way
        return None
    for node in calls:
        if node.target is torch.ops.aten._lazy_clone.default:  # of memory that a backend may write again
            node.target = torch.ops.aten.clone.default
    graph.recompile()
    return graph, forms


def _form(value: Any) -> Any:
    """None for a tensor; for a value of several, the same with their descriptions."""
    if isinstance(value, Tensor):
        return None
    if not value.tensors():  # what it holds is not among them
        raise _Refused(type(value).__name__)
    return value.described()


def _other_numbers(x: Tensor) -> Tensor:
    """A tensor of the same layout, from -1 to 1; zero for an index."""
    length = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    if not x.is_floating_point() and not x.is_complex():
        return x.new_zeros(length).as_strided(x.shape, x.stride())
    return torch.linspace(-1, 1, length, device=x.device).to(x.dtype).as_strided(x.shape, x.stride())


def _tensors(values: Sequence[Sequence[Any]]) -> list[Tensor]:
    """All tensors of values, those of values of several tensors among them."""
    return [t for some in values for v in some for t in ([v] if isinstance(v, Tensor) else v.tensors())]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    room = _ROOM.get(one.dtype, 1e-2) * float(other.abs().max()) if other.numel() and other.is_floating_point() else 0.0
    return bool(torch.allclose(one, other, rtol=0, atol=room, equal_nan=True))
