"""Graphs, normalizing flows, spiking nets, Kolmogorov-Arnold nets and neural operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecosystem.base import Configuration, Program, shaken, sliced

__all__ = ["FLOWS", "GRAPHS", "KOLMOGOROV", "OPERATORS", "SPIKING"]

N, FEATURES, CLASSES = 3, 4, 3
NODES = (3, 5, 4)


def classified(model: nn.Module, x: Tensor, outputs: Callable[[Tensor], Tensor], **options: Any) -> Program:
    """One class for each row of x."""
    batch = {"x": x, "y": torch.randint(CLASSES, (N,))}
    loss_of = lambda z, b: F.cross_entropy(z, b["y"])  # noqa: E731
    return Program(model, batch, sliced(batch, N), lambda b: outputs(b["x"]), loss_of, **options)


def regressed(model: nn.Module, x: Tensor, shape: tuple[int, ...], outputs: Callable[[Tensor], Tensor]) -> Program:
    """The mean squared error."""
    batch = {"x": x, "y": torch.randn(N, *shape)}
    return Program(model, batch, sliced(batch, N), lambda b: outputs(b["x"]), lambda z, b: F.mse_loss(z, b["y"]))


# Graphs ------------------------------------------------------------------------------------------


def graph(nodes: int) -> Any:
    """A ring of nodes with a chord, and a class."""
    from torch_geometric.data import Data

    ring = torch.arange(nodes)
    edges = torch.stack([ring, ring.roll(-1)])
    edges = torch.cat([edges, edges.flip(0), torch.tensor([[0], [2]])], dim=1)
    return Data(torch.randn(nodes, FEATURES), edges, y=torch.randint(CLASSES, (1,)))


class Graphs(nn.Module):
    """Two layers of one kind, and a pooled head."""

    def __init__(self, layer: Callable[..., nn.Module], pool: str) -> None:
        super().__init__()
        self.one, self.two, self.head, self.pool = layer(FEATURES, 6), layer(6, 6), nn.Linear(6, CLASSES), pool

    def forward(self, data: Any) -> Tensor:
        import torch_geometric.nn as gnn

        h = torch.tanh(self.one(data.x, data.edge_index))
        h = torch.tanh(self.two(h, data.edge_index))
        return self.head(getattr(gnn, f"global_{self.pool}_pool")(h, data.batch))


def graphs(layer: str, pool: str = "mean", wrapped: bool = False, said: bool = False, **options: Any) -> Program:
    """A class for each graph."""
    import torch_geometric.nn as gnn
    from torch_geometric.data import Batch

    kind = getattr(gnn, layer)
    make = (
        (lambda i, o: kind(nn.Sequential(nn.Linear(i, o), nn.Tanh(), nn.Linear(o, o)), **options))
        if wrapped
        else partial(kind, **options)
    )
    model = shaken(Graphs(make, pool))
    data = [graph(nodes) for nodes in NODES]
    given = {"samples": len(NODES)} if said else {}
    alone = [Batch.from_data_list([one]) for one in data]
    return Program(model, Batch.from_data_list(data), alone, model, lambda z, b: F.cross_entropy(z, b.y), options=given)


def nodewise() -> Program:
    """A class for each node of one graph: the nodes are no samples of their own."""
    import torch_geometric.nn as gnn

    data = graph(6)
    model = shaken(nn.ModuleList([gnn.GCNConv(FEATURES, 6), gnn.GCNConv(6, CLASSES)]))
    y = torch.randint(CLASSES, (6,))
    outputs = lambda b: model[1](torch.tanh(model[0](b.x, b.edge_index)), b.edge_index)  # noqa: E731
    return Program(model, data, [data], outputs, lambda z, b: F.cross_entropy(z, y), mixed=True)


GRAPHS = [
    Configuration("torch-geometric", name, make, ("torch_geometric",))
    for name, make in (
        ("GCN", partial(graphs, "GCNConv")),
        ("GAT", partial(graphs, "GATConv")),
        ("GATv2", partial(graphs, "GATv2Conv")),
        ("GIN", partial(graphs, "GINConv", pool="add", wrapped=True, train_eps=True)),
        ("GraphSAGE, `samples=3`", partial(graphs, "SAGEConv", said=True, pool="max")),
        ("TransformerConv", partial(graphs, "TransformerConv")),
        ("GraphConv, `samples=3`", partial(graphs, "GraphConv", said=True)),
        ("ChebConv, `samples=3`", partial(graphs, "ChebConv", said=True, K=2)),
        ("SGConv, `samples=3`", partial(graphs, "SGConv", said=True, K=2)),
        ("TAGConv, `samples=3`", partial(graphs, "TAGConv", said=True, K=2)),
        ("ResGatedGraphConv", partial(graphs, "ResGatedGraphConv")),
        ("GCN, the nodes of one graph", nodewise),
    )
]


# Flows -------------------------------------------------------------------------------------------


def density(flow: Any, value: Callable[[Tensor], Tensor]) -> Program:
    """The negative log likelihood: a loss of the user's own."""
    batch = {"x": torch.randn(N, 2)}
    loss = lambda b: -value(b["x"]).mean()  # noqa: E731
    return Program(shaken(flow), batch, sliced(batch, N), None, lambda z, b: z, loss)


