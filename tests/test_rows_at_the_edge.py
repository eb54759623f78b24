"""Calls without a row, batches of one sample, positions on two axes, and the number of samples that trainers read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.parts import Apply

import layerwise as lw
from layerwise import errors, local


def _terms_of(model: nn.Module, terms: Callable[[], list[Tensor]]) -> dict[str, Tensor]:
    """The gradient of each term by itself."""
    named = dict(model.named_parameters())
    rows = [torch.autograd.grad(t, list(named.values()), retain_graph=True, materialize_grads=True) for t in terms()]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(named)}


def _each(model: nn.Module, loss: Callable[[], Tensor], samples: Any = None) -> dict[str, Tensor]:
    with lw.observe(model, lw.PerSampleGrad(), samples=samples) as seen:
        loss().backward()
    return {name: seen.per_sample_grad[name] for name, _ in model.named_parameters()}


# --- no rows --------------------------------------------------------------------------------------


def _routed(layer: Callable[[], nn.Module], shape: tuple[int, ...], skip: bool = False) -> nn.Module:
    """Three experts on the rows that are routed to them; skip: those without a row are not called."""

    def forward(m: nn.Module, x: Tensor, route: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 3)
        for i, expert in enumerate((m.first, m.second, m.third)):
            mine = route == i
            if not skip or bool(mine.any()):
                out[mine] = expert(x[mine].view(-1, *shape)).flatten(2).mean(-1).tanh()
        return m.head(out)

    torch.manual_seed(0)
    model = Apply(forward, first=layer(), second=layer(), third=layer(), head=nn.Linear(3, 2)).double()
    assert isinstance(model, nn.Module)
    return model


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(lambda: nn.Conv1d(2, 3, 2), (2, 3)), (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 2, 2)),
     (lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3)), (1, 3, 3))],
    ids=["conv", "transposed", "norm"],
)  # fmt: skip
@pytest.mark.parametrize("route", [(0, 1, 0, 1), (2,), (1, 1, 1)])
def test_a_convolution_without_rows_has_zero_gradients(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], route: tuple[int, ...]
) -> None:
    model, n, to = _routed(layer, shape), len(route), torch.tensor(route)
    x, y = torch.randn(n, *shape, dtype=torch.float64), torch.randint(2, (n,))
    want = _terms_of(model, lambda: list(F.cross_entropy(model(x, to), y, reduction="none").split(1)))
    oracle.assert_close(_each(model, lambda: F.cross_entropy(model(x, to), y, reduction="sum")), want)


_TRAINERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "locoprop": lw.LocoProp,
    "exact": lambda m: lw.LocoProp(m, solver=local.ProximalSolve(0.1)),
    "in_turn": lambda m: lw.LocoProp(m, order="input_to_output"),
    "altmin": lw.AltMin,
    "memory": lambda m: lw.AltMin(m, weights="memory"),
    "sweep": lambda m: lw.AltMin(m, codes="sweep"),
}


@pytest.mark.parametrize("trainer", _TRAINERS)
def test_an_expert_without_rows_stays_as_if_it_was_not_called(trainer: str) -> None:
    """Over batches in which an expert has rows, has none, and has rows again."""

    def trained(skip: bool) -> dict[str, Tensor]:
        model = _routed(lambda: nn.Linear(4, 3), (1, 4), skip)
        opt = _TRAINERS[trainer](model)
        for i, route in enumerate(((0, 1, 2, 0), (1, 1, 0, 0), (2, 2), (0, 1, 2))):
            torch.manual_seed(1 + i)
            x, y = torch.randn(len(route), 4, dtype=torch.float64), torch.randint(2, (len(route),))
            to = torch.tensor(route)
            opt.step(lambda x=x, y=y, to=to: F.cross_entropy(model(x, to), y))
        return {name: p.detach() for name, p in model.named_parameters()}

    oracle.assert_close(trained(skip=False), trained(skip=True), 1e-12)


# --- one sample, and what is no number --------------------------------------------------------------


@pytest.mark.parametrize("samples", [None, 1])
def test_of_one_sample_every_axis_of_size_one_says_the_same(samples: int | None) -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Tanh(), nn.Conv1d(2, 1, 1)).double()
    x, y = torch.randn(1, 1, 6, dtype=torch.float64), torch.randn(1, 1, 6, dtype=torch.float64)
    want = _terms_of(model, lambda: [F.mse_loss(model(x), y)])
    oracle.assert_close(_each(model, lambda: F.mse_loss(model(x), y), samples), want)


@pytest.mark.parametrize("samples", [True, torch.tensor(4)], ids=["bool", "number"])
def test_what_is_no_number_of_samples_is_refused(samples: Any) -> None:
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))
    with pytest.raises(errors.BadInput, match="samples"):
        _each(model, lambda: F.cross_entropy(model(x), y), samples)


# --- positions on two axes --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4])
def test_pairs_of_positions_as_many_as_samples_are_positions(n: int) -> None:
    """A bias of attention scores for each pair of positions, made by an MLP of their distance, N divides both axes."""
    place = torch.arange(4, dtype=torch.float64)
    apart = (place[:, None] - place)[..., None] / 4

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        scores = m.query(x) @ x.mT + m.out(m.distance(apart).tanh())[..., 0]
        return m.head((scores.softmax(-1) @ x)[:, 0])

    torch.manual_seed(0)
    layers = {"distance": nn.Linear(1, 3), "out": nn.Linear(3, 1), "query": nn.Linear(3, 3), "head": nn.Linear(3, 2)}
    model = Apply(forward, **layers).double()
    x, y = torch.randn(n, 4, 3, dtype=torch.float64), torch.randint(2, (n,))
    want = _terms_of(model, lambda: list(F.cross_entropy(model(x), y, reduction="none").split(1)))
    oracle.assert_close(_each(model, lambda: F.cross_entropy(model(x), y, reduction="sum")), want)


# --- what trainers read -----------------------------------------------------------------------------


def _pairs() -> tuple[nn.Module, Callable[[nn.Module], Tensor], int]:
    """A loss of the user's own over three pairs of rows."""
    x = torch.randn(6, 4, dtype=torch.float64)

    def loss(model: nn.Module) -> Tensor:
        z = model(x).squeeze(-1)
        return -F.logsigmoid(z[:3] - z[3:]).mean()

    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double(), loss, 3


