"""The diagonal of the Hessian: exact from columns of a root or from Hessian-vector products, or sampled.

Where only elementwise functions lie nonlinearly between a use and the losses, columns of the loss Hessian's root and of
those functions' residuals give the diagonal (`residual_columns`). For any other parameter W that is used once, in a
linear map Z = W A whose input does not depend on W, with M[n,t,u,o] = d²L / dZ[n,t,o] dZ[n,u,o],

    diag[o,i] = sum_n sum_{t,u} A[n,t,i] M[n,t,u,o] A[n,u,i].

Samples are independent in the loss, so one direction serves all of them: one Hessian-vector product for every output
(t, o), or for every element (o, i) where there are fewer. All other parameters take one product for every element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from layerwise.errors import BadInput, Undefined
from layerwise.graph.cotangents import Second
from layerwise.graph.coverage import Graph
from layerwise.graph.decisions import decided
from layerwise.graph.own_loss import gradients
from layerwise.graph.products import HessianProducts, gradient_of, twice
from layerwise.graph.samples import SampleLayout
from layerwise.quantities.base import Quantity, positive, takes_draws
from layerwise.quantities.hessian import residual_columns
from layerwise.quantities.hessian.residual_columns import ResidualPlan
from layerwise.quantities.hessian.unit_columns import Unit, plan
from layerwise.tape.pull import pull, pull_stack
from layerwise.tape.tape import Tape
from layerwise.tensors import dense

__all__ = ["DiagHessian"]

_STACK_ELEMENTS = 2**22  # elements of columns that are backpropagated together


class DiagHessian(Quantity):
    """The diagonal of the Hessian of the loss as written.

    diag(d²L / dtheta²), `[*shape]`; `per_sample=True`: of every sample's term, `[N, *shape]`. `draws=None` is
    exact. Where elementwise functions are the only nonlinearity, it backpropagates the exact GGN's columns and one
    for each unit of those functions (none for the lowest two such layers); otherwise it takes one Hessian-vector
    product for each output or each element, whichever are fewer. More than `max_products` of both are refused.
    `draws=k` is sampled: the unbiased mean of k draws of z * (H z), with random signs z. Attention runs unfused, since
    fused kernels have no second derivative. Units: loss over parameter units squared.
    Raises UnknownLoss, NonFinite, Undefined (no second derivative, or too many products), BadInput.
    Source: Dangel et al. (2020), table 1; sampled: Bekas, Kokiopoulou and Saad (2007), eq. 1.
    """

    powers = (1,)
    cotangent = Second()

    @takes_draws
    def __init__(
        self,
        draws: int | None = None,
        generator: torch.Generator | None = None,
        per_sample: bool = False,
        max_products: int | None = 10_000,
    ) -> None:
        self.draws = positive("DiagHessian's draws", draws)
        self.max_products = positive("DiagHessian's max_products", max_products)
        if per_sample and draws is not None:
            raise BadInput("DiagHessian of every sample is exact only: give per_sample=True, or draws=k, not both")
        self.generator = generator
        self.per_sample = self.concatenate = self.needs_samples = per_sample

    def compute_graph(self, tape: Tape, graph: Graph, layout: SampleLayout | None) -> dict[str, tuple[Tensor, ...]]:
        """`[*shape]` (or `[N, *shape]`) of every parameter of the graph."""
        names = [name for name in tape.parameters if name in set(graph.parameters())]
        parameters = [tape.parameters[name] for name in names]
        if self.draws is not None:
            hessian = HessianProducts.of(graph.total, graph.weight, parameters, graph.unread)
            return dict(zip(names, self._sampled(hessian, parameters), strict=True))
        plans, rest = plan(tape, graph, layout, names)
        columns: ResidualPlan | None = None
        if layout is not None and layout.regular and plans:
            columns, plans = residual_columns.plan(graph, layout, plans)
        self._check_cost(columns, plans, rest, tape, layout)
        if rest:  # refuses wrong second derivatives, as `Unit.diagonals` does
            HessianProducts.of(graph.total, graph.weight, [tape.parameters[name] for name in rest], graph.unread)
        values = {} if columns is None else columns.diagonals(self.per_sample)
        for unit in plans:
            values |= unit.diagonals(graph, self.per_sample)
        for name in rest:
            values[name] = (_by_element(graph, layout if self.per_sample else None, tape.parameters[name]),)
        return values

    def _sampled(self, hessian: HessianProducts, parameters: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        totals = [torch.zeros_like(p) for p in parameters]
        assert self.draws is not None
        for _ in range(self.draws):
            signs = [_signs(p, self.generator) for p in parameters]
            products = hessian.apply([s.unsqueeze(0) for s in signs], range(len(signs)))
            for total, s, h in zip(totals, signs, products, strict=True):
                total += s * h[0] / self.draws
        return ((total,) for total in totals)

    def _check_cost(
        self,
        columns: ResidualPlan | None,
        plans: Sequence[Unit],
        rest: Sequence[str],
        tape: Tape,
        layout: SampleLayout | None,
    ) -> None:
        """Raise Undefined, before any product, where more than `max_products` are needed."""
        counts = {", ".join(unit.names): unit.count for unit in plans}
        if columns is not None:
            counts[", ".join(name for unit in columns.units for name in unit.names)] = columns.count
        times = layout.n if self.per_sample and layout is not None else 1
        counts |= {name: times * tape.parameters[name].numel() for name in rest}
        total = sum(counts.values())
        if self.max_products is not None and total > self.max_products:
            most = max(counts, key=lambda name: counts[name])
            share = f"; {most} alone takes {counts[most]}. Freeze that layer" if len(counts) > 1 else ". Freeze layers"
            raise Undefined(
                f"asked for the exact Hessian diagonal, which takes {total} columns or products with the Hessian here, "
                f"each as long as one or two backward passes, more than max_products={self.max_products}"
                f"{share}, raise max_products, or take DiagHessian(draws=k)"
            )

    def __repr__(self) -> str:
        if self.draws is not None:
            return f"DiagHessian(draws={self.draws})"
        return "DiagHessian(per_sample=True)" if self.per_sample else "DiagHessian()"


def _signs(p: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randint(2, p.shape, generator=generator, device=p.device).mul_(2).sub_(1).to(p.dtype)


# -- one product for every element --------------------------------------------------------------------------


def _by_element(graph: Graph, layout: SampleLayout | None, p: Tensor) -> Tensor:
    """The diagonal of one parameter by one product per element, `[*shape]`; with a layout per sample, `[N, *shape]`."""
    if layout is None:
        return _elements(gradient_of(graph, p), p)
    return torch.stack([_elements(g, p) for g in _sample_gradients(graph, layout, p)])


def _sample_gradients(graph: Graph, layout: SampleLayout, p: Tensor) -> Iterator[Tensor | None]:
    """The gradient of every sample's loss term, by masking the cotangents of all other samples at the losses."""
    edges = [loss.logits for loss in graph.losses]
    found = gradients(graph)
    kept = [(e, g, rows) for e, g, rows in zip(edges, found, layout.losses, strict=True) if g is not None]
    for n in range(layout.n):
        masked = [g * (rows.owners(g.shape, g.device) == n) for _, g, rows in kept]
        with twice():
            yield pull([e for e, _, _ in kept], masked, [p], create_graph=True)[0]


def _elements(gradient: Tensor | None, p: Tensor) -> Tensor:
    diagonal = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
    if gradient is None or not gradient.requires_grad:
        return diagonal.view(p.shape)
    each = max(1, min(_STACK_ELEMENTS // max(1, p.numel()), 256))
    for start in range(0, p.numel(), each):
        index = torch.arange(start, min(start + each, p.numel()), device=p.device)
        columns = torch.zeros(len(index), p.numel(), dtype=p.dtype, device=p.device)
        columns[torch.arange(len(index)), index] = 1
        with twice():
            (rows,) = pull_stack([gradient], [columns.view(-1, *p.shape)], [p], decided)
        if rows is not None:
            diagonal[index] = dense(rows.detach()).reshape(len(index), -1)[torch.arange(len(index)), index]
    return diagonal.view(p.shape)
