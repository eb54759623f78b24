"""Which rows of a use are real: those that some counting loss term can send a cotangent to.

Padding is what is not: rows behind ignored targets, or that a selection (`logits[keep]`) leaves out. A row is left out
where it answers to what does not count, and to nothing that counts, in two vector-Jacobian products of random
cotangents. So a row of exact zeros (an inactive unit, a loser of max pooling) stays, as it does in a program where
everything counts, of which nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise.graph.coverage import Graph
from layerwise.graph.decisions import decided
from layerwise.graph.probes import away_from_zero
from layerwise.graph.walk import Node
from layerwise.losses import Likelihood
from layerwise.rows.base import Samples
from layerwise.tape.pull import pull
from layerwise.tape.uses import Use

__all__ = ["RealRows", "measure_rows"]

_COUNTS, _OTHER = 1, 2  # bits: answers to what counts, to what does not


@dataclass(frozen=True)
class RealRows:
    """What the outputs of uses answer to, and what they read, by the number of the use: bits.

    outputs: `[*rows, 1]` where the features are last, else `[*out_shape]`. inputs: `[*rows, 1]`, where these are also
    the rows of the only tensor that is read. readers: all uses that read the same tensor by the same function: their
    rows are one row.
    """

    outputs: Mapping[int, Tensor]
    inputs: Mapping[int, Tensor]
    readers: Mapping[int, Sequence[Use]]

    def mask(self, use: Use, slot: Any, samples: Samples | None) -> Tensor | None:
        """Bool `[N,T]`: the real rows of a slot of a use, in the order of `slot.rows(g, samples)`; None: all."""
        if use.index not in self.outputs:
            return None
        bits = _bits(use, slot, self.outputs[use.index], samples)
        for other in self.readers[use.index]:
            its = next((s for s in other.slots if type(s) is type(slot) and not s.bias), None)
            if other is not use and its is not None:
                more = _bits(other, its, self.outputs[other.index], samples)
                bits = bits | more if more.shape == bits.shape else bits
        silent = bits == 0
        waits = bits.device.type != "cpu"  # to know that nothing is left out, which changes no value
        if use.index in self.inputs and (waits or bool(silent.any())):  # such as the query of an attention to one key
            bits = torch.where(silent, _bits(use, slot, self.inputs[use.index], samples), bits)
        left_out = bits == _OTHER
        return ~left_out if waits or bool(left_out.any()) else None


def _bits(use: Use, slot: Any, bits: Tensor, samples: Samples | None) -> Tensor:
    """`[N,T]`: the bits at any output of a row, from those at each output, or at each row `[*rows, 1]`."""
    data = use.edge.node._input_metadata[use.edge.output_nr]
    sent = torch.stack([bits & _COUNTS, bits & _OTHER]).to(data.dtype)
    if bits.shape == use.call.out_shape:
        counts, other = (slot.output(sent, samples) != 0).any(4).any(3)
    else:  # the same for all features
        counts, other = slot.output(sent.expand(2, *use.call.out_shape), samples)[..., 0, 0] != 0
    return counts.to(torch.uint8) * _COUNTS + other.to(torch.uint8) * _OTHER


def measure_rows(graph: Graph, likelihoods: Sequence[Likelihood]) -> RealRows | None:
    """The real rows of the uses of a graph; None, mostly at no cost, where all rows are.

    likelihoods: of the known losses. Costs two vector-Jacobian products where a loss term does not count, or a
    selection leaves elements out, and one where no use hears of them.
    """
    counting = [_not_all(lik.counting()) for lik in likelihoods]
    generator = torch.Generator().manual_seed(0)
    own, own_left_out = _boundary(graph, generator)
    selected = [x for node in graph.selections if (x := _left_out(node)) is not None]
    other = [*_terms(graph, counting), *own_left_out, *selected]
    if not other:
        return None
    others = _answers(graph.uses, [(edge, _noise(mask, generator)) for edge, mask in other])
    if not others:
        return None
    sources = [
        (loss.logits, _noise(_whole(loss.call.logits, True if mask is None else mask), generator))
        for loss, mask in zip(graph.known, counting, strict=True)
    ]
    sources += own or _sent(graph)
    uses = [use for use in graph.uses if use.index in others]
    counts = _answers(uses, sources)
    outputs = {i: _joined(counts[i].output if i in counts else None, its.output) for i, its in others.items()}
    inputs = {
        i: _joined(counts[i].read if i in counts else None, its.read)
        for i, its in others.items()
        if its.read is not None
    }
    return RealRows(outputs, inputs, _readers(uses))


def _not_all(mask: Tensor | None) -> Tensor | None:
    """The mask, or None where it is True everywhere."""
    return None if mask is None or decided(mask.all()) else mask


def _joined(counts: Tensor | None, other: Tensor) -> Tensor:
    """Bits of where something that counts, and something that does not, is answered to."""
    bits = other.to(torch.uint8) * _OTHER
    return bits if counts is None else bits | counts.to(torch.uint8) * _COUNTS


def _terms(graph: Graph, counting: Sequence[Tensor | None]) -> Iterator[tuple[GradientEdge, Tensor]]:
    """The loss terms that do not count: where cotangents of theirs start, and a mask `[*logits.shape]`."""
    for loss, mask in zip(graph.known, counting, strict=True):
        if mask is not None:
            yield loss.logits, _whole(loss.call.logits, ~mask)


def _sent(graph: Graph) -> list[tuple[GradientEdge, Tensor]]:
    """What the user's own losses send to their boundary, where the weights of their terms are not known."""
    boundary = [part.logits for own in graph.own for part in own.boundary]
    found = pull([graph.total], [graph.seed], boundary) if boundary else []
    return [(edge, g) for edge, g in zip(boundary, found, strict=True) if g is not None]


