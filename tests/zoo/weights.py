"""Models by how they use their parameters: bare, tied, reused, outside modules, derived."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from .parts import Apply, leaf
from .problem import Functional, Problem, floats, register, tokens

__all__ = ["WEIGHTS"]

WEIGHTS: list[Problem] = []
problem = register(WEIGHTS)


# Bare parameters --------------------------------------------------------------------------------


@problem(floats(4, 3, 4), (4, 3))
def layer_scale():
    return Apply(
        lambda m, x: m.head((x + m.scale * m.inner(x).tanh()).mean(1)),
        inner=nn.Linear(4, 4), scale=leaf(4), head=nn.Linear(4, 3),
    )  # fmt: skip


@problem(floats(3, 4, 3), (3, 3))
def position_table():
    return Apply(
        lambda m, x: m.head((m.inner(x) + m.table).tanh().mean(1)),
        inner=nn.Linear(3, 4),
        table=leaf(4, 4),
        head=nn.Linear(4, 3),
    )


@problem(floats(3, 2, 4), (3, 3))
def class_token():
    def forward(m, x):
        h = torch.cat([m.token.expand(x.shape[0], -1, -1), x], dim=1)
        h = torch.einsum("st,nti->nsi", m.mixing, m.inner(h).tanh())
        return m.head(h[:, 0])

    return Apply(forward, token=leaf(1, 1, 4), inner=nn.Linear(4, 4), mixing=torch.randn(3, 3), head=nn.Linear(4, 3))


@problem(floats(4, 4), (4, 3), "ce_mean", "ce_scaled", "mse_sum")
def temperature():
    """A learned scalar, used as its exponential, divides the logits."""
    return Apply(
        lambda m, x: m.head(m.inner(x).relu()) / m.log_t.exp(),
        inner=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
        log_t=leaf(),
    )


@problem(floats(3, 4, 3), (3, 3))
def mask_token():
    """Positions chosen by the data are replaced by a parameter."""
    return Apply(
        lambda m, x: m.head(torch.where(x[..., :1] > 0, x, m.token).tanh().mean(1)),
        token=leaf(3),
        head=nn.Linear(3, 3),
    )


@problem(floats(4, 4), (4, 3), "ce_mean")
def affine_by_hand():
    """Subtraction, division and exponential of bare parameters, also in place and reversed."""

    def forward(m, x):
        h = (x - m.shift) / (m.scale.exp() + 1)
        h = h.mul(2).add_(m.bias)
        return (m.total - h[:, :3]).mul(m.scale[:3]).tanh()

    return Apply(forward, shift=leaf(4), scale=leaf(4), bias=leaf(4), total=leaf(1))


# Reuse ------------------------------------------------------------------------------------------


@problem(floats(4, 4), (4, 3), "ce_mean", "ce_weighted", "mse_mean")
def residual():
    def forward(m, x):
        h = x + m.a(x).relu()
        return m.head(h + m.b(h).tanh())

    return Apply(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), head=nn.Linear(4, 3))


@problem(floats(4, 4), (4, 3), "ce_mean", "ce_ignore", "mse_sum")
def reused():
    """One Linear called twice."""
    return Apply(lambda m, x: m.head(m.inner(m.inner(x).tanh()).tanh()), inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


@problem(floats(3, 4, 3), (3, 3), "ce_mean")
def reused_at_two_shapes():
    """One Linear on [N, T, i] and then on the mean over T."""
    return Apply(
        lambda m, x: m.head(m.inner(m.inner(x).tanh().mean(1)).tanh()),
        inner=nn.Linear(3, 3),
        head=nn.Linear(3, 3),
    )


@problem(tokens(5, 3, 4), (3, 5, 4), "ce_mean", "ce_ignore", "mse_mean")
def tied_embedding():
    """The embedding is the output projection too."""
    return Apply(
        lambda m, x: F.linear(m.inner(m.embed(x)).tanh(), m.embed.weight).transpose(1, 2),
        embed=nn.Embedding(5, 4),
        inner=nn.Linear(4, 4),
    )


@problem(floats(4, 5), (4, 5), "mse_mean", "bce_mean")
def tied_autoencoder():
    """The decoder is the encoder's transpose."""
    return Apply(lambda m, x: F.linear(F.linear(x, m.w, m.a).tanh(), m.w.t(), m.b), w=leaf(3, 5), a=leaf(3), b=leaf(5))


# Weights outside modules ------------------------------------------------------------------------


