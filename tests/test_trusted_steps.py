"""A step is whole or has not happened; a finite batch never ends a model; parameters may change in training."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from ranks import ranks
from torch import Tensor, nn
from torch.nn.utils import prune

import layerwise as lw
from benchmarks import faults
from layerwise.errors import BadInput

every = pytest.mark.parametrize("name", faults.OPTIMIZERS)


# Whole steps ------------------------------------------------------------------------------------------------------


@every
def test_an_operation_that_raises_takes_the_step_back(name: str) -> None:
    make = faults.OPTIMIZERS[name]
    found = faults.tried(make, most=8)
    assert found.tried >= 6 and not found.failed


@every
def test_an_interrupt_between_two_lines_takes_the_step_back(name: str) -> None:
    make = faults.OPTIMIZERS[name]
    found = faults.tried(make, lines=True, most=6, first=3)
    assert found.tried >= 5 and not found.failed


@pytest.mark.parametrize("name", ["K-FAC", "DiagNewton", "LocoProp"])
def test_an_interrupt_at_the_end_of_a_step_takes_it_back_or_comes_after_it(name: str) -> None:
    make = faults.OPTIMIZERS[name]
    found = faults.tried(make, lines=True, first=-40)
    assert found.tried >= 40 and not found.failed


@pytest.mark.parametrize("name", faults.WATCHED)
def test_an_operation_that_raises_in_a_watched_step_takes_it_back(name: str) -> None:
    make = faults.OPTIMIZERS[name]
    found = faults.tried(make, most=8, step=faults.watched)
    assert found.tried >= 6 and not found.failed


@pytest.mark.thinned(2)
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("name", faults.RANKS)
def test_an_operation_that_raises_in_one_rank_takes_the_step_back_on_both(name: str, failing: int) -> None:
    for tried, failed in ranks(2)(faults.tried_in_rank, name, failing, 3):
        assert tried >= 3 and not failed


@pytest.mark.slow
@every
def test_each_operation_that_raises_takes_the_step_back(name: str) -> None:
    assert not faults.tried(faults.OPTIMIZERS[name]).failed


def test_an_error_in_a_later_repeat_takes_back_the_trace_and_the_coupling() -> None:
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    trace, calls = lw.optim.Trace(), [0]
    opt = lw.AltMin(model, repeats=2, trace=trace, coupling=lw.local.Coupling(0.1, add=0.1))

    def closure() -> Tensor:
        calls[0] += 1
        if calls[0] in (2, 6):
            raise MemoryError
        return F.cross_entropy(model(x), y)

    for _ in range(3):  # of which the first one and the last one raise in their second repeat
        before = copy.deepcopy((trace.rows(), trace.passed, opt.param_groups[0]["coupling"]))
        with contextlib.suppress(MemoryError):
            opt.step(closure)
            continue
        assert (trace.rows(), trace.passed, opt.param_groups[0]["coupling"]) == before
    assert trace.steps == [0, 1] and calls == [6]


@pytest.mark.slow
def test_a_worker_that_raises_or_dies_takes_the_step_back_and_hangs_nothing() -> None:
    assert faults.tried_in_workers() == faults.Counted(4, [])


def preconditioned(kind: Any, fault: Any) -> tuple[nn.Module, Any, Any]:
    """A model whose second gradients a preconditioner turns under a fault, and gradients and state before and after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    pre = lw.optim.Preconditioner(model, kind, update_factors_every=1, update_inverses_every=1)

    def held() -> Any:
        return copy.deepcopy(([p.grad for p in model.parameters()], pre.state_dict()))

    for context in (contextlib.nullcontext(), fault):
        model.zero_grad()
        with pre.watch():
            F.cross_entropy(model(x), y).backward()
        before = held()
        with suppress(torch.OutOfMemoryError, KeyboardInterrupt), context:
            pre.step()
    return model, before, held()


