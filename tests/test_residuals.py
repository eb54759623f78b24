"""Residuals of elementwise functions: which nodes are curved and how, their columns, and the proof behind them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import Case, cases

import layerwise as lw
from layerwise.graph.coverage import Graph, prove
from layerwise.graph.loss_curvature import likelihoods, loss_hessian
from layerwise.graph.products import SecondOrder
from layerwise.graph.residuals import ResidualCurvature, proved, residual_curvature
from layerwise.graph.samples import SampleLayout
from layerwise.quantities.hessian import residual_columns
from layerwise.rows import weighted as signed
from layerwise.rows.base import Rows, Samples
from layerwise.tape.tape import Tape

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Linear layers with something between them."""

    def __init__(self, *sizes: int, act: Callable[..., Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _net(act: Callable[..., Tensor], *sizes: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    sizes = sizes or (4, 5, 4, 3)
    model = Net(*sizes, act=act)
    x, y = torch.randn(6, sizes[0], generator=_seeded(1)), torch.randint(sizes[-1], (6,), generator=_seeded(2))
    return model, lambda: F.cross_entropy(model(x), y)


def _walked(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[Graph, ResidualCurvature]:
    tape = Tape(model, lambda *_: None)
    with tape, SecondOrder():
        total = loss()
    graph = prove(tape, total)
    return graph, residual_curvature(graph)


def _diagonal(model: Any, loss: Callable[[], Tensor], samples: int | None = None, **options: Any) -> dict[str, Tensor]:
    with lw.observe(model, lw.DiagHessian(**options), samples=samples) as seen:
        loss().backward()
    return dict(seen.diag_hessian)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Columns of residuals wherever they are right, however many; the names that they served."""
    served: list[Sequence[str]] = []
    diagonals = residual_columns.ResidualPlan.diagonals

    def spy(plan: Any, per_sample: bool) -> Any:
        served.append([name for unit in plan.units for name in unit.names])
        return diagonals(plan, per_sample)

    monkeypatch.setattr(residual_columns, "_PRODUCT", 10**9)
    monkeypatch.setattr(residual_columns.ResidualPlan, "diagonals", spy)
    return served


def _check(model: nn.Module, loss: Callable[[], Tensor], samples: int | None = None) -> None:
    """The diagonal, and that of every sample summed up, against the oracle."""
    want = oracle.diag_hessian(oracle.parameters(model), loss)
    oracle.assert_close(_diagonal(model, loss, samples), want)
    every = _diagonal(model, loss, samples, per_sample=True)
    assert samples is None or all(len(v) == samples for v in every.values())
    oracle.assert_close({k: v.sum(0) for k, v in every.items()}, want)


# Which nodes are curved -----------------------------------------------------------------------------

ELEMENTWISE = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "sin": torch.sin,
    "square": lambda z: z * z,
    "power": lambda z: z.pow(3),
    "in-place": lambda z: z.sigmoid_(),
    "two functions of one tensor": lambda z: z.tanh() + z.sigmoid(),
    "one of the other": lambda z: torch.sin(torch.tanh(z)),
    "a constant's product": lambda z: torch.tanh(z) * torch.linspace(-1, 2, z.shape[-1]),
    "residual sum": lambda z: z + torch.tanh(z),
    "checkpoint": lambda z: checkpoint(torch.tanh, z, use_reentrant=False),
    "some units dead": lambda z: torch.sigmoid(z) * (torch.arange(z.shape[-1]) > 1),
    "rolled": lambda z: torch.tanh(z).roll(1, -1),
    "averaged": lambda z: torch.tanh(z) + torch.tanh(z).mean(1, keepdim=True),
    "mixed before": lambda z: torch.tanh(z + z.flip(1)),
}
FLAT = {"relu": F.relu, "leaky": F.leaky_relu, "identity": lambda z: z, "abs": torch.abs}
OTHER = {
    "product of two": (lambda z: torch.tanh(z) * torch.sigmoid(z), "MulBackward0"),
    "product of halves": (lambda z: z * z.roll(1, -1), "MulBackward0"),
    "softmax": (lambda z: z.softmax(-1), "SoftmaxBackward0"),
    "softsign": (F.softsign, "DivBackward0"),
    "norm": (lambda z: z / z.norm(dim=1, keepdim=True), "DivBackward0"),
    "layer norm": (lambda z: F.layer_norm(z, z.shape[1:]), "NativeLayerNormBackward0"),
    "attention": (lambda z: (z[:, :, None] @ z[:, None]).sum(1), "BmmBackward0"),
    "logsumexp": (lambda z: z.logsumexp(1, keepdim=True) + z, "LogsumexpBackward0"),
    "product of all": (lambda z: z + z.prod(1, keepdim=True), "ProdBackward1"),
    "cumulative product": (lambda z: z.cumprod(1), "CumprodBackward0"),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions_are_residuals(name: str, forced: list[Any]) -> None:
    model, loss = _net(ELEMENTWISE[name])
    graph, found = _walked(model, loss)
    assert not found.other
    assert len(found.residuals) >= 2
    assert proved(graph, loss_hessian(graph, likelihoods(graph)), found, {use.index for use in graph.uses})
    _check(model, loss)
    assert [sorted(names) for names in forced] == [sorted(oracle.parameters(model))] * 2


@pytest.mark.parametrize("name", FLAT)
def test_piecewise_linear_functions_are_flat(name: str, forced: list[Any]) -> None:
    model, loss = _net(FLAT[name])
    _, found = _walked(model, loss)
    assert not found.other
    assert not found.residuals
    _check(model, loss)
    assert len(forced) == 2


@pytest.mark.parametrize("name", OTHER)
def test_other_curvature_is_named_and_takes_the_other_way(name: str, forced: list[Any]) -> None:
    act, node = OTHER[name]
    model, loss = _net(act)
    _, found = _walked(model, loss)
    assert sorted(found.other) == [0, 1]
    assert node in found.other.values()
    _check(model, loss)
    assert all(sorted(names) == ["layers.2.bias", "layers.2.weight"] for names in forced)


def test_a_use_that_is_curved_in_its_data_is_named(forced: list[Any]) -> None:
    model, loss = _net(torch.sigmoid)
    model.norm = nn.LayerNorm(5)
    model.act = lambda z: torch.sigmoid(model.norm(z) if z.shape[1] == 5 else z)
    _, found = _walked(model, loss)
    assert list(found.other) == [0]
    assert "layer_norm" in found.other[0]
    _check(model, loss)
    assert all(not {"layers.0.weight", "layers.0.bias"} & set(names) for names in forced)
    assert all({"norm.weight", "norm.bias", "layers.1.weight"} <= set(names) for names in forced)


def test_a_softmax_over_two_numbers_is_not_elementwise() -> None:
    """The least that a probe must tell apart: one sample, two coupled numbers."""
    for seed in range(50):
        torch.manual_seed(seed)
        model = Net(2, 2, 3, act=lambda z: z.softmax(-1))
        x = torch.randn(1, 2)
        _, found = _walked(model, lambda x=x, model=model: F.cross_entropy(model(x), torch.tensor([1])))
        assert set(found.other) == {0}


def test_a_python_function_may_read_anything() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.save_for_backward(z)
            return z.square()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * ctx.saved_tensors[0]

    model, loss = _net(Doubled.apply)
    assert set(_walked(model, loss)[1].other) == {0, 1}
    _check(model, loss)


def test_residuals_are_those_of_the_formula() -> None:
    model, loss = _net(torch.tanh, 4, 5, 3)
    graph, found = _walked(model, loss)
    (residual,) = found.residuals
    x = graph.uses[0].call.args[0]
    with torch.no_grad():
        y = model.layers[0](x).tanh()
    y.requires_grad_()
    labels = torch.randint(3, (6,), generator=_seeded(2))
    (g,) = torch.autograd.grad(F.cross_entropy(model.layers[1](y), labels), y)
    oracle.assert_close(residual.value, g * -2 * y.detach() * (1 - y.detach() ** 2))
    assert bool((residual.value < 0).any())
    assert bool((residual.value > 0).any())
    assert residual.below == {0}


# The proof ------------------------------------------------------------------------------------------


def test_the_proof_fails_where_a_residual_is_missing_wrong_or_nan() -> None:
    model, loss = _net(torch.sigmoid)
    graph, found = _walked(model, loss)
    hessian, uses = loss_hessian(graph, likelihoods(graph)), {use.index for use in graph.uses}
    assert proved(graph, hessian, found, uses)
    first, second = found.residuals
    for wrong in (
        [first],
        [second],
        [],
        [first, second, second],
        [first._replace(value=first.value * (1 + 1e-9)), second],
        [first._replace(value=first.value.abs()), second],
        [first._replace(value=first.value * float("nan")), second],
    ):
        assert not proved(graph, hessian, replace(found, residuals=wrong), uses)


def test_a_failed_proof_leaves_the_other_way(monkeypatch: pytest.MonkeyPatch, forced: list[Any]) -> None:
    model, loss = _net(torch.sigmoid)
    walk = residual_columns.residual_curvature

    def partial(graph: Graph) -> ResidualCurvature:
        found = walk(graph)
        return replace(found, residuals=found.residuals[:1])

    monkeypatch.setattr(residual_columns, "residual_curvature", partial)
    _check(model, loss)
    assert not forced


# Where columns go ------------------------------------------------------------------------------------


def _drop(z: Tensor) -> Tensor:
    return z * (torch.rand(z.shape[1:], generator=_seeded(3)) > 0.4) / 0.6


def _sequence(axis: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Net(3, 4, 4, 2)
    x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    x, y = (t.transpose(0, axis).contiguous() for t in (x, y))
    return model, lambda: F.mse_loss(model(x), y)


class Conv(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3).eval()
        self.second, self.head = nn.Conv2d(3, 4, 2, groups=1), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.bn(self.conv(x)))
        return self.head(torch.sigmoid(self.second(x).flatten(2).mean(2)))


def _conv(between: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Conv(between)
    model.bn.running_var.fill_(0.7)
    x, y = torch.randn(3, 1, 6, 6), torch.randint(3, (3,))
    return model, lambda: F.cross_entropy(model(x), y)


def _frozen() -> tuple[nn.Module, Callable[[], Tensor]]:
    model, loss = _net(torch.sigmoid, 4, 5, 4, 4, 3)
    for p in model.layers[2].parameters():
        p.requires_grad_(False)
    return model, loss


def _losses() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Net(4, 5, 4, 3)
    other = nn.Linear(5, 2)
    model.other = other
    x, y, t = torch.randn(6, 4), torch.randint(3, (6,)), torch.randn(6, 2)

    def loss() -> Tensor:
        h = torch.sigmoid(model.layers[0](x))
        main = F.cross_entropy(model.layers[2](torch.tanh(model.layers[1](h))), y)
        return main + 0.3 * F.mse_loss(torch.sin(other(h)), t, reduction="sum")

    return model, loss


def _shared() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Net(4, 4, 4, 3)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))

    def loss() -> Tensor:  # the second layer twice: only the last one's diagonal is found by columns
        h = torch.sigmoid(model.layers[1](torch.sigmoid(model.layers[0](x))))
        return F.cross_entropy(model.layers[2](torch.sigmoid(model.layers[1](h))), y)

    return model, loss


def _skip() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Net(4, 4, 4, 3)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))

    def loss() -> Tensor:
        h = torch.tanh(model.layers[0](x))
        return F.cross_entropy(model.layers[2](h + torch.sigmoid(model.layers[1](h))), y)

    return model, loss


def _embedding() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 2))
    x, y = torch.tensor([[0, 1], [1, 1], [2, 0], [1, 2]]), torch.tensor([0, 1, 1, 0])
    return model, lambda: F.cross_entropy(model(x), y)


def _one_sample() -> tuple[nn.Module, Callable[[], Tensor]]:
    model, _ = _net(torch.sigmoid)
    x = torch.randn(1, 4)
    return model, lambda: F.cross_entropy(model(x), torch.tensor([1]))


def _single_units() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Net(3, 1, 1, 1)
    x, y = torch.randn(4, 3), torch.rand(4, 1).round()
    return model, lambda: F.binary_cross_entropy_with_logits(model(x), y)


PLACES: dict[str, Callable[[], tuple[nn.Module, Callable[[], Tensor]]]] = {
    "deep": lambda: _net(torch.sigmoid, 4, 5, 4, 5, 4, 3),
    "dropout below": lambda: _net(lambda z: torch.sigmoid(_drop(z))),
    "dropout above": lambda: _net(lambda z: _drop(torch.sigmoid(z))),
    "sequence": lambda: _sequence(0),
    "conv": lambda: _conv(torch.sigmoid),
    "conv, pool, sigmoid": lambda: _conv(lambda z: torch.sigmoid(F.avg_pool2d(z, 2))),
    "conv, max pool, sigmoid": lambda: _conv(lambda z: torch.sigmoid(F.max_pool2d(z, 2))),
    "channels last": lambda: _conv(lambda z: torch.tanh(z.permute(2, 0, 3, 1)).permute(1, 3, 0, 2)),
    "frozen layer": _frozen,
    "several losses": _losses,
    "shared layer": _shared,
    "skip": _skip,
    "embedding": _embedding,
    "one sample": _one_sample,
    "single units": _single_units,
}


@pytest.mark.parametrize("name", PLACES)
def test_columns_find_their_way(name: str, forced: list[Any]) -> None:
    model, loss = PLACES[name]()
    _check(model, loss)
    names = set(oracle.parameters(model)) - ({"layers.1.weight", "layers.1.bias"} if name == "shared layer" else set())
    assert [set(served) for served in forced] == [names] * 2


MIX = {
    "nothing": lambda z: z,
    "mean": lambda z: z.mean(0, keepdim=True) + z,
    "sum so far": lambda z: z.cumsum(0),
    "sum so far, flattened": lambda z: z.cumsum(0).flatten(0, 1),
}


@pytest.mark.parametrize("mix", MIX.values(), ids=MIX.keys())
def test_samples_in_the_second_axis(mix: Callable[[Tensor], Tensor], forced: list[Any]) -> None:
    """Time first, and what lies between two uses mixes the times: its samples' axis is its own to be found."""
    model, loss = _sequence(1)
    model.act = lambda z: torch.sigmoid(mix(z)).view(z.shape)
    _check(model, loss, samples=4)
    assert [sorted(names) for names in forced] == [sorted(oracle.parameters(model))] * 2


def test_where_samples_are_not_found_the_other_way_is_taken(monkeypatch: pytest.MonkeyPatch, forced: list[Any]) -> None:
    model, loss = _net(lambda z: torch.tanh(z + z.flip(1)))
    monkeypatch.setattr(residual_columns, "_place", lambda x, y, c: None)
    _check(model, loss)
    assert [sorted(names) for names in forced] == [["layers.2.bias", "layers.2.weight"]] * 2


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_an_embedding_bag_takes_columns_though_torch_cannot_differentiate_it_twice(
    mode: str, forced: list[Any]
) -> None:
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(5, 3, mode=mode), nn.Linear(3, 2)
    x, y = torch.tensor([[0, 1, 1], [2, 3, 0]]), torch.tensor([0, 1])
    model = nn.ModuleDict({"bag": bag, "head": head})

    def rows() -> Tensor:
        found = F.embedding(x, bag.weight)
        return found.sum(1) if mode == "sum" else found.mean(1)

    want = oracle.diag_hessian(oracle.parameters(model), lambda: F.cross_entropy(head(rows().tanh()), y))
    got = _diagonal(model, lambda: F.cross_entropy(head(bag(x).tanh()), y))
    oracle.assert_close(got, want)
    assert forced == [["bag.weight", "head.weight", "head.bias"]]


@pytest.mark.parametrize(
    ("lay", "able"),
    [
        (lambda g: g, True),
        (lambda g: g.mT.flip(1), True),
        (lambda g: 2 * g, False),
        (lambda g: -g, False),
        (lambda g: torch.cat([g, g], 1), False),  # a row's output is a sum of rows
        (lambda g: g[:, :1].expand_as(g), False),  # the same element twice, another one never
        (lambda g: g + g.flip(1), False),
    ],
)
def test_rows_must_be_the_elements_of_the_output(lay: Callable[[Tensor], Tensor], able: bool) -> None:
    use = SimpleNamespace(index=0, call=SimpleNamespace(out_shape=torch.Size([2, 3])))
    slot = SimpleNamespace(used=torch.zeros(3, 4), output=lambda g, samples: lay(g))
    unit: Any = SimpleNamespace(use=use, slots=[("w", slot, None)])
    assert residual_columns._able(0, [unit], SampleLayout(2, {0: Samples(2, 0)}, [])) is able
    assert not residual_columns._able(1, [unit], SampleLayout(2, {0: Samples(2, 0)}, []))


def test_what_is_free_sends_no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    stacks = residual_columns._Source.stacks

    def spy(source: Any, elements: int) -> Any:
        for stack, weights in stacks(source, elements):
            sent.append(len(stack))
            yield stack, weights

    monkeypatch.setattr(residual_columns._Source, "stacks", spy)
    monkeypatch.setattr(residual_columns, "_PRODUCT", 10**9)
    _check(*_net(torch.sigmoid, 4, 7, 5, 3))  # two hidden layers: their own output, and one further down
    assert not sent
    model, loss = _net(torch.sigmoid, 4, 7, 6, 5, 3)
    _diagonal(model, loss)
    assert sum(sent) == 5
    sent.clear()
    with torch.no_grad():
        model.layers[3].weight[:, 1:3] = 0  # units 1 and 2 reach no loss: no gradient, no residual
    _diagonal(model, loss)
    assert sum(sent) == 3
    monkeypatch.setattr(residual_columns, "_STACK_ELEMENTS", 1)
    _check(model, loss)


@one_in(4, case=cases(exclude=("bag",), first_loss_only=True))
def test_the_zoo_by_columns(case: Case, forced: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    instance = case.make(seed=0)
    by_columns = [_diagonal(instance.subject, instance.loss, per_sample=each) for each in (False, True)]
    monkeypatch.setattr(residual_columns, "plan", lambda graph, layout, units: (None, list(units)))
    by_products = [_diagonal(instance.subject, instance.loss, per_sample=each) for each in (False, True)]
    for got, want in zip(by_columns, by_products, strict=True):
        oracle.assert_close(got, want)


# Signed second moments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("kind", ["float", "constant", "index"])
@pytest.mark.parametrize("sign", ["both", "negative", "none", "zero"])
def test_signed_second_moments(t: int, kind: str, sign: str) -> None:
    v, n, k, o, i = 3, 4, 2 if kind == "float" else 1, 3, 5
    generator = _seeded(0)
    g = torch.randn(v, n, t, k, o, generator=generator)
    w = torch.randn(v, n, generator=generator)
    w = {"both": w, "negative": -w.abs(), "zero": 0 * w, "none": None}[sign]
    if kind == "float":
        a = torch.randn(n, t, k, i, generator=generator)
        d = torch.einsum("vntko,ntki->vnkoi", g, a)
    elif kind == "constant":
        a, i = None, 1
        d = g.sum(2)[..., None]
    else:
        a = torch.randint(i, (n, t), generator=generator)
        d = torch.einsum("vntko,nti->vnkoi", g, F.one_hot(a, i).to(g))
    want = (d.square() * (torch.ones(v, n) if w is None else w)[:, :, None, None, None]).sum(0)
    before = g.clone()
    oracle.assert_close(signed.squares(Rows(a, g, i), w), want)
    oracle.assert_close(signed.second_moment(Rows(a, g, i), w), want.sum(0))
    assert torch.equal(g, before)