def zuko_flow(name: str, **options: Any) -> Program:
    import zuko

    flow = getattr(zuko.flows, name)(2, transforms=2, hidden_features=(6,), **options)
    return density(flow, lambda x: flow().log_prob(x))


def nflows_flow(make: Callable[[Any], Any]) -> Program:
    import nflows.distributions
    import nflows.flows
    import nflows.transforms as t

    flow = nflows.flows.Flow(
        t.CompositeTransform([make(t), t.ReversePermutation(2), make(t)]), nflows.distributions.StandardNormal([2])
    )
    return density(flow, flow.log_prob)


def normflows_flow() -> Program:
    import normflows as nf

    flows = []
    for _ in range(2):
        flows += [nf.flows.AffineCouplingBlock(nf.nets.MLP([1, 6, 2])), nf.flows.Permute(2, mode="swap")]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), flows)
    return density(flow, flow.log_prob)


FLOWS = (
    [
        Configuration("zuko", name, partial(zuko_flow, name, **options), ("zuko",))
        for name, options in (
            ("MAF", {}),
            ("NSF", {"bins": 3}),
            ("NICE", {}),
            ("SOSPF", {"degree": 2}),
            ("BPF", {"degree": 3}),
            ("GF", {}),
        )
    ]
    + [
        Configuration("nflows", name, partial(nflows_flow, make), ("nflows",))
        for name, make in (
            ("masked affine autoregressive", lambda t: t.MaskedAffineAutoregressiveTransform(2, 6, num_blocks=1)),
            ("LU linear", lambda t: t.LULinear(2)),
            ("SVD linear", lambda t: t.SVDLinear(2, num_householder=2)),
            (
                "rational quadratic splines",
                lambda t: t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                    2, 6, num_bins=3, num_blocks=1, tails="linear"
                ),
            ),
        )
    ]
    + [Configuration("normflows", "affine coupling", normflows_flow, ("normflows",))]
)


# Spiking, Kolmogorov-Arnold, operators -----------------------------------------------------------


def spiking(neuron: str, **options: Any) -> Program:
    """Three time steps; the head reads the last membrane."""
    import snntorch

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)
            self.spike = getattr(snntorch, neuron)(beta=0.9, learn_beta=True, threshold=0.2, **options)
            self.read = snntorch.Leaky(beta=0.8, reset_mechanism="none", learn_beta=True)

        def forward(self, x: Tensor) -> Tensor:
            state = self.spike.reset_mem()
            state = state if isinstance(state, tuple) else (state,)
            mem = self.read.reset_mem()
            for step in range(3):
                spikes, *state = self.spike(self.one(x[:, step]), *state)
                _, mem = self.read(self.two(spikes), mem)
            return mem

    model = shaken(Net())
    return classified(model, torch.randn(N, 3, FEATURES), model)


SPIKING = [
    Configuration("snntorch", name, partial(spiking, neuron, **options), ("snntorch",))
    for name, neuron, options in (
        ("leaky neurons", "Leaky", {}),
        ("leaky neurons, reset to zero", "Leaky", {"reset_mechanism": "zero"}),
        ("synaptic neurons", "Synaptic", {"alpha": 0.8, "learn_alpha": True}),
        ("recurrent leaky neurons", "RLeaky", {"linear_features": 6}),
    )
]


def kolmogorov(**options: Any) -> Program:
    """Learned splines on the edges."""
    import kan

    model = shaken(
        kan.KAN(width=[FEATURES, 3, CLASSES], grid=3, k=3, auto_save=False, symbolic_enabled=False, **options)
    )
    return classified(model, 0.5 * torch.randn(N, FEATURES), model)


KOLMOGOROV = [
    Configuration("pykan", "KAN", kolmogorov, ("kan",)),
    Configuration("pykan", "KAN with multiplications", partial(kolmogorov, mult_arity=2), ("kan",)),
]


def fno(**options: Any) -> Program:
    """Spectral convolutions: complex parameters."""
    from neuralop.models import FNO

    model = shaken(FNO(n_modes=(3, 3), in_channels=2, out_channels=1, hidden_channels=4, n_layers=1, **options))
    return regressed(model, torch.randn(N, 2, 6, 6), (1, 6, 6), model)


OPERATORS = [
    Configuration("neuraloperator", "FNO", fno, ("neuralop",)),
    Configuration("neuraloperator", "FNO, factorized", partial(fno, factorization="tucker", rank=0.5), ("neuralop",)),
]
