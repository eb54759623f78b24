"""Where data comes from: the tensor that it was made of, and how its elements were moved since.

A call that only moves elements (an index, a chunk, a reshape, a `cat`) can be run again on integers: where each element
of the first tensor holds its number along dim 0, the result holds the number that each element comes from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.tape.calls import ASSEMBLES, CHOOSES, LIKE, RANDOM, REARRANGES, SCATTER, assembles, functions_and_methods
from layerwise.tensors import is_out_of_memory

__all__ = [
    "Moved", "Origin", "Origins", "Source", "ancestors", "is_open", "numbers", "offsets_of", "parents", "settle",
    "sources",
]  # fmt: skip

_MOVES = REARRANGES | CHOOSES | {F.pad}
_MOVES |= functions_and_methods(
    """gather take take_along_dim split chunk tensor_split unbind split_with_sizes expand expand_as flip roll repeat
    tile repeat_interleave stack cat concat vstack hstack"""
)

_OTHERS = LIKE | _MOVES | SCATTER | ASSEMBLES  # the calls whose results are no map of their data, row by row


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor that data was made of; two with equal shapes are two tensors.

    made_of: where the tensors come from that were put together to it, by calls that are not followed row by row. new:
    whether a call made it of none, as noise; where it meets data, the rows are those of the data.
    """

    shape: torch.Size
    made_of: tuple[Origin, ...] = ()
    new: bool = False


@dataclass(eq=False)
class Moved:
    """The result of a call that moves elements; each data tensor among its arguments is an `Origin`.

    place: the number of the result where the call returns several. drawn: whether rows were drawn by whole numbers, so
    that they may be a batch of their own; it is one where nothing else was made of the same tensor (`settle`).
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | None
    shape: torch.Size
    drawn: bool = False
    own: bool = False


Origin = Source | Moved


class Origins:
    """Notes of the batch that each tensor was made from, by maps that keep the samples, and of its rows' origin."""

    def __init__(self) -> None:
        self._noted: dict[int, tuple[weakref.ref[Tensor], Tensor, Origin]] = {}
        self.together: dict[tuple[int, int], tuple[Origin, Origin]] = {}  # tensors whose rows a call took one by one

    def of(self, tensor: Tensor) -> tuple[Tensor, Origin]:
        """The batch and the origin; the tensor itself where none was noted."""
        found = self._noted.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1], found[2]
        batch, origin = tensor.detach(), Source(tensor.shape)
        self.set(tensor, batch, origin)
        return batch, origin

    def set(self, tensor: Tensor, batch: Tensor, origin: Origin) -> None:
        """Note the batch and the origin of a tensor."""
        self._noted[id(tensor)] = (weakref.ref(tensor), batch, origin)

    def made(self, func: Any, out: Any) -> None:
        """Note the result of a call that was made of no data, if it holds random numbers."""
        if func in RANDOM and isinstance(out, Tensor):
            self.set(out, out.detach(), Source(out.shape, new=True))

    def note(self, func: Any, args: Any, kwargs: Any, data: Sequence[Tensor], out: Any) -> None:
        """Note what the results of a call of data were made from."""
        if func not in _OTHERS and isinstance(out, Tensor):
            self._mapped(out, data)
            return
        if isinstance(out, Tensor):
            results = [out]
        else:
            results = [x for x in out if isinstance(x, Tensor)] if isinstance(out, (list, tuple)) else []
        if func in LIKE:
            self.made(func, out)
        elif func in _MOVES and not data[0].requires_grad:
            if not any(x.requires_grad for x in results):
                self._moved(func, args, kwargs, data[0], results, not isinstance(out, Tensor))
        elif not results or assembles(func, args, kwargs):
            for x in results or args[:1]:  # a write returns nothing
                self._put_together(x, data)
        elif func in SCATTER and not any(x is data[0] for x in [*args[:1], kwargs.get("input")]):
            for x in results:
                self._scattered(x, data)
        else:
            for x in results:  # a frozen recurrent layer returns several
                self._mapped(x, data)

    def _put_together(self, out: Any, data: Sequence[Tensor]) -> None:
        found = self._noted.get(id(out))
        if isinstance(out, Tensor) and (found is None or found[0]() is not out):
            self.set(out, out.detach(), Source(out.shape, tuple(self.of(x)[1] for x in data if x is not out)))

    def _scattered(self, out: Tensor, data: Sequence[Tensor]) -> None:
        """Note rows that were written onto a constant: made of what has the values, and open which row of it."""
        batch, origin = self.of(next((d for d in reversed(data) if d.is_floating_point()), data[-1]))
        self.set(out, batch, Moved(_unknown_rows, (origin,), {}, None, out.shape))

    def _mapped(self, out: Tensor, data: Sequence[Tensor]) -> None:
        parent = data[0]
        if len(data) > 1 and out.dim():  # `mean - x`: the argument with as many rows as the result
            rows, dims = out.shape[0], out.dim()
            alike = [d for d in data if d.dim() == dims and d.shape[0] == rows] or [parent]
            parent = next((d for d in alike if _shows_rows(self.of(d)[1])), alike[0])
            self._meet(parent, [d for d in data if d.dim() and d.shape[0] == rows])
        if parent is not out:
            self.set(out, *self.of(parent))

    def _meet(self, one: Tensor, others: Sequence[Tensor]) -> None:
        """Note that a call took rows of several tensors together, one by one."""
        batch, origin = self.of(one)
        for other in others:
            if other is not one and self.of(other)[0] is not batch:
                met = self.of(other)[1]
                self.together[id(origin), id(met)] = origin, met

    def _moved(self, func: Any, args: Any, kwargs: Any, data: Tensor, results: Sequence[Tensor], several: bool) -> None:
        """Note the results of a moving call; one that collects samples makes a new batch."""
        kept, origin = self.of(data)
        collects = assembles(func, args, kwargs)
        first = args[0] if args else next(iter(kwargs.values()))
        table = not any(x is data for x in (first if isinstance(first, (list, tuple)) else [first]))
        drawn = not table and _draws(func, args)
        moved: Any = None
        if not table:  # else `first` is a constant, looked up by data
            moved = self.of(first)[1] if isinstance(first, Tensor) else [self.of(x)[1] for x in first]
        others = dict(kwargs) if args else dict(list(kwargs.items())[1:])
        for i, x in enumerate(results):
            if not table:
                origin = Moved(func, (moved, *args[1:]), others, i if several else None, x.shape, drawn)
            self.set(x, x.detach() if collects else kept, origin)