@pytest.mark.parametrize("fault", [faults.Operations, faults.Lines])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diag-ggn"])
def test_what_raises_in_a_preconditioner_leaves_its_averages_and_the_gradients(kind: Any, fault: Any) -> None:
    counting = fault(0)
    *_, whole = preconditioned(kind, counting)
    places = {*range(1, counting.seen + 1, max(1, counting.seen // 40)), counting.seen}
    for place in sorted(places):
        model, before, found = preconditioned(kind, fault(place))
        assert faults.same(found, before) or faults.same(found, whole), place
        assert not faults.left_over(model), place
    assert len(places) > 30


def test_the_injector_finds_a_step_that_is_half_made() -> None:
    class Halves(lw.LocoProp):
        def step(self, closure: Any = None) -> Tensor:  # type: ignore[override]
            loss = super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.9)
            return loss

    assert faults.tried(lambda m: Halves(m), first=-3).failed


@pytest.mark.parametrize("quantities", [(lw.SecondMoment(),), (lw.DiagHessian(),)], ids=["once", "twice"])
def test_an_interrupt_on_the_way_in_leaves_no_mode_and_no_hook(quantities: Any) -> None:
    model, x, y = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), torch.tensor([1])
    place = 0
    while True:
        place += 1
        context, fault = lw.observe(model, *quantities), faults.Lines(place)
        try:
            with fault:
                context.__enter__()
            break
        except KeyboardInterrupt:
            assert not faults.left_over(model), place
            with context as seen:
                F.cross_entropy(model(x), y).backward()
            assert torch.isfinite(seen.grad["0.weight"]).all() and not faults.left_over(model)
    context.__exit__(None, None, None)
    assert place > 20 and not faults.left_over(model)


@pytest.mark.parametrize("casts", [False, True], ids=["", "autocast"])
def test_an_interrupt_among_the_products_leaves_torch_functions_and_autocast_as_they_were(casts: bool) -> None:
    model, x, y = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), torch.ones(2, 2), torch.tensor([1, 0])
    hooks: list[Tensor] = []
    model[0].weight.register_hook(lambda g: hooks.append(g))

    def observed(fault: faults.Lines) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            with suppress(KeyboardInterrupt), fault, lw.observe(model, lw.SecondMoment(), lw.DiagGGN()):
                F.cross_entropy(model(x), y).backward()
            assert torch.is_autocast_enabled("cpu") == casts, fault.at

    total = faults.Lines(0, "/layerwise/tape/pull.py")
    observed(total)
    for place in range(1, total.seen + 1):
        observed(faults.Lines(place, "/layerwise/tape/pull.py"))
        assert torch._C._is_torch_function_enabled() and not faults.left_over(model), place
        assert len(model[0].weight._backward_hooks or ()) == 1, place
    assert total.seen > 20 and hooks


# Finite batches ---------------------------------------------------------------------------------------------------


@one_in(4, name=faults.OPTIMIZERS, scale=[1e10, 1e15, 1e20, 1e37, 1e5, 1e18, 1e25, 1e30], norm=[True, False])
def test_a_finite_batch_never_ends_a_model(name: str, scale: float, norm: bool) -> None:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(6)] if norm else []
    model = nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    opt = faults.OPTIMIZERS[name](model)
    y = torch.randint(3, (8,))

    def step(x: Tensor) -> None:
        opt.step(lambda: F.cross_entropy(model(x), y))

    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 4, generator=generator)
        x[0] *= scale if seed in (1, 3) else 1.0
        step(x)
        assert all(bool(torch.isfinite(p).all()) for p in (*model.parameters(), *model.buffers()))
    skipped = opt.skipped
    for seed in range(6, 9):
        step(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)))
    assert opt.skipped == skipped


# Whose steps have no bound: they follow a huge batch as far as finite numbers reach, as `torch.optim.SGD` does.
_UNBOUNDED = {"K-FAC quadratic"}
# A memory holds a huge batch until it has faded; with write="grad" the optimizer behind moves the parameters.
_SLOW = {"AltMin memory", "LocoProp, into .grad"}


@pytest.mark.parametrize("name", sorted(faults.OPTIMIZERS.keys() - _UNBOUNDED))
@pytest.mark.parametrize("scale", [1e4, *(pytest.param(s, marks=pytest.mark.slow) for s in (1e8, 1e12, 1e30, 1e38))])
def test_a_model_trains_on_after_a_whole_batch_of_huge_numbers(name: str, scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    opt, labels = faults.OPTIMIZERS[name](model), torch.randn(4, 3)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
        return x, (x @ labels).argmax(1)

    losses, skipped = [], []
    for seed in range(30):
        x, y = batch(seed)
        x = x * scale if seed == 5 else x
        opt.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        skipped.append(opt.skipped)
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(batch(99)[0]), batch(99)[1])))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    stale = 3 if name == "AltMin async" else 0  # layers may be fitted to the huge batch later
    assert skipped[5 + stale] == skipped[-1]
    assert losses[-1] < losses[6] + 1e-3 or name in _SLOW


