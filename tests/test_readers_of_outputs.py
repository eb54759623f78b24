"""What reads a layer's output: calls that the loss's gradient comes back from, not what a program makes beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
    """A perceptron that looks at its hidden layer before the transfer function reads it, and at its logits.

    head: a second layer on the hidden one, which no loss reads.
    """

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
        self.head = nn.Linear(7, 2).double()
        self.look = look
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.kept.append(self.look(h))
        logits = self.b(h.tanh())
        self.kept.append(self.look(logits))
        return logits


def without_grad(h: Tensor) -> None:
    with torch.no_grad():
        h.norm()


LOOKS = {
    "shape": lambda h: h.shape, "stride": lambda h: h.stride(), "detach": lambda h: h.detach().mean(),
    "data": lambda h: h.data, "no_grad": without_grad, "isfinite": lambda h: torch.isfinite(h).all(),
    "compared": lambda h: h > 0,
    # with a graph of their own, which the loss does not reach; the first are dropped, the last kept until the step
    "mean": lambda h: h.mean().item(), "norm": lambda h: h.norm().item(), "part": lambda h: h[:, 0].sum().item(),
    "accuracy": lambda h: (h.argmax(1) == 0).double().mean().item(), "parts": lambda h: h.chunk(2)[0].sum().item(),
    "entropy": lambda h: (-h.softmax(1) * h.log_softmax(1)).sum(1).mean().item(), "tanh": lambda h: h.tanh(),
    "view": lambda h: h.view(-1), "loss": lambda h: F.cross_entropy(h, Y % h.shape[1]),
}  # fmt: skip
OPTIMIZERS = {
    "LocoProp": lw.LocoProp, "AltMin": lw.AltMin,
    "sweep": partial(lw.AltMin, codes="sweep"), "Gauss-Newton": partial(lw.AltMin, codes="gauss-newton"),
}  # fmt: skip


def stepped(make: Any, look: Callable[[Tensor], Any], loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """The parameters after two steps."""
    model = Looking(look)
    opt = make(model)
    for _ in range(2):
        opt.step(lambda: loss(model))
    return [p.detach() for p in model.parameters()]


def plain(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_a_look_at_an_output_leaves_the_step_as_it_is(make: Any, look: Callable[[Tensor], Any]) -> None:
    torch.testing.assert_close(stepped(make, look, plain), stepped(make, lambda h: None, plain), rtol=0, atol=0)


HOOKED = {"layer": ["a"], "last layer": ["b"], "model": [""], "all": ["", "a", "b"], "transfer": ["tanh"]}


class Blocks(nn.Module):
    """The perceptron of `Looking`, with its transfer function a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.tanh, self.b = nn.Linear(5, 7).double(), nn.Tanh(), nn.Linear(7, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(self.tanh(self.a(x)))
        return logits


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the batch requires no gradient
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("hooked", HOOKED.values(), ids=HOOKED.keys())
def test_backward_hooks_of_modules_leave_the_step_as_it_is(make: Any, hooked: list[str]) -> None:
    """A module with such a hook hands its output on through a function, which is no reader of its own."""
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: Any, outputs: Any) -> None:
        seen.append(outputs[0].norm())

    plain, watched = Blocks(), Blocks()
    for name in hooked:
        watched.get_submodule(name).register_full_backward_hook(watch)
    for model in (plain, watched):
        opt = make(model)
        for _ in range(2):
            opt.step(lambda model=model: F.cross_entropy(model(X), Y))
    assert seen
    torch.testing.assert_close(watched.state_dict(), plain.state_dict(), rtol=0, atol=0)


def with_a_head(model: Any) -> Tensor:
    """A feature and a second head that are returned, and nothing reads."""
    h = model.a(X)
    out = {"logits": model.b(h.tanh()), "feature": h, "other": model.head(h), "third": model.head(h.tanh())}
    return F.cross_entropy(out["logits"], Y)


def with_a_second_loss(model: Any) -> Tensor:
    """Losses of the hidden layer and of the logits, which are logged and not added."""
    h = model.a(X)
    logits = model.b(h.tanh())
    logged = (
        F.mse_loss(h, torch.zeros_like(h)),
        F.cross_entropy(model.head(h), Y % 2),
        F.mse_loss(logits, logits.detach()),
    )
    loss = F.cross_entropy(logits, Y)
    assert all(other.requires_grad for other in logged)
    return loss


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("beside", [with_a_head, with_a_second_loss])
def test_what_is_made_beside_the_loss_leaves_the_step_as_it_is(make: Any, beside: Callable[[Any], Tensor]) -> None:
    nothing = stepped(make, lambda h: None, plain)
    torch.testing.assert_close(stepped(make, lambda h: None, beside), nothing, rtol=0, atol=0)


class Identity(torch.autograd.Function):
    """A function whose calls no record sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


READ = {
    "twice": lambda h: h.tanh() + h, "by a function": lambda h: h.tanh() + Identity.apply(h),
    "by a function alone": lambda h: (h.tanh(), Identity.apply(h))[1],
    "written": lambda h: (h[:, :2].mul_(2.0), h.tanh())[1], "overwritten": lambda h: (h.view(7, 8).tanh_(), h)[1],
}  # fmt: skip


@pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
def test_a_second_reader_that_the_loss_reaches_counts(read: Callable[[Tensor], Tensor]) -> None:
    """Also where its call is not seen, or writes through a view."""
    model = Looking(lambda h: None)
    opt = lw.LocoProp(model)
    opt.step(lambda: F.cross_entropy(model.b(read(model.a(X))), Y))
    assert "squared" in opt.describe()["a.weight"]


def test_a_layer_that_is_read_by_two_layers_has_no_transfer_function() -> None:
    model = Looking(lambda h: None)
    opt = lw.LocoProp(model)

    def closure() -> Tensor:
        h = model.a(X)
        return F.cross_entropy(model.b(h.tanh()), Y) + F.cross_entropy(model.head(h), Y % 2)

    opt.step(closure)
    assert "squared" in opt.describe()["a.weight"]


@pytest.mark.parametrize("logged", [lambda h: h.mean().item(), lambda h: h[:, 0].sum().item(), lambda h: h.tanh()])
def test_a_look_before_the_transfer_function_overwrites_the_output(logged: Callable[[Tensor], Any]) -> None:
    def closure(model: Any, look: Callable[[Tensor], Any]) -> Tensor:
        h = model.a(X)
        look(h)
        return F.cross_entropy(model.b(h.relu_()), Y)

    ends = [stepped(lw.LocoProp, lambda h: None, partial(closure, look=look)) for look in (logged, lambda h: None)]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


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
