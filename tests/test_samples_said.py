"""What trainers take for N under a loss of the user's own, and where the advice of a refusal leads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.errors import AmbiguousSamples, BadInput, LayerwiseError

Loss = Callable[[nn.Module], Tensor]


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def _rows(n: int) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _pair(model: nn.Module) -> Tensor:
    reward = model(_rows(2)).squeeze(-1)
    return -F.logsigmoid(reward[0] - reward[1])


def _pair_and_known(model: nn.Module) -> Tensor:
    reward = model(_rows(2)).squeeze(-1)
    return F.mse_loss(reward, torch.ones_like(reward)) - F.logsigmoid(reward[0] - reward[1])


def _triplet(model: nn.Module) -> Tensor:
    z = model(_rows(3)).squeeze(-1)
    return F.relu(5 + z[0] - z[1] - z[2])


def _whole_batch_pooled(model: nn.Module) -> Tensor:
    return (model(_rows(5)).mean(0) - 1).square().sum()


def _known_of_a_pair(model: nn.Module) -> Tensor:
    reward = model(_rows(2)).squeeze(-1)
    return F.mse_loss(reward[0] - reward[1], reward.new_ones(()))


ONE_SAMPLE = [_pair, _pair_and_known, _triplet, _whole_batch_pooled]


def _moved(model: nn.Module, step: Callable[[nn.Module], object]) -> list[Tensor]:
    before = [p.detach().clone() for p in model.parameters()]
    step(model)
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    assert any(bool(m.any()) for m in moved)
    return moved


def _locoprop(per: str, loss: Loss, samples: int | None) -> list[Tensor]:
    target = local.GradientStep(0.5, per=per)
    return _moved(_model(), lambda m: lw.LocoProp(m, target=target).step(lambda: loss(m), samples=samples))


@pytest.mark.parametrize("loss", ONE_SAMPLE)
def test_a_target_per_sample_of_one_sample_of_several_rows(loss: Loss) -> None:
    """Untold it is not taken for as many samples as rows; told, γN is γ."""
    with pytest.raises(AmbiguousSamples, match="samples=N"):
        _locoprop("sample", loss, None)
    want = _locoprop("batch", loss, None)
    for got, its in zip(_locoprop("sample", loss, 1), want, strict=True):
        torch.testing.assert_close(got, its, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", ONE_SAMPLE)
def test_codes_of_one_sample_of_several_rows(loss: Loss) -> None:
    with pytest.raises(AmbiguousSamples, match="samples=N"):
        lw.AltMin(model := _model()).step(lambda: loss(model))
    _moved(_model(), lambda m: lw.AltMin(m).step(lambda: loss(m), samples=1))


def test_a_known_loss_of_one_number_is_of_one_sample() -> None:
    want = _locoprop("batch", _known_of_a_pair, None)
    for got, its in zip(_locoprop("sample", _known_of_a_pair, None), want, strict=True):
        torch.testing.assert_close(got, its, rtol=1e-10, atol=1e-13)


def test_samples_that_meet_below_a_loss_of_ones_own_are_still_its_terms() -> None:
    """Batch norm in training mode: no per-sample gradients, but five terms, as in a known loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = _rows(5), torch.ones(5, 1, dtype=torch.float64)
    moved = []
    target = local.GradientStep(0.5, per="sample")
    for loss in (lambda: (model(x) - y).square().mean(), lambda: F.mse_loss(model(x), y)):
        model.load_state_dict(state)
        moved.append(_moved(model, lambda m, f=loss: lw.LocoProp(m, target=target).step(f)))
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


# -- advice of refusals --------------------------------------------------------------------------------------------


