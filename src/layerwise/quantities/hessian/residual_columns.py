"""Hessian diagonals of parameters that are used once, from the GGN root and the residuals of elementwise functions.

Where elementwise functions s_k are the only nonlinearity between a use and the losses (`graph.residuals`), the diagonal
is the GGN's plus

    sum_k sum_j r_k[n,j] D_kj[n]²,      D_kj[n] the gradient of sample n for the cotangent e_j at the input of s_k,

a signed second moment over unit vectors e_j, each backpropagated for all samples at once. A residual at a use's own
output needs no backpropagation for that use. Below a matrix W, e_j becomes row W[j]; an elementwise function in between
multiplies that row element by element, so the next use gets `r W²` times squared derivatives. Only uses further down
need columns, which start as rows W[j].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise.errors import NonFinite, Undefined, UnknownLoss
from layerwise.graph.cotangents import Exact
from layerwise.graph.coverage import Graph
from layerwise.graph.decisions import decided
from layerwise.graph.loss_curvature import LossCurvature, likelihoods, loss_curvatures, loss_hessian
from layerwise.graph.probes import join, matrix_among, near, same, split
from layerwise.graph.residuals import Residual, ResidualCurvature, powers, proved, residual_curvature
from layerwise.graph.samples import SampleLayout
from layerwise.ops.base import Slot
from layerwise.quantities.hessian.unit_columns import Unit
from layerwise.rows import contract, weighted
from layerwise.rows.base import RowNumbers, Rows, Samples
from layerwise.rows.layout import MatrixLayout
from layerwise.tape.pull import pull
from layerwise.tape.uses import Use

__all__ = ["ResidualPlan", "plan"]

_STACK_ELEMENTS = 2**20  # elements of one stack of columns: small enough to stay in the cache
_PRODUCT = 2  # cost of one Hessian-vector product, in columns


@dataclass(frozen=True)
class _Source:
    """Columns of a residual, backpropagated from `edge`: the rows of `rows`, the same for all samples (None: one-hot).

    weights: r `[N,U]`. below: indices of the uses that receive the columns.
    """

    edge: GradientEdge
    shape: torch.Size
    samples: Samples
    weights: Tensor
    rows: Tensor | None
    below: frozenset[int]

    def stacks(self, elements: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield cotangents `[V, *shape]` and their weights `[V,N]`; elements: how many one column needs in memory."""
        n = self.samples.n
        for units in self._units.split(max(1, _STACK_ELEMENTS // max(1, elements))):
            if self.rows is not None:
                sent = self.rows[units][:, None].expand(-1, n, -1)
            else:
                sent = self.weights.new_zeros(len(units), n, self.weights.shape[1])
                sent[torch.arange(len(units), device=units.device), :, units] = 1
            yield join(sent, self.samples, self.shape), self.weights[:, units].T.contiguous()

    @property
    def count(self) -> int:
        """The number of columns."""
        return len(self._units)

    @cached_property
    def _units(self) -> Tensor:
        """The units whose residuals are not all zero."""
        alive = self.weights.any(0)
        if decided(alive.all()):
            return torch.arange(len(alive), device=alive.device)
        return alive.nonzero().flatten()


@dataclass(frozen=True)
class ResidualPlan:
    """The uses whose diagonals come from columns of the GGN root and of residuals, and these columns.

    exact: by use, the residuals that need no columns, `[*out_shape]`.
    """

    layout: SampleLayout
    curvatures: Sequence[LossCurvature]
    units: Sequence[Unit]
    exact: dict[int, Tensor]
    sources: Sequence[_Source]

    @property
    def count(self) -> int:
        """The number of columns."""
        return _roots(self.curvatures) + sum(source.count for source in self.sources)

    def diagonals(self, per_sample: bool) -> dict[str, tuple[Tensor, ...]]:
        """The diagonals by parameter name, `[*shape]`, or per sample `[N, *shape]`."""
        slots: dict[int, list[tuple[str, Slot, Tensor]]] = {}
        uses = {unit.use.index: unit.use for unit in self.units}
        for unit in self.units:
            slots.setdefault(unit.use.index, []).extend(unit.slots)
        sums = {i: _Sum(uses[i], self.layout.axes[i], found, per_sample) for i, found in slots.items()}
        for index, d in self.exact.items():
            sums[index].flat += d
        elements = sum(use.call.out_shape.numel() for use in uses.values())
        for curvature in self.curvatures:
            for stack in Exact().columns(
                curvature.likelihood, curvature.rows, max(1, _STACK_ELEMENTS // max(1, elements))
            ):
                _send(curvature.edges, curvature.cotangents(stack), None, list(sums.values()))
        for source in self.sources:
            below = [s for i, s in sums.items() if i in source.below]
            elements = sum(s.flat.numel() for s in below) + source.shape.numel()
            for stack, weights in source.stacks(elements):
                _send([source.edge], [stack], weights, below)
        return {name: value for s in sums.values() for name, value in s.finish().items()}


class _Sum:
    """Accumulates the diagonals of one use's parameters over columns.

    flat: sums for each element of the output, multiplied by the squared inputs once, at the end.
    """

    def __init__(self, use: Use, samples: Samples, slots: list[tuple[str, Slot, Tensor]], per_sample: bool) -> None:
        self.use, self.samples, self._slots, self._per_sample = use, samples, slots, per_sample
        used = slots[0][1].used
        self.flat = used.new_zeros(use.call.out_shape)
        self._one_position = _positions(use, samples, slots) == 1
        self._totals: list[Tensor | None] = [None] * len(slots)

    def add(self, g: Tensor, weights: Tensor | None) -> None:
        """Add cotangents `[V, *out_shape]` with weights `[V,N]` (None: all 1)."""
        if self._one_position:
            weighted.add_squares(self.flat, g, None if weights is None else _along(weights, self.samples, g[0]))
            return
        for i, (_, slot, _) in enumerate(self._slots):
            rows = slot.rows(g, self.samples)
            moment = (
                weighted.squares(rows, weights) if self._per_sample else weighted.second_moment(rows, weights, decided)
            )
            total = self._totals[i]
            self._totals[i] = moment if total is None else total + moment

    def finish(self) -> dict[str, tuple[Tensor, ...]]:
        """The diagonals by parameter name."""
        diagonals: dict[str, tuple[Tensor, ...]] = {}
        for (name, slot, p), total in zip(self._slots, self._totals, strict=True):
            rows = slot.rows(self.flat[None], self.samples)
            a = rows.a if rows.a is None or not rows.a.is_floating_point() else rows.a.square()
            rows = Rows(a, rows.g, rows.size_in)
            value = (contract.per_sample if self._per_sample else contract.total)(rows)[0]
            view = MatrixLayout.of_view(slot.used, p)
            assert view is not None
            diagonals[name] = (view.fold(slot.fold(value if total is None else value + total)).to(p.dtype),)
        return diagonals


def _send(
    starts: Sequence[GradientEdge], stacks: Sequence[Tensor], weights: Tensor | None, sums: Sequence[_Sum]
) -> None:
    edges = [s.use.edge for s in sums]
    if not len(stacks[0]):  # of rows that the loss does not see
        return
    if len(stacks[0]) == 1:
        pulled = [None if g is None else g[None] for g in pull(starts, [stack[0] for stack in stacks], edges)]
    else:
        pulled = pull(starts, stacks, edges, batched=True)
    for s, g in zip(sums, pulled, strict=True):
        if g is not None:
            s.add(g.detach(), weights)


# -- which uses take columns, and which -------------------------------------------------------------------------


def plan(graph: Graph, layout: SampleLayout, units: Sequence[Unit]) -> tuple[ResidualPlan | None, list[Unit]]:
    """Split units into those for which residual columns cost less than Hessian-vector products, and the others."""
    try:
        known = likelihoods(graph)
        hessian, tops = loss_hessian(graph, known), loss_curvatures(graph, known, layout)
        for curvature in tops:
            curvature.likelihood.root(0, 1)
        residuals = residual_curvature(graph)
        exact, sources, blocked = _spread(graph, layout, residuals)
    except (Undefined, NonFinite, UnknownLoss):
        return None, list(units)
    walk = residuals.walk
    order = [use.index for node in walk.order for use in walk.use_at.get(node, ())]  # from the loss down
    eligible = [i for i in order if i not in blocked and i not in residuals.other and _able(i, units, layout)]
    roots = _roots(tops)
    best, chosen = sum(unit.count for unit in units) * _PRODUCT, frozenset[int]()
    for last in range(1, len(eligible) + 1):
        these = frozenset(eligible[:last])
        cost = roots + sum(s.count for s in sources if s.below & these)
        cost += sum(unit.count for unit in units if unit.use.index not in these) * _PRODUCT
        if cost < best:
            best, chosen = cost, these
    if not chosen or not proved(graph, hessian, residuals, chosen):
        return None, list(units)
    mine = [unit for unit in units if unit.use.index in chosen]
    left = [unit for unit in units if unit.use.index not in chosen]
    kept = [replace(s, below=s.below & chosen) for s in sources if s.below & chosen]
    return ResidualPlan(layout, tops, mine, {i: d for i, d in exact.items() if i in chosen}, kept), left


def _roots(tops: Sequence[LossCurvature]) -> int:
    return sum(Exact().count(curvature.likelihood, curvature.rows) for curvature in tops)


def _able(index: int, units: Sequence[Unit], layout: SampleLayout) -> bool:
    """Whether a use has units, and each slot's output rows are its output's elements, each exactly once."""
    slots = [slot for unit in units if unit.use.index == index for _, slot, _ in unit.slots]
    use = next((unit.use for unit in units if unit.use.index == index), None)
    if use is None:
        return False
    x = powers(slots[0].used.new_empty(1, *use.call.out_shape), index) + 1
    for slot in slots:
        rows = slot.output(x, layout.axes[index])
        squares = same(rows.square(), slot.output(x.square(), layout.axes[index]))
        once = squares and rows.numel() == x.numel()
        if not (once and near(rows.sum()[None], x.sum()[None], torch.finfo(x.dtype).eps)):
            return False
    return True


def _spread(
    graph: Graph, layout: SampleLayout, found: ResidualCurvature
) -> tuple[dict[int, Tensor], list[_Source], set[int]]:
    """Backpropagate residuals: by use, those that need no columns; the columns; uses that neither can serve."""
    at_use = {(use.edge.node, use.edge.output_nr): use for use in graph.uses}
    waiting: dict[int, Tensor] = {}  # residuals at a use's output
    extra: dict[int, Tensor] = {}  # diagonals of full curvature: exact for this use, not for uses below it
    sources: list[_Source] = []
    unplaced: list[Residual] = []
    for residual in found.residuals:
        use = at_use.get((residual.edge.node, residual.edge.output_nr))
        if use is not None:
            _add(waiting, use, residual.value)
        elif not _through(residual.edge, residual.value, found.next_uses([residual.edge]), waiting):
            unplaced.append(residual)
    places = _places(graph, layout, unplaced)
    blocked: set[int] = set()
    for residual, samples in zip(unplaced, places, strict=True):
        if samples is None:
            blocked |= residual.below
        else:
            weights = split(residual.value[None], samples)[0]
            sources.append(_Source(residual.edge, residual.value.shape, samples, weights, None, residual.below))
    for use in [use for node in found.walk.order for use in found.walk.use_at.get(node, ())]:
        if use.index not in waiting:
            continue
        d, samples = waiting[use.index], layout.axes[use.index]
        inputs = found.walk.inputs(use)
        below = frozenset(found.walk.indices(inputs))
        following = found.next_uses(inputs)
        if not below:
            continue
        matrix = _matrix(use, d, inputs, samples)
        if matrix is None:
            if not _through(use.edge, d, following, waiting):
                weights = split(d[None], samples)[0]
                sources.append(_Source(use.edge, use.call.out_shape, samples, weights, None, below))
            continue
        squares = d @ matrix.square()
        for after in following:
            factor = _factor(inputs[0], squares, after)
            if factor is not None and after.call.out_shape == squares.shape:
                _add(extra, after, squares * factor.square())
                below -= {after.index}
        if below:
            sources.append(_Source(inputs[0], squares.shape, samples, d, matrix, below))
    for use in graph.uses:
        if use.index in extra:
            _add(waiting, use, extra[use.index])
    return waiting, sources, blocked


def _add(totals: dict[int, Tensor], use: Use, value: Tensor) -> None:
    totals[use.index] = totals[use.index] + value if use.index in totals else value


def _through(edge: GradientEdge, d: Tensor, following: Sequence[Use], waiting: dict[int, Tensor]) -> bool:
    """Add a diagonal to the only following use; False where the map in between is not elementwise."""
    if len(following) != 1:
        return False
    factor = _factor(edge, d, following[0])
    if factor is None:
        return False
    _add(waiting, following[0], d.reshape(factor.shape) * factor.square())
    return True


def _factor(edge: GradientEdge, like: Tensor, use: Use) -> Tensor | None:
    """The factors of an elementwise map from a use's output to `edge`: its VJP of ones; None for another map."""
    probe = powers(like, 3)
    ones, back = (pull([edge], [x], [use.edge])[0] for x in (torch.ones_like(like), probe))
    if ones is None or back is None or ones.numel() != like.numel():
        return None
    return ones if same(ones.flatten() * probe.flatten(), back.flatten()) else None


def _matrix(use: Use, like: Tensor, inputs: Sequence[GradientEdge], samples: Samples) -> Tensor | None:
    """The matrix `[O,I]` of a use that maps one row `[I]` per sample to one row `[O]`; None for other uses."""
    if len(inputs) != 1 or len(use.call.out_shape) != 2 or samples != Samples(use.call.out_shape[0], 0):
        return None
    x = torch.rand(use.call.out_shape, generator=torch.Generator().manual_seed(4)).to(like).sub_(0.5)
    (back,) = pull([use.edge], [x], inputs)
    if back is None or back.dim() != 2 or len(back) != len(x):
        return None
    return matrix_among((derived.tensor for derived in use.used), x, back)


# -- samples ------------------------------------------------------------------------------------------------


def _positions(use: Use, samples: Samples, slots: Sequence[tuple[str, Slot, Tensor]]) -> int:
    zero = slots[0][1].used.new_zeros(1).expand(1, *use.call.out_shape)
    return max(slot.output(zero, samples).shape[2] for _, slot, _ in slots)


def _along(weights: Tensor, samples: Samples | RowNumbers, like: Tensor) -> Tensor:
    """Weights `[V,N]` broadcast along the samples' axis, `[V, 1, ..., n·r, ..., 1]`."""
    return weights[:, samples.owners(like.shape, weights.device)]


def _places(graph: Graph, layout: SampleLayout, residuals: Sequence[Residual]) -> list[Samples | None]:
    """Where the samples lie in each residual, None where no such axis is found.

    Proved by scaling: losses' cotangents times one number per sample must give a VJP times the same numbers.
    """
    if not residuals:
        return []
    generator = torch.Generator().manual_seed(5)
    c = torch.rand(1, layout.n, generator=generator, dtype=torch.float64) + 0.5
    edges = [loss.logits for loss in graph.losses]
    plain = [torch.rand(loss.call.logits.shape, generator=generator) for loss in graph.losses]
    plain = [x.to(loss.call.logits) for x, loss in zip(plain, graph.losses, strict=True)]
    scaled = [x * _along(c.to(x), rows, x)[0] for x, rows in zip(plain, layout.losses, strict=True)]
    wanted = [r.edge for r in residuals]
    pairs = zip(pull(edges, plain, wanted), pull(edges, scaled, wanted), strict=True)
    return [None if x is None or y is None else _place(x, y, c.to(x)) for x, y in pairs]


def _place(x: Tensor, y: Tensor, c: Tensor) -> Samples | None:
    n, epsilon = c.shape[1], torch.finfo(x.dtype).eps
    for axis, size in enumerate(x.shape):
        for n_major in (True, False) if size > n else (True,):
            samples = Samples(n, axis, n_major)
            if size % n == 0 and near(x * _along(c, samples, x)[0], y, epsilon):
                return samples
    return None
