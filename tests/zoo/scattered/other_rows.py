"""Kind 8: what the first layer reads are other rows than samples: a grid, edges, the rows that a mask keeps."""

from __future__ import annotations

import torch
from torch import Generator, nn

from ..parts import Apply
from .program import Batch, Scattered, draw, labels, register

__all__ = ["OTHER_ROWS"]

OTHER_ROWS: list[Scattered] = []
program = register(OTHER_ROWS, 8)


def _rows(gen: Generator) -> Batch:
    """Five rows with a label each."""
    return Batch(x=draw(gen, 5, 4), y=labels(gen, 5), number=torch.arange(5), n=5)


def _graphs(gen: Generator) -> Batch:
    """Three graphs of 3, 2 and 4 nodes, with 16 edges within them and a label each."""
    graph = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    edges = [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (3, 4), (4, 3), (3, 3), (5, 6), (6, 7), (7, 8), (8, 5), (6, 5),
             (5, 7), (7, 5), (8, 6)]  # fmt: skip
    source, target = torch.tensor(edges).T
    return Batch(
        x=draw(gen, 9, 4), graph=graph, source=source, target=target, y=labels(gen, 3), number=torch.arange(3), n=3
    )


def _masked(gen: Generator) -> Batch:
    """Four sequences of six rows of which 18 are kept, a label each."""
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[0, 4:], keep[1, 2:], keep[2, 0] = False, False, True
    return Batch(x=draw(gen, 4, 6, 4), keep=keep, y=labels(gen, 4), number=torch.arange(4), n=4)


@program(_rows)
def frequency_grid():
    """The weights of the first layer are made from a grid of eight frequencies, a plain attribute."""

    def forward(m, x):
        weight = m.up(m.grid.sin() + m.wave(m.grid)).tanh()  # [8,4]
        return m.head((x @ weight.T).tanh())

    m = Apply(forward, wave=nn.Linear(2, 2), up=nn.Linear(2, 4), head=nn.Linear(8, 3))
    m.grid = torch.linspace(0.1, 3, 16, dtype=torch.float64).view(8, 2)
    return m


@program(_rows)
def field_on_a_grid():
    """A vector of each sample and a constant grid of eight points, each through a layer, added and summed over it."""

    def forward(m, x):
        return m.head((m.point(m.grid) + m.inner(x)[:, None]).tanh().sum(1))

    m = Apply(forward, point=nn.Linear(2, 5), inner=nn.Linear(4, 5), head=nn.Linear(5, 3))
    m.grid = torch.linspace(-1, 1, 16, dtype=torch.float64).view(8, 2)
    return m


@program(_rows, lambda m, b: m(torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2), b.x))
def as_many_points_as_samples():
    """The same with the grid as first argument, and as many points as samples."""

    def forward(m, grid, x):
        return m.head((m.point(grid) + m.inner(x)[:, None]).tanh().sum(1))

    return Apply(forward, point=nn.Linear(2, 5), inner=nn.Linear(4, 5), head=nn.Linear(5, 3))


@program(_graphs, lambda m, b: m(b.x, b.source, b.target, b.graph))
def edges_first():
    """The first layer reads the two ends of every edge; messages are added at the nodes, nodes by graph."""

    def forward(m, x, source, target, graph):
        message = m.edge(torch.cat([x[source], x[target]], 1)).tanh()
        nodes = (m.node(x) + x.new_zeros(len(x), 4).index_add(0, target, message)).tanh()
        return m.head(x.new_zeros(3, 4).index_add(0, graph, nodes))

    return Apply(forward, edge=nn.Linear(8, 4), node=nn.Linear(4, 4), head=nn.Linear(4, 3))


@program(_graphs, lambda m, b: m(b.x, b.source, b.target, b.graph))
def two_rounds_of_messages():
    """Nodes first, then messages along edges twice, and the mean of each graph."""

    def forward(m, x, source, target, graph):
        h = m.node(x)
        for layer in (m.first, m.second):
            h = (h + x.new_zeros(len(x), 4).index_add(0, target, layer(h[source]))).tanh()
        return m.head(x.new_zeros(3, 4).index_add(0, graph, h) / graph.bincount()[:, None])

    return Apply(forward, node=nn.Linear(4, 4), first=nn.Linear(4, 4), second=nn.Linear(4, 4), head=nn.Linear(4, 3))


@program(_masked, lambda m, b: m(b.x, b.keep))
def masked_first_layer():
    """The first layer reads `x[mask]`, and its rows go back to their places."""

    def forward(m, x, keep):
        h = x.new_zeros(4, 6, 5)
        h[keep] = m.inner(x[keep]).tanh()
        return m.head(h.sum(1))

    return Apply(forward, inner=nn.Linear(4, 5), head=nn.Linear(5, 3))


@program(_masked, lambda m, b: m(b.x, b.keep))
def masked_scatter():
    """The same by `masked_scatter`, with a layer on all rows behind it."""

    def forward(m, x, keep):
        h = x.new_zeros(4, 6, 5).masked_scatter(keep[..., None], m.inner(x[keep]))
        return m.head(m.middle(h.tanh()).tanh().sum(1))

    return Apply(forward, inner=nn.Linear(4, 5), middle=nn.Linear(5, 5), head=nn.Linear(5, 3))
