"""Proof that a loss of the user's own is a sum over samples, on the autograd graph between it and its boundary.

A total is a sum over samples where it is linear in numbers that depend on one sample each. So the graph is walked
from the total down: calls that are linear in what depends on the boundary may mix samples, and every other call must
give numbers of one sample each. Which sample a number depends on is measured: where the part of a random direction in
sample n is multiplied by a power of two that encodes n, the number's derivative must be multiplied by that power.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise.errors import SamplesMixed, Undefined
from layerwise.graph.own_loss import OwnLossGraph
from layerwise.graph.probes import sample_axes
from layerwise.graph.products import twice
from layerwise.graph.second.custom_functions import is_custom
from layerwise.graph.walk import Edge, Node, call_of, children, edges, finished
from layerwise.rows.base import RowNumbers, Samples
from layerwise.tape.pull import pull

__all__ = ["check_sum_over_samples", "loss_terms", "read_together", "sequences"]

_LEVELS = 8  # powers of two in use: each measurement reads one octal digit of the samples' numbers
_LINEAR = frozenset(
    """Sum Mean Nansum Add Sub Neg View UnsafeView ReshapeAlias Squeeze Unsqueeze Expand Select Slice Index Stack Cat
    Transpose Permute T Clone ToCopy Alias Where MaskedFill MaskedSelect IndexSelect Gather Unbind Split
    SplitWithSizes Diagonal NllLoss NllLoss2D Repeat Flip Roll Cumsum ConstantPadNd AsStrided""".split()
)
_BILINEAR = frozenset("Mul Mm Bmm Mv Dot".split())  # linear where one factor alone depends on the boundary
# Elementwise losses: where they reduce, they add up a function of single elements of their inputs.
_SUMS = frozenset(
    """MseLoss HuberLoss SmoothL1Loss BinaryCrossEntropy BinaryCrossEntropyWithLogits SoftMarginLoss""".split()
)
_ROW_SUMS = frozenset("MultiMarginLoss MultilabelMarginLoss".split())  # losses that add up a function of single rows


_SEQUENCES = frozenset(["CtcLoss"])  # calls whose results are a number for each sequence of a batch, by definition


class TermProbe(NamedTuple):
    """Tensors whose elements at the same index must depend on one sample; rows: all elements of the same row."""

    name: str
    edges: list[Edge]
    rows: bool = False


def check_sum_over_samples(own_loss: OwnLossGraph, samples: Sequence[Samples | RowNumbers]) -> None:
    """Raise SamplesMixed where a loss is no sum over samples; samples: where they lie in each boundary tensor."""
    if samples[0].n < 2:
        return
    for probe in _probes(own_loss):
        if not _one_sample_each(own_loss, samples, probe):
            why = (
                f"no function that is seen to be a sum over samples: {probe.name}, a function of one's own, makes one "
                "number of several of them. Let it return a number for each sample, and take their mean or sum outside"
                if any(is_custom(node) for node, _ in probe.edges)
                else f"no sum over samples: {probe.name}, which is not linear, takes several of them together. What "
                "sums over the batch, or sets samples against each other, must come last and be linear, as a mean is"
            )
            raise SamplesMixed(
                f"asked for per-sample quantities of {samples[0].n} samples, but {own_loss.own} is {why}; where "
                f"{samples[0].n} is not their number, pass samples=N; quantities of the Hessian (DiagHessian, Hessian) "
                "and products (GGN) need no samples"
            )


# -- the calls of a loss ------------------------------------------------------------------------------------


def loss_terms(own_loss: OwnLossGraph) -> list[TermProbe]:
    """The terms that a loss adds up: the first tensors from the total down that it is not linear in what they read."""
    return list(_probes(own_loss, whole=False))


def sequences(own_loss: OwnLossGraph) -> int | None:
    """The number of sequences, each a sample, where all that a loss adds up is a number for each; else None."""
    terms = [edge for probe in loss_terms(own_loss) for edge in probe.edges]
    if not terms or any(_kind(node) not in _SEQUENCES for node, _ in terms):
        return None
    counts = {torch.Size(node._input_metadata[output].shape).numel() for node, output in terms}
    return counts.pop() if len(counts) == 1 else None


def read_together(own_loss: OwnLossGraph) -> list[set[int]]:
    """The boundary tensors, by number, that each call which makes terms of a loss is made of."""
    number = {(edge.node, edge.output_nr): i for i, edge in enumerate(own_loss.edges)}
    stops: dict[Node, tuple[()]] = dict.fromkeys(own_loss.others, ())
    probes = loss_terms(own_loss)  # a call that reduces is known by what it reads, such as both sides of mse_loss
    return [{number[edge] for edge in edges(probe.edges, stops, number) if edge in number} for probe in probes]


def _probes(own_loss: OwnLossGraph, whole: bool = True) -> Iterator[TermProbe]:
    """The tensors whose elements must depend on one sample each, from the total down; whole: those below others too."""
    ends: set[Edge] = {(edge.node, edge.output_nr) for edge in own_loss.edges}
    dependent = _dependent(own_loss, ends)
    below: dict[Node, Sequence[Edge]] = dict(dependent)
    for node, output in edges([own_loss.start], below, ends, by_output=True):
        if (node, output) in ends or not dependent[node]:
            continue
        kind = _kind(node)
        sums = kind in _SUMS or kind in _ROW_SUMS
        if not sums and _is_linear(kind, node, dependent[node]):
            continue
        if not whole:
            below[node] = ()
        yield TermProbe(call_of(node), dependent[node] if sums else [(node, output)], kind in _ROW_SUMS)


def _kind(node: Node) -> str:
    return str(node.name().removesuffix("0").removesuffix("1").removesuffix("Backward"))


def _is_linear(kind: str, node: Node, below: Sequence[Edge]) -> bool:
    if kind == "Div":
        return node.next_functions[1] not in below
    return kind in _LINEAR or (kind in _BILINEAR and len(below) == 1)


def _dependent(own_loss: OwnLossGraph, ends: set[Edge]) -> dict[Node, list[Edge]]:
    """The edges of every node of the loss that depend on the boundary."""
    found: dict[Node, list[Edge]] = {}
    stops: dict[Node, tuple[()]] = dict.fromkeys(own_loss.others, ())
    for node in finished([own_loss.start.node], stops, ends):
        found[node] = [edge for edge in children(node, stops) if edge in ends or found.get(edge[0])]
    return found


# -- measurement --------------------------------------------------------------------------------------------


def _one_sample_each(own_loss: OwnLossGraph, samples: Sequence[Samples | RowNumbers], probe: TermProbe) -> bool:
    """Whether the elements of a probe depend on one sample each."""
    generator = torch.Generator().manual_seed(0)
    data = [node._input_metadata[output] for node, output in probe.edges]
    r = [_noise(torch.Size(d.shape), d, generator).requires_grad_() for d in data]
    try:
        back = _send(own_loss, probe, r, create_graph=True)
        return _scale_with_samples(own_loss, samples, probe, r, back, generator)
    except Undefined:  # without a second derivative: the call's result must carry the samples on an axis
        axes = sample_axes(r[0].shape, samples[0].n) if len(r) == 1 else ()
        return any(_follows(own_loss, samples, probe, r[0].detach(), s) for s in axes)


def _send(own_loss: OwnLossGraph, probe: TermProbe, r: list[Tensor], create_graph: bool = False) -> list[Tensor | None]:
    """J^T r at the boundary, J the Jacobian of the probed tensors."""
    starts = [GradientEdge(node, output) for node, output in probe.edges]
    with twice(), own_loss.alone():
        return pull(starts, r, own_loss.edges, create_graph=create_graph)


def _scale_with_samples(
    own_loss: OwnLossGraph,
    samples: Sequence[Samples | RowNumbers],
    probe: TermProbe,
    r: list[Tensor],
    back: list[Tensor | None],
    generator: torch.Generator,
) -> bool:
    """Whether each element of J (m v) is m_n times that of J v for one sample n; J v is d/dr of v . (J^T r)."""
    kept = [(g, s) for g, s in zip(back, samples, strict=True) if g is not None]
    if not all(g.requires_grad for g, _ in kept):
        raise Undefined("no second derivative")
    v = [_noise(g.shape, g, generator) for g, _ in kept]
    mix = [_noise(x.shape, x, generator) for x in r]

    def along(directions: list[Tensor]) -> Tensor:
        with twice(), own_loss.alone():
            found = pull([g for g, _ in kept], directions, r)
        moving = [m * x for m, x in zip(mix, found, strict=True) if x is not None]
        if not moving:  # a function of the user's own may give its gradient as a constant
            raise Undefined("no second derivative")
        moved = torch.stack(moving).sum(0)
        return moved.flatten(1).sum(1) if probe.rows and moved.dim() > 1 else moved

    a = along(v)
    for digit in _digits(samples[0].n):
        b = along([x * _powers(g, s, digit) for x, (g, s) in zip(v, kept, strict=True)])
        power = (b / a).abs().log2().round().clamp(0, _LEVELS - 1).exp2()
        if not bool(((b - power * a).abs() <= 64 * torch.finfo(a.dtype).eps * b.abs())[a != 0].all()):
            return False
        if bool((b[a == 0] != 0).any()):
            return False
    return True


def _follows(
    own_loss: OwnLossGraph, samples: Sequence[Samples | RowNumbers], probe: TermProbe, r: Tensor, own: Samples
) -> bool:
    """Whether J^T (m r) = m J^T r, with the samples on an axis of the probed tensor."""
    plain = _send(own_loss, probe, [r])
    for digit in _digits(own.n):
        scaled = _send(own_loss, probe, [r * _powers(r, own, digit)])
        for a, b, s in zip(plain, scaled, samples, strict=True):
            if a is None or b is None:
                continue
            wanted = a * _powers(a, s, digit)
            if not bool(((b - wanted).abs() <= 64 * torch.finfo(a.dtype).eps * wanted.abs()).all()):
                return False
    return True


def _digits(n: int) -> Iterator[int]:
    """1, 8, 64, ...: the values of the octal digits of n samples' numbers."""
    place = 1
    while place < n:
        yield place
        place *= _LEVELS


def _powers(x: Tensor, s: Samples | RowNumbers, place: int) -> Tensor:
    """2^d at each index, d one octal digit of its sample's number, broadcastable to `x`."""
    owner = s.owners(x.shape, x.device).clamp(min=0)
    return (owner // place % _LEVELS).to(x.dtype).exp2()


def _noise(shape: torch.Size, like: Any, generator: torch.Generator) -> Tensor:
    """Random numbers of either sign and of magnitude 0.5 to 1.5."""
    x = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    return (x * (torch.randint(2, shape, generator=generator) * 2 - 1)).to(like.device, like.dtype)
