"""What one use contributes to a parameter's gradient."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.gradient.derived import Later, carry, hollow, maps
from layerwise.ops.base import Slot
from layerwise.rows import contract, gram
from layerwise.rows.base import Rows, Samples
from layerwise.rows.layout import Matrix
from layerwise.rows.views import Map, view_maps
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use

__all__ = ["Part", "bias_of", "joined_parts", "parts_of"]


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
        return Matrix(*maps(hollow(self.slot), self.view), self.slot.bias)

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
                found.append((name, Part(use, slot, slot.rows(g, where), *maps(slot, view), view=view)))
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


def bias_of(part: Part) -> str | None:
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


def joined_parts(parts: Sequence[Part]) -> Part:
    """Parts of one layout as one pair of rows; inputs of several kinds are written out."""
    first = parts[0]
    rows = [part.rows for part in parts if part.rows is not None]
    if len({r.g.shape[1] for r in rows}) > 1:  # rows without sample structure: all are positions
        rows = [contract.flatten_samples(r) for r in rows]
    if len({r.kind for r in rows}) > 1:
        rows = [gram.written_out(r) for r in rows]
    return Part(first.use, first.slot, contract.concat(rows), first.fold, first.matrix, view=first.view)
