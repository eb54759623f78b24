"""Where the samples lie: measured, told apart, remembered only while the memory cannot be wrong."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.parts import Apply, leaf

from layerwise import errors
from layerwise.graph.samples import sample_axes
from layerwise.observation.observe import observe
from layerwise.quantities import PerSampleGrad, SecondMoment, SquaredNorm

MEASURED = sys.modules["layerwise.graph.samples.memo"]._MEASURED
FUNCTIONAL = sys.modules["layerwise.graph.samples.memo"]._FUNCTIONAL

pytestmark = pytest.mark.usefixtures("float64")


def _check(
    model: nn.Module,
    logits: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    terms: Callable[[Tensor], Tensor],
    count: int | None = None,
) -> None:
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: terms(logits()))
    model.zero_grad()
    with observe(model, PerSampleGrad(), samples=count) as seen:
        loss(logits()).backward()
    oracle.assert_close(dict(seen.per_sample_grad), want)


def _sequence(inner: Callable, out: int = 3) -> nn.Module:
    return Apply(
        lambda m, x: m.head(inner(m, m.inner(x)).tanh()),
        inner=nn.Linear(2, 4), mix=torch.randn(12, 12).tril(), head=nn.Linear(4, out),
    )  # fmt: skip


def _mixed_over_time(m: nn.Module, h: Tensor) -> Tensor:
    """Causal mixing over the first axis."""
    t = h.shape[0]
    return torch.einsum("st,tnh->snh", m.mix[:t, :t], h)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("t", [1, 2, 3, 4])
def test_time_first_with_any_number_of_steps(n: int, t: int) -> None:
    model, x, y = _sequence(_mixed_over_time), torch.randn(n, t, 2), torch.randint(3, (t, n))
    _check(
        model,
        lambda: model(x.transpose(0, 1)).flatten(0, 1),
        lambda z: F.cross_entropy(z, y.flatten()),
        lambda z: F.cross_entropy(z, y.flatten(), reduction="none").view(t, n).sum(0) / (t * n),
    )


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("t", [1, 2, 3])
def test_samples_first_flattened(n: int, t: int) -> None:
    model = _sequence(lambda m, h: h.cumsum(1))
    x, y = torch.randn(n, t, 2), torch.randint(3, (n, t))
    _check(
        model,
        lambda: model(x).flatten(0, 1),
        lambda z: F.cross_entropy(z, y.flatten(), reduction="sum"),
        lambda z: F.cross_entropy(z, y.flatten(), reduction="none").view(n, t).sum(1),
    )


def test_a_batch_scaled_by_features_has_its_own_rows() -> None:
    """N is not read off a mean or a scale that happens to be the first operand."""
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    scale = torch.rand(4)  # 8 rows are also 4 samples of two rows
    for make in (lambda: scale * x, lambda: scale - x, lambda: torch.add(scale, x), lambda: scale[None] * x):
        _check(
            model,
            lambda make=make: model(make()),
            lambda z: F.cross_entropy(z, y),
            lambda z: F.cross_entropy(z, y, reduction="none") / 8,
        )


def test_the_batch_is_that_of_the_forward_sent_back() -> None:
    """Another forward with grad, of half the samples, comes first."""
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))

    def logits() -> Tensor:
        F.cross_entropy(model(x[:4]), y[:4])
        return model(x)

    _check(model, logits, lambda z: F.cross_entropy(z, y), lambda z: F.cross_entropy(z, y, reduction="none") / 8)


def test_features_detached_from_a_time_first_trunk() -> None:
    """The batch is followed through a use and a detach: N is not the number of time steps."""
    n, t = 2, 4
    model = nn.ModuleDict({"trunk": nn.Linear(2, 3), "head": nn.Linear(3, 3)})
    x, y = torch.randn(n, t, 2), torch.randint(3, (t, n))

    def logits() -> Tensor:
        return model["head"](model["trunk"](x.transpose(0, 1)).detach().tanh()).flatten(0, 1)

    with pytest.raises(errors.AmbiguousSamples, match="2 samples"), observe(model, PerSampleGrad()):
        F.cross_entropy(logits(), y.flatten()).backward()


TRUNKS = {
    "recurrent": lambda m, h: m.cell(h)[0],
    "states": lambda m, h: m.cell(h)[1].transpose(0, 1).flatten(1),
    "attention": lambda m, h: m.attend(h, h, h)[0],
    "chunk": lambda m, h: torch.mul(*m.inner(h).chunk(2, -1)),
    "split": lambda m, h: torch.mul(*torch.split(m.inner(h), 2, dim=2)),
    "extremes": lambda m, h: m.inner(h).max(-1, keepdim=True)[0] + h,
}


@pytest.mark.parametrize(("n", "t"), [(2, 1), (1, 2), (3, 2), (4, 2), (2, 4)])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_batch_of_a_frozen_time_first_trunk(trunk: str, n: int, t: int) -> None:
    """Tensors that a call returned together were made from the batch that went in: N is its dim 0."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = TRUNKS[trunk](m, x.transpose(0, 1))
        return m.head(h) if h.dim() == 2 else m.head(h.tanh()).mean(0)

    parts = {"cell": nn.GRU(4, 4), "attend": nn.MultiheadAttention(4, 2), "inner": nn.Linear(4, 4)}
    for part in parts.values():
        part.requires_grad_(False)
    model = Apply(forward, **parts, head=nn.Linear(2 if trunk in ("chunk", "split") else 4, 3))
    x, y = torch.randn(n, t, 4), torch.randint(3, (n,))
    _check(
        model, lambda: model(x), lambda z: F.cross_entropy(z, y), lambda z: F.cross_entropy(z, y, reduction="none") / n
    )  # fmt: skip