def _boundary(graph: Graph, generator: torch.Generator) -> tuple[list[Any], list[tuple[GradientEdge, Tensor]]]:
    """What own losses send to their boundary, and the elements that only what they leave out there would reach, as 1.

    Both empty where they leave nothing out. Nothing below the boundary is run: where all of it counts (the other
    classes of a hand-written likelihood), that is the proof.
    """
    left_out = [x for node in graph.in_losses if graph.own and (x := _left_out(node)) is not None]
    if not left_out:
        return [], []
    sent = _sent(graph)
    edges, cotangents = [edge for edge, _ in left_out], [_noise(mask, generator) for _, mask in left_out]
    found = pull(edges, cotangents, [edge for edge, _ in sent])
    masks = [
        (edge, ((x != 0) & (g == 0)).to(g.dtype)) for (edge, g), x in zip(sent, found, strict=True) if x is not None
    ]
    return sent, [(edge, mask) for edge, mask in masks if decided(mask.any())]


def _whole(logits: Tensor, mask: Tensor | bool) -> Tensor:
    """A mask that broadcasts to the logits, with their shape and type."""
    return torch.zeros_like(logits).masked_fill_(torch.as_tensor(mask, device=logits.device), 1)


def _left_out(node: Node) -> tuple[GradientEdge, Tensor] | None:
    """The elements that a selection leaves out, as 1 in a tensor of its input's shape; None where it takes all."""
    (below, output), *_ = node.next_functions
    if below is None or hasattr(below, "variable"):  # nothing that depends on a use
        return None
    given, result = below._input_metadata[output], node._input_metadata[0]
    edge = GradientEdge(below, output)
    ones = torch.ones(result.shape, dtype=given.dtype, device=given.device)
    (taken,) = pull([GradientEdge(node, 0)], [ones], [edge])
    if taken is None or decided((taken != 0).all()):
        return None
    return edge, (taken == 0).to(taken.dtype)