def _unknown_rows(*_: Any) -> Tensor:
    raise ValueError("an index decides which rows of the result are made of which")


def is_open(origin: Origin) -> bool:
    """Whether an index decided, on the way to some data, which of its rows are made of which."""
    return _followed(origin)[1]


def _followed(origin: Origin) -> tuple[Origin, bool]:
    """The tensor that data was made of, if of one alone, as far as that goes, and whether an index decided rows."""
    while isinstance(origin, Moved) and not isinstance(origin.args[0], list):
        if origin.func is _unknown_rows:
            return origin, True
        origin = origin.args[0]
    return origin, False


def _shows_rows(origin: Origin) -> bool:
    """Whether the rows of some data are known, and none that a call made of no data."""
    first, is_open = _followed(origin)
    return not is_open and not (isinstance(first, Source) and first.new)


def _draws(func: Any, args: Any) -> bool:
    """Whether a call draws a batch by whole numbers along dim 0, so that each of its rows is one of its own."""
    if func in (torch.index_select, Tensor.index_select):
        return len(args) > 1 and args[1] in (0, -args[0].dim())
    index = args[1] if func is Tensor.__getitem__ else None
    if isinstance(index, Tensor):
        return index.dim() == 1 and index.dtype in (torch.int64, torch.int32)
    return isinstance(index, list) and all(type(i) is int for i in index)


def settle(origins: Sequence[Origin]) -> None:
    """Decide which drawn rows are batches of their own: those of a tensor that nothing else of these was made of.

    Nor may anything else be made of the parts that such a tensor was put together from.
    """
    draws: dict[Origin, set[Moved | None]] = {}  # by the tensor drawn from: the draws, and None for another use of it
    for origin in origins:
        path = [origin]
        while isinstance(path[-1], Moved) and not isinstance(path[-1].args[0], list):
            path.append(path[-1].args[0])
        drawn = [x for x in path if isinstance(x, Moved) and x.drawn]
        for x in drawn:
            x.own = False
        draws.setdefault(path[-1], set()).add(drawn[-1] if drawn else None)
    single = [(drawn_from, next(iter(found))) for drawn_from, found in draws.items() if len(found) == 1]
    own = [draw for drawn_from, draw in single if draw is not None and not _shares_parts(drawn_from, draws)]
    for draw in own:
        draw.own = True


