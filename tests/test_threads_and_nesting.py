"""Observations of several models, contexts closed out of order, and backward passes in hooks and other threads."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from local_cases import mlp
from torch import Tensor, nn

import layerwise as lw
from benchmarks import faults
from layerwise.errors import NoBackward, UncoveredUse
from layerwise.local.layers.record import record

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def loss(model: nn.Module, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x), Y)


def gradient(model: nn.Module) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    return dict(zip(params, torch.autograd.grad(loss(model), list(params.values())), strict=True))


def moments(model: nn.Module) -> dict[str, Tensor]:
    """Sum over samples of squared gradients, by a loop."""
    params, total = dict(model.named_parameters()), {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for n in range(len(X)):
        one = F.cross_entropy(model(X[n : n + 1]), Y[n : n + 1]) / len(X)
        for name, g in zip(params, torch.autograd.grad(one, list(params.values())), strict=True):
            total[name] += g.square()
    return total


def same(found: Any, want: dict[str, Tensor]) -> None:
    assert set(found) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14)


# Nesting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_first", [True, False])
def test_two_observations_see_the_passes_of_their_models(inner_first: bool) -> None:
    a, b = mlp(4, 5, 3), mlp(4, 6, 3)
    with lw.observe(a, lw.SecondMoment()) as seen_a, lw.observe(b, lw.SecondMoment()) as seen_b:
        for model in (b, a) if inner_first else (a, b):
            loss(model).backward()
    for model, seen in ((a, seen_a), (b, seen_b)):
        same(seen.second_moment, moments(model))
        same(seen.grad, gradient(model))


def test_the_inner_observation_has_seen_no_pass_of_another_model() -> None:
    a, b = mlp(4, 5, 3), mlp(4, 5, 3)
    with lw.observe(a, lw.SecondMoment()) as seen, lw.observe(b, lw.SecondMoment()) as empty:
        loss(a).backward()
    same(seen.second_moment, moments(a))
    with pytest.raises(NoBackward, match="a parameter of the model"):
        _ = empty.second_moment


def test_one_model_observed_twice_and_a_chain_of_two() -> None:
    a, b = mlp(4, 5, 4), mlp(4, 3)
    both = nn.ModuleDict({"a": a, "b": b})
    want = moments(nn.Sequential(a, b))
    with lw.observe(both, lw.SecondMoment()) as one, lw.observe(a, lw.SecondMoment()) as two:
        F.cross_entropy(b(a(X)), Y).backward()
    same(two.second_moment, {n[2:]: v for n, v in want.items() if n.startswith("0.")})
    same(one.second_moment, {("a" if n[0] == "0" else "b") + n[1:]: v for n, v in want.items()})


@pytest.mark.parametrize("quantity", [lw.SecondMoment, lw.DiagHessian])
@pytest.mark.parametrize("outer_ends_first", [True, False])
def test_contexts_may_end_in_any_order(quantity: Callable[[], Any], outer_ends_first: bool) -> None:
    model = mlp(4, 5, 3)
    contexts = [lw.observe(model, quantity()) for _ in range(2)]
    seen = [context.__enter__() for context in contexts]
    first, last = (0, 1) if outer_ends_first else (1, 0)
    contexts[first].__exit__(None, None, None)
    loss(model).backward()
    contexts[last].__exit__(None, None, None)
    assert not faults.left_over(model)
    same(seen[last].grad, gradient(model))
    with pytest.raises(NoBackward):
        _ = seen[first].grad


def test_a_mode_of_the_user_stays_where_the_observation_ends_before_it() -> None:
    model, device = mlp(4, 5, 3), torch.device("meta")
    context = lw.observe(model, lw.SecondMoment())
    context.__enter__()
    loss(model).backward()
    with device:
        context.__exit__(None, None, None)
        assert torch.zeros(()).is_meta
    assert not torch.zeros(()).is_meta and not faults.left_over(model)


# Passes inside the observed one -----------------------------------------------------------------------------------


def test_a_pass_in_a_hook_is_refused_and_leaves_the_gradient_as_it_was() -> None:
    model = mlp(4, 5, 3)

    def again(g: Tensor) -> None:
        with torch.enable_grad():
            loss(model, OTHER).backward()

    with lw.observe(model, lw.SecondMoment()):
        out = model(X)
        out.register_hook(again)
        with pytest.raises(UncoveredUse, match=r"0\.weight, 2\.bias, 2\.weight inside the observed one, in a hook"):
            F.cross_entropy(out, Y).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hook on a parameter"])
def test_a_pass_in_another_thread_is_no_part_of_what_is_seen(hooked: bool) -> None:
    """In the middle of the observed pass, another thread runs one through the same parameters."""
    model = mlp(4, 5, 3)
    want, squares = gradient(model), moments(model)
    if hooked:
        model[0].weight.register_hook(lambda g: g * 1.0)  # type: ignore[union-attr]

    def elsewhere(g: Tensor) -> None:
        thread = threading.Thread(target=lambda: loss(model, OTHER).backward())
        thread.start()
        thread.join()

    with lw.observe(model, lw.SecondMoment(), lw.Variance()) as seen:
        out = model(X)
        out.register_hook(elsewhere)
        F.cross_entropy(out, Y).backward()
    same(seen.grad, want)
    same(seen.second_moment, squares)
    assert not torch.allclose(model[0].weight.grad, want["0.weight"])  # type: ignore[union-attr,arg-type]


def test_threads_that_train_one_model_see_their_own_passes() -> None:
    model, rounds = mlp(4, 5, 3), 40
    want = gradient(model)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            loss(model, OTHER).backward()

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(rounds):
            with lw.observe(model, lw.SecondMoment()) as seen:
                loss(model).backward()
            same(seen.grad, want)
    finally:
        stop.set()
        thread.join()


def test_another_thread_may_call_a_hook_that_torch_has_half_registered() -> None:
    """torch notes that a hook takes keyword arguments after it registers the hook, and forgets it before."""
    model = mlp(4, 5, 3)
    want, found = gradient(model), list[Tensor]()
    with lw.observe(model, lw.SecondMoment()) as seen:
        noted = dict(model._forward_hooks_with_kwargs)
        assert noted
        model._forward_hooks_with_kwargs.clear()
        thread = threading.Thread(target=lambda: found.append(model(X)))
        thread.start()
        thread.join()
        model._forward_hooks_with_kwargs.update(noted)
        loss(model).backward()
    assert len(found) == 1
    same(seen.grad, want)


def test_a_part_called_by_itself_is_seen_while_another_thread_is_inside_one() -> None:
    model, inside, leave = mlp(4, 5, 3), threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            leave.wait()

    def parts() -> Tensor:
        return (model[2](model[1](model[0](X))) ** 4).mean()  # type: ignore[operator]

    thread = threading.Thread(target=lambda: model[0](X))  # type: ignore[operator]
    with lw.observe(model, lw.DiagGGN()) as seen:
        parts().backward()
    want = seen.diag_ggn
    handle = model[0].register_forward_pre_hook(wait)  # type: ignore[operator]
    with lw.observe(model, lw.DiagGGN()) as seen:
        thread.start()
        inside.wait()
        parts().backward()
        leave.set()
        thread.join()
    handle.remove()
    same(seen.diag_ggn, want)


@pytest.mark.parametrize("quantity", [lw.SecondMoment, lw.DiagHessian])
def test_an_interrupt_on_the_way_out_leaves_no_mode_and_no_hook(quantity: Callable[[], Any]) -> None:
    model, place, interrupted = mlp(4, 3), 2, 0  # the first two lines are those of the `try`
    while True:
        place += 1
        context, fault = lw.observe(model, quantity()), faults.Lines(place)
        context.__enter__()
        try:
            with fault:
                context.__exit__(None, None, None)
            break
        except KeyboardInterrupt:
            interrupted += 1
            assert not faults.left_over(model), place
    assert interrupted > 10 and not faults.left_over(model)


class _Scaled(nn.Module):
    """A layer, and a parameter that is in none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale.exp()