class TimeMajor(nn.Module):
    """Time steps first, which meet: [T, N, 4] to [T, N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh().cumsum(0))


class Ensemble(nn.Module):
    """Members first: [N, 4] to [K, N, 3]."""

    def __init__(self, members: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(members, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,kio->kno", x, self.w).tanh()


class Spans(nn.Module):
    """Means of spans of frozen embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 6).requires_grad_(False), nn.Linear(6, 3)

    def forward(self, ids: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
        e = self.table(ids)
        return self.head(torch.stack([e[row, start:stop].mean(0) for row, start, stop in spans]))


class ClassPrompts(nn.Module):
    """A layer on rows of the batch beside attention among the classes' prompts."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(3, 8))
        self.attend, self.image = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        prompts = self.prompts[None]
        return self.image(x) @ self.attend(prompts, prompts, prompts, need_weights=False)[0][0].T


Case = tuple[nn.Module, Callable[[], Tensor], Callable[[int], Tensor], int, Tensor]


def _time_major(steps: int, n: int = 4) -> Case:
    model, x = TimeMajor().double(), torch.randn(steps, n, 4).double()
    y, mask = torch.randint(3, (steps, n)), torch.rand(steps, n) > 0.3
    terms = int(mask.sum())

    def of(i: int) -> Tensor:
        kept = mask[:, i]
        return F.cross_entropy(model(x)[:, i][kept], y[:, i][kept], reduction="sum") / terms

    number = torch.arange(n).expand(steps, n)[mask]
    return model, lambda: F.cross_entropy(model(x)[mask], y[mask]), of, n, number


def _ensemble(members: int, squared: bool, n: int = 4) -> Case:
    model, x = Ensemble(members).double(), torch.randn(n, 4).double()
    y, t = torch.randint(3, (n,)), torch.randn(members, n, 3).double()
    number = torch.arange(n).expand(members, n)
    if squared:
        of = lambda i: F.mse_loss(model(x)[:, i], t[:, i], reduction="sum") / t.numel()  # noqa: E731
        return model, lambda: F.mse_loss(model(x), t), of, n, number
    one = lambda i: F.cross_entropy(model(x)[:, i], y[i].expand(members), reduction="sum") / (members * n)  # noqa: E731
    return model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.repeat(members)), one, n, number.flatten()


def _spans() -> Case:
    model, ids = Spans().double(), torch.randint(10, (4, 7))
    spans = [(0, 0, 2), (0, 3, 5), (1, 1, 3), (2, 0, 4), (2, 2, 5), (3, 1, 2)]
    y, number = torch.randint(3, (6,)), torch.tensor([row for row, _, _ in spans])

    def of(i: int) -> Tensor:
        return F.cross_entropy(model(ids, spans)[number == i], y[number == i], reduction="sum") / 6

    return model, lambda: F.cross_entropy(model(ids, spans), y), of, 4, number


def _prompts(n: int) -> Case:
    model, x = ClassPrompts().double(), torch.randn(n, 4).double()
    y = torch.randint(3, (n,))
    of = lambda i: F.cross_entropy(model(x)[i : i + 1], y[i : i + 1], reduction="sum") / n  # noqa: E731
    return model, lambda: F.cross_entropy(model(x), y), of, n, torch.arange(n)


CASES: dict[str, Callable[[], Case]] = {
    "time-major": lambda: _time_major(5), "as many steps as samples": lambda: _time_major(4),
    "ensemble": lambda: _ensemble(3, False), "as many members as samples": lambda: _ensemble(4, False),
    "squared ensemble": lambda: _ensemble(3, True), "as many members, squared": lambda: _ensemble(4, True),
    "spans": _spans, "class prompts": lambda: _prompts(4), "as many prompts as samples": lambda: _prompts(3),
}  # fmt: skip


def _norms(model: nn.Module, loss: Callable[[], Tensor], samples: int | Tensor | None) -> Tensor:
    with lw.observe(model, lw.SquaredNorm(), samples=samples) as seen:
        loss().backward()
    return seen.squared_norm.total


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_of_sample_numbers_is_exact_and_refusals_ask_for_its_shape(name: str) -> None:
    torch.manual_seed(0)
    model, loss, of, n, number = CASES[name]()
    params = list(model.parameters())
    found = [torch.autograd.grad(of(i), [p for p in params if p.requires_grad], allow_unused=True) for i in range(n)]
    want = torch.stack([torch.stack([g.square().sum() for g in grads if g is not None]).sum() for grads in found])
    torch.testing.assert_close(_norms(model, loss, number), want, rtol=1e-10, atol=0)
    for said in (None, n):
        try:
            got = _norms(model, loss, said)
        except LayerwiseError as error:
            shape = str(tuple(number.shape))[:-1].rstrip(",")  # of elementwise losses with the outputs' axis
            assert f"of shape {shape}" in str(error)
        else:
            if name != "spans":  # untold, a span is a sample
                torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


def test_a_tensor_that_does_not_fit_is_refused_with_both_shapes() -> None:
    model, loss, _, n, number = _time_major(5)
    with pytest.raises(BadInput) as caught:
        _norms(model, loss, torch.arange(n).expand(5, n))
    assert f"of shape ({len(number)},)" in str(caught.value) and f"(5, {n})" in str(caught.value)


@pytest.mark.parametrize("steps", [3, 6])  # 3: as many as actions
@pytest.mark.parametrize("stacked", [False, True])
def test_a_list_of_losses_of_ones_own_has_a_number_for_each(steps: int, stacked: bool) -> None:
    """REINFORCE: a term for each step of three episodes, summed; the terms of an episode are one sample's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, action, reward = torch.randn(steps, 4).double(), torch.randint(3, (steps,)), torch.randn(steps).double()
    episode = torch.arange(steps) % 2

    def term(t: int) -> Tensor:
        return -torch.log_softmax(model(x[t]), -1)[action[t]] * reward[t]

    def loss() -> Tensor:
        terms = [term(t) for t in range(steps)]
        return torch.stack(terms).sum() if stacked else sum(terms, x.new_zeros(()))

    params = list(model.parameters())
    want = torch.zeros(2, dtype=torch.float64)
    for i in range(2):
        of = sum((term(t) for t in range(steps) if episode[t] == i), x.new_zeros(()))
        want[i] = sum(g.square().sum() for g in torch.autograd.grad(of, params))
    torch.testing.assert_close(_norms(model, loss, episode), want, rtol=1e-10, atol=0)
