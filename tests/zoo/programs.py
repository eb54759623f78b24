"""Models by what their forward does: time first, constants, branches, checkpoints, losses inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .parts import Apply, leaf
from .problem import Problem, floats, register, tokens

__all__ = ["PROGRAMS"]

PROGRAMS: list[Problem] = []
problem = register(PROGRAMS)


# Time ---------------------------------------------------------------------------------------------


@problem(floats(3, 5, 2), (3, 3))
def seq_first_recurrent():
    """A recurrent cell by hand, time first inside, started at zeros; T ≠ N."""

    def forward(m, x):
        x = x.transpose(0, 1)
        h = x.new_zeros(x.shape[1], 3)
        for step in x:
            h = torch.tanh(F.linear(step, m.w) + F.linear(h, m.u, m.b))
        return m.head(h)

    return Apply(forward, w=leaf(3, 2), u=leaf(3, 3), b=leaf(3), head=nn.Linear(3, 3))


def _causal() -> nn.Module:
    def forward(m, x):
        z = m.inner(x.transpose(0, 1))  # [T, N, h]
        return m.head(torch.einsum("st,tnh->snh", m.mixing, z).tanh())

    return Apply(forward, inner=nn.Linear(2, 3), mixing=torch.randn(3, 3).tril(), head=nn.Linear(3, 3))


@problem(
    floats(3, 3, 2),
    (9, 3),
    "ce_mean",
    "ce_ignore",
    "mse_sum",
    layout="flat_t",
    head=lambda z: z.flatten(0, 1),
)
def seq_first_flat_square():
    """Time first inside and out, T = N, causal mixing over time; logits [T·N, C]."""
    return _causal()


@problem(floats(3, 3, 2), (3, 3, 3), "mse_mean", "bce_mean", layout="second")
def seq_first_square():
    """The same with outputs [T, N, C]."""
    return _causal()


@problem(floats(3, 3, 2), (3, 3), "ce_mean", "mse_mean", head=lambda z: z.mean(0))
def seq_first_pooled():
    """The same with a mean over time, so that only the layers inside are time first."""
    return _causal()


@problem(floats(3, 4, 2), (3, 3), "ce_mean")
def constant_start():
    """A recurrent cell from torch.ones(N, h): its first use sees no data, yet has a row for every sample."""

    def forward(m, x):
        h = torch.ones(x.shape[0], 3, dtype=x.dtype)
        for step in x.unbind(1):
            h = torch.tanh(m.w(step) + m.u(h))
        return m.head(h)

    return Apply(forward, w=nn.Linear(2, 3), u=nn.Linear(3, 3, bias=False), head=nn.Linear(3, 3))


@problem(floats(3, 3, 4), (3, 3), "ce_mean", "mse_sum")
def constant_input():
    """A layer applied to a constant grid [T, i] with T = N: its output has no sample axis."""
    return Apply(
        lambda m, x: m.head((x + m.inner(m.grid).sin()).tanh().mean(1)),
        grid=torch.randn(3, 2), inner=nn.Linear(2, 4), head=nn.Linear(4, 3),
    )  # fmt: skip


@problem(floats(3, 4, 2), (3, 3), "ce_mean")
def learned_start():
    """A recurrent cell from a learned state that is expanded over the samples."""

    def forward(m, x):
        h = m.start.expand(x.shape[0], -1)
        for step in x.unbind(1):
            h = torch.addmm(m.b, step, m.w).add(h @ m.u).tanh()
        return m.head(h)

    return Apply(forward, start=leaf(1, 3), w=leaf(2, 3), u=leaf(3, 3), b=leaf(3), head=nn.Linear(3, 3))


# Programs ---------------------------------------------------------------------------------------


@problem(floats(4, 4), (4, 3))
def frozen_subset():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


@problem(floats(4, 4), (4, 3), "ce_mean", tags="unused_frozen")
def frozen_branch():
    """A branch that is never run and is frozen."""
    return Apply(lambda m, x: m.head(x.tanh()), head=nn.Linear(4, 3), idle=nn.Linear(4, 3).requires_grad_(False))


@problem(floats(4, 4), (4, 3), "ce_mean", tags="unused_parameter")
def unused_parameter():
    """A branch that is never run although it may be trained: no error, its quantities are absent or 0."""
    return Apply(lambda m, x: m.head(x.tanh()), head=nn.Linear(4, 3), idle=nn.Linear(4, 3))


@problem(floats(4, 4), (4, 3), "ce_mean", "mse_sum")
def no_grad_gate():
    """A second use of the weight under no_grad is a constant."""

    def forward(m, x):
        with torch.no_grad():
            gate = m.inner(x).sigmoid()
        return m.head(m.inner(x).tanh() * gate)

    return Apply(forward, inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


@problem(floats(5, 4), (5, 3), "ce_mean", "ce_ignore", "mse_sum")
def dead_samples():
    """Some samples send nothing back through the first layer: its cotangent has zero rows."""
    return Apply(
        lambda m, x: m.head(torch.cat([m.inner(x).tanh() * (x[:, :1] > 0), x], 1)),
        inner=nn.Linear(4, 3), head=nn.Linear(7, 3),
    )  # fmt: skip


@problem(floats(4, 4), (4, 3), "ce_mean", tags="dead")
def dead_layer():
    """No sample sends anything back through the first layer: all of its quantities are 0."""
    return Apply(lambda m, x: m.head((m.inner(x) - 100).relu() + x[:, :3]), inner=nn.Linear(4, 3), head=nn.Linear(3, 3))


@problem(floats(4, 4), (4, 3), "ce_mean", "mse_sum")
def checkpointed():
    """Non-reentrant activation checkpointing of the first two layers."""
    inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
    return Apply(lambda m, x: m.head(checkpoint(m.inner, x, use_reentrant=False)), inner=inner, head=nn.Linear(4, 3))


@problem(floats(4, 4), (4, 3), "ce_mean", dtype=torch.float32, rel=2e-2)
def autocast():
    """Products in bfloat16, whose rounding is in the gradient itself; parameters and results in float32."""

    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = m.norm(m.inner(x.float())).tanh()
            return m.head(h).float()

    return Apply(forward, inner=nn.Linear(4, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 3))


class _Doubler(torch.autograd.Function):
    """Doubles its input, with the derivative of doubling."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@problem(floats(4, 4), (4, 3), "ce_mean")
