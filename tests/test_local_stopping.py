"""The number of local steps by their decrease for their cost: beside brute force over all numbers of steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput
from layerwise.local import LocalProblem, LocalSteps, local_loss, marginal_value

MOST = 30
LABELS = torch.arange(10) % 3
SGD = partial(torch.optim.SGD, momentum=0.5)


def cost_of(problem: LocalProblem, steps: int) -> float:
    """The pass that made the problem and its local steps, in multiply-adds, by loops over what is multiplied."""
    k, o, i = problem.weight.shape
    rows = problem.a.shape[0]
    product = rows * o if problem.indexed else rows * k * o * i
    total = product if problem.indexed else 2 * product  # no cotangent goes back from indices
    for t in range(steps):
        total += product if t == 0 and problem.g is not None and not problem.indexed else 2 * product
        total += 12 * k * o * i
    return float(total)


def best_count(problem: LocalProblem, make: Callable[[int], LocalSteps], lr: float) -> int:
    """The first number of steps after which the decrease for its cost falls, and one more: each number tried anew."""
    start = local_loss(problem)
    before = -float("inf")
    for count in range(1, MOST):
        moved, shift = make(count)(problem, lr)
        bias = None if problem.bias is None or shift is None else problem.bias + shift
        value = float(start - local_loss(problem, problem.weight + moved, bias)) / cost_of(problem, count)
        if value < before:
            return count + 1
        before = value
    return MOST


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    x, images, words = torch.randn(10, 6), torch.randn(10, 2, 4, 4), torch.randint(5, (10,))
    conv = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    table = nn.Sequential(nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 3))
    norm = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    dense = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    one = nn.Linear(6, 6)
    twice = nn.Sequential(one, nn.Tanh(), one, nn.Tanh(), nn.Linear(6, 3))
    found = {"dense": (dense, x), "conv": (conv, images), "embedding": (table, words), "batch norm": (norm, x),
             "called twice": (twice, x)}  # fmt: skip
    return {name: (net.double(), x if x.dtype == torch.int64 else x.double()) for name, (net, x) in found.items()}


def problems_of(net: nn.Module, x: Tensor, **settings: Any) -> list[tuple[str, LocalProblem]]:
    """The local problems of a step, with the weights they start from."""
    found: list[LocalProblem] = []

    def keep(problem: LocalProblem) -> Any:
        weight, bias = problem.weight.clone(), None if problem.bias is None else problem.bias.clone()
        found.append(LocalProblem(problem.a, weight, bias, problem.target, problem.transfer, problem.prox, problem.g,
                                  problem.gamma, problem.rest, problem.pulls))  # fmt: skip
        return torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)

    opt = lw.LocoProp(net, solver=keep, **settings)
    opt.step(lambda: F.cross_entropy(net(x), LABELS))
    names = [name for name, form in opt.describe().items() if "loss," in form]
    return list(zip(names, found, strict=True))


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("name", nets())
def test_a_layer_takes_the_steps_that_brute_force_finds(name: str, form: Any) -> None:
    """Under the squared loss on all rows the decrease is exact: the step is bitwise that of the best fixed counts."""
    settings: dict[str, Any] = {"loss": "squared", "target": local.GradientStep(10.0, per="sample")}
    settings["regularizer"] = local.WeightDecay(0.01)
    form = form if name not in ("embedding", "batch norm") else "plain"

    def make(steps: int, stop: Any = None) -> LocalSteps:
        return LocalSteps(steps, SGD, "all", schedule="constant", form=form, stop=stop)

    net, x = nets()[name]
    lr, start = 0.01, [p.detach().clone() for p in net.parameters()]
    counts = {key: best_count(problem, make, lr) for key, problem in problems_of(net, x, **settings)}
    results = []
    fixed = {key.rpartition(".")[0]: {"solver": make(count), "lr": lr} for key, count in counts.items()}
    for solvers in ({}, fixed):
        net, x = nets()[name]
        opt = lw.LocoProp(
            net, solver=make(MOST, None if solvers else marginal_value), lr=lr, layers=solvers, **settings
        )
        opt.step(lambda net=net, x=x: F.cross_entropy(net(x), LABELS))  # type: ignore[misc]
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(2 < count < MOST for count in counts.values()), counts
    for ours, theirs, before in zip(*results, start, strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours, before)


def test_the_rule_is_the_marginal_value_theorems() -> None:
    """It first holds one step past the greatest decrease for its cost, for any falling decreases."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        outer, cost = (float(x) for x in 0.1 + 10 * torch.rand(2, generator=generator))
        d = torch.rand(20, generator=generator).sort(descending=True).values.tolist()
        values = [sum(d[: t + 1]) / (outer + cost * (t + 1)) for t in range(20)]
        peak = max(range(20), key=values.__getitem__)
        first = next((t for t in range(20) if marginal_value(d[: t + 1], [cost] * (t + 1), outer)), 20)
        assert first == peak + 1


