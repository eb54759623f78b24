"""`observe(compile=)`: the same values from graphs of the contractions, whatever a quantity reads on the way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from zoo import Case, case, cases

import layerwise as lw
from layerwise.errors import BadInput, LayerwiseError
from layerwise.quantities.base import Quantity

SOME = ("mlp_tanh", "conv2d", "tied_embedding", "functional_conv", "residual")
QUANTITIES: tuple[Callable[[], Quantity], ...] = (
    lw.SquaredNorm, lw.Variance, lw.PairwiseDot, lw.DiagGGN, lambda: lw.KFLR(rows="all"), lambda: lw.SqrtGGN(),
)  # fmt: skip
COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))


class Backend:
    """Runs graphs as they were traced, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
        self.graphs.append(graph)
        return graph


def numbers(result: Any) -> dict[str, Tensor]:
    """The tensors of a result by name, Kronecker factors apart."""
    if hasattr(result, "blocks"):
        found = ((f"{name} {key}", t) for name, block in result.blocks.items() for key, t in vars(block).items())
        return {name: t for name, t in found if isinstance(t, Tensor)}
    return dict(result)


def assert_equal(one: Any, other: Any, room: float = 1e-12) -> None:
    if isinstance(other, type):  # of an error
        assert one is other
        return
    found, expected = numbers(one), numbers(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=room, atol=room * float(value.abs().max())), name


def both(one: Case, compile: Any) -> list[tuple[Any, Any]]:
    """The results of all quantities that the case has, plain and compiled, the latter once more from a kept graph."""
    found = []
    for make in QUANTITIES:
        results = []
        instance = one.make(seed=0)
        for asked in (False, compile, compile):
            quantity = make()
            for p in instance.params.values():
                p.grad = None
            try:
                with lw.observe(instance.subject, quantity, compile=asked) as seen:
                    instance.loss().backward()
            except LayerwiseError as error:
                results.append(type(error))
                continue
            results.append(seen[quantity])
        plain, *others = results
        found += [(other, plain) for other in others]
    return found


@pytest.mark.parametrize(
    "one", [pytest.param(c, marks=() if c.problem.name in SOME else pytest.mark.slow, id=c.id)
            for c in cases(first_loss_only=True)]
)  # fmt: skip
def test_the_zoo_has_the_same_values(one: Case) -> None:
    backend = Backend()
    for compiled, plain in both(one, backend):
        assert_equal(compiled, plain)
    assert backend.graphs or one.problem.name not in SOME


INDUCTORS_OWN = "ignore:.*torch.jit:DeprecationWarning"  # on its import


@pytest.mark.slow
@pytest.mark.filterwarnings(INDUCTORS_OWN)
@pytest.mark.skipif(not COMPILER, reason="inductor compiles for the CPU with a C++ compiler, and none is here")
@pytest.mark.parametrize("name", ["mlp_tanh", "tied_embedding"])
def test_inductor_gives_the_same_values(name: str) -> None:
    for compiled, plain in both(case(name), True):
        assert_equal(compiled, plain)


# What a quantity reads on the way ---------------------------------------------------------------------


class Own(Quantity):
    """A quantity of the squares, times what `factor` says."""

    needs_samples = True
    factors: ClassVar[dict[str, float]] = {}

    def factor(self, squares: Tensor) -> Any:
        return 1.0

    def compute(self, gradient: Any) -> tuple[Tensor, ...]:
        squares = gradient.second_moment()
        return (squares * self.factor(squares),)


class ReadsAList(Own):
    def factor(self, squares: Tensor) -> Any:
        return squares.flatten().tolist()[0]


class ReadsAnItem(Own):
    def factor(self, squares: Tensor) -> Any:
        return squares.sum().item()


class Branches(Own):
    def factor(self, squares: Tensor) -> Any:
        return 2.0 if bool(squares.sum() > 0) else 3.0


class ReadsAnArray(Own):
    def factor(self, squares: Tensor) -> Any:
        return float(squares.numpy().max())


class ShapeOfNumbers(Own):
    def factor(self, squares: Tensor) -> Any:
        return len(squares.round(decimals=1).unique())


class HoldsATensor(Own):
    def __init__(self) -> None:
        self.held = torch.full((), 2.0, dtype=torch.float64)

    def factor(self, squares: Tensor) -> Any:
        return self.held


