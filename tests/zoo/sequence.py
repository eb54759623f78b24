"""Sequence models whose parameters torch hides inside one call: attention and recurrent layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .parts import Apply, Mean, leaf
from .problem import Problem, floats, register, tokens

__all__ = ["SEQUENCE"]

SEQUENCE: list[Problem] = []
problem = register(SEQUENCE)


def _causal(t: int) -> torch.Tensor:
    return torch.ones(t, t, dtype=torch.bool).triu(1)


# Attention ----------------------------------------------------------------------------------------


@problem(floats(3, 4, 4), (3, 3), "ce_mean", "mse_sum")
def multihead_attention():
    return Apply(
        lambda m, x: m.head(m.attend(x, x, x, need_weights=False)[0].mean(1)),
        attend=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 3),
    )  # fmt: skip


@problem(floats(3, 3, 4), (3, 3), "ce_mean")
def attention_time_first():
    """Time first with T = N, a Boolean mask, and the attention weights in the output."""

    def forward(m, x):
        h = m.inner(x).transpose(0, 1)
        out, weights = m.attend(h, h, h, attn_mask=m.mask)
        return m.head(out.mean(0)) + weights.square().mean(1)

    return Apply(
        forward, inner=nn.Linear(4, 4), attend=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 3), mask=_causal(3)
    )


@problem(floats(3, 4, 4), (3, 3), "ce_mean", "mse_mean")
def attention_padded():
    """Padding that depends on the data, a float mask, a learned position, a position of zeros."""

    def forward(m, x):
        padding = torch.cat([x[:, :1, 0] > 9, x[:, 1:, 0] > 0], 1)
        out, _ = m.attend(x, x, x, key_padding_mask=padding.to(x.dtype) * -1e9, attn_mask=m.mask)
        return m.head(out.mean(1))

    attend = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
    return Apply(forward, attend=attend, mask=torch.randn(4, 4), head=nn.Linear(4, 3))


@problem(floats(3, 4, 4), (3, 3), "ce_mean")
def attention_cross():
    """Other keys than queries, with one weight for all three and with one each; values of another width."""

    def forward(m, x):
        h = m.one(x[:, :2], x, x, need_weights=False)[0]
        h = m.two(h, x[..., :3], x[..., 1:3], need_weights=False)[0]
        return m.head(m.three(h, h, x[:, 2:])[0].mean(1))

    return Apply(
        forward,
        one=nn.MultiheadAttention(4, 2, batch_first=True),
        two=nn.MultiheadAttention(4, 2, kdim=3, vdim=2, bias=False, batch_first=True),
        three=nn.MultiheadAttention(4, 1, batch_first=True),
        head=nn.Linear(4, 3),
    )


@problem(floats(3, 4, 4), (3, 3), "ce_mean")
def attention_learned_queries():
    """The queries are a parameter, so that their projection meets no data."""
    return Apply(
        lambda m, x: m.head(m.attend(m.queries.expand(x.shape[0], -1, -1), x, x)[0].flatten(1)),
        queries=leaf(1, 2, 4), attend=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(8, 3),
    )  # fmt: skip


def _encoder(norm_first: bool, batch_first: bool = True, **kw: object) -> nn.TransformerEncoder:
    """Two layers."""
    layer = nn.TransformerEncoderLayer(4, 2, 2, batch_first=batch_first, norm_first=norm_first, **kw)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@problem(floats(3, 4, 4), (3, 3), "ce_mean", "mse_mean")
def transformer_post_norm():
    return nn.Sequential(_encoder(False), Mean(1), nn.Linear(4, 3))


@problem(floats(2, 3, 4), (2, 3), "ce_mean")
def transformer_pre_norm():
    """Time first, with a mask."""
    return Apply(
        lambda m, x: m.head(m.encoder(x.transpose(0, 1), mask=m.mask).mean(0)),
        encoder=_encoder(True, batch_first=False, activation="gelu"), mask=_causal(3), head=nn.Linear(4, 3),
    )  # fmt: skip


@problem(floats(2, 3, 4), (2, 3), "ce_mean")
def transformer_decoder():
    return Apply(
        lambda m, x: m.head(m.decoder(x, x[:, :2].tanh(), tgt_mask=m.mask, tgt_is_causal=True).mean(1)),
        decoder=nn.TransformerDecoderLayer(4, 2, 5, batch_first=True),
        mask=_causal(3),
        head=nn.Linear(4, 3),
    )


@problem(floats(2, 1, 4, 4), (2, 3), "ce_mean", "mse_sum")
def vit():
    """Patches, a class token, a table of positions."""

    def forward(m, x):
        h = m.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([m.token.expand(x.shape[0], -1, -1), h], 1) + m.positions
        return m.head(m.encoder(h)[:, 0])

    return Apply(
        forward,
        patches=nn.Conv2d(1, 4, 2, stride=2), token=leaf(1, 1, 4), positions=leaf(1, 5, 4),
        encoder=_encoder(True), head=nn.Linear(4, 3),
    )  # fmt: skip


@problem(tokens(5, 3, 4), (3, 5, 4), "ce_mean", "ce_ignore", head=lambda z: z.transpose(1, 2))
def char_gpt():
    """The embedding is the output layer too; every position predicts."""

    def forward(m, x):
        t = x.shape[1]
        h = m.embed(x) + m.place(torch.arange(t))
        h = m.encoder(h, mask=nn.Transformer.generate_square_subsequent_mask(t, dtype=h.dtype), is_causal=True)
        return F.linear(m.norm(h), m.embed.weight)

    return Apply(
        forward, embed=nn.Embedding(5, 4), place=nn.Embedding(4, 4), encoder=_encoder(True), norm=nn.LayerNorm(4)
    )


# Recurrent layers ---------------------------------------------------------------------------------


@problem(floats(3, 4, 2), (3, 3), "ce_mean", "mse_sum")
def lstm():
    return Apply(lambda m, x: m.head(m.cell(x)[0][:, -1]), cell=nn.LSTM(2, 3, batch_first=True), head=nn.Linear(3, 3))


@problem(floats(3, 3, 2), (3, 3), "ce_mean")
def lstm_stacked_both_ways():
    """Time first with T = N; the last states of h and c are read too."""

    def forward(m, x):
        out, (h, c) = m.cell(x.transpose(0, 1))
        return m.head(out.mean(0)) + m.state(torch.cat([*h, *c], -1))

    return Apply(forward, cell=nn.LSTM(2, 2, 2, bidirectional=True), head=nn.Linear(4, 3), state=nn.Linear(16, 3))


@problem(floats(3, 4, 2), (3, 3), "ce_mean")
def lstm_projected():
    """A projection, no biases, and a start that depends on the data."""

    def forward(m, x):
        h, c = m.start_h(x[:, 0]), m.start_c(x[:, 0])
        return m.head(m.cell(x, (h.unsqueeze(0), c.unsqueeze(0)))[0].mean(1))

    cell = nn.LSTM(2, 3, proj_size=2, bias=False, batch_first=True)
    return Apply(forward, start_h=nn.Linear(2, 2), start_c=nn.Linear(2, 3), cell=cell, head=nn.Linear(2, 3))


@problem(floats(3, 4, 2), (3, 3), "ce_mean", "mse_mean")
def gru():
    return Apply(lambda m, x: m.head(m.cell(x)[1][0]), cell=nn.GRU(2, 3, batch_first=True), head=nn.Linear(3, 3))


@problem(floats(3, 3, 2), (3, 3), "ce_mean")
def gru_learned_start():
    """Two layers, both ways, time first, from a state that is a parameter."""

    def forward(m, x):
        return m.head(m.cell(x.transpose(0, 1), m.start.expand(-1, x.shape[0], -1))[0].mean(0))

    return Apply(forward, cell=nn.GRU(2, 2, 2, bidirectional=True), start=leaf(4, 1, 2), head=nn.Linear(4, 3))


@problem(floats(3, 4, 2), (3, 3), "ce_mean", "mse_sum")
def rnn_tanh():
    return Apply(
        lambda m, x: m.head(m.cell(x)[0].mean(1)), cell=nn.RNN(2, 3, 2, batch_first=True), head=nn.Linear(3, 3)
    )


@problem(floats(3, 4, 2), (3, 3, 4), "ce_mean", "ce_stepwise", head=lambda z: z.transpose(1, 2))
def rnn_relu_per_step():
    """A class at every step, read from both directions."""
    cell = nn.RNN(2, 2, nonlinearity="relu", bidirectional=True, batch_first=True)
    return Apply(lambda m, x: m.head(m.cell(x)[0]), cell=cell, head=nn.Linear(4, 3))


@problem(floats(3, 4, 2), (3, 3), "ce_mean")
def cells():
    """An LSTM cell, a GRU cell and an RNN cell in a loop."""

    def forward(m, x):
        lstm = None
        gru = rnn = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        for step in x.unbind(1):
            lstm = m.lstm(step, lstm)
            gru = m.gru(lstm[0], gru)
            rnn = m.rnn(gru, rnn)
        return m.head(rnn)

    return Apply(forward, lstm=nn.LSTMCell(2, 3), gru=nn.GRUCell(3, 3), rnn=nn.RNNCell(3, 3), head=nn.Linear(3, 3))


# Inside activation checkpoints ----------------------------------------------------------------------


@problem(floats(3, 4, 4), (3, 3), "ce_mean", "mse_sum")
def checkpointed_attention():
    """Attention in the middle of a block that runs again in the backward pass."""

    def block(m, x):
        h = m.inner(x).tanh()
        return m.norm(h + m.attend(h, h, h, need_weights=False)[0]).sin()

    return Apply(
        lambda m, x: m.head(checkpoint(block, m, x, use_reentrant=False).mean(1)),
        inner=nn.Linear(4, 4), attend=nn.MultiheadAttention(4, 2, batch_first=True), norm=nn.LayerNorm(4),
        head=nn.Linear(4, 3),
    )  # fmt: skip


@problem(floats(3, 3, 4), (3, 3), "ce_mean")
def checkpointed_transformer():
    """Two encoder layers, each in a checkpoint of its own, within one around both."""

    def blocks(m, x):
        for layer in m.encoder.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    encoder = _encoder(True)
    return Apply(
        lambda m, x: m.head(checkpoint(blocks, m, x, use_reentrant=False).mean(1)),
        encoder=encoder, head=nn.Linear(4, 3),
    )  # fmt: skip


@problem(floats(3, 4, 2), (3, 3), "ce_mean", "mse_mean")
def checkpointed_lstm():
    """A stacked LSTM after a layer, and the same LSTM again outside the checkpoint."""

    def block(m, x):
        return m.cell(m.inner(x).tanh())[0].sin()

    return Apply(
        lambda m, x: m.head(checkpoint(block, m, x, use_reentrant=False).mean(1) + m.cell(x)[1][0][-1]),
        inner=nn.Linear(2, 2), cell=nn.LSTM(2, 3, 2, batch_first=True), head=nn.Linear(3, 3),
    )  # fmt: skip


@problem(floats(3, 3, 2), (3, 3), "ce_mean")
def checkpointed_gru():
    """A checkpoint of the recurrent layer alone, with T = N; then of a cell."""

    def step(m, x, h):
        return m.cell(x, h)

    def forward(m, x):
        out, h = checkpoint(m.layer, x, use_reentrant=False)
        return m.head(checkpoint(step, m, out[:, 0], h[0], use_reentrant=False))

    return Apply(forward, layer=nn.GRU(2, 3, batch_first=True), cell=nn.GRUCell(3, 3), head=nn.Linear(3, 3))