def _noise(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of either sign where a mask is not zero: a product of one vector for each axis, cheap to draw."""
    for axis, size in enumerate(mask.shape):
        x = away_from_zero((size,), generator)
        mask = mask * x.to(mask).reshape([-1 if a == axis else 1 for a in range(mask.dim())])
    return mask


class _Support(NamedTuple):
    """Where a use receives something, and what it reads does: bool, as `RealRows.outputs` and `inputs`."""

    output: Tensor
    read: Tensor | None


def _answers(uses: Sequence[Use], sources: Sequence[tuple[GradientEdge, Tensor]]) -> dict[int, _Support]:
    """What each use receives of cotangents from some edges, by number; those that do, or that read what does."""
    edges, cotangents = [edge for edge, _ in sources], [x for _, x in sources]
    below = [_read_rows(use) for use in uses]
    pulled = pull(edges, cotangents, [*(use.edge for use in uses), *(read.edge for read in below if read is not None)])
    rest = iter(pulled[len(uses) :])
    found: dict[int, _Support] = {}
    for use, g, source in zip(uses, pulled, below, strict=False):
        at_input = None if source is None else next(rest)
        read = None if source is None or at_input is None else _any_feature(source.turned(at_input))
        if g is None:
            device = use.edge.node._input_metadata[use.edge.output_nr].device
            output = torch.zeros(use.call.out_shape, dtype=torch.bool, device=device)
        else:
            output = _any_feature(g) if _features_last(use) else g != 0
        if decided(output.any()) or (read is not None and decided(read.any())):
            found[use.index] = _Support(output, read)
    return found


def _any_feature(g: Tensor) -> Tensor:
    """Where any feature (last axis) is not zero, `[*rows, 1]`; by the largest, which is found fastest."""
    return g.abs().amax(-1, keepdim=True) != 0 if g.shape[-1] else g.any(-1, keepdim=True)


def _features_last(use: Use) -> bool:
    """Whether the rows of all slots of a use are those of the output, features on its last axis."""
    rows = tuple(range(len(use.call.out_shape) - 1))
    return all(tuple(sorted(slot.axes)) == rows for slot in use.slots)


class _Read(NamedTuple):
    """The tensor that a use reads, before it was transposed: others may read it there (a residual sum)."""

    edge: GradientEdge
    transposed: list[tuple[int, int]]

    def turned(self, g: Tensor) -> Tensor:
        """A cotangent of that tensor, transposed as the use reads it."""
        for one, other in reversed(self.transposed):
            g = g.transpose(one, other)
        return g


def _read_rows(use: Use) -> _Read | None:
    """The only tensor that a use reads, where its rows are those of the output, features last."""
    if len(use.inputs) != 1 or not _features_last(use):
        return None
    (edge,) = use.inputs
    shape = torch.Size(edge.node._input_metadata[edge.output_nr].shape)
    if shape[:-1] != use.call.out_shape[:-1]:
        return None
    node: Any = edge.node
    output, transposed = edge.output_nr, list[tuple[int, int]]()
    while node.name() == "TransposeBackward0" and node.next_functions[0][0] is not None:
        transposed.append((_signed(node._saved_dim0), _signed(node._saved_dim1)))
        node, output = node.next_functions[0]
    return _Read(GradientEdge(node, output), transposed)


def _signed(dim: int) -> int:
    """An axis that autograd saved as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim


def _readers(uses: Sequence[Use]) -> dict[int, list[Use]]:
    """For each use those that read the same tensor by the same function, itself among them."""
    groups: dict[Any, list[Use]] = {}
    for use in uses:
        own = {derived.tensor.untyped_storage().data_ptr() for derived in use.used}
        data = [x for x in (*use.call.args, *use.call.kwargs.values()) if isinstance(x, Tensor)]
        places = tuple(
            (x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride())
            for x in data
            if x.untyped_storage().data_ptr() not in own
        )
        groups.setdefault((use.call.func, places), []).append(use)
    return {use.index: group for group in groups.values() for use in group}
