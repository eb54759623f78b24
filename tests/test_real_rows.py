"""Kronecker factors average over real rows: those that a loss term which counts can send a cotangent to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors
from layerwise.graph import real_rows
from layerwise.quantities import KFLR

pytestmark = pytest.mark.usefixtures("float64")
N, T, D, C = 3, 6, 4, 3
LENGTHS = (6, 2, 3)


class Block(nn.Module):
    """Causal or key-masked self-attention with projections of its own, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.up, self.down = (
            nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 5), nn.Linear(5, D),
        )  # fmt: skip

    def forward(self, h: Tensor, allowed: Tensor) -> Tensor:
        scores = self.q(h) @ self.k(h).mT / 2
        h = h + torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1) @ self.v(h)
        return h + self.down(torch.tanh(self.up(h)))


class Model(nn.Module):
    """Tokens `[N, T]` to logits `[N, T, C]`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.kind = kind
        self.embedding = nn.Embedding(7, D)
        if kind == "recurrent":
            self.body: Any = nn.GRU(D, D, batch_first=True)
        elif kind in ("causal", "masked"):
            self.body = nn.ModuleList([Block(), Block()])
        elif kind == "encoder":
            self.body = nn.ModuleList([nn.TransformerEncoderLayer(D, 2, 5, 0.0, batch_first=True) for _ in range(2)])
        elif kind == "convolution":
            self.body = nn.Conv1d(D, D, 3)
        else:
            self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, C)

    def hidden(self, x: Tensor, real: Tensor) -> Tensor:
        h = self.embedding(x)
        if self.kind == "recurrent":
            return self.body(h)[0]
        if self.kind in ("causal", "masked"):
            allowed = torch.ones(x.shape[1], x.shape[1]).tril().bool()[None] if self.kind == "causal" else real[:, None]
            for block in self.body:
                h = block(h, allowed)
            return h
        if self.kind == "encoder":
            for layer in self.body:
                h = layer(h, src_key_padding_mask=~real)
            return h
        if self.kind == "convolution":  # causal
            return torch.tanh(self.body(F.pad(h.mT, (2, 0)))).mT
        return torch.tanh(self.body(h))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        return self.head(self.hidden(x, real))


KINDS = ("linear", "causal", "masked", "encoder", "convolution", "recurrent")


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and which of them are real; padding is at the end."""
    gen = torch.Generator().manual_seed(1)
    x, y = torch.randint(1, 7, (N, T), generator=gen), torch.randint(C, (N, T), generator=gen)
    real = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]
    return x.masked_fill(~real, 0), y, real


def one_by_one(kind: str, quantity: lw.Quantity) -> tuple[Model, Any]:
    """Each sequence alone and without padding, in backward passes whose losses sum to that of the whole batch."""
    model, (x, y, real) = Model(kind), data()
    with lw.observe(model, quantity) as seen:
        for n, length in enumerate(LENGTHS):
            z = model(x[n : n + 1, :length], real[n : n + 1, :length])
            (F.cross_entropy(z.mT, y[n : n + 1, :length], reduction="sum") / sum(LENGTHS)).backward()
    return model, seen[quantity]