class _Plain(torch.optim.SGD):
    """torch's, with a closure that returns the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        self.zero_grad()
        closure().backward()
        super().step()


@pytest.mark.parametrize("name", [*sorted(_UNBOUNDED), "SGD"])
@pytest.mark.parametrize("scale", [1e3, 1e8, 1e12, 1e16])
def test_a_step_without_a_bound_follows_a_huge_batch_in_finite_numbers_and_a_checkpoint_trains_on(
    name: str, scale: float
) -> None:
    """As `torch.optim.SGD` follows it; each batch that is skipped later is counted, with its reason."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    opt, labels = (_Plain if name == "SGD" else faults.OPTIMIZERS[name])(model), torch.randn(4, 3)

    def step(seed: int, factor: float = 1.0) -> None:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
        y = (x @ labels).argmax(1)
        opt.step(lambda: F.cross_entropy(model(x * factor), y))

    for seed in range(5):
        step(seed)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    step(5, scale)
    if name != "K-FAC quadratic":
        largest = max(float(p.detach().abs().max()) for p in model.parameters())
        assert largest > 1e-4 * scale or opt.why_skipped() is not None
    if name == "SGD":
        return
    for seed in range(6, 30):
        skipped = opt.skipped
        step(seed)
        assert (opt.skipped > skipped) == (opt.why_skipped() is not None)
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    model.load_state_dict(saved[0])
    opt.load_state_dict(saved[1])
    for seed in range(6, 30):
        step(seed)
        assert opt.why_skipped() is None


# Parameters that change -------------------------------------------------------------------------------------------


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def closure_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    x = x.to(next(model.parameters()).dtype)
    return lambda: F.cross_entropy(model(x), y)


def moved(model: nn.Module, act: Callable[[], Any]) -> set[str]:
    """The names of the parameters that an act moves."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    act()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@every
def test_a_layer_that_is_thawed_is_trained_or_the_error_says_what_to_call(name: str) -> None:
    model = small()
    model[2].requires_grad_(False)
    opt = faults.OPTIMIZERS[name](model)
    opt.step(closure_of(model))
    model[2].requires_grad_(True)
    with pytest.raises(BadInput, match=r"2\.weight, 2\.bias .*add_param_group"):
        opt.step(closure_of(model, 1))
    opt.add_param_group({"params": model[2].parameters()})
    if name != "LocoProp, into .grad":
        opt.step(closure_of(model, 2))
        assert {"2.weight", "2.bias"} <= moved(model, lambda: opt.step(closure_of(model, 3)))


@one_in(2, name=faults.OPTIMIZERS, frozen=["2.weight", "2.bias", "0.weight", "4.weight", "4.bias"])
def test_a_parameter_that_is_frozen_stays(name: str, frozen: str) -> None:
    model = small()
    opt = faults.OPTIMIZERS[name](model)
    opt.step(closure_of(model))
    p = dict(model.named_parameters())[frozen]
    p.requires_grad_(False)
    if name == "AltMin memory" and frozen.endswith("bias"):
        with pytest.raises(BadInput, match="frozen or thawed"):
            opt.step(closure_of(model, 1))
        return
    for seed in range(1, 4):
        found = moved(model, lambda seed=seed: opt.step(closure_of(model, seed)))  # type: ignore[misc]
        assert frozen not in found and (found or name == "LocoProp, into .grad")
    p.requires_grad_(True)
    for seed in range(5, 8):
        found = moved(model, lambda seed=seed: opt.step(closure_of(model, seed)))  # type: ignore[misc]
        assert frozen in found or name == "LocoProp, into .grad"
    assert opt.skipped == 0


@one_in(2, name=faults.OPTIMIZERS, given=[False, True], change=["head", "weight norm", "assigned"])
def test_a_parameter_that_is_replaced_is_refused(name: str, given: bool, change: str) -> None:
    model = small()
    opt = faults.OPTIMIZERS[name](model)
    opt.step(closure_of(model))
    if given:
        opt.all_parameters = False
    if change == "head":
        model[4] = nn.Linear(6, 3)
    elif change == "weight norm":
        nn.utils.parametrizations.weight_norm(model[2])
    else:
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(BadInput, match=r"new optimizer|optimizer again"):
        opt.step(closure_of(model, 1))
    opt = faults.OPTIMIZERS[name](model)
    opt.step(closure_of(model, 1))
    assert opt.skipped == 0


@every
def test_pruning_goes_on_as_with_torch(name: str) -> None:
    model = small()
    opt = faults.OPTIMIZERS[name](model)
    opt.step(closure_of(model))
    prune.random_unstructured(model[2], "weight", 0.5)
    found = moved(model, lambda: [opt.step(closure_of(model, seed)) for seed in range(1, 4)])
    assert "2.weight_orig" in found or name == "LocoProp, into .grad"
    opt.load_state_dict(opt.state_dict())
    opt.step(closure_of(model, 4))


@every
def test_a_model_may_change_its_type(name: str) -> None:
    model = small()
    opt = faults.OPTIMIZERS[name](model)
    for seed in range(2):
        opt.step(closure_of(model, seed))
    model.double()
    for seed in range(2, 5):
        found = moved(model, lambda seed=seed: opt.step(closure_of(model, seed)))  # type: ignore[misc]
        assert len(found) == 6 or name == "LocoProp, into .grad"
    assert opt.skipped == 0
    model.float()
    opt.step(closure_of(model, 6))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step(closure_of(model, 7))
    assert opt.skipped == 0 and all(p.dtype is torch.float32 for p in model.parameters())