def test_a_count_that_fits_nothing() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(errors.BadInput, match="samples=N"), observe(model, SecondMoment(), samples=3):
        F.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,))).backward()


def test_a_count_of_ones_own() -> None:
    """The first tensor is not the batch; and pairs of rows are no samples without a sign of their order."""
    model, x, y = nn.Linear(4, 3), torch.randn(32), torch.randint(3, (8,))
    _check(
        model,
        lambda: model(x.view(8, 4)),
        lambda z: F.cross_entropy(z, y),
        lambda z: F.cross_entropy(z, y, reduction="none") / 8,
        count=8,
    )
    with pytest.raises(errors.AmbiguousSamples), observe(model, PerSampleGrad(), samples=4):
        F.cross_entropy(model(x.view(8, 4)), y).backward()


# The memo ---------------------------------------------------------------------------------------


class _Pulls:
    """Counts the measurements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = sample_axes._test

        def counted(*args, **given):
            self.count += 1
            return real(*args, **given)

        monkeypatch.setattr(sample_axes, "_test", counted)

    def of(self, model: nn.Module, x: Tensor, y: Tensor) -> int:
        before = self.count
        with observe(model, SecondMoment()):
            F.cross_entropy(model(x), y).backward()
        return self.count - before


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch) -> _Pulls:
    return _Pulls(monkeypatch)


def test_the_same_calls_are_measured_once(pulls: _Pulls) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    assert pulls.of(model, x, y) == 1
    assert pulls.of(model, torch.randn(6, 4), y) == 0
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    assert pulls.of(model, x, y) == 0
    model.eval()
    assert pulls.of(model, x, y) == 1, "another mode"
    assert pulls.of(model, x[:5], y[:5]) == 1, "another shape"
    model.train()
    assert pulls.of(model, x, y) == 0, "the first again"
    assert pulls.of(nn.Sequential(*model), x, y) == 1, "another model"


def test_memory_of_a_model_ends_with_it() -> None:
    before = len(MEASURED)
    model = nn.Linear(4, 3)
    with observe(model, SecondMoment()):
        F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
    assert len(MEASURED) == before + 1
    del model
    assert len(MEASURED) == before


def _then_mixed(model: nn.Module, change: Callable[[nn.Module], None], first_ok: bool = True) -> None:
    """The same program keeps samples apart, and after a change mixes them."""
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    with observe(model, SecondMoment()):
        F.cross_entropy(model(x), y).backward()
    change(model)
    model.zero_grad()
    with pytest.raises(errors.LayerwiseError), observe(model, SecondMoment()):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


def _then_moved(model: nn.Module, change: Callable[[nn.Module], None]) -> None:
    """The same program keeps samples in their rows, and after a change loss term n reads another row: none is lost."""
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    for _ in range(2):
        _check(
            model,
            lambda: model(x),
            lambda z: F.cross_entropy(z, y),
            lambda z: F.cross_entropy(z, y, reduction="none") / 4,
        )
        change(model)


def _gated(**parts) -> nn.Module:
    return Apply(
        lambda m, x: m.head(((h := m.inner(x)) + m.gate * h.flip(0)).tanh()),
        inner=nn.Linear(4, 4), head=nn.Linear(4, 3), **parts,
    )  # fmt: skip


def test_a_mixing_branch_that_starts_at_zero_is_not_remembered_as_harmless() -> None:
    """A buffer, a frozen parameter or a plain number multiplies the branch by zero at first."""
    _then_mixed(_gated(gate=torch.zeros(())), lambda m: m.gate.fill_(1.0))
    frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
    _then_mixed(_gated(gate=frozen), lambda m: m.gate.data.fill_(1.0))
    model = _gated()
    model.gate = 0.0
    _then_mixed(model, lambda m: setattr(m, "gate", 1.0))


def test_a_mixing_matrix_that_starts_as_the_identity() -> None:
    model = Apply(
        lambda m, x: m.head((m.mix @ m.inner(x)).tanh()),
        mix=torch.eye(4), inner=nn.Linear(4, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    _then_mixed(model, lambda m: m.mix.copy_(torch.rand(4, 4)))


def test_an_index_whose_values_change() -> None:
    model = Apply(
        lambda m, x: m.head(m.inner(x)[m.order].tanh()),
        order=torch.arange(4), inner=nn.Linear(4, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    _then_moved(model, lambda m: m.order.copy_(torch.arange(3, -1, -1)))


def test_a_choice_whose_values_change() -> None:
    model = Apply(
        lambda m, x: m.head(torch.where(m.keep, h := m.inner(x), h.flip(0)).tanh()),
        keep=torch.ones(4, 1, dtype=torch.bool), inner=nn.Linear(4, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    _then_moved(model, lambda m: m.keep.fill_(False))
    model = Apply(
        lambda m, x: m.head(torch.where(x[:, :1] < m.limit, h := m.inner(x), h.flip(0)).tanh()),
        limit=torch.tensor(100.0), inner=nn.Linear(4, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    _then_moved(model, lambda m: m.limit.fill_(-100.0))


@pytest.mark.parametrize(
    ("first", "second", "then"),
    [
        (lambda h: torch.transpose(h, dim0=1, dim1=1), lambda h: torch.transpose(h, dim0=0, dim1=1), _then_mixed),
        (lambda h: h.flip(1), lambda h: h.flip(0), _then_moved),
        (lambda h: h.roll(4, 0), lambda h: h.roll(1, 0), _then_moved),
        (lambda h: h[[0, 1, 2, 3]], lambda h: h[[1, 0, 2, 3]], _then_moved),
        (lambda h: torch.cat([h[0:2], h[2:4]]), lambda h: torch.cat([h[2:4], h[0:2]]), _then_moved),
        (lambda h: h.softmax(dim=1), lambda h: h.softmax(dim=0), _then_mixed),
    ],
)
def test_arguments_are_part_of_what_is_remembered(first: Callable, second: Callable, then: Callable) -> None:
    """A Python flag changes an argument, and nothing else about the program."""
    model = Apply(
        lambda m, x: m.head((second if m.other else first)(m.inner(x)).tanh()),
        inner=nn.Linear(4, 4), head=nn.Linear(4, 3),
    )  # fmt: skip
    model.other = False
    then(model, lambda m: setattr(m, "other", True))


def test_the_wiring_is_part_of_what_is_remembered() -> None:
    """A Python flag chooses between two tensors; the calls are the same."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.inner(x)
        other = h.flip(0)
        return m.head((other if m.other else h).tanh())

    model = Apply(forward, inner=nn.Linear(4, 4), head=nn.Linear(4, 3))
    model.other = False
    _then_moved(model, lambda m: setattr(m, "other", True))