class HoldsAFunction(Own):
    def __init__(self, of: Callable[[Tensor], Tensor] = lambda x: x + 1) -> None:
        self.of = of

    def factor(self, squares: Tensor) -> Any:
        return self.of(squares)


class HoldsANumber(Own):
    def __init__(self, number: float = 2.0) -> None:
        self.number = number

    def factor(self, squares: Tensor) -> Any:
        return self.number


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def seen_of(model: nn.Module, x: Tensor, quantity: Quantity, compile: Any = False) -> Any:
    model.zero_grad()
    torch.manual_seed(0)  # of draws
    with lw.observe(model, quantity, compile=compile) as seen:
        F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    return seen[quantity]


@pytest.mark.parametrize(
    "make", [ReadsAList, ReadsAnItem, Branches, ReadsAnArray, ShapeOfNumbers, HoldsATensor, HoldsAFunction,
             HoldsANumber, lambda: lw.EKFAC(), lambda: lw.ClippedGrad(0.1)],
)  # fmt: skip
def test_no_number_of_a_batch_stays_in_a_graph(make: Callable[[], Quantity]) -> None:
    model, backend = net(), Backend()
    for seed in range(3):
        x = (seed + 1) * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert_equal(seen_of(model, x, make(), backend), seen_of(model, x, make()))


def test_attributes_and_functions_of_a_quantity_are_told_apart() -> None:
    model, backend, x = net(), Backend(), torch.ones(6, 4, dtype=torch.float64)
    plain = seen_of(model, x, lw.SecondMoment())["0.weight"]
    for number in (2.0, 3.0):
        found = seen_of(model, x, HoldsANumber(number), backend)["0.weight"]
        assert torch.allclose(found, number * plain)
        found = seen_of(model, x, HoldsAFunction(lambda squares, n=number: squares + n), backend)["0.weight"]  # type: ignore[misc]
        assert torch.allclose(found, (plain + number) * plain)


# What is compiled, and when ---------------------------------------------------------------------------


def test_a_graph_is_made_once_for_a_layout_and_holds_all_quantities() -> None:
    model, backend, x = net(), Backend(), torch.ones(6, 4, dtype=torch.float64)
    for size, made in ((6, 4), (6, 4), (5, 8), (6, 8)):
        quantities = lw.SquaredNorm(), lw.Variance(), lw.SecondMoment()
        model.zero_grad()
        with lw.observe(model, *quantities, compile=backend) as seen:
            F.cross_entropy(model(x[:size]), torch.arange(size) % 3).backward()
        assert len(backend.graphs) == made  # one for each parameter
        assert torch.equal(seen.second_moment["0.weight"], seen.second_moment["0.weight"])
    products = [n for n in backend.graphs[1].graph.nodes if n.target is torch.ops.aten.mm.default]
    assert len(products) == 1  # the second moment, once for two quantities


def test_results_are_in_memory_of_their_own() -> None:
    model, backend, x = net(), Backend(), torch.ones(1, 4, dtype=torch.float64)
    first = None
    for _ in range(2):
        model.zero_grad()
        with lw.observe(model, lw.PerSampleGrad(), lw.SecondMoment(), lw.Variance(), compile=backend) as seen:
            F.cross_entropy(model(x), torch.zeros(1, dtype=torch.long)).backward()
        first = first or {name: g.clone() for name, g in seen.per_sample_grad.items()}
        before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        for result in (seen.per_sample_grad, seen.second_moment):
            for value in result.values():
                value.zero_()
        assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert first is not None and all(first[name].any() for name in first)


def test_a_backend_that_fails_is_an_error_and_changes_nothing() -> None:
    def fails(graph: GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no compiler\nfound")

    model = net()
    with pytest.raises(BadInput, match=r"nothing for '2\.\w+': its backend raised RuntimeError: no compiler\. "):
        seen_of(model, torch.ones(6, 4, dtype=torch.float64), lw.SquaredNorm(), fails)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings(INDUCTORS_OWN)
def test_without_a_compiler_inductor_is_refused() -> None:
    import torch._inductor.config as inductor

    none = inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with none, pytest.raises(BadInput, match="wants a C\\+\\+ compiler"):
        seen_of(net(), torch.ones(7, 4, dtype=torch.float64), lw.SquaredNorm(), True)


@pytest.mark.parametrize("given", ["inductor", 1])
def test_other_arguments_are_refused(given: Any) -> None:
    with pytest.raises(BadInput, match="compile must be"):
        lw.observe(net(), lw.SquaredNorm(), compile=given)
