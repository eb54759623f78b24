"""The gradient of one parameter as parts, one for each use, joined before anything is squared.

A part is a pair of rows where the used tensor is the parameter itself (or a transposed view of it), and
per-sample gradients otherwise: those of a derived tensor are carried back to its parameters by its vjp.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layerwise import contract, grams, layouts, memory, projection
from layerwise.carried import Later, carry
from layerwise.layouts import Laid, Matrix
from layerwise.ops.base import Rows, Samples, Slot
from layerwise.tape import Tape
from layerwise.uses import Use
from layerwise.views import Map, view_maps

__all__ = ["ParameterGradient", "Part", "parts_of"]


@dataclass(frozen=True)
class Part:
    """What one use gives to one parameter: rows with maps to the parameter's shape, or per-sample gradients.

    fold: `[..., K,O,I]` -> `[..., *shape]`; matrix: its inverse. dense: `[V,N,*shape]`, or made as it is read.
    carried: whether it came back through a graph of parameters, which a backward pass frees.
    """

    use: Use
    slot: Slot | None = None
    rows: Rows | None = None
    fold: Map | None = None
    matrix: Map | None = None
    dense: Tensor | Later | None = None
    view: tuple[Map, Map] | None = None
    carried: bool = False

    def without_data(self) -> Matrix:
        """The maps to the parameter's shape and back, free of the batch and of the graph."""
        assert self.slot is not None and self.rows is not None and self.view is not None
        return Matrix(*layouts.maps(layouts.hollow(self.slot), self.view), self.slot.bias)

    def to(self, dtype: torch.dtype | None) -> Part:
        """The same part with its numbers in another type; None: as they are."""
        if dtype is None:
            return self
        dense = None if self.dense is None else self.dense.to(dtype)
        if self.rows is None:
            return replace(self, dense=dense)
        a = self.rows.a
        a = a.to(dtype) if a is not None and a.is_floating_point() else a
        return replace(self, rows=Rows(a, self.rows.g.to(dtype), self.rows.size_in), dense=dense)

    @property
    def samples(self) -> int:
        """N."""
        held = self.dense if self.rows is None else self.rows.g
        assert held is not None
        return held.shape[1]


_CHUNK = 2**22  # elements of per-sample gradients held at once where uses have no common row form