def test_pieces_of_one_call_are_told_apart() -> None:
    """The same, where the two tensors are outputs of one call."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.inner(x)
        pieces = torch.stack([h, h.flip(0)]).unbind()
        return m.head(pieces[m.which].tanh())

    model = Apply(forward, inner=nn.Linear(4, 4), head=nn.Linear(4, 3))
    model.which = 0
    _then_moved(model, lambda m: setattr(m, "which", 1))


def _functional(params: dict[str, Tensor], x: Tensor, mixed: float | None = None) -> Tensor:
    h = F.linear(x, params["w"])
    return F.linear((h if mixed is None else h + mixed * h.flip(0)).tanh(), params["u"])


def _params(width: int = 5) -> dict[str, Tensor]:
    return {"w": torch.randn(width, 4).requires_grad_(), "u": torch.randn(3, width).requires_grad_()}


@pytest.mark.parametrize("kind", ["own", "known", "own and known"])
def test_many_losses_are_measured_together(pulls: _Pulls, kind: str) -> None:
    """Products with the graph, of which each runs through all of it, do not grow with the number of losses."""
    model = nn.ParameterList([torch.randn(4) for _ in range(6)])
    x, y = torch.randn(5, 4), torch.randn(5, 4)

    def terms() -> Tensor:
        """`[N, parameters]`: what each sample and each parameter add to the loss."""
        found = [(x * p).tanh() for p in model]
        own = [z.square().mean(1) for z in found] if kind != "known" else []
        known = [F.mse_loss(z, y, reduction="none").mean(1) for z in found] if kind != "own" else []
        return torch.stack([*own, *known], 1)

    def loss() -> Tensor:
        found = [(x * p).tanh() for p in model]
        own = sum(z.square().mean() for z in found) if kind != "known" else 0
        return own + (sum(F.mse_loss(z, y) for z in found) if kind != "own" else 0)  # type: ignore[no-any-return]

    want = oracle.per_sample_grad(oracle.parameters(model), lambda: terms().sum(1) / len(x))
    with observe(model, PerSampleGrad()) as seen:
        loss().backward()
    oracle.assert_close(dict(seen.per_sample_grad), want)
    assert pulls.count == 1


def test_functional_models_are_measured_once(pulls: _Pulls) -> None:
    """The mapping itself may be another one at each step; its tensors may not."""
    x, y = torch.randn(6, 4), torch.randint(3, (6,))

    def count(params: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> int:
        before = pulls.count
        model = {"u": frozen} | params
        with observe(params, SecondMoment()) as seen:
            F.cross_entropy(_functional(model, x), y).backward()
        terms = oracle.per_sample_grad(
            params, lambda: F.cross_entropy(_functional(model, x), y, reduction="none") / len(x)
        )
        oracle.assert_close(dict(seen.second_moment), oracle.second_moment(terms))
        return pulls.count - before

    params = _params()
    frozen = params["u"].detach().clone()
    assert [count(params), count(dict(params)), count(params)] == [1, 0, 0]
    with torch.no_grad():
        params["w"].add_(1.0)
    assert count(params) == 0
    assert count(params, x[:5], y[:5]) == 1, "another shape"
    assert count({"w": params["w"], "u": params["u"].detach().requires_grad_()}) == 1, "another tensor"
    assert count({"w": params["w"]}) == 1, "one parameter less"
    assert count(_params()) == 1, "another model"


def test_a_functional_model_whose_mixing_starts_at_zero() -> None:
    params, x, y = _params(), torch.randn(4, 4), torch.randint(3, (4,))
    for mixed, error in ((0.0, None), (0.0, None), (1.0, errors.SamplesMixed)):
        context = nullcontext() if error is None else pytest.raises(errors.LayerwiseError)
        with context, observe(params, SecondMoment()):
            F.cross_entropy(_functional(params, x, mixed), y).backward()


def test_memory_of_a_functional_model_ends_with_its_tensors() -> None:
    gc.collect()
    before = len(FUNCTIONAL)
    params = _params()
    for _ in range(2):
        with observe(params, SecondMoment()):
            F.cross_entropy(_functional(params, torch.randn(6, 4)), torch.randint(3, (6,))).backward()
    assert len(FUNCTIONAL) == before + 1
    gone = weakref.ref(params["w"]), weakref.ref(params["u"])
    del params
    assert [ref() for ref in gone] == [None, None]
    assert len(FUNCTIONAL) == before


def test_dead_layers_are_measured_until_they_live(pulls: _Pulls) -> None:
    model = Apply(
        lambda m, x: m.head((m.inner(x) - m.shift).relu() + x),
        inner=nn.Linear(4, 4), shift=torch.tensor(100.0), head=nn.Linear(4, 3),
    )  # fmt: skip
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    assert [pulls.of(model, x, y) for _ in range(2)] == [1, 1]
    model.shift.zero_()
    assert [pulls.of(model, x, y) for _ in range(2)] == [1, 0]


def test_a_token_that_every_sample_shares() -> None:
    model = Apply(
        lambda m, x: m.head(torch.cat([m.token.expand(x.shape[0], 1, 4), x], 1).tanh().mean(1)),
        token=leaf(4), head=nn.Linear(4, 3),
    )  # fmt: skip
    for n in (1, 2, 4):
        x, y = torch.randn(n, 4, 4), torch.randint(3, (n,))
        _check(
            model,
            lambda x=x: model(x),
            lambda z, y=y: F.cross_entropy(z, y),
            lambda z, y=y, n=n: F.cross_entropy(z, y, reduction="none") / n,
        )


# Frozen layers that return several tensors -----------------------------------------------------------


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("kind", ["lstm", "gru", "attention", "max", "sort"])
def test_what_follows_a_frozen_layer_of_several_outputs(kind: str, n: int) -> None:
    """The batch is followed through tuples: N is not the number of time steps."""
    t = 4
    frozen = {"lstm": nn.LSTM, "gru": nn.GRU, "attention": nn.MultiheadAttention}.get(kind)
    layer = nn.Identity() if frozen is None else frozen(4, *((1,) if kind == "attention" else (4,)))
    model = nn.ModuleDict({"layer": layer.requires_grad_(False), "head": nn.Linear(4, 3)})

    def trunk(h: Tensor) -> Tensor:
        if kind == "attention":
            return layer(h, h, h)[0]
        return {"max": lambda: h.unsqueeze(-1).max(-1)[0], "sort": lambda: h.sort(-1)[0]}.get(
            kind, lambda: layer(h)[0]
        )()

    x, y = torch.randn(n, t, 4), torch.randint(3, (n,))
    _check(
        model,
        lambda: model["head"](trunk(x.transpose(0, 1)))[-1],
        lambda z: F.cross_entropy(z, y),
        lambda z: F.cross_entropy(z, y, reduction="none") / n,
    )
    if n > t:
        return
    labels = torch.randint(3, (t * n,))  # here the first use reads the batch in an order that nothing tells
    with pytest.raises(errors.AmbiguousSamples, match=f"{n} samples"), observe(model, PerSampleGrad()):
        F.cross_entropy(model["head"](trunk(x.transpose(0, 1))).flatten(0, 1), labels).backward()


class _Frozen(nn.Module):
    """A frozen first layer, row by row, and a constant that all samples share."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4).requires_grad_(requires_grad=False)
        self.table, self.head = nn.Embedding(4, 4), nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([self.first(row) for row in x])
        return self.head((h + self.table(torch.tensor([3, 1]))).tanh())


