"""What a sample is where several tensors meet in one loss: graphs, parts of a batch, rows compared with others."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw

Loss = Callable[[], Tensor]
N = 4


def _each(model: nn.Module, loss: Loss, samples: int | Tensor | None = None) -> dict[str, Tensor]:
    with lw.observe(model, lw.PerSampleGrad(), samples=samples) as seen:
        loss().backward()
    return dict(seen.per_sample_grad)


# -- graphs ----------------------------------------------------------------------------------------------------------

RING = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [1, 0, 3, 4, 2, 6, 7, 8, 5]])
GRAPH_OF = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])


class Sage(nn.Module):
    """Nodes beside the sum of their neighbours; the edges come as `[2, E]`, as many as nodes or not."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.neighbours, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        summed = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        return self.head((self.own(x) + self.neighbours(summed)).tanh())


@pytest.mark.parametrize("edges", [RING, RING[:, :7], torch.cat([RING, RING.flip(0)], 1)], ids=["nodes", "7", "both"])
@pytest.mark.parametrize("of", ["graphs", "nodes"])
def test_rows_of_an_edge_index_are_no_samples(of: str, edges: Tensor) -> None:
    model, x = Sage().double(), torch.randn(9, 3).double()
    n = 3 if of == "graphs" else 9
    y = torch.randn(n, 2).double()

    def terms() -> Tensor:
        z = model(x, edges)
        z = z if of == "nodes" else z.new_zeros(3, 2).index_add(0, GRAPH_OF, z)
        return F.mse_loss(z, y, reduction="none")

    want = oracle.per_sample_grad(oracle.parameters(model), lambda: terms().sum(1))
    oracle.assert_close(_each(model, lambda: terms().sum()), want, 1e-12)

    def loss() -> Tensor:
        z = model(x, edges)
        return F.mse_loss(z if of == "nodes" else z.new_zeros(3, 2).index_add(0, GRAPH_OF, z), y, reduction="sum")

    oracle.assert_close(_each(model, loss), want, 1e-12)