@dataclass(frozen=True)
class ParameterGradient:
    """All parts of one parameter's gradient for a stack of V cotangents; `column` numbers the first.

    Second moments, norms and dots are computed once, for all quantities that ask for them.

    shared: results that other parameters of the same stack can use again (a weight and its bias).
    curvature: for the cotangent `Averaged`, the Hessian by the output rows of one sample `[T,K,O,T,K,O]`.
    """

    name: str
    shape: torch.Size
    parts: Sequence[Part]
    column: int = 0
    shared: dict[Any, Any] = field(default_factory=dict)
    curvature: Tensor | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def joined(self) -> Part | None:
        """The parts as one pair of rows, or None where they have no common row form."""
        first = self.parts[0]
        if len(self.parts) == 1:
            return first if first.rows is not None else None
        rows = [p.rows for p in self.parts if p.rows is not None]
        kinds = {r.kind for r in rows}
        if len(rows) < len(self.parts) or len(kinds) > 1 or self._groups is None or len(self._groups) > 1:
            return None
        return _joined(self.parts)

    @cached_property
    def _groups(self) -> list[list[int]] | None:
        """The numbers of parts that lay the parameter out alike, where those that do not share no element of it."""
        matrices = [p.matrix for p in self.parts if p.matrix is not None]
        return layouts.grouped(matrices, self.shape) if len(matrices) == len(self.parts) else None

    @cached_property
    def groups(self) -> list[Part] | None:
        """The parts as one pair of rows for each matrix, of the parameter or of disjoint slices; None otherwise."""
        if self.joined is not None:
            return [self.joined]
        if self._groups is None:
            return None
        return [_joined([self.parts[i] for i in group]) for group in self._groups]

    def laid(self, partner: bool = False) -> Laid:
        """How the parameter has Kronecker factors; partner: look for the bias of its uses as well."""
        if self.groups is None:
            return layouts.dense_laid(self.shape)
        found = tuple(part.without_data() for part in self.groups)
        if sum(part.slot.used.numel() for part in self.groups if part.slot is not None) < self.shape.numel():
            return Laid("slices", found, layouts.rest_of(found, self.shape))
        if len(found) > 1:
            return Laid("slices", found)
        if partner:
            names = {_bias_of(part) for part in self.parts}
            found = (found[0]._replace(partner=names.pop() if len(names) == 1 else None),)
        return Laid("rows", found)

    def per_sample(self, start: int = 0, stop: int | None = None) -> Tensor:
        """`[V,n,*shape]`: the gradient of each sample from `start` to `stop`, summed over uses."""
        parts = [self.joined] if self.joined is not None else self.parts
        total: Tensor | None = None
        for part in parts:
            if part.rows is None:
                assert part.dense is not None
                value = part.dense[:, start:stop]
            else:
                assert part.fold is not None
                length = len(range(part.samples)[start:stop])
                value = part.fold(contract.per_sample(contract.narrow(part.rows, start, length)))
            total = value if total is None else total + value
        assert total is not None
        return total

    def chunks(self) -> Iterator[Tensor]:
        """`per_sample` a few samples at a time, and one cotangent where they are large: `[N, P]` is never held."""
        held = self.parts[0].dense if self.parts[0].rows is None else self.parts[0].rows.g
        assert held is not None
        for gradient in self._columns() if len(held) * self.shape.numel() > _CHUNK else [self]:
            yield from gradient._in_chunks()

    def _in_chunks(self) -> Iterator[Tensor]:
        """`per_sample` a few samples at a time, so that `[N, P]` is never held."""
        n, each = self.parts[0].samples, self._each()
        for start in range(0, n, each):
            yield self.per_sample(start, start + each)

    def total(self) -> Tensor:
        """`[V,*shape]`: the gradient, summed over samples and uses."""
        part = self.joined
        if part is not None and part.rows is not None and part.fold is not None:
            return part.fold(contract.total(part.rows))
        return sum((g.sum(1) for g in self._in_chunks()), self._zeros(()))

    def rows(self) -> Tensor:
        """`per_sample()` of all samples, for every quantity that asks; squares are then read off it."""
        return self._once("rows", self.per_sample)

    def _held_rows(self) -> Tensor | None:
        """All per-sample gradients, where they are at hand and squares of them are not had for less."""
        part, held = self.joined, self._kept.get("rows")
        if held is None or part is None or part.rows is None:
            return held
        return held if contract.squares_need_rows(part.rows) else None

    def second_moment(self) -> Tensor:
        """`[*shape]`: sum over v and n of the squared per-sample gradient."""
        return self._once("second moment", self._second_moment)

    def _once(self, what: str, compute: Callable[[], Tensor]) -> Tensor:
        """A result for every quantity that asks: its values are shared until one of them is written to."""
        if what not in self._kept:
            self._kept[what] = compute()
        return memory.lazy_copy(self._kept[what])

    def _second_moment(self) -> Tensor:
        if (held := self._held_rows()) is not None:
            return contract.sum_of_squares(held.flatten(0, 1))
        part = self.joined
        if part is not None and part.rows is not None and part.fold is not None:
            return part.fold(contract.second_moment(part.rows))
        return sum((g.square().sum((0, 1)) for g in self._in_chunks()), self._zeros(self.shape))

    def output_gram(self, g: Tensor) -> Tensor:
        """`[K,O,O]` of the joined rows' cotangents; computed once for a weight and its bias."""
        key = g.data_ptr(), g.shape, g.stride()
        if key not in self.shared:
            self.shared[key] = g, contract.output_gram(g)  # g is held, so that its address stays its own
        return self.shared[key][1]

    def dense_grams(self) -> tuple[Tensor, Tensor]:
        """Sums over v and n of D D^T, `[1,O,O]`, and D^T D, `[1,I,I]` or its diagonal, D as `layouts.dense_matrix`."""
        return grams.dense_grams(self.chunks(), self.shape, self.like)

    def squared_norm(self) -> Tensor:
        """`[V,N]`: squared norm of each per-sample gradient; the diagonal of the dots where those are known."""
        return self._once("squared norm", self._squared_norm)

    def _squared_norm(self) -> Tensor:
        if "dots" in self._kept:
            return self._kept["dots"].diagonal(dim1=1, dim2=2).clone()
        if (held := self._held_rows()) is not None:
            return torch.linalg.vector_norm(held.reshape(*held.shape[:2], -1), dim=2).square_()
        part = self.joined
        if part is not None and part.rows is not None:
            return contract.squared_norm(part.rows)
        norms = [g.reshape(*g.shape[:2], -1).square().sum(2) for g in self._in_chunks()]
        return torch.cat(norms, 1) if norms else self._zeros((1, 0))

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device of the gradient."""
        return self._zeros(())

    def squares(self) -> Tensor:
        """`[N,*shape]`: sum over v of the squared per-sample gradient, one cotangent at a time."""
        total: Tensor | None = None
        for column in self._columns():
            value = column.per_sample()[0]
            total = value.square() if total is None else total.addcmul_(value, value)
        return self._zeros((self.parts[0].samples, *self.shape)) if total is None else total

    def _columns(self) -> Iterator[ParameterGradient]:
        """The same gradient for each cotangent alone."""

        def alone(part: Part, v: int) -> Part:
            if part.rows is None:
                assert part.dense is not None
                return replace(part, dense=part.dense[v : v + 1, :])
            return replace(part, rows=part.rows.sent(part.rows.g[v : v + 1]))

        parts = [self.joined] if self.joined is not None else self.parts
        held = parts[0].dense if parts[0].rows is None else parts[0].rows.g
        assert held is not None
        for v in range(len(held)):
            yield ParameterGradient(self.name, self.shape, [alone(p, v) for p in parts], self.column + v)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """`[*shape]`: sum over v and n of the per-sample gradient times `weights` `[V,N]`."""
        part = self.joined
        if part is not None and part.rows is not None and part.fold is not None:
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
            flat = held.reshape(*held.shape[:2], -1)
            return flat @ flat.mT
        part = self.joined
        if part is not None and part.rows is not None:
            return contract.pairwise_dot(part.rows)
        n, each = self.parts[0].samples, self._each()
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
        return self._zeros((1, 0, 0)) if result is None else result

    def sketch(self, left: Tensor, right: Tensor) -> Tensor:
        """`[V,N,J]`: inner products with the rank-one matrices `left[j] right[j]^T` of shape `[R,C]`, R·C = numel.

        left: `[J,R]`; right: `[J,C]`. The parameter's elements count in its own order, whatever the layout of its uses.
        """
        part = self.joined
        if part is not None and part.rows is not None and part.matrix is not None:
            factors = projection.in_layout(left, right, part.matrix, self.shape)
            if factors is not None:
                return projection.project_rows(part.rows, *factors)
        chunks = [projection.project_vectors(g.reshape(*g.shape[:2], -1), left, right) for g in self._in_chunks()]
        return torch.cat(chunks, 1) if chunks else self._zeros((1, 0, len(left)))

    def _vectors(self, where: slice) -> Tensor:
        """`[V,n,P]`."""
        g = self.per_sample(where.start, where.stop)
        return g.reshape(*g.shape[:2], -1)

    def _each(self) -> int:
        """How many samples' gradients are held at once."""
        through = [p.dense.slot.used.numel() for p in self.parts if isinstance(p.dense, Later)]
        return max(1, _CHUNK // max(1, self.shape.numel(), *through))

    def _zeros(self, shape: Sequence[int]) -> Tensor:
        first = self.parts[0]
        like = first.dense if first.rows is None else first.rows.g
        assert like is not None
        return like.new_zeros(shape)


def parts_of(
    tape: Tape,
    use: Use,
    g: Tensor,
    samples: Samples | None,
    later: bool = False,
    flat: Collection[str] = (),
    lenient: bool = False,
) -> list[tuple[str, Part]]:
    """The parts that a stack of cotangents `[V, *out_shape]` of one use gives to each parameter.

    later: carry what came through a derived tensor only as it is read, while its graph lives.
    flat: parameters that have rows and of which no per-sample structure is asked (Kronecker factors).
    lenient: what is neither flat nor has rows becomes a part without data. samples: None where all are flat or lenient.
    """
    found: list[tuple[str, Part]] = []
    for derived, slot in zip(use.used, use.slots, strict=True):
        if len(derived.names) == 1:
            (name,) = derived.names
            where = None if name in flat else samples
            view = view_maps(slot.used, tape.parameters[name])
            if view is not None and slot.factored and (where is None or where.axis not in slot.aligned):
                found.append((name, Part(use, slot, slot.rows(g, where), *layouts.maps(slot, view), view=view)))
                continue
        if lenient:
            found += [(name, Part(use)) for name in sorted(derived.names)]
            continue
        assert samples is not None
        leaves = {name: tape.parameters[name] for name in sorted(derived.names)}
        if later and slot.factored and samples.axis not in slot.aligned and not slot.used.is_leaf:
            rows = slot.rows(g, samples)
            found += [(name, Part(use, dense=Later(slot, rows, leaf), carried=True)) for name, leaf in leaves.items()]
            continue
        dense = slot.dense(g, samples)
        carried = not slot.used.is_leaf
        values = carry(slot.used, dense, list(leaves.values())) if carried else [dense]
        found += [(name, Part(use, dense=v, carried=carried)) for name, v in zip(leaves, values, strict=True)]
    return found


def _bias_of(part: Part) -> str | None:
    """The parameter that a use adds to each output row of a weight: `Z = W A + b`; None where there is none.

    Proved on the numbers of the output's places: both slots must lay them out as the same rows.
    """
    if part.slot is None or part.rows is None or part.slot.bias:
        return None
    places = torch.arange(part.use.call.out_shape.numel(), device=part.rows.g.device)
    places = places.to(part.rows.g.dtype).reshape(1, *part.use.call.out_shape)
    for derived, slot in zip(part.use.used, part.use.slots, strict=True):
        if not slot.bias or not slot.factored or not derived.tensor.is_leaf:
            continue
        elements = torch.arange(slot.used.numel()).reshape(slot.used.shape)
        if not torch.equal(slot.matrix(elements).flatten(), elements.flatten()):
            continue
        mine, its = (s.output(places, None)[0].flatten(0, 1).flatten(1) for s in (part.slot, slot))
        if mine.shape == its.shape and torch.equal(mine[mine[:, 0].argsort()], its[its[:, 0].argsort()]):
            return next(iter(derived.names))
    return None


def _joined(parts: Sequence[Part]) -> Part:
    """Parts of one layout as one pair of rows; inputs of several kinds are written out."""
    first = parts[0]
    rows = [part.rows for part in parts if part.rows is not None]
    if len({r.g.shape[1] for r in rows}) > 1:  # rows without sample structure: all are positions
        rows = [contract.flatten_samples(r) for r in rows]
    if len({r.kind for r in rows}) > 1:
        rows = [grams.written_out(r) for r in rows]
    return Part(first.use, first.slot, contract.concat(rows), first.fold, first.matrix, view=first.view)