def custom_function_between():
    """A custom autograd.Function that touches no parameter is only another node."""
    return Apply(lambda m, x: m.head(_Doubler.apply(m.inner(x)).tanh()), inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


@problem(floats(4, 4), (4, 3), "ce_mean")
def functional_call():
    """The module's own parameters handed in by torch.func.functional_call."""

    def forward(m, x):
        return torch.func.functional_call(m.inner, dict(m.inner.named_parameters()), (x,))

    return Apply(forward, inner=nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))


@problem(floats(4, 4), (4, 3), "ce_mean", "mse_sum", head=lambda out: out["logits"])
def dict_output():
    return Apply(
        lambda m, x: {"hidden": (h := m.inner(x).tanh()), "logits": m.head(h)},
        inner=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )


@problem(floats(4, 4), ((4, 3), (4, 2)), "two_heads")
def two_heads():
    """A tuple of outputs, a loss for each, a trunk under both."""

    def forward(m, x):
        h = m.trunk(x).relu()
        return m.classes(h), m.values(h)

    return Apply(forward, trunk=nn.Linear(4, 4), classes=nn.Linear(4, 3), values=nn.Linear(4, 2))


@problem(floats(3, 3, 4), (3, 3))
def attention():
    """Single-head attention from Linear layers, T = N."""

    def forward(m, x):
        scores = m.q(x) @ m.k(x).transpose(1, 2) / 2
        return m.head(m.out(scores.softmax(-1) @ m.v(x)).add(x).mean(1))

    return Apply(
        forward,
        q=nn.Linear(4, 4),
        k=nn.Linear(4, 4, bias=False),
        v=nn.Linear(4, 4),
        out=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )


# Losses made inside forward ---------------------------------------------------------------------


@dataclass
class Output:
    """What models of the Hugging Face kind return."""

    loss: Tensor | None
    logits: Tensor


@problem(
    floats(4, 4), (4, 3), "ce_mean",
    head=lambda out: out.logits,
    own_output=lambda m, x, y: m(x, labels=y),
    own_loss=lambda m, x, y: m(x, labels=y).loss,
)  # fmt: skip
def loss_inside():
    def forward(m, x, labels=None):
        logits = m.head(m.inner(x).tanh())
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)

    return Apply(forward, inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


@problem(
    tokens(5, 3, 4), (9, 5), "ce_mean", "ce_ignore", layout="flat_n",
    head=lambda out: out.logits[:, :-1].flatten(0, 1),
    own_output=lambda m, x, y: m(x, labels=F.pad(y.view(3, 3), (1, 0), value=-100)),
    own_loss=lambda m, x, y: m(x, labels=F.pad(y.view(3, 3), (1, 0), value=-100)).loss,
)  # fmt: skip
def causal_lm():
    """Labels [N, T] shifted inside, a head tied to the embedding, the loss on [N·(T-1), C]."""

    def forward(m, x, labels=None):
        h = m.inner(m.embed(x).cumsum(1)).tanh()
        logits = F.linear(h, m.embed.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, 5), labels[:, 1:].reshape(-1))
        return Output(loss, logits)

    return Apply(forward, embed=nn.Embedding(5, 4), inner=nn.Linear(4, 4))
