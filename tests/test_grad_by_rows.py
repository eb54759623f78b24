"""`grad="rows"`: the gradients of weights as sums of per-sample gradients, beside autograd's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import random_programs
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from random_nets import FAMILIES, programs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import Case, cases

import layerwise as lw
from layerwise import errors
from layerwise.gradient import row_sums

pytestmark = pytest.mark.usefixtures("float64")
QUANTITIES: dict[str, Callable[[], Sequence[lw.Quantity]]] = {
    "rows": lambda: [lw.Variance(), lw.PerSampleGrad()],
    "moment": lambda: [lw.SecondMoment(), lw.SquaredNorm()],
}
ZOO = [
    pytest.param(case, id=case.id, marks=() if i % 8 == 0 else (pytest.mark.slow,))
    for i, case in enumerate(cases(first_loss_only=True))
]


@pytest.fixture
def left_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights that backward passes left out."""
    found: list[str] = []
    choose = row_sums.summed_weights

    def chosen(*args: object) -> frozenset[str]:
        names = choose(*args)  # type: ignore[arg-type]
        found.extend(names)
        return names

    monkeypatch.setattr("layerwise.observation.stream.summed_weights", chosen)
    return found


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of two positions are left out, too."""
    monkeypatch.setattr(row_sums, "sums_are_cheaper", lambda t: t >= 2)


def _assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Equal to the bit."""
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def _gradients(params: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: p.grad.detach().clone() for name, p in params.items() if p.grad is not None}
    for p in params.values():
        p.grad = None
    return found


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("asked", QUANTITIES)
@pytest.mark.parametrize("case", ZOO)
def test_gradients_of_the_zoo(case: Case, asked: str) -> None:
    """`.grad` to 1e-11, twice into the same memory; the quantities as without."""
    instance = case.make(seed=0)
    params = oracle.parameters(instance.subject)
    instance.loss().backward()
    want = _gradients(params)
    found = []
    for grad in ("autograd", "rows"):
        quantities = QUANTITIES[asked]()
        try:
            with lw.observe(instance.subject, *quantities, grad=grad) as seen:
                instance.loss().backward()
        except errors.LayerwiseError as error:
            found.append(type(error))
            assert not _gradients(params)
            continue
        mine = _gradients(params)
        _assert_same(dict(seen.grad), mine)
        oracle.assert_close(mine, want, rel=1e-11)  # some are differences of larger terms
        found.append([dict(seen[q]) for q in quantities])
        if grad == "rows":
            for _ in range(2):
                with lw.observe(instance.subject, *QUANTITIES[asked](), grad=grad):
                    instance.loss().backward()
            oracle.assert_close(_gradients(params), {k: 2 * g for k, g in want.items()}, rel=1e-12)
    plain, rows = found
    if isinstance(plain, type):
        assert plain is rows
        return
    for one, other in zip(plain, rows, strict=True):
        oracle.assert_close(other, one, rel=1e-12)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("family", FAMILIES)
def test_random_programs(family: str) -> None:
    """Exact, or refused where it may be."""

    @settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
    @given(programs(family))
    def check(program: object) -> None:
        random_programs.outcome(program, grad="rows")

    check()


# What the pass leaves out ---------------------------------------------------------------------------


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.x, self.y = torch.randn(4, 12, 5), torch.randint(3, (4,))

    def loss(self) -> Tensor:
        h = self.second(self.first(self.x).tanh()).relu()
        return F.cross_entropy(self.head(h.mean(1)), self.y)


def _observed(net: _Net, **backward: object) -> dict[str, Tensor]:
    with lw.observe(net, lw.SecondMoment(), grad="rows"):
        net.loss().backward(**backward)  # type: ignore[arg-type]
    return _gradients(dict(net.named_parameters()))


def test_weights_with_positions_alone(left_out: list[str]) -> None:
    """A first layer, whose input needs no gradient, is among them; a head of one position is not."""
    net = _Net()
    net.loss().backward()
    want = _gradients(dict(net.named_parameters()))
    found = _observed(net)
    assert sorted(left_out) == ["first.weight", "second.weight"]
    oracle.assert_close(found, want, rel=1e-12)
    assert all(torch.equal(found[name], want[name]) for name in found if name not in left_out)


