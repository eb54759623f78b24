"""Kind 6: a sample is several rows of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..parts import Apply
from .program import Batch, Scattered, draw, labels, register

__all__ = ["SEVERAL"]

SEVERAL: list[Scattered] = []
program = register(SEVERAL, 6)

N = 5


def _pairs(gen: Generator) -> Batch:
    """Five pairs of rows: what was chosen, and what was rejected."""
    return Batch(chosen=draw(gen, N, 4), rejected=draw(gen, N, 4), number=torch.arange(N), n=N)


def _triplets(gen: Generator) -> Batch:
    """Five anchors, each with a row near it and another one."""
    a, p, o = (draw(gen, N, 4) for _ in range(3))
    return Batch(anchor=a, near=p, other=o, number=torch.arange(N), n=N)


def _sentences(gen: Generator) -> Batch:
    """Five pairs of four tokens and the tokens that follow."""
    x = torch.randint(6, (2 * N, 5), generator=gen)
    return Batch(x=x[:, :-1], follow=x[:, 1:], number=torch.arange(N), n=N)


def _compared(gen: Generator) -> Batch:
    """Five pairs with a label, and with a number."""
    b = _pairs(gen)
    b.y, b.value = labels(gen, N, classes=2).double(), draw(gen, N)
    return b


def _scores() -> nn.Module:
    """A log probability for each row."""
    return Apply(
        lambda m, x: F.logsigmoid(m.head(m.inner(x).tanh())[..., 0]), inner=nn.Linear(4, 5), head=nn.Linear(5, 1)
    )


def _tower() -> nn.Module:
    return Apply(lambda m, x: m.head(m.inner(x).tanh()), inner=nn.Linear(4, 5), head=nn.Linear(5, 3))


def _logistic(left: Tensor, right: Tensor) -> Tensor:
    return (1 + (right - left).exp()).log() / N


def _regular(m: nn.Module, b: Batch) -> Tensor:
    z = m(torch.stack([b.chosen, b.rejected], 1))
    return -F.logsigmoid(z[:, 0] - z[:, 1]).mean()


@program(
    _pairs, lambda m, b: m(torch.cat([b.chosen, b.rejected])), samples=lambda b: N, own=True, regular=_regular,
    call=lambda z, b: -F.logsigmoid(z[:N] - z[N:]).mean(),
    elements=lambda z, b: _logistic(z[:N], z[N:]),
)  # fmt: skip
def pairs():
    """`lp = m(cat([chosen, rejected]))`, and `-logsigmoid(lp[:n] - lp[n:]).mean()`."""
    return _scores()


@program(
    _pairs, lambda m, b: m(torch.cat([b.chosen, b.rejected])).chunk(2), samples=lambda b: torch.arange(N), own=True,
    regular=_regular, call=lambda z, b: -F.logsigmoid(z[0] - z[1]).mean(),
    elements=lambda z, b: _logistic(z[0], z[1]),
)  # fmt: skip
def numbered_pairs():
    """The same by `chunk`, where the user numbers the loss's terms."""
    return _scores()


@program(
    _pairs, lambda m, b: m(torch.stack([b.chosen, b.rejected], 1).flatten(0, 1)), samples=lambda b: N, own=True,
    regular=_regular, call=lambda z, b: -F.logsigmoid(z[::2] - z[1::2]).mean(),
    elements=lambda z, b: _logistic(z[::2], z[1::2]),
)  # fmt: skip
def interleaved_pairs():
    """A pair is two rows that follow each other."""
    return _scores()


@program(
    _pairs, lambda m, b: (m(b.chosen), m(b.rejected)), own=True, regular=_regular,
    call=lambda z, b: -F.logsigmoid(z[0] - z[1]).mean(), elements=lambda z, b: _logistic(z[0], z[1]),
)  # fmt: skip
def pairs_in_two_calls():
    """The model called for each half of the pairs."""
    return _scores()


@program(
    _pairs, lambda m, b: m(torch.cat([b.chosen, b.rejected])), samples=lambda b: N, own=True,
    call=lambda z, b: F.margin_ranking_loss(z[:N], z[N:], torch.ones(N, dtype=z.dtype), margin=1.0),
    elements=lambda z, b: (1 + z[N:] - z[:N]).clamp(min=0) / N,
)  # fmt: skip
def margins_between_pairs():
    """`margin_ranking_loss` of the halves."""
    return _scores()


def _triplet_terms(z: Tensor, b: Batch) -> Tensor:
    a, p, o = z[:N], z[N : 2 * N], z[2 * N :]
    return (1 + ((a - p) ** 2).sum(1) - ((a - o) ** 2).sum(1)).exp().add(1).log() / N


@program(
    _triplets, lambda m, b: m(torch.cat([b.anchor, b.near, b.other])), samples=lambda b: N, own=True,
    call=lambda z, b: F.softplus(
        1 + (z[:N] - z[N : 2 * N]).square().sum(1) - (z[:N] - z[2 * N :]).square().sum(1)
    ).mean(),
    elements=_triplet_terms,
)  # fmt: skip
def triplets():
    """Anchors, near rows and other rows in one forward pass."""
    return _tower()


def _log_likelihood(z: Tensor, follow: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, follow[..., None])[..., 0].sum(1)


@program(
    _sentences, samples=lambda b: N, own=True,
    call=lambda z, b: -F.logsigmoid(0.5 * torch.sub(*_log_likelihood(z, b.follow).chunk(2))).mean(),
    elements=lambda z, b: _logistic(*(0.5 * _log_likelihood(z, b.follow)).chunk(2)),
)  # fmt: skip
def preferred_sentences():
    """Log likelihoods of sentences, the preferred ones first, and their differences."""
    return Apply(lambda m, x: m.head(m.token(x).tanh().cumsum(1)), token=nn.Embedding(6, 4), head=nn.Linear(4, 6))


@program(
    _compared, lambda m, b: torch.sub(*m(torch.cat([b.chosen, b.rejected])).chunk(2)),
    call=lambda z, b: F.mse_loss(z, b.value), elements=lambda z, b: (z - b.value) ** 2 / N,
    samples=lambda b: N,
)  # fmt: skip
def differences_of_pairs():
    """`mse_loss` of the differences of scores."""
    return _scores()


@program(
    _compared, lambda m, b: torch.mul(*m(torch.cat([b.chosen, b.rejected])).chunk(2)).sum(1), samples=lambda b: N,
    call=lambda z, b: F.binary_cross_entropy_with_logits(z, b.y),
    elements=lambda z, b: ((1 + z.exp()).log() - b.y * z) / N,
)  # fmt: skip
def two_towers():
    """A binary label for the inner product of the outputs of two rows."""
    return _tower()
