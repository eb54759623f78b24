"""What reads a layer's output: calls that a gradient comes back from, and not what a program looks at on the way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from local_cases import mlp
from torch import Tensor, nn

import layerwise as lw

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


class Looking(nn.Module):
    """A perceptron that looks at its hidden layer before the transfer function reads it."""

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.look(h)
        return self.b(h.tanh())


def without_grad(h: Tensor) -> None:
    with torch.no_grad():
        h.norm()


LOOKS = {
    "shape": lambda h: h.shape, "stride": lambda h: h.stride(), "detach": lambda h: h.detach().mean(),
    "data": lambda h: h.data, "no_grad": without_grad, "isfinite": lambda h: torch.isfinite(h).all(),
    "compared": lambda h: h > 0,
}  # fmt: skip


@pytest.mark.parametrize("make", [lw.LocoProp, lw.AltMin])
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_a_look_at_an_output_leaves_the_step_as_it_is(make: Any, look: Callable[[Tensor], Any]) -> None:
    ends = []
    for other in (lambda h: None, look):
        model = Looking(other)
        opt = make(model)
        opt.step(lambda model=model: F.cross_entropy(model(X), Y))
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_a_second_reader_that_a_gradient_comes_back_from_counts() -> None:
    class Skip(Looking):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.tanh() + h)

    model = Skip(lambda h: None)
    opt = lw.LocoProp(model)
    opt.step(lambda: F.cross_entropy(model(X), Y))
    assert "squared" in opt.describe()["a.weight"]


@pytest.mark.parametrize("make", [lw.LocoProp, lw.AltMin, lw.optim.KFAC])
def test_an_observation_inside_a_step_leaves_it_as_it_is(make: Any) -> None:
    ends = []
    for observed in (False, True):
        model = mlp(5, 7, 3)
        opt = make(model)

        def closure(model: nn.Module = model, observed: bool = observed) -> Tensor:
            with lw.observe(model, lw.Variance()) if observed else nullcontext():
                loss = F.cross_entropy(model(X), Y)
                model.zero_grad()
                loss.backward()
            return loss

        for _ in range(2):
            opt.step(closure)
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


@pytest.mark.parametrize("inner", [lw.LocoProp, lw.optim.DiagNewton])
def test_two_optimizers_of_a_model_record_the_same_pass(inner: Any) -> None:
    """Each makes its layers' step from the pass; the other's record, inside or around its own, changes nothing."""

    def run(together: bool) -> list[Tensor]:
        model = mlp(5, 7, 3)
        first, last = lw.LocoProp(model, model[0].parameters()), inner(model, model[2].parameters())
        for opt in (first, last) if not together else ():
            opt.zero_grad()
            with opt.watch():
                F.cross_entropy(model(X), Y).backward()
        if together:
            with first.watch(), last.watch():
                F.cross_entropy(model(X), Y).backward()
        first.step()
        last.step()
        return [p.detach() for p in model.parameters()]

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)