def test_gradients_outside_of_layers_are_those_of_the_recorded_pass() -> None:
    model, x = _Scaled(), torch.randn(8, 4)
    (wanted,) = torch.autograd.grad(model(x).square().mean(), [model.scale])

    def closure() -> Tensor:
        loss = model(x).square().mean()
        other = threading.Thread(target=(3 * model.scale).backward)

        def meanwhile(g: Tensor) -> None:
            other.start()
            other.join()

        hook = model.layer.weight.register_hook(meanwhile)
        loss.backward()
        hook.remove()
        return loss

    run = record(model, closure)
    assert torch.equal(run.gradients["scale"], wanted)
    assert model.scale.grad is not None and torch.allclose(model.scale.grad, wanted + 3)


# Optimizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lw.LocoProp, lw.AltMin, lw.optim.KFAC, lw.optim.DiagNewton])
def test_threads_that_step_one_optimizer_take_turns(make: Any) -> None:
    """Each step is whole: as many steps one after another end at the same bits."""
    steps, errors = 8, []

    def run(opt: Any, model: nn.Module, n: int) -> None:
        try:
            for _ in range(n):
                opt.step(lambda: loss(model))
        except Exception as error:
            errors.append(error)

    alone, shared = mlp(4, 5, 3), mlp(4, 5, 3)
    run(make(alone), alone, 2 * steps)
    opt = make(shared)
    threads = [threading.Thread(target=run, args=(opt, shared, steps)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    torch.testing.assert_close(list(shared.parameters()), list(alone.parameters()), rtol=0, atol=0)


def test_threads_that_step_one_preconditioner_take_turns() -> None:
    entered, go, errors = threading.Event(), threading.Event(), []

    class Slow(lw.optim.Preconditioner):
        def join(self, *args: Any, **kwargs: Any) -> Any:
            entered.set()
            go.wait(10)
            return super().join(*args, **kwargs)

    model = mlp(4, 5, 3)
    pre = Slow(model)

    def step() -> None:
        try:
            pre.step()
        except Exception as error:
            errors.append(error)

    with pre.watch():
        loss(model).backward()
    first, second = threading.Thread(target=step), threading.Thread(target=step)
    first.start()
    assert entered.wait(10)
    second.start()
    second.join(0.05)
    waits = second.is_alive()
    go.set()
    first.join()
    second.join()
    assert waits and pre.steps == 1
    assert [type(error) for error in errors] == [lw.errors.BadInput]  # the second had no batch
    assert isinstance(pickle.loads(pickle.dumps(lw.optim.Preconditioner(model))), lw.optim.Preconditioner)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("make", [lw.LocoProp, lw.optim.KFAC])
def test_a_copy_that_is_made_inside_a_context_has_nothing_of_it(make: Any, copied: Callable[[Any], Any]) -> None:
    model = mlp(4, 5, 3)
    opt = make(model)
    with opt.watch(), lw.observe(model, lw.SecondMoment()) as seen:
        twin, its = copied((model, opt))
        loss(twin, OTHER).backward()  # as of a teacher: no part of what is recorded
        loss(model).backward()
    same(seen.second_moment, moments(model))
    opt.step()
    its.step(lambda: loss(twin))
    torch.testing.assert_close(list(twin.parameters()), list(model.parameters()), rtol=0, atol=0)
