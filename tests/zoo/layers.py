"""Models made of torch's own layers: linear, embedding, norms, activations; convolutions apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .losses import LOSSES
from .parts import Apply, Mean, leaf
from .problem import Problem, floats, register, tokens

__all__ = ["LAYERS"]

LAYERS: list[Problem] = []
problem = register(LAYERS)


# Linear -----------------------------------------------------------------------------------------

EVERY_LOSS_OF_ONE_HEAD = [name for name in LOSSES if name not in ("ce_ignore_sum", "ce_stepwise", "two_heads")]


@problem(floats(5, 4), (5, 3), *EVERY_LOSS_OF_ONE_HEAD)
def mlp_relu():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@problem(floats(4, 3), (4, 3), "ce_mean", "ce_weighted", "mse_mean")
def mlp_tanh():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.GELU(), nn.Linear(4, 3))


@problem(floats(3, 4), (3, 2), "ce_sum", "mse_sum", "bce_mean")
def mlp_sigmoid():
    return nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2))


@problem(floats(4, 4), (4, 3), "ce_mean", "ce_ignore", "mse_sum")
def mlp_inplace():
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 4),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Linear(4, 3),
    )


@problem(floats(4, 3), (4, 2), "mse_mean", "mse_sum")
def linear_alone():
    return nn.Linear(3, 2)


@problem(floats(1, 3), (1, 3), "ce_mean", "mse_mean")
def one_sample():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


@problem(floats(4, 3), (4, 4), "ce_mean", "mse_mean")
def features_equal_samples():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))


@problem(floats(3, 3, 4), (3, 3), "ce_mean", "mse_sum")
def positions_equal_samples():
    """Linear on [N, T, i] with T = N, then a mean over T."""
    return Apply(lambda m, x: m.b(m.a(x).tanh().mean(1)), a=nn.Linear(4, 3), b=nn.Linear(3, 3))


@problem(floats(3, 2, 2, 4), (3, 2, 2, 2), "mse_mean", "bce_mean")
def linear_4d():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


# Embedding --------------------------------------------------------------------------------------


@problem(tokens(6, 4, 3), (4, 3), "ce_mean", "ce_smooth", "mse_sum")
def embedding_pool():
    return nn.Sequential(nn.Embedding(6, 4, padding_idx=0), Mean(1), nn.Tanh(), nn.Linear(4, 3))


@problem(tokens(6, 4, 3), (4, 3), tags="bag")
def embedding_bag():
    return nn.Sequential(nn.EmbeddingBag(6, 4, mode="mean"), nn.Tanh(), nn.Linear(4, 3))


@problem(tokens(6, 4, 3), (4, 3), tags="bag")
def embedding_bag_padded():
    """Token 0 counts nothing."""
    return nn.Sequential(nn.EmbeddingBag(6, 4, mode="sum", padding_idx=0), nn.Tanh(), nn.Linear(4, 3))


@problem(tokens(5, 3, 4), (3, 3, 4), "ce_mean", "ce_ignore", "ce_everything", "ce_stepwise", "mse_mean")
def tokens_class_second():
    """A class for every token, logits [N, C, T] as torch's cross entropy wants them."""
    return Apply(lambda m, x: m.head(m.embed(x).tanh()).transpose(1, 2), embed=nn.Embedding(5, 4), head=nn.Linear(4, 3))


@problem(
    tokens(5, 3, 4),
    (12, 3),
    "ce_mean",
    "ce_ignore",
    "ce_ignore_sum",
    "ce_user_weighted",
    "mse_sum",
    layout="flat_n",
)
def tokens_flat():
    """The same with logits [N·T, C]: the loss's own dim 0 is not N."""
    return Apply(lambda m, x: m.head(m.embed(x).tanh()).flatten(0, 1), embed=nn.Embedding(5, 4), head=nn.Linear(4, 3))


@problem(tokens(5, 3, 4), (3, 3))
def position_embedding():
    """The second table is read at torch.arange(T): the same rows for every sample."""
    return Apply(
        lambda m, x: m.head((m.embed(x) + m.position(torch.arange(x.shape[1]))).tanh().mean(1)),
        embed=nn.Embedding(5, 4),
        position=nn.Embedding(4, 4),
        head=nn.Linear(4, 3),
    )


# Norms and PReLU --------------------------------------------------------------------------------


@problem(floats(4, 3, 4), (4, 3))
def layer_norm():
    return nn.Sequential(
        nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), Mean(1), nn.LayerNorm(5, bias=False), nn.Linear(5, 3)
    )


@problem(floats(3, 2, 3, 3), (3, 3), "ce_mean")
def layer_norm_images():
    """Normalised over three axes."""
    return nn.Sequential(nn.Conv2d(2, 2, 2), nn.LayerNorm((2, 2, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))


@problem(floats(3, 2, 4, 3), (3, 3))
def group_norm():
    return nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), Mean(-1, -2), nn.Linear(4, 3))


@problem(floats(3, 2, 4, 3), (3, 3))
def instance_norm():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.Tanh(), Mean(-1, -2))


@problem(floats(3, 2, 6), (3, 3), "ce_mean")
def instance_norm_tracked():
    """With running statistics, which eval mode uses."""
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Tanh(), Mean(-1)
    )


@problem(floats(4, 3, 4), (4, 3))
def rms_norm():
    return nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Tanh(), Mean(1), nn.Linear(5, 3))


@problem(floats(4, 4), (4, 3), "ce_mean", "mse_mean", tags="batch_norm")
def batch_norm1d_eval():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


@problem(floats(3, 2, 4, 3), (3, 3), tags="batch_norm")
def batch_norm2d_eval():
    return nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), Mean(-1, -2), nn.Linear(3, 3))


@problem(floats(4, 4), (4, 3), "ce_mean", tags="batch_norm mixed", train=True)
def batch_norm_train():
    """A sample's term depends on the other samples."""
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


@problem(floats(4, 4), (4, 3))
def prelu_single():
    return nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3))


@problem(floats(3, 2, 4, 3), (3, 3))
def prelu_channels():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.PReLU(3), Mean(-1, -2), nn.Linear(3, 3))


@problem((lambda gen: (floats(4, 3)(gen), floats(4, 2)(gen))), (4, 3))
def bilinear():
    """Two inputs."""
    return Apply(lambda m, a, b: m.head(F.tanh(m.mix(a, b))), mix=nn.Bilinear(3, 2, 4), head=nn.Linear(4, 3))


@problem(floats(4, 4), (4, 3), "ce_mean", tags="opaque")
def unknown_call():
    """Distances to learned centres: a call that no rule knows."""
    return Apply(
        lambda m, x: m.head(torch.pairwise_distance(x[:, None], m.centres)),
        centres=leaf(5, 4), head=nn.Linear(5, 3),
    )  # fmt: skip


@problem(floats(4, 4), (4, 3))
def dropout_eval():
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))