def test_the_biases_of_convolutions(left_out: list[str]) -> None:
    """Torch computes a convolution's product for the bias alone, too; a bias that is read elsewhere is autograd's."""

    class Net(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.first, self.second, self.shared = nn.Conv2d(2, 3, 3), nn.ConvTranspose2d(3, 3, 3), shared

        def forward(self, x: Tensor) -> Tensor:
            z = self.second(self.first(x).tanh())
            return (z + self.first.bias[:, None, None] if self.shared else z).flatten(1)

    torch.manual_seed(0)
    x, y = torch.randn(4, 2, 7, 7), torch.randint(7, (4,))
    for shared, biases in ((False, ["first.bias", "second.bias"]), (True, ["second.bias"])):
        net = Net(shared)
        F.cross_entropy(net(x), y).backward()
        want = _gradients(dict(net.named_parameters()))
        left_out.clear()
        computed = _kernel_gradients(lambda net=net: _observe_moment(net, x, y))
        assert sorted(left_out) == sorted(["first.weight", "second.weight", *biases])
        assert computed == (1 if shared else 0)
        oracle.assert_close(_gradients(dict(net.named_parameters())), want, rel=1e-12)


def _observe_moment(net: nn.Module, x: Tensor, y: Tensor) -> None:
    with lw.observe(net, lw.SecondMoment(), grad="rows"):
        F.cross_entropy(net(x), y).backward()


def _kernel_gradients(run: Callable[[], None]) -> int:
    """How many convolutions of one group computed the gradient of a kernel or a bias."""
    found = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                found.append(args[9] == 1 and any(args[10][1:]))
            return func(*args, **(kwargs or {}))

    with Count():
        run()
    return sum(found)


class _Wide(nn.Module):
    """Wide for its positions: norms come from Gram matrices, sketches from Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(40, 48), nn.Linear(48, 3)
        self.x, self.y = torch.randn(4, 8, 40), torch.randint(3, (4,))

    def loss(self) -> Tensor:
        return F.cross_entropy(self.head(self.first(self.x).tanh().mean(1)), self.y)


REDUCED: dict[str, Callable[[], Sequence[lw.Quantity]]] = {
    "norms": lambda: [lw.SquaredNorm()],
    "noise": lambda: [lw.NoiseScale(snr=False)],
    "clipped": lambda: [lw.ClippedGrad(0.1)],
    "sketches": lambda: [lw.Sketch(64, torch.Generator().manual_seed(0))],
    "sketches after norms": lambda: [lw.SquaredNorm(), lw.Sketch(8, torch.Generator().manual_seed(0))],
    "norms before moments": lambda: [lw.SquaredNorm(), lw.Variance()],
}


FORMED = {_Net: {"first.weight", "second.weight"}, _Wide: set[str]()}


@pytest.mark.parametrize("asked", REDUCED)
@pytest.mark.parametrize("make", FORMED)
def test_only_weights_are_left_out_whose_rows_are_formed(
    make: type[_Net | _Wide], asked: str, left_out: list[str]
) -> None:
    """Gram matrices and Fourier transforms leave autograd its product; many positions of narrow layers do not."""
    found = []
    for grad in ("autograd", "rows"):
        net, quantities = make(), REDUCED[asked]()
        with lw.observe(net, *quantities, grad=grad) as seen:
            net.loss().backward()
        found.append([_gradients(dict(net.named_parameters())), *(_numbers(seen[q]) for q in quantities)])
    assert set(left_out) == (FORMED[make] or ({"first.weight"} if "moments" in asked else set()))
    for mine, theirs in zip(*found, strict=True):
        oracle.assert_close(mine, theirs, rel=1e-11)


def _numbers(value: Any) -> dict[str, Tensor]:
    return dict(value.noise if hasattr(value, "noise") else value)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("option", ["create_graph", "inputs"])
def test_backward_passes_of_another_kind(option: str, left_out: list[str]) -> None:
    """A graph of the gradients, and a choice of leaves, are autograd's to the bit."""
    net = _Net()
    net.loss().backward()
    want = _gradients(dict(net.named_parameters()))
    leaves = [net.second.weight, net.first.bias]
    found = _observed(net, **{option: leaves if option == "inputs" else True})
    assert not left_out
    assert len(found) == (2 if option == "inputs" else 6)
    _assert_same(found, {name: want[name] for name in found})


def test_inside_another_mode(left_out: list[str]) -> None:
    """An observation around this one sees the user's own backward pass."""
    net = _Net()
    with lw.observe(net, lw.PerSampleGrad()) as outer, lw.observe(net, lw.SecondMoment(), grad="rows"):
        net.loss().backward()
    assert not left_out
    oracle.assert_close(
        {k: g.sum(0) for k, g in outer.per_sample_grad.items()}, _gradients(dict(net.named_parameters()))
    )


def test_hooks_on_parameters_run(left_out: list[str]) -> None:
    """Masks, hooks after the accumulation, and hooks on autograd's own nodes."""
    net = _Net()
    net.loss().backward()
    want = _gradients(dict(net.named_parameters()))
    weight, ran = net.second.weight, []
    node = weight.view_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    handles = [
        weight.register_hook(lambda g: 3 * g),
        weight.register_post_accumulate_grad_hook(lambda p: ran.append("after")),
        node.register_hook(lambda *_: ran.append("node")),
    ]
    with lw.observe(net, lw.SecondMoment(), grad="rows") as seen:
        net.loss().backward()
    assert "second.weight" in left_out
    assert ran == ["node", "after"] or ran == ["after", "node"]
    oracle.assert_close(dict(seen.grad), want, rel=1e-12)
    want["second.weight"] *= 3
    oracle.assert_close(_gradients(dict(net.named_parameters())), want, rel=1e-12)
    for handle in handles:
        handle.remove()


def test_other_leaves_and_retained_activations() -> None:
    """What else the pass gives a gradient: an input, an activation with `retain_grad`, another model's parameter."""
    net, other = _Net(), nn.Linear(6, 6)
    kept = []

    def loss() -> Tensor:
        h = net.first(x).tanh()
        h.retain_grad()
        kept.append(h)
        return F.cross_entropy(net.head(other(net.second(h)).relu().mean(1)), net.y)

    x = net.x.clone().requires_grad_()
    leaves = {"x": x, **{f"other.{k}": p for k, p in other.named_parameters()}}
    loss().backward()
    want = _gradients(leaves)
    net.zero_grad()
    with lw.observe(net, lw.PerSampleGrad(), grad="rows"):
        loss().backward()
    _assert_same(_gradients(leaves), want)
    assert torch.equal(kept[0].grad, kept[1].grad)  # type: ignore[arg-type]


def test_a_refused_pass_leaves_grad_as_it_was() -> None:
    """NaN in a sum of rows rolls everything back."""
    net = _Net()
    net.loss().backward()
    want = {name: p.grad.clone() for name, p in net.named_parameters()}  # type: ignore[union-attr]
    net.x[0, 0, 0] = float("inf")
    with pytest.raises(errors.NonFinite), lw.observe(net, lw.SecondMoment(), grad="rows"):
        (net.second(net.first(net.x).tanh()).relu().mean(1) @ net.head.weight.T).sum().backward()
    assert all(torch.equal(p.grad, want[name]) for name, p in net.named_parameters())  # type: ignore[arg-type]


def test_the_graph_is_whole_afterwards() -> None:
    """A graph that was retained gives autograd every gradient, outside of the context too."""
    net = _Net()
    with lw.observe(net, lw.SecondMoment(), grad="rows"):
        loss = net.loss()
        loss.backward(retain_graph=True)
    first = _gradients(dict(net.named_parameters()))
    loss.backward()
    oracle.assert_close(_gradients(dict(net.named_parameters())), first, rel=1e-12)


def test_an_unknown_kind() -> None:
    """It is named."""
    with pytest.raises(errors.BadInput, match="'sum'"):
        lw.observe(_Net(), grad="sum")
