"""Programs for which no exact answer exists or is known: each must raise its typed error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .losses import LOSSES
from .parts import Apply, leaf
from .problem import batch_of, floats, prepare

__all__ = ["REFUSED", "Refused"]


def _cross_entropy(model: nn.Module, x: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


_INPUTS = floats(4, 4)


@dataclass(frozen=True)
class Refused:
    """A program that runs in plain torch and is refused by the library.

    error: the class name in `layerwise.errors`; "LayerwiseError" where any typed error will do.
    loss: (model, x, y) -> the scalar on which backward is called.
    tags: "later" where a later version of the library is meant to be exact instead.
    """

    name: str
    make: Callable[[], nn.Module]
    error: str
    loss: Callable[[nn.Module, Any, Tensor], Tensor] = _cross_entropy
    inputs: Callable[[torch.Generator], Any] = _INPUTS
    out: tuple[int, ...] = (4, 3)
    target: str = "ce_mean"
    train: bool = False
    tags: frozenset[str] = frozenset()

    def build(self, seed: int = 0) -> nn.Module:
        """The model in float64."""
        return prepare(self.make, seed, self.train)

    def batch(self, seed: int = 0) -> tuple[Any, Any]:
        """(x, y)."""
        return batch_of(self.inputs, LOSSES[self.target].target, self.out, seed)


# Samples mixed ----------------------------------------------------------------------------------


def _batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def _contrastive(model: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    z = F.normalize(model(x), dim=1)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(x.shape[0]).roll(1))


def _mixing(mix: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Apply(lambda m, x: m.head(mix(m.inner(x)).tanh()), inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


# Uses that no torch call shows ------------------------------------------------------------------


class _Linear(torch.autograd.Function):
    """x wᵀ with its derivative, hidden in a custom Function."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


def _hidden() -> nn.Module:
    return Apply(lambda m, x: m.head(_Linear.apply(x, m.w).tanh()), w=leaf(4, 4), head=nn.Linear(4, 3))


def _half_covered() -> nn.Module:
    def forward(m, x):
        return m.head(F.linear(x, m.w).tanh() + _Linear.apply(x, m.w))

    return Apply(forward, w=leaf(4, 4), head=nn.Linear(4, 3))


def _half_covered_chain() -> nn.Module:
    """The hidden use lies before the seen one, on the same path."""
    return Apply(lambda m, x: m.head(F.linear(_Linear.apply(x, m.w).tanh(), m.w)), w=leaf(4, 4), head=nn.Linear(4, 3))


def _scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script says that it is deprecated
        block = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    return Apply(lambda m, x: m.head(m.block(x)), block=block, head=nn.Linear(4, 3))


def _reentrant() -> nn.Module:
    return Apply(
        lambda m, x: m.head(checkpoint(m.inner, m.first(x), use_reentrant=True)),
        first=nn.Linear(4, 4), inner=nn.Sequential(nn.Linear(4, 4), nn.Tanh()), head=nn.Linear(4, 3),
    )  # fmt: skip


def _threaded() -> nn.Module:
    def forward(m, x):
        with ThreadPoolExecutor(1) as pool:
            return m.head(pool.submit(m.inner, x).result().tanh())

    return Apply(forward, inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


def _vmapped() -> nn.Module:
    return Apply(lambda m, x: m.head(torch.vmap(m.inner)(x).tanh()), inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


def _inner_step() -> nn.Module:
    """A step on a weight by its own gradient, which sums over the batch."""

    def forward(m, x):
        (g,) = torch.autograd.grad(m.inner(x).square().sum(), m.inner.weight, create_graph=True)
        return m.head(F.linear(x, m.inner.weight - 0.1 * g).tanh())

    return Apply(forward, inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


# Losses -----------------------------------------------------------------------------------------


def _regularised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y) + 0.1 * sum((p**2).sum() for p in model.parameters())


def _squared(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y) ** 2


def _product(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Two known calls multiplied: each alone looks linear."""
    z = model(x)
    return F.mse_loss(z, y) * F.l1_loss(z, y)


# Composite calls -------------------------------------------------------------------------------


def _packed() -> nn.Module:
    def forward(m, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 3, 2, 1]), batch_first=True)
        return m.head(m.cell(packed)[1][0])

    return Apply(forward, cell=nn.GRU(4, 3, batch_first=True), head=nn.Linear(3, 3))


REFUSED = [
    Refused("batch_norm_train", _batch_norm, "SamplesMixed", train=True),
    Refused("contrastive", _mlp, "SamplesMixed", _contrastive),
    Refused("batch_centred", _mixing(lambda h: h - h.mean(0)), "SamplesMixed"),
    # Pairs of samples: any one split of the batch in two halves is blind to some of these.
    Refused("pairs_near", _mixing(lambda h: h + h[[1, 0, 3, 2]]), "SamplesMixed"),
    Refused("pairs_far", _mixing(lambda h: h + h[[2, 3, 0, 1]]), "SamplesMixed"),
    Refused("pairs_outer", _mixing(lambda h: h + h[[3, 2, 1, 0]]), "SamplesMixed"),
    Refused("custom_function", _hidden, "UncoveredUse"),
    Refused("half_covered", _half_covered, "UncoveredUse"),
    Refused("half_covered_chain", _half_covered_chain, "UncoveredUse"),
    Refused("scripted", _scripted, "UncoveredUse"),
    Refused("reentrant_checkpoint", _reentrant, "UncoveredUse"),
    Refused("thread_inside", _threaded, "UncoveredUse"),
    Refused("vmap_inside", _vmapped, "LayerwiseError"),
    Refused("inner_step", _inner_step, "SamplesMixed"),
    Refused("regulariser", _mlp, "Undefined", _regularised),
    Refused("loss_squared", _mlp, "LayerwiseError", _squared),
    Refused("loss_product", _mlp, "LayerwiseError", _product, target="mse_mean"),
    Refused("packed_sequence", _packed, "UnsupportedCall", inputs=floats(4, 3, 4)),
]