@problem(floats(4, 3), (4, 3), "ce_mean", "mse_sum")
def matmul_forms():
    """x @ w, (w @ xᵀ)ᵀ, einsum, addmm and torch.mm, one after the other."""

    def forward(m, x):
        h = (x @ m.right + m.bias).tanh()
        h = (m.left @ h.T).T.tanh()
        h = torch.einsum("ni,oi->no", h, m.named).tanh()
        h = torch.addmm(m.bias, h, m.added).tanh()
        return torch.mm(h, m.last.t())

    return Apply(
        forward,
        right=leaf(3, 4),
        bias=leaf(4),
        left=leaf(4, 4),
        named=leaf(4, 4),
        added=leaf(4, 4),
        last=leaf(3, 4),
    )


@problem(floats(3, 3, 4), (3, 3), "ce_mean", "mse_sum")
def matmul_batched():
    """torch.matmul of [N, T, i] by [i, o] with T = N, and baddbmm-free groups by bmm."""

    def forward(m, x):
        h = torch.matmul(x, m.w).tanh()  # [N, T, 4]
        h = torch.bmm(h.transpose(0, 1), m.groups).tanh()  # a weight for every position
        return h.mean(0)

    return Apply(forward, w=leaf(4, 4), groups=leaf(3, 4, 3))


@problem(floats(3, 2, 4), (3, 3), "ce_mean")
def einsum_groups():
    """A weight for every group in one einsum, and a sum over the groups."""
    return Apply(lambda m, x: torch.einsum("ngi,gio->no", x.tanh(), m.w).tanh() @ m.v, w=leaf(2, 4, 4), v=leaf(4, 3))


@problem(tokens(5, 4, 3), (4, 3), "ce_mean")
def table_lookup():
    """A table read by indexing instead of by an embedding."""
    return Apply(lambda m, x: m.head(m.table[x].tanh().mean(1)), table=leaf(5, 4), head=nn.Linear(4, 3))


@problem(floats(4, 3), (4, 3), "ce_mean", "mse_mean", tags="functional")
def functional():
    """No module: a dictionary of leaf tensors."""
    params = {"w1": torch.randn(5, 3), "b1": torch.randn(5), "w2": torch.randn(3, 5), "b2": torch.randn(3)}
    return Functional(params, lambda p, x: F.linear(F.linear(x, p["w1"], p["b1"]).relu(), p["w2"], p["b2"]))


@problem(floats(3, 2, 4, 4), (3, 3), "ce_mean", tags="functional")
def functional_conv():
    params = {"kernel": torch.randn(3, 2, 3, 3), "gain": torch.randn(3, 1, 1), "w": torch.randn(3, 3)}
    return Functional(params, lambda p, x: (F.conv2d(x, p["kernel"]) * p["gain"]).relu().mean((2, 3)) @ p["w"])


# Derived weights --------------------------------------------------------------------------------


@problem(floats(4, 4), (4, 3))
def weight_norm():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(5, 3), dim=None),
    )


@problem(floats(3, 2, 4, 3), (3, 3), "ce_mean")
def weight_norm_conv():
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 3, 2, groups=1)), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    )


@problem(floats(4, 3), (4, 3), "ce_mean")
def spectral_norm():
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))


@problem(floats(4, 3), (4, 3), "ce_mean")
def orthogonal():
    return nn.Sequential(
        parametrizations.orthogonal(nn.Linear(3, 4), orthogonal_map="cayley"), nn.Tanh(), nn.Linear(4, 3)
    )


@problem(floats(4, 4), (4, 3), "ce_mean", "ce_weighted", "mse_sum")
def lora():
    """W frozen, W + B A used; and a plain product of two factors."""

    def forward(m, x):
        h = F.linear(x, m.base.weight + m.up @ m.down, m.base.bias).tanh()
        return F.linear(h, m.out_left @ m.out_right)

    base = nn.Linear(4, 4)
    base.weight.requires_grad_(False)
    return Apply(forward, base=base, up=leaf(4, 2), down=leaf(2, 4), out_left=leaf(3, 2), out_right=leaf(2, 4))


@problem(floats(3, 2, 4), (3, 3))
def chunked():
    """One parameter chunked into the weights of q, k and v, another stacked from two."""

    def forward(m, x):
        q, k, v = (F.linear(x, w, b) for w, b in zip(m.qkv.chunk(3), m.bias.chunk(3), strict=True))
        h = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return F.linear(h.mean(1), torch.cat([m.top, m.bottom]))

    return Apply(forward, qkv=leaf(12, 4), bias=leaf(12), top=leaf(2, 4), bottom=leaf(1, 4))


@problem(floats(4, 3), (4, 3), "ce_mean")
def softmax_weights():
    """Weights that are a nonlinear function of a parameter, also through a frozen one."""
    return Apply(
        lambda m, x: F.linear(F.linear(x, m.w.softmax(1)).tanh(), m.v * m.v.abs().sum(), m.a + m.b.exp()),
        w=leaf(4, 3),
        v=leaf(3, 4),
        a=leaf(3),
        b=leaf(3),
    )