def test_the_decreases_are_those_of_the_objective() -> None:
    """To rounding for the squared loss, to third order in a step for another; costs are counted, and in order."""
    torch.manual_seed(0)
    a, w, g = torch.randn(20, 1, 5).double(), torch.randn(1, 4, 5).double(), torch.randn(20, 1, 4).double()
    for f, tolerance in ((local.IDENTITY, 1e-12), (local.TANH, 1e-3)):
        z = torch.einsum("rki,koi->rko", a, w)
        problem = LocalProblem(a, w.clone(), None, f.f(z) - 0.1 * g, f, g=g, gamma=0.1)
        heard: list[Any] = []

        def listen(d: Any, c: Any, outer: float, heard: list[Any] = heard) -> bool:
            heard[:] = [list(d), list(c), outer]
            return False

        values = [float(local_loss(problem))]
        for count in range(1, 5):
            moved, _ = LocalSteps(count, torch.optim.SGD, "all", "constant", stop=listen)(problem, 0.02)
            values.append(float(local_loss(problem, w + moved)))
        decreases, costs, outer = heard
        exact = [old - new for old, new in pairwise(values[:4])]
        assert decreases == pytest.approx(exact, rel=0, abs=tolerance * max(exact)) and exact[-1] > 0
        assert costs == [400 + 240, 800 + 240, 800 + 240] and outer == 800


def test_a_step_that_raises_the_objective_is_the_last_but_one() -> None:
    torch.manual_seed(0)
    a, w = torch.randn(20, 1, 5).double(), torch.randn(1, 4, 5).double()
    problem = LocalProblem(a, w, None, torch.randn(20, 1, 4).double())
    moved, _ = LocalSteps(10, torch.optim.SGD, "all", "constant", stop=marginal_value)(problem, 1.0)
    two, _ = LocalSteps(2, torch.optim.SGD, "all", "constant")(problem, 1.0)
    assert torch.equal(moved, two) and local_loss(problem, w + two) > local_loss(problem)


@pytest.mark.parametrize("rows", ["auto", "all", 4])
def test_it_goes_with_the_defaults_and_resumes_bitwise(rows: Any) -> None:
    """TFRMSProp with its state, rows of each step's own, threads, a saved state; the rule is asked by every layer."""

    def run(net: nn.Module, x: Tensor, workers: Any = None, cut: int | None = None) -> list[Tensor]:
        make = partial(lw.LocoProp, solver=LocalSteps(8, rows=rows, stop=marginal_value), workers=workers)
        opt = make(net)
        for t in range(6):
            if t == cut:
                saved = opt.state_dict()
                opt = make(net)
                opt.load_state_dict(saved)
            opt.step(lambda: F.cross_entropy(net(x), LABELS))
        return [p.detach().clone() for p in net.parameters()]

    for name in nets():
        whole = run(*nets()[name])
        for other in (run(*nets()[name], cut=3), run(*nets()[name], workers=2)):
            assert all(torch.equal(p, q) for p, q in zip(whole, other, strict=True)), name


def test_layers_of_equal_shape_are_judged_each_by_itself() -> None:
    """Tasks that are solved as one, as on an accelerator, are those without a rule."""
    from layerwise.local.solvers.task import Task, in_batches

    torch.manual_seed(0)
    tasks = []
    for _ in range(2):
        problem = LocalProblem(torch.randn(8, 1, 3), torch.randn(1, 3, 3), None, torch.randn(8, 1, 3))
        optimizer = local.TFRMSProp([{"params": [problem.weight]}])
        tasks.append(lambda solver, p=problem, o=optimizer: Task(p, solver, "w", [p.weight], [1.0], o, lambda w: w))
    assert len(in_batches([make(LocalSteps(5)) for make in tasks])) == 1
    assert len(in_batches([make(LocalSteps(5, stop=marginal_value)) for make in tasks])) == 2


def test_describe_says_that_fewer_may_be_taken_and_nonsense_is_refused() -> None:
    net, x = nets()["dense"]
    opt = lw.LocoProp(net, solver=LocalSteps(7, stop=marginal_value))
    opt.step(lambda: F.cross_entropy(net(x), LABELS))
    assert opt.describe()["0.weight"].endswith("at most 7 steps of TFRMSProp")
    with pytest.raises(BadInput, match="stops by a function"):
        LocalSteps(stop="soon")  # type: ignore[arg-type]
