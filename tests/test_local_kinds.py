"""What local learning remembers of calls from batch to batch: it changes no bit, whatever the closure does next."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise.local.layers import layer as layers
from layerwise.local.layers.kinds import Kind, Kinds
from layerwise.local.layers.record import record
from layerwise.tensors import all_finite, is_finite

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tanh": {"f": torch.tanh},
    "softmax": {"f": lambda z: F.softmax(z, -1)},
    "softmax over samples": {"f": lambda z: F.softmax(z, 0)},
    "squared loss": {"loss": lambda z, y: F.mse_loss(z, F.one_hot(y, 4).to(z))},
    "weighted loss": {"loss": lambda z, y: 0.3 * F.cross_entropy(z, y)},
    "two losses": {"loss": lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean()},
    "class weights": {"loss": lambda z, y: F.cross_entropy(z, y, weight=torch.arange(1.0, 5.0).to(z))},
    "shared twice": {"again": True},
    "alpha": {"alpha": 2.0},
    "transposed rows": {"x": lambda x: x.t().contiguous().t()},
    "every other row": {"x": lambda x: x[::2], "y": lambda y: y[::2]},
    "offset": {"x": lambda x: F.pad(x, (3, 0))[:, 3:]},
    "repeated rows": {"x": lambda x: x[:1].expand(x.shape)},
    "time steps": {"x": lambda x: x.view(4, 2, -1), "z": lambda z: z.flatten(0, 1)},
    "no bias": {"bias": False},
}


class Net(nn.Module):
    """A product of each kind, that goes another way whenever it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4)
        self.weight, self.bias = nn.Parameter(torch.randn(5, 5) / 2), nn.Parameter(torch.zeros(5))

    def loss(self, x: Tensor, y: Tensor, way: str) -> Tensor:
        told = WAYS[way]
        f, x, y = told.get("f", F.relu), told.get("x", lambda x: x)(x), told.get("y", lambda y: y)(y)
        a = f(self.first(x))
        a = f(self.middle(a))
        a = f(self.middle(a)) if "again" in told else a
        a = torch.addmm(self.bias, a.reshape(-1, 5), self.weight, alpha=told.get("alpha", 1.0)).view(a.shape)
        z = F.linear(f(a), self.last.weight, self.last.bias if told.get("bias", True) else None)
        loss: Tensor = told.get("loss", F.cross_entropy)(told.get("z", lambda z: z)(z), y)
        return loss


def batch(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=g), torch.randint(4, (8,), generator=g)


OPTIMIZERS: dict[str, Any] = {
    "AltMin": lw.AltMin,
    "AltMin, SGD, all rows": lambda m: lw.AltMin(m, weights="sgd", rows="all", steps=3),
    "AltMin, sweep": lambda m: lw.AltMin(m, codes="sweep"),
    "AltMin, threads": lambda m: lw.AltMin(m, workers=2),
    "AltMin, solver": lambda m: lw.AltMin(m, weights=lw.local.Spectral()),
    "LocoProp": lw.LocoProp,
    "LocoProp, squared": lambda m: lw.LocoProp(m, loss="squared"),
    "LocoProp, in order": lambda m: lw.LocoProp(m, order="output_to_input"),
}


def compare(make: Any, ways: list[str]) -> None:
    """A long-lived optimizer beside one made anew, with its state, at every step."""
    net = Net()
    ours = make(net)
    for step, way in enumerate(ways):
        other = copy.deepcopy(net)
        fresh = make(other)
        fresh.load_state_dict(copy.deepcopy(ours.state_dict()))
        x, y = batch(step)
        assert torch.equal(ours.step(partial(net.loss, x, y, way)), fresh.step(partial(other.loss, x, y, way))), way
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q), f"{name} after {way}"
            mine, theirs = ours.state.get(p, {}), fresh.state.get(q, {})
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(theirs[k])) for k, v in mine.items())
    assert ours.skipped == 0


