"""Kind 4: samples of uneven length in one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from ..parts import Apply
from .program import Batch, Refusal, Scattered, draw, labels, register

__all__ = ["UNEVEN"]

UNEVEN: list[Scattered] = []
program = register(UNEVEN, 4)

LENGTHS = [2, 4, 3]
PACKED = Refusal("UnsupportedCall", "packed", "a packed sequence: pad it")


def _segments(gen: Generator) -> Batch:
    """Nine rows of three samples, a label each."""
    segment = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    return Batch(x=draw(gen, 9, 4), segment=segment, y=labels(gen, 3), number=torch.arange(3), n=3)


def _one_row(gen: Generator) -> Batch:
    """Three samples one after the other in a sequence of nine tokens, a label for each token."""
    segment = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    apart = segment[:, None] != segment
    return Batch(x=draw(gen, 1, 9, 4), apart=apart, y=labels(gen, 9), number=segment, n=3)


def _padded(gen: Generator) -> Batch:
    """Four padded sequences of lengths 3, 3, 2 and 1, longest first, a label each."""
    return Batch(
        x=draw(gen, 4, 3, 4), lengths=torch.tensor([3, 3, 2, 1]), y=labels(gen, 4), number=torch.arange(4), n=4
    )


def _bags(gen: Generator) -> Batch:
    """Bags of 2, 4 and 3 tokens in one tensor."""
    x = torch.randint(7, (9,), generator=gen)
    return Batch(x=x, offsets=torch.tensor([0, 2, 6]), y=labels(gen, 3), number=torch.arange(3), n=3)


def _layers() -> dict[str, nn.Module]:
    return {"inner": nn.Linear(4, 5), "head": nn.Linear(5, 3)}


def _sums_of_pads(m: nn.Module, b: Batch) -> Tensor:
    """The regular form of sums: padded sequences, and zeros where there is no row."""
    x = pad_sequence(list(b.x.split(LENGTHS)), batch_first=True)
    real = pad_sequence([torch.ones(t, 1, dtype=b.x.dtype) for t in LENGTHS], batch_first=True)
    return F.cross_entropy(m.head((m.inner(x).tanh() * real).sum(1)), b.y)


def _means_of_pads(m: nn.Module, b: Batch) -> Tensor:
    x = pad_sequence(list(b.x.split(LENGTHS)), batch_first=True)
    real = pad_sequence([torch.full((t, 1), 1 / t, dtype=b.x.dtype) for t in LENGTHS], batch_first=True)
    return F.cross_entropy(m.head((m.inner(x).tanh() * real).sum(1)), b.y)


@program(_segments, lambda m, b: m(b.x, b.segment), regular=_sums_of_pads)
def index_added():
    """`zeros(3, 5).index_add(0, segment, h)`."""
    return Apply(lambda m, x, s: m.head(x.new_zeros(3, 5).index_add(0, s, m.inner(x).tanh())), **_layers())


@program(_segments, lambda m, b: m(b.x, b.segment), regular=_sums_of_pads)
def scatter_added():
    """`zeros(3, 5).scatter_add(0, index, h)`."""
    return Apply(
        lambda m, x, s: m.head(x.new_zeros(3, 5).scatter_add(0, s[:, None].expand(-1, 5), m.inner(x).tanh())),
        **_layers(),
    )


@program(_segments, regular=_means_of_pads)
def means_of_a_split():
    """`stack` of the means of `split(lengths)`."""
    return Apply(lambda m, x: m.head(torch.stack([h.mean(0) for h in m.inner(x).tanh().split(LENGTHS)])), **_layers())


@program(_segments, lambda m, b: m(b.x, b.segment), regular=_means_of_pads)
def segment_means():
    """Sums by `index_add` over counts by `bincount`."""

    def forward(m, x, s):
        sums = x.new_zeros(3, 5).index_add(0, s, m.inner(x).tanh())
        return m.head(sums / s.bincount()[:, None])

    return Apply(forward, **_layers())


@program(_segments, lambda m, b: m(b.x, b.segment), regular=_sums_of_pads)
def matrix_pooling():
    """The matrix that assigns rows to samples, times the rows."""
    return Apply(lambda m, x, s: m.head((s == torch.arange(3)[:, None]).to(x) @ m.inner(x).tanh()), **_layers())


@program(_segments)
def padded_inside():
    """Flat rows through a layer, then padded, then a layer on the padded rows, and a sum of those that a mask picks."""

    def forward(m, x):
        h = pad_sequence(list(m.inner(x).tanh().split(LENGTHS)), batch_first=True)
        real = pad_sequence([torch.ones(t, dtype=torch.bool) for t in LENGTHS], batch_first=True)
        sums = [rows.sum(0) for rows in m.middle(h).tanh()[real].split(LENGTHS)]
        return m.head(torch.stack(sums))

    return Apply(forward, middle=nn.Linear(5, 5), **_layers())


@program(
    lambda gen: (b := _segments(gen), setattr(b, "graph", draw(gen, 3, 2)))[0],
    lambda m, b: m(b.graph, b.x, b.segment),
)
def repeated_to_their_rows():
    """A vector of each sample repeated to its rows, and the rows summed."""

    def forward(m, graph, x, s):
        rows = (m.whole(graph)[s] + m.inner(x)).tanh()
        return m.head(x.new_zeros(3, 5).index_add(0, s, rows))

    return Apply(forward, whole=nn.Linear(2, 5), **_layers())


@program(_bags, lambda m, b: m(b.x, b.offsets))
def bags_by_offsets():
    """`EmbeddingBag` with offsets."""
    return Apply(
        lambda m, x, offsets: m.head(m.bag(x, offsets).tanh()),
        bag=nn.EmbeddingBag(7, 4, mode="sum"), head=nn.Linear(4, 3),
    )  # fmt: skip


@program(_one_row, lambda m, b: m(b.x, b.apart), samples=lambda b: b.number)
def packed_in_one_row():
    """Attention with a block-diagonal mask over samples packed in one row; the user numbers the loss's terms."""

    def forward(m, x, apart):
        q, k, v = m.query(x), m.key(x), m.value(x)
        scores = (q @ k.mT).masked_fill(apart, -torch.inf)
        return m.head((scores.softmax(-1) @ v).tanh())[0]

    return Apply(forward, query=nn.Linear(4, 3), key=nn.Linear(4, 3), value=nn.Linear(4, 4), head=nn.Linear(4, 3))


