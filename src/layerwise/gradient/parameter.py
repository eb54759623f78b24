"""The per-sample gradient of one parameter as parts, one for each use, summed before anything is squared.

A part holds rows (inputs and output cotangents) where the used tensor is the parameter or a transposed view of it, and
per-sample gradients otherwise: a derived tensor's gradients reach its parameters by a vector-Jacobian product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from layerwise import tensors
from layerwise.gradient.parts import LaterPart, Part, RowsPart, bias_of, joined_parts, layouts_of
from layerwise.rows import contract, gram, inner, layout, project
from layerwise.rows.cost import norms_form_rows, squares_need_rows
from layerwise.rows.layout import FactorForm
from layerwise.rows.project import TensorSketch
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use

__all__ = ["ParameterGradient", "PartCollector"]


_CHUNK = 2**22  # elements of per-sample gradients in memory at once where uses have no common row form

T = TypeVar("T")


@dataclass(frozen=True)
class ParameterGradient:
    """The gradient of one parameter for a stack of V cotangents; column: the index of the first among all stacks.

    Second moments, norms and inner products are cached for all quantities that ask for them.

    shared: a cache for results that other parameters of the same stack can reuse (a weight and its bias).
    summed: whether `sum` will be asked for, so that whoever forms the per-sample gradients adds them up.
    """

    name: str
    shape: torch.Size
    parts: Sequence[Part]
    column: int = 0
    shared: dict[Any, Any] = field(default_factory=dict)
    summed: bool = False
    _kept: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def all_rows(self) -> RowsPart | None:
        """The parts as one pair of rows, or None where they have no common row form."""
        if len(self.parts) == 1:
            (first,) = self.parts
            return first if isinstance(first, RowsPart) else None
        parts = self._row_parts
        if parts is None or len({part.rows.kind for part in parts}) > 1:
            return None
        if self._groups is None or len(self._groups) > 1:
            return None
        return joined_parts(parts)

    @cached_property
    def _row_parts(self) -> list[RowsPart] | None:
        """The parts, or None unless all of them are rows."""
        found = [part for part in self.parts if isinstance(part, RowsPart)]
        return found if len(found) == len(self.parts) else None

    @cached_property
    def _groups(self) -> list[list[int]] | None:
        """Indices of parts grouped by layout, or None where different layouts share an element of the parameter."""
        return None if self._row_parts is None else layout.grouped(layouts_of(self._row_parts))

    @cached_property
    def groups(self) -> list[RowsPart] | None:
        """One pair of rows for the parameter, or for each of its disjoint slices; None where neither exists."""
        if self.all_rows is not None:
            return [self.all_rows]
        parts = self._row_parts
        if parts is None or self._groups is None:
            return None
        return [joined_parts([parts[i] for i in group]) for group in self._groups]

    def laid(self, partner: bool = False) -> FactorForm:
        """The form of the Kronecker factors and the matrix layouts; partner: find the bias of its uses as well."""
        if self.groups is None:
            return FactorForm("gradients", (layout.dense_layout(self.shape),))
        found = tuple(part.layout() for part in self.groups)
        if len(found) > 1 or self.groups[0].slot.used.numel() < self.shape.numel():
            return FactorForm("slices", found)
        if partner:
            names = {bias_of(part) for part in self._row_parts or ()}
            found = (replace(found[0], partner=names.pop() if len(names) == 1 else None),)
        return FactorForm("rows", found)

    @property
    def size(self) -> torch.Size:
        """(V, N)."""
        return self.parts[0].size

    @property
    def _fewest(self) -> Sequence[Part]:
        """The part with all rows alone where there is one, otherwise all parts."""
        return self.parts if self.all_rows is None else [self.all_rows]

    def per_sample(self, start: int = 0, stop: int | None = None) -> Tensor:
        """`[V,n,*shape]`: the gradient of each sample from `start` to `stop`, summed over uses."""
        first, *others = self._fewest
        total = first.per_sample(start, stop)
        for i, part in enumerate(others):
            total = part.added(total, start, stop, new=i > 0 or first.is_slice)
        return total

    def chunks(self) -> Iterator[Tensor]:
        """Yield `per_sample` for a few samples at a time, if large for one cotangent at a time; never `[N, P]`."""
        for gradient in self._columns() if self.parts[0].size[0] * self.shape.numel() > _CHUNK else [self]:
            yield from gradient._in_chunks()

    def _in_chunks(self) -> Iterator[Tensor]:
        """Yield `per_sample` for a few samples at a time, so that memory never holds `[N, P]`."""
        n, each = self.parts[0].size[1], self._each()
        for start in range(0, n, each):
            yield self.per_sample(start, start + each)

    def total(self) -> Tensor:
        """`[V,*shape]`: the gradient, summed over samples and uses."""
        if (part := self.all_rows) is not None:
            return part.fold(contract.total(part.rows))
        return sum((g.sum(1) for g in self._in_chunks()), self._zeros(()))

    def rows(self) -> Tensor:
        """`per_sample()` of all samples, cached; second moments and norms then reuse it."""
        return self._once("rows", self._rows)

    def _rows(self) -> Tensor:
        if (part := self.all_rows) is None or not self.summed:
            return self.per_sample()
        return part.fold(self._adding_up(part, lambda sums: contract.per_sample(part.rows, sums=sums)))

    def _adding_up(self, part: RowsPart, compute: Callable[[Tensor | None], T], forms: bool = True) -> T:
        """What is computed of the rows, keeping the gradients' sum where it is wanted and they are formed for it.

        compute: gets zeros `[K,O,I]` to add the sum to, or None.
        """
        if not (forms and self.summed) or "sum" in self._kept or part.rows.kind != "float":
            return compute(None)
        sums = part.rows.g.new_zeros((*part.rows.g.shape[3:], part.rows.size_in))
        found = compute(sums)
        if found is not None:
            self._kept["sum"] = part.fold(sums)
        return found

    def sum(self) -> Tensor:
        """`[*shape]`: the gradient summed over stacks, samples and uses, from where they were formed if they were."""
        return self._once("sum", lambda: self.total().sum(0))

    def _held_rows(self) -> Tensor | None:
        """The cached per-sample gradients, unless there are none or their squares are cheaper from rows."""
        held = self._kept.get("rows")
        if held is None or (part := self.all_rows) is None:
            return held
        return held if squares_need_rows(part.rows) else None

    def second_moment(self) -> Tensor:
        """`[*shape]`: sum over v and n of the squared per-sample gradient."""
        return self._once("second moment", self._second_moment)

    def _once(self, what: str, compute: Callable[[], Tensor]) -> Tensor:
        """A cached result, as a copy-on-write copy for every caller."""
        if what not in self._kept:
            self._kept[what] = compute()
        return tensors.lazy_copy(self._kept[what])

    def _second_moment(self) -> Tensor:
        if (held := self._held_rows()) is not None and not held.is_complex():
            return contract.sum_of_squares(held.flatten(0, 1))
        if (part := self.all_rows) is not None:
            return part.fold(self._adding_up(part, lambda sums: contract.second_moment(part.rows, sums)))
        return sum((tensors.squared(g).sum((0, 1)) for g in self._in_chunks()), self._zeros(self.shape, real=True))

    def output_gram(self, g: Tensor) -> Tensor:
        """The Gram matrix `[K,O,O]` of the rows' cotangents g; cached for a weight and its bias."""
        # not its data_ptr, which wrapped tensors of some devices have in common
        key = g.untyped_storage()._cdata, g.storage_offset(), g.shape, g.stride()
        if key not in self.shared:
            self.shared[key] = g, contract.output_gram(g)  # keeps g alive, so that its storage stays the one
        return self.shared[key][1]

    def dense_grams(self) -> tuple[Tensor, Tensor]:
        """Sums over v, n of D D^T `[1,O,O]` and D^T D `[1,I,I]` (or its diagonal), D as by `layout.dense_layout`."""
        return gram.dense_grams(self.chunks(), self.shape, self.like)

    def squared_norm(self) -> Tensor:
        """`[V,N]`: squared norm of each per-sample gradient; the diagonal of `pairwise_dot` where that is cached."""
        return self._once("squared norm", self._squared_norm)

    def _squared_norm(self) -> Tensor:
        if "dots" in self._kept:
            return self._kept["dots"].diagonal(dim1=1, dim2=2).clone()
        if (held := self._held_rows()) is not None:
            return torch.linalg.vector_norm(held.reshape(*held.shape[:2], -1), dim=2).square_()
        if (part := self.all_rows) is not None:
            forms = norms_form_rows(part.rows)
            return self._adding_up(part, lambda sums: contract.squared_norm(part.rows, sums), forms)
        norms = [tensors.squared(g.reshape(*g.shape[:2], -1)).sum(2) for g in self._in_chunks()]
        return torch.cat(norms, 1) if norms else self._zeros((1, 0), real=True)

    @property
    def like(self) -> Tensor:
        """A scalar with the dtype and device of the gradient."""
        return self._zeros(())

    def squares(self) -> Tensor:
        """`[N,*shape]`: sum over v of the squared per-sample gradient, one cotangent at a time."""
        total: Tensor | None = None
        for column in self._columns():
            value = column.per_sample()[0]
            total = value.square() if total is None else total.addcmul_(value, value)
        return self._zeros((self.parts[0].size[1], *self.shape)) if total is None else total

    def _columns(self) -> Iterator[ParameterGradient]:
        """Yield the gradient for each single cotangent."""
        parts = self._fewest
        for v in range(parts[0].size[0]):
            yield ParameterGradient(self.name, self.shape, [part.column(v) for part in parts], self.column + v)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """`[*shape]`: sum over v and n of the per-sample gradient times `weights` `[V,N]`."""
        if (part := self.all_rows) is not None:
            return part.fold(contract.weighted_sum(part.rows, weights))
        total, start = self._zeros(self.shape), 0
        for g in self._in_chunks():
            w = weights[:, start : start + g.shape[1]].to(g.dtype)
            total = total + torch.tensordot(w, g, 2)
            start += g.shape[1]
        return total

    def pairwise_dot(self) -> Tensor:
        """`[V,N,N]`: inner products of the per-sample gradients."""
        return self._once("dots", self._pairwise_dot)

    def _pairwise_dot(self) -> Tensor:
        if (held := self._held_rows()) is not None:
            flat = tensors.as_real(held).reshape(*held.shape[:2], -1)
            return flat @ flat.mT
        if (part := self.all_rows) is not None:
            return contract.pairwise_dot(part.rows)
        n, each = self.parts[0].size[1], self._each()
        blocks = [slice(low, min(n, low + each)) for low in range(0, n, each)]
        result: Tensor | None = None
        for p, here in enumerate(blocks):
            x = self._vectors(here)
            if result is None:
                result = x.new_zeros(len(x), n, n)
            for there in blocks[: p + 1]:
                y = x if there == here else self._vectors(there)
                result[:, here, there] = x @ y.mT
                result[:, there, here] = result[:, here, there].mT.clone()
        return self._zeros((1, 0, 0), real=True) if result is None else result

    def sketch(self, sketch: TensorSketch) -> Tensor:
        """`[V,N,dim]`: sketches of the per-sample gradients, whatever the layout of the parameter's uses."""
        if (part := self.all_rows) is not None:
            forms, laid = sketch.forms(part.rows), part.layout()
            found = self._adding_up(part, lambda sums: sketch.of_rows(part.rows, laid, sums), forms)
            if found is not None:
                return found
        chunks = [sketch.of_gradients(g.reshape(*g.shape[:2], -1)) for g in self._in_chunks()]
        return torch.cat(chunks, 1) if chunks else self._zeros((1, 0, sketch.dim))

    def inner(self, directions: Tensor) -> Tensor:
        """`[V,N,Q]`: inner products of the per-sample gradients with directions `[Q,*shape]`."""
        total: Tensor | None = None
        for part in self._fewest:
            if isinstance(part, RowsPart):
                value = inner.inner(part.rows, part.layout().matrix(directions))
            else:
                value = self._inner_in_chunks(part, directions)
            total = value if total is None else total + value
        assert total is not None
        return total

    def _inner_in_chunks(self, part: Part, directions: Tensor) -> Tensor:
        n, each = part.size[1], self._each()
        flat = directions.flatten(1).T
        starts = range(0, n, each)
        found = [part.per_sample(low, low + each).flatten(2) @ flat for low in starts]
        return torch.cat(found, 1) if found else self._zeros((part.size[0], 0, len(directions)))

    @property
    def positions(self) -> list[int]:
        """The numbers of positions that rows of its uses have; none where not all uses have rows."""
        return sorted({part.rows.g.shape[2] for part in self._row_parts or ()})

    def inner_by_position(self, directions: Tensor) -> Tensor | None:
        """`[V,N,T,Q]`: what each position of the uses' rows adds to `inner`; None where the uses share no positions."""
        parts = self._row_parts
        if parts is None or len(self.positions) > 1:
            return None
        each = [inner.inner_by_position(part.rows, part.layout().matrix(directions)) for part in parts]
        return torch.stack(each).sum(0)

    def two_sided(self, left: Tensor, right: Tensor) -> Tensor:
        """`[V,N,P,Q]`: `left D right^T` of the per-sample gradients D as matrices `[R,C]`, the first axis by the rest.

        left: `[P,R]`; right: `[Q,C]`.
        """
        if (part := self.all_rows) is not None:
            factors = project.in_layout(left, right, part.layout())
            if factors is not None:
                u, w, turned = factors
                value = inner.two_sided(part.rows, u, w)
                return value.mT if turned else value
        sides = left.shape[1], right.shape[1]
        chunks = [left @ g.reshape(*g.shape[:2], *sides) @ right.T for g in self._in_chunks()]
        return torch.cat(chunks, 1) if chunks else self._zeros((1, 0, len(left), len(right)))

    def _vectors(self, where: slice) -> Tensor:
        """`[V,n,P]`, or `[V,n,2P]` real numbers for a complex parameter."""
        g = tensors.as_real(self.per_sample(where.start, where.stop))
        return g.reshape(*g.shape[:2], -1)

    def _each(self) -> int:
        """The number of samples whose gradients are computed at once."""
        through = [part.slot.used.numel() for part in self.parts if isinstance(part, LaterPart)]
        return max(1, _CHUNK // max(1, self.shape.numel(), *through))

    def _zeros(self, shape: Sequence[int], real: bool = False) -> Tensor:
        zeros = self.parts[0].zeros(shape)
        return zeros.real if real and zeros.is_complex() else zeros


class PartCollector:
    """Collects the parts of every parameter's gradient, and returns the gradient once all its uses have parts.

    asked: the names of the parameters whose gradients are wanted; None: all. summed: of those whose sum is wanted, too.
    """

    def __init__(
        self, tape: Tape, uses: Iterable[Use], asked: Collection[str] | None = None, summed: Collection[str] = ()
    ) -> None:
        self._tape, self._summed = tape, summed
        self._expected: dict[str, set[int]] = {}
        self._waiting: dict[str, list[Part]] = {}
        for use in uses:
            for name in use.names:
                if asked is None or name in asked:
                    self._expected.setdefault(name, set()).add(use.index)

    def add(self, use: Use, parts: Iterable[tuple[str, Part]]) -> Iterator[ParameterGradient]:
        """Add the parts of one use, and yield the gradients that are now complete."""
        for name, part in parts:
            self._waiting.setdefault(name, []).append(part)
        for name in use.names:
            if name in self._expected:
                self._expected[name].discard(use.index)
                if not self._expected[name]:
                    del self._expected[name]
                    yield self._take(name)

    def leave(self, use: Use) -> None:
        """Wait for no parameter of a use, whose gradients are computed elsewhere."""
        for name in use.names:
            self._expected.pop(name, None)

    def complete(self, use: Use) -> bool:
        """Whether the gradients of all parameters of a use have been returned."""
        return self._expected.keys().isdisjoint(use.names)

    def rest(self) -> Iterator[ParameterGradient]:
        """Yield the incomplete gradients, of which some use had no cotangent."""
        for name in list(self._waiting):
            yield self._take(name)

    def _take(self, name: str) -> ParameterGradient:
        parts, shape = self._waiting.pop(name), self._tape.parameters[name].shape
        return ParameterGradient(name, shape, parts, summed=name in self._summed)