def ignored(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    return F.cross_entropy(model(x, real).mT, y.masked_fill(~real, -100))


def chosen_logits(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    return F.cross_entropy(model(x, real)[real], y[real])


def chosen_before_the_head(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    return F.cross_entropy(model.head(model.hidden(x, real)[real]), y[real])


def masked_select(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    z = model(x, real)
    return F.cross_entropy(z.masked_select(real[..., None]).view(-1, C), y[real])


def index_select(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    keep = real.flatten().nonzero()[:, 0]
    return F.cross_entropy(model(x, real).flatten(0, 1).index_select(0, keep), y.flatten()[keep])


def gathered(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    keep = real.flatten().nonzero()
    return F.cross_entropy(model(x, real).flatten(0, 1).gather(0, keep.expand(-1, C)), y.flatten()[keep[:, 0]])


def weighted_by_hand(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    return (F.cross_entropy(model(x, real).mT, y, reduction="none") * real).sum() / real.sum()


def no_weight(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    """A fourth class, of weight zero, for the padding."""
    z = F.pad(model(x, real), (0, 1), value=-1e3)
    return F.cross_entropy(z.mT, y.masked_fill(~real, C), weight=torch.tensor([1.0, 1.0, 1.0, 0.0]))


def own_loss(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    """Chosen rows of what the model returned, in a loss that is not known."""
    z = model(x, real)[real]
    return (torch.logsumexp(z, 1) - z[torch.arange(len(z)), y[real]]).mean()


def weighted_squares(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    """An elementwise loss, with a weight for each position."""
    return F.mse_loss(model(x, real), F.one_hot(y, C).double(), reduction="none").mul(real[..., None]).sum()


def losses_chosen(model: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    return F.cross_entropy(model(x, real).mT, y, reduction="none")[real].mean()


LOSSES: dict[str, Callable[[Model, Tensor, Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        ignored, chosen_logits, chosen_before_the_head, masked_select, index_select, gathered, weighted_by_hand,
        losses_chosen, no_weight,
    )
}  # fmt: skip


def factors(model: Model, loss: Callable[..., Tensor], quantity: lw.Quantity) -> dict[str, tuple[Tensor, ...]]:
    with lw.observe(model, quantity) as seen:
        loss(model, *data()).backward()
    return seen[quantity].factors


@one_in(3, kind=KINDS, loss=LOSSES)
def test_padded_factors_are_those_without_padding(kind: str, loss: str) -> None:
    model, want = one_by_one(kind, KFLR())
    got = factors(model, LOSSES[loss], KFLR())
    for name, w in want.factors.items():
        for a, b in zip(got[name], w, strict=True):
            oracle.assert_close(a, b)


@one_in(
    3,
    kind=KINDS,
    options=[{"sharing": "reduce"}, {"joint": True}, {"sharing": "reduce", "joint": True}],
    loss=["ignored", "chosen_logits", "chosen_before_the_head", "weighted_by_hand"],
)
def test_options(kind: str, options: dict[str, Any], loss: str) -> None:
    """Rows of samples told apart by number are those that receive something: a query to one key has no number."""
    if kind in ("causal", "masked") and "chosen" in loss and "sharing" in options:
        pytest.skip("queries of one key, or of equal ones, receive nothing, and belong to no irregular sample")
    model, want = one_by_one(kind, KFLR(**options))
    got = factors(model, LOSSES[loss], KFLR(**options))
    for name, w in want.factors.items():
        for a, b in zip(got[name], w, strict=True):
            oracle.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_ekfac_and_accumulate(kind: str) -> None:
    model, want = one_by_one(kind, lw.EKFAC(None))
    x, y, real = data()
    with lw.observe(model, lw.EKFAC(None)) as seen:
        ignored(model, x, y, real).backward()
    batches = [(x[:1], y[:1], real[:1]), (x[1:], y[1:], real[1:])]
    streamed = lw.accumulate(model, lambda batch: ignored(model, *batch), batches, lw.EKFAC(None))
    dense = {name: want.to_dense(name) for name in want.names()}
    for got in (seen.ekfac, streamed.ekfac):
        oracle.assert_close({name: got.to_dense(name) for name in dense}, dense)


def test_brute_force_over_the_real_rows() -> None:
    """A as a loop over the rows whose target counts; `rows="all"` over all of them."""
    model, (x, _, real) = Model("linear"), data()
    got, every = factors(model, ignored, KFLR()), factors(model, ignored, KFLR(rows="all"))
    h = model.embedding(x).detach()
    hidden = torch.tanh(model.body(h)).detach()
    for name, a in (("body.weight", h), ("head.weight", hidden)):
        rows = [a[n, t] for n in range(N) for t in range(T) if real[n, t]]
        oracle.assert_close(got[name][0][0], sum(torch.outer(r, r) for r in rows) / len(rows))
        oracle.assert_close(every[name][0][0], torch.einsum("nti,ntj->ij", a, a) / (N * T))
        oracle.assert_close(got[name][1], every[name][1])
    counts = torch.bincount(x[real], minlength=7) / real.sum()
    oracle.assert_close(got["embedding.weight"][0][0], counts)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_row_of_inactive_units_behind_an_ignored_target_is_padding(sharing: str) -> None:
    """A block of a residual sum that answers to nothing is left out where the sum is: as in the batch without it."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = nn.Linear(D, 4), nn.LayerNorm(4)
            self.up, self.down, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, C)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h + self.down(self.up(self.norm(h)).relu()))

    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.up.bias.fill_(-1.0)
    x, y = torch.randn(2, 12, D), torch.randint(C, (2, 12))
    dead = (model.up(model.norm(model.body(x))) > 0).sum(-1) == 0
    length = 12 - int(dead.sum(1).min())
    order = torch.argsort(dead.int(), dim=1, stable=True)  # inactive rows behind the others
    x, y = torch.stack([x[n, order[n]] for n in range(2)]), torch.stack([y[n, order[n]] for n in range(2)])
    y[:, length:] = -100
    with lw.observe(model, KFLR(sharing=sharing)) as padded:
        F.cross_entropy(model(x).mT, y).backward()
    with lw.observe(model, KFLR(sharing=sharing)) as bare:
        F.cross_entropy(model(x[:, :length]).mT, y[:, :length]).backward()
    assert 0 < length < 12
    for name in ("body.weight", "norm.weight", "down.weight", "head.weight"):
        for got, want in zip(padded.kflr.factors[name], bare.kflr.factors[name], strict=True):
            oracle.assert_close(got, want)


def test_the_trace_with_eighty_percent_padding_is_that_without() -> None:
    """KFLR's trace over the exact one, about 1 without padding, was a fifth of that with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 5, bias=False), nn.Tanh(), nn.Linear(5, C, bias=False))
    x, y = torch.randn(4, 10, D), torch.randint(C, (4, 10))
    y[:, 2:], x[:, 2:] = -100, 0
    ratios = {}
    for rows in ("real", "all"):
        with lw.observe(model, KFLR(rows=rows), lw.DiagGGN()) as seen:
            F.cross_entropy(model(x).mT, y).backward()
        ratios[rows] = float(seen.kflr.trace() / seen.diag_ggn.total)
    with lw.observe(model, KFLR(), lw.DiagGGN()) as seen:
        F.cross_entropy(model(x[:, :2]).mT, y[:, :2]).backward()
    bare = float(seen.kflr.trace() / seen.diag_ggn.total)
    assert abs(ratios["real"] - bare) < 1e-12 and abs(ratios["all"] - bare / 5) < 1e-12 and bare > 0.5


@pytest.mark.parametrize("loss", [own_loss, weighted_squares, ignored], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_the_input_factor_alone(kind: str, loss: Callable[..., Tensor]) -> None:
    """FOOF needs neither a likelihood nor the samples: also of a loss of one's own."""
    model, want = one_by_one(kind, KFLR(joint=True))
    pre = lw.optim.Preconditioner(model, kind="foof")
    with pre.watch() as watched:
        loss(model, *data()).backward()
    for name, w in want.factors.items():
        if len(w) == 2 and name in watched.blocks:
            oracle.assert_close(watched.blocks[name].block.A, w[0])
    assert len(watched.blocks) >= 3


def test_a_selection_of_an_input_that_requires_grad() -> None:
    """There is nothing below it that could have rows: nothing is left out, and its gradient is its own."""
    model, x, y = nn.Linear(D, C), torch.randn(5, D).requires_grad_(), torch.tensor([0, 2])
    keep = torch.tensor([1, 3])
    with lw.observe(model, lw.KFAC()) as seen:
        F.cross_entropy(model(x[keep]), y).backward()
    oracle.assert_close(seen.kfac.factors["weight"][0][0], x.detach()[keep].T @ x.detach()[keep] / 2)
    assert x.grad is not None and not x.grad[0].any() and bool(x.grad[1].any())


# -- what stays ---------------------------------------------------------------------------------------------------


@contextmanager
def pulls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The vector-Jacobian products that are sent to measure rows."""
    made: list[int] = []
    plain = real_rows.pull

    def counted(outputs: Any, cotangents: Any, inputs: Any) -> Any:
        made.append(len(inputs))
        return plain(outputs, cotangents, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(real_rows, "pull", counted)
        yield made


@pytest.mark.parametrize(
    "loss",
    [
        lambda m, x, y, real: F.cross_entropy(m(x, real).mT, y),
        lambda m, x, y, real: F.cross_entropy(m(x, real).mT, y, label_smoothing=0.1, reduction="sum"),
        lambda m, x, y, real: F.cross_entropy(m(x, real).mT, y, weight=torch.tensor([0.2, 1.0, 3.0])),
        lambda m, x, y, real: F.cross_entropy(m(x, real).mT, y, reduction="none").mean(),
        lambda m, x, y, real: F.mse_loss(m(x, real), F.one_hot(y, C).to(torch.float64)),
    ],
)
def test_where_every_term_counts_nothing_is_measured(loss: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("causal")
    with pulls(monkeypatch) as made:
        real, every = factors(model, loss, KFLR()), factors(model, loss, KFLR(rows="all"))
    assert not made
    assert all(torch.equal(a, b) for name in real for a, b in zip(real[name], every[name], strict=True))


def test_a_selection_that_takes_everything_costs_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A permutation of the rows: its own derivative alone is asked for."""
    model = Model("linear")
    order = torch.randperm(N * T)

    def permuted(m: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
        return F.cross_entropy(m(x, real).flatten(0, 1)[order], y.flatten()[order])

    with pulls(monkeypatch) as made:
        got = factors(model, permuted, lw.KFAC())
    every = factors(model, permuted, lw.KFAC(rows="all"))
    assert made == [1]
    assert all(torch.equal(got[name][0], every[name][0]) for name in got if len(got[name]) == 2)


def test_a_likelihood_written_by_hand_is_measured_in_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `gather` leaves out are the other classes of terms that count: nothing is sent through the model."""
    model = Model("linear")

    def by_hand(m: Model, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
        return -torch.log_softmax(m(x, real), -1).gather(2, y[..., None]).mean()

    with pulls(monkeypatch) as made:
        got = factors(model, by_hand, lw.KFAC())
    every = factors(model, by_hand, lw.KFAC(rows="all"))
    assert made == [1, 1, 1]  # the selection itself, the gradient at the logits, and what it leaves out there
    assert all(torch.equal(got[name][0], every[name][0]) for name in got if len(got[name]) == 2)


def test_padding_is_measured_for_the_factors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("linear")
    with pulls(monkeypatch) as made:
        with lw.observe(model, lw.DiagGGN(), lw.Variance(), KFLR(rows="all")):
            ignored(model, *data()).backward()
        assert not made
        factors(model, ignored, KFLR())
    assert len(made) == 2


def test_dead_units_and_losers_of_a_pool_are_real_rows() -> None:
    """Zero by their value: they count, as they do without padding, and whichever samples are ignored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.ReLU(), nn.MaxPool1d(4), nn.Flatten(), nn.Linear(6, C))
    with torch.no_grad():
        model[0].bias.fill_(-0.5)  # at many positions no unit is active
    x, y = torch.randn(5, 2, 8), torch.tensor([0, 1, 2, 0, 1])
    with lw.observe(model, KFLR()) as bare:
        (F.cross_entropy(model(x[:3]), y[:3])).backward()
    y[3:] = -100
    with lw.observe(model, KFLR()) as padded:
        F.cross_entropy(model(x), y).backward()
    assert bool(((model[0](x) > 0).sum(1) == 0).any())
    # of the last two samples, the rows that win answer to ignored terms alone, and the others to nothing
    winners = _winners(model, x)
    rows = torch.cat([x[:3].transpose(1, 2).flatten(0, 1), x[3:].transpose(1, 2)[~winners[3:]]])
    oracle.assert_close(padded.kflr.factors["0.weight"][0][0], rows.T @ rows / len(rows))
    oracle.assert_close(padded.kflr.factors["4.weight"][0], bare.kflr.factors["4.weight"][0])


def _winners(model: nn.Sequential, x: Tensor) -> Tensor:
    """`[N, T]`: positions whose output passes the pool and the activation in some channel."""
    z = model[0](x).detach().requires_grad_()
    model[1:](z).square().sum().backward()
    return (z.grad != 0).any(1)


def test_a_batch_without_any_term_for_a_layer() -> None:
    """A branch of which every term is ignored has zero factors, not NaN."""
    model = nn.ModuleDict({"a": nn.Linear(D, C), "b": nn.Linear(D, C)})
    x, y = torch.randn(4, D), torch.tensor([0, 1, -100, -100])
    for joint in (False, True):
        with lw.observe(model, KFLR(joint=joint)) as seen:
            z = torch.cat([model["a"](x[:2]), model["b"](x[2:])])
            F.cross_entropy(z, y).backward()
        assert all(bool(torch.isfinite(f).all()) for fs in seen.kflr.factors.values() for f in fs)
        assert not seen.kflr.factors["b.weight"][-1].any()
        if not joint:
            oracle.assert_close(seen.kflr.factors["a.weight"][0][0], x[:2].T @ x[:2] / 2)


# -- optimizers --------------------------------------------------------------------------------------------------


@one_in(3, kind=KINDS, how=[{"kind": "kflr"}, {"kind": "foof"}, {"kind": "kflr", "sharing": "reduce"}])
def test_a_padded_step_is_that_without_padding(kind: str, how: dict[str, Any]) -> None:
    x, y, real = data()
    grads = []
    for padded in (True, False):
        model = Model(kind)
        pre = lw.optim.Preconditioner(model, **how, damping=1e-2)
        with pre.watch():
            if padded:
                ignored(model, x, y, real).backward()
            else:
                for n, length in enumerate(LENGTHS):
                    z = model(x[n : n + 1, :length], real[n : n + 1, :length])
                    (F.cross_entropy(z.mT, y[n : n + 1, :length], reduction="sum") / sum(LENGTHS)).backward()
        pre.step()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    oracle.assert_close(*grads, rel=1e-8)


def test_settings() -> None:
    assert repr(KFLR(rows="all")) == "KFLR(rows='all')" and repr(lw.KFAC()) == "KFAC(draws=1)"
    assert lw.optim.KFAC(Model("linear"), rows="all").preconditioner.curvature.rows == "all"
    for make in (lw.KFAC, KFLR, lw.EKFAC, lambda rows: lw.optim.KFAC(Model("linear"), rows=rows)):
        with pytest.raises(errors.BadInput, match='"real" or "all"'):
            make(rows="some")