@program(_one_row, lambda m, b: m(b.x, b.apart), samples=lambda b: b.number)
def attention_packed_in_one_row():
    """The same by `MultiheadAttention`."""
    return Apply(
        lambda m, x, apart: m.head(m.attend(x, x, x, attn_mask=apart)[0])[0],
        attend=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 3),
    )  # fmt: skip


def _packed(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths, batch_first=True)
    return m.head(pad_packed_sequence(m.cell(packed)[0], batch_first=True)[0].sum(1))


@program(_padded, lambda m, b: m(b.x, b.lengths), may_refuse=PACKED)
def packed_gru():
    """A GRU of a packed sequence, padded back and summed."""
    return Apply(_packed, cell=nn.GRU(4, 3, batch_first=True), head=nn.Linear(3, 3))


@program(_padded, lambda m, b: m(b.x, b.lengths), may_refuse=PACKED)
def packed_lstm():
    """An LSTM of a packed sequence, padded back and summed."""
    return Apply(_packed, cell=nn.LSTM(4, 3, batch_first=True), head=nn.Linear(3, 3))


@program(_padded, lambda m, b: m(b.x, b.lengths))
def layer_of_a_packed_sequence():
    """A layer on the data of a packed sequence, time by time with fewer and fewer samples, padded back and summed."""

    def forward(m, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        packed = packed._replace(data=m.inner(packed.data).tanh())
        return m.head(pad_packed_sequence(packed, batch_first=True)[0].sum(1))

    return Apply(forward, **_layers())