def _shares_parts(one: Origin, others: Iterable[Origin]) -> bool:
    """Whether any other tensor was made of the parts that one was made of."""
    parts = set(sources(one))
    return any(other is not one and not parts.isdisjoint(sources(other)) for other in others)


def sources(origin: Origin) -> list[Origin]:
    """The tensors that data was made of, each once."""
    if isinstance(origin, Source) or origin.own:
        return [origin]
    return list(dict.fromkeys(source for parent in parents(origin) for source in sources(parent)))


def ancestors(origin: Origin) -> set[Origin]:
    """All tensors that data was computed from, as far as calls were seen."""
    found: set[Origin] = set()
    new = sources(origin)
    while new:
        found.update(new)
        below = [x for source in new for x in (source.made_of if isinstance(source, Source) else parents(source))]
        new = [x for origin in below for x in sources(origin) if x not in found]
    return found


def parents(origin: Moved) -> list[Origin]:
    """Those of the tensors whose elements a call moved."""
    first = origin.args[0]
    return first if isinstance(first, list) else [first]


def offsets_of(source: Origin, origin: Origin) -> dict[Origin, int]:
    """Offsets for `numbers` by which the rows of one source have numbers from 0 on, and those of all others less."""
    return dict.fromkeys(sources(origin), -(2**40)) | {source: 0}


def numbers(origin: Origin, offsets: Mapping[Origin, int]) -> Tensor | None:
    """The number along dim 0 of the source that each element comes from, plus the source's offset; int64.

    None where the moves cannot be run on integers.
    """
    try:
        with torch.no_grad(), torch._C.DisableTorchFunction():
            return _run(origin, offsets, {})
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return None


def _run(origin: Origin, offsets: Mapping[Origin, int], done: dict[int, Tensor]) -> Tensor:
    if id(origin) in done:
        return done[id(origin)]
    if isinstance(origin, Source) or origin.own:
        size = origin.shape[0] if origin.shape else 1
        lead = torch.arange(size) + offsets[origin]
        found = lead.reshape(-1, *(1,) * (len(origin.shape) - 1)).expand(origin.shape) if origin.shape else lead[0]
    else:
        first = origin.args[0]
        again: Any = [_run(x, offsets, done) for x in first] if isinstance(first, list) else _run(first, offsets, done)
        rest = [_on_cpu(x) for x in origin.args[1:]]
        others = {key: _on_cpu(x) for key, x in origin.kwargs.items()}
        out = _padded(again, *rest, **others) if origin.func is F.pad else origin.func(again, *rest, **others)
        found = _fitted(out if origin.place is None else out[origin.place], origin.shape)
    done[id(origin)] = found
    return found


def _fitted(found: Tensor, shape: torch.Size) -> Tensor:
    """Numbers in the shape of the data: a map in between may have given it other features, along which rows are one."""
    if found.dim() != len(shape):
        raise ValueError("the moves gave another shape")
    for axis, size in enumerate(shape):
        if found.shape[axis] != size:
            one = found.narrow(axis, 0, 1)
            if not bool((found == one).all()):
                raise ValueError("the moves gave another shape")
            found = one.expand(*found.shape[:axis], size, *found.shape[axis + 1 :])
    return found


def _padded(rows: Tensor, pad: Sequence[int], *_: Any, **__: Any) -> Tensor:
    """What is added along an axis belongs to the row that it is added to; rows that are added belong to none."""
    for i in range(len(pad) // 2):
        before, after = pad[2 * i : 2 * i + 2]
        axis = rows.dim() - 1 - i
        if axis == 0 and (before > 0 or after > 0):
            raise ValueError("rows were added")
        size = rows.shape[axis]
        rows = rows.index_select(axis, torch.arange(-before, size + after).clamp(0, size - 1))
    return rows


def _on_cpu(argument: Any) -> Any:
    if isinstance(argument, (tuple, list)):
        return type(argument)(_on_cpu(x) for x in argument)
    return argument.cpu() if isinstance(argument, Tensor) else argument