def _candidates() -> tuple[nn.Module, Callable[[nn.Module], Tensor], int]:
    """One sample of four candidates, which are the classes of its loss."""
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([2])
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    return model, lambda m: F.cross_entropy(m(x).view(1, 4), y), 1


def _kept_frames() -> tuple[nn.Module, Callable[[nn.Module], Tensor], int]:
    """One sequence, of which two frames are kept for the head."""
    x, keep = torch.randn(1, 2, 4, dtype=torch.float64), torch.tensor([[True, False, True, False]])
    y = torch.tensor([0, 1])

    def forward(m: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
        return m.head(m.conv(x).tanh().mT[keep])

    model = Apply(forward, conv=nn.Conv1d(2, 3, 3, padding=1), head=nn.Linear(3, 2)).double()
    return model, lambda m: F.cross_entropy(m(x, keep), y), 1


@pytest.mark.parametrize("program", [_pairs, _candidates, _kept_frames])
def test_layer_local_trainers_read_the_number_that_quantities_read(program: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, loss, n = program()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(len(rows) == n for rows in _each(model, lambda: loss(model)).values())

    def trained(make: Callable[[nn.Module], Any], samples: int | None = None) -> dict[str, Tensor]:
        model.load_state_dict(start)
        make(model).step(lambda: loss(model), samples=samples)
        return {name: p.detach() - start[name] for name, p in model.named_parameters()}

    def locoprop(target: local.GradientStep) -> dict[str, Tensor]:
        return trained(lambda m: lw.LocoProp(m, loss="squared", target=target, rows="all"))

    step = local.GradientStep
    oracle.assert_close(locoprop(step(0.5, per="sample")), locoprop(step(0.5 * n)), 1e-10)
    for codes in ("jacobi", "sweep"):
        opt = partial(lw.AltMin, codes=codes, coupling=0.5)
        oracle.assert_close(trained(opt), trained(opt, samples=n), 1e-12)


def test_two_numbers_that_hold_are_asked_for_where_a_trainer_needs_one() -> None:
    """One function at six points: a sample with six outputs, or six samples that share the function."""
    x, points, y = (torch.randn(*s, dtype=torch.float64) for s in ((1, 3), (6, 1), (1, 6)))
    model = Apply(lambda m, x, points: m.branch(x) @ m.trunk(points).T, branch=nn.Linear(3, 4), trunk=nn.Linear(1, 4))
    model = model.double()

    def step(**more: Any) -> None:
        lw.AltMin(model, **more).step(lambda: F.mse_loss(model(x, points), y))

    with pytest.raises(errors.AmbiguousSamples, match="samples="):
        step()
    step(reduction="sum")
    lw.AltMin(model).step(lambda: F.mse_loss(model(x, points), y), samples=1)


# --- rows of one batch, put together and sorted ---------------------------------------------------


@pytest.mark.parametrize("together", [torch.stack, lambda rows: torch.cat([row[None] for row in rows])])
def test_rows_sorted_by_expert_below_which_a_frozen_layer_went_sample_by_sample(together: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 2, 2).double(), torch.randint(3, (3, 2))

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        rows = together([m.frozen(row) for row in x]).tanh().flatten(0, 1)
        route = rows.sum(-1).gt(0).long()
        order = route.argsort(stable=True)
        pieces = rows[order].split(route.bincount(minlength=2).tolist())
        out = torch.cat([layer(piece) for layer, piece in zip((m.a, m.b), pieces, strict=True)])
        return m.head(out[order.argsort()].tanh())

    model = Apply(forward, frozen=nn.Linear(2, 3).requires_grad_(False), a=nn.Linear(3, 4), b=nn.Linear(3, 4),
                  head=nn.Linear(4, 3)).double()  # fmt: skip

    def loss_of(rows: slice) -> Tensor:
        return F.cross_entropy(model(x[rows]), y[rows].flatten(), reduction="sum")

    with lw.observe(model, lw.PerSampleGrad()) as seen:
        loss_of(slice(None)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        terms = [loss_of(slice(n, n + 1)) for n in range(3)]
        want = torch.stack([torch.autograd.grad(t, p, materialize_grads=True)[0] for t in terms])
        oracle.assert_close({name: seen.per_sample_grad[name]}, {name: want})