@pytest.mark.filterwarnings("ignore::layerwise.errors.SquaredInstead")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_long_lived_optimizer_has_the_bits_of_a_fresh_one(name: str) -> None:
    """Whatever a closure changes from one batch to the next, there and back again."""
    compare(OPTIMIZERS[name], [w for way in WAYS if way != "plain" for w in ("plain", way)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::layerwise.errors.SquaredInstead")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_each_way_to_the_next_it_has_the_bits_of_a_fresh_one(name: str) -> None:
    compare(OPTIMIZERS[name], [*WAYS, *reversed(WAYS)])


def test_a_long_lived_memory_has_the_bits_of_a_fresh_one() -> None:
    """Gauss-Newton codes need samples apart and one size of the batch."""
    left_out = ("softmax over samples", "two losses", "every other row", "repeated rows", "no bias", "time steps")
    compare(lambda m: lw.AltMin(m, weights="memory"), [way for way in WAYS if way not in left_out for _ in range(2)])


def test_a_call_like_an_earlier_one_is_not_decided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[Any] = []
    plain = layers._kind
    monkeypatch.setattr(layers, "_kind", lambda tape, use, ours: decided.append(use.index) or plain(tape, use, ours))
    net, kinds = Net(), Kinds()
    for step in range(3):
        x, y = batch(step)
        record(net, partial(net.loss, x, y, "plain"), kinds=kinds)
        assert len(decided) == 4
    x, y = batch(3)
    record(net, lambda: net.loss(x, y, "alpha"), kinds=kinds)
    assert len(decided) == 5
    record(net, lambda: net.loss(x, y, "plain"), lambda p: p is not net.last.bias, kinds=kinds)
    assert len(decided) == 6


def test_calls_whose_values_may_count_are_decided_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[Any] = []
    plain = layers._kind
    monkeypatch.setattr(layers, "_kind", lambda tape, use, ours: decided.append(use.index) or plain(tape, use, ours))
    model, kinds, words = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)), Kinds(), torch.arange(5)
    for _ in range(3):
        found = record(model, lambda: model(words).square().sum(), kinds=kinds).layers
        assert [layer.name for layer in found] == ["0.weight", "1.weight"]
    assert decided == [0, 1, 0, 0]


def test_rows_are_views_of_the_present_batch() -> None:
    """A view that is remembered as strides: of this batch's tensors, at this batch's place in their memory."""
    net, kinds = Net(), Kinds()
    large = torch.randn(3, 8, 6)
    for place in range(3):
        x = large[place]
        run = record(net, partial(net.loss, x, torch.zeros(8, dtype=torch.int64), "plain"), kinds=kinds)
        rows = run.layers[0].input()
        assert torch.equal(rows, x.view(8, 1, 6)) and rows.data_ptr() == x.data_ptr()
        g = run.cotangents[run.layers[0].use.index]
        assert torch.equal(run.layers[0].rows(g), g.view(8, 1, 5))


def test_memory_that_tensors_share_is_not_remembered() -> None:
    """Input rows of another tensor that happened to lie in the same memory are made again."""
    use = record(net := Net(), lambda: net.loss(*batch(0), "plain")).layers[0].use
    kind, x = Kind(use, 0, 1, True), torch.randn(4, 4)
    assert torch.equal(kind.view("input", x, lambda: x.t(), [x]), x.t())
    other = torch.randn(4, 4)
    assert torch.equal(kind.view("input", x, lambda: other), other)
    kind.view("rows", x, lambda: x.t())
    assert torch.equal(kind.view("rows", other, lambda: other), other.t())  # remembered
    assert torch.equal(kind.view("rows", other.t(), lambda: other), other)  # laid out otherwise: made


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_finite_tensors_may_have_sums_that_are_not(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    for finite in ([most, most], [-most, -most], [], [0.0]):
        assert is_finite(torch.tensor(finite, dtype=dtype))
    for value in (float("inf"), float("-inf"), float("nan")):
        assert not is_finite(torch.tensor([1.0, value, most], dtype=dtype))
    assert not is_finite(torch.tensor([float("inf"), float("-inf")], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_one_tensor_among_many_that_is_not_finite_is_found_and_none_changes(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 4
    good = [torch.tensor([most, most, -0.0, tiny], dtype=dtype), torch.zeros(0, dtype=dtype), torch.tensor(3),
            torch.randn(3, 2).to(dtype).t(), torch.tensor(-most, dtype=dtype).requires_grad_()]  # fmt: skip
    before = [t.detach().clone() for t in good]
    assert all_finite(good) and all_finite(good[:2]) and all_finite([])
    for value in (float("inf"), float("-inf"), float("nan")):
        bad = torch.tensor([1.0, value], dtype=dtype)
        assert not all_finite([*good, bad]) and not all_finite([bad, good[0]])
    for t, old in zip(good, before, strict=True):
        assert torch.equal(t, old) and torch.equal(torch.signbit(t.detach().real), torch.signbit(old.real))