@pytest.mark.parametrize("outputs", [2, 3, 5])
@pytest.mark.parametrize("kept", [[0, 1, 2, 4], [0, 1, 2, 3, 4], [0, 2, 4, 5]])
def test_outputs_are_not_taken_for_samples(outputs: int, kept: list[int]) -> None:
    """Three samples, whose rows no trained layer reads as they came, and of which some are chosen for the loss."""
    model, x = _Frozen(outputs).double(), torch.randn(3, 2, 3, dtype=torch.float64)
    at, y = torch.tensor(kept), torch.randn(len(kept), outputs, dtype=torch.float64)
    rows = lambda: (model(x).flatten(0, 1)[at] - y).square().mean(1) / len(kept)  # noqa: E731
    each = lambda: torch.zeros(3, dtype=torch.float64).index_add(0, at // 2, rows())  # noqa: E731
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for samples in (None, at // 2):
        try:
            with observe(model, PerSampleGrad(), samples=samples) as seen:
                F.mse_loss(model(x).flatten(0, 1)[at], y).backward()
        except (errors.SamplesMixed, errors.AmbiguousSamples, errors.BadInput) as error:
            assert samples is None and "samples=" in str(error)
            continue
        oracle.assert_close(dict(seen.per_sample_grad), oracle.per_sample_grad(params, each))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 21, 128])
def test_of_any_two_samples_each_is_once_chosen_without_the_other(n: int) -> None:
    chosen = torch.stack(list(sample_axes._choices(n)))
    assert chosen.any(0).all()
    for i in range(n):
        for j in range(n):
            assert i == j or bool((chosen[:, i] & ~chosen[:, j]).any()), (i, j)


def test_a_first_pass_sends_each_set_of_samples_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, pull = [], sample_axes.pull

    def counted(*args: Any) -> Any:
        sent.append(args)
        return pull(*args)

    monkeypatch.setattr(sample_axes, "pull", counted)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 3)
    for _ in range(3):
        with observe(model, SquaredNorm()):
            F.cross_entropy(model(x), torch.arange(8) % 2).backward()
    assert len(sent) == 5  # ten sets of two or three of five


class _NaNsAway(torch.autograd.Function):
    """The identity, whose gradient is each row's less the mean over all, without NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        g = g.nan_to_num(0.0)
        return g - g.mean(0)


def test_samples_that_meet_where_a_function_of_ones_own_drops_nan_are_seen() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with pytest.raises(errors.SamplesMixed), observe(model, SquaredNorm()):
        z = model(x)
        F.cross_entropy(z + _NaNsAway.apply(z), torch.arange(4) % 2).backward()
