"""Steps without a closure, gradient scalers, accumulation: each equals the step of a closure over the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler

import layerwise as lw
from layerwise.errors import BadInput, NonFinite, Undefined

pytestmark = pytest.mark.usefixtures("float64")

Make = Callable[[nn.Module], Any]
STEPS, K = 4, 3

# Exact curvature, since draws for parts are others than for the whole.
OPTIMIZERS: dict[str, Make] = {
    "KFAC": lambda m: lw.optim.KFAC(m, kind="kflr", lr=0.1, update_factors_every=4, update_inverses_every=4),
    "EKFAC": lambda m: lw.optim.KFAC(m, kind="ekfac", lr=0.1, seed=3),
    "DiagNewton": lambda m: lw.optim.DiagNewton(m, lr=0.1),
    "DiagNewton, Hessian": lambda m: lw.optim.DiagNewton(m, kind="diag-hessian", draws=None, lr=0.1),
    "LocoProp": lambda m: lw.LocoProp(m, lr=1e-3),
    "LocoProp, S, few rows": lambda m: lw.LocoProp(m, preset="S", rows=2),
}
CODES: dict[str, Make] = {
    "AltMin, jacobi": lambda m: lw.AltMin(m, codes="jacobi", rows="all"),
    "AltMin, sweep": lambda m: lw.AltMin(m, codes="sweep", rows="all", weights="sgd"),
    "AltMin, Gauss-Newton": lambda m: lw.AltMin(m, codes="gauss-newton", rows="all"),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)
exact = pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "EKFAC"])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3))


def batch(step: int, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def parts(step: int) -> list[tuple[Tensor, Tensor]]:
    x, y = batch(step)
    return [(a.clone(), b.clone()) for a, b in zip(x.split(6 // K), y.split(6 // K), strict=True)]


def trained(make: Make, run: Callable[[nn.Module, Any, int], Any], model: nn.Module | None = None) -> Tensor:
    """The parameters after some steps. run: one step, of the model, its optimizer and the step's number."""
    model = net() if model is None else model
    opt = make(model)
    for step in range(STEPS):
        run(model, opt, step)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def whole(factor: float = 1.0) -> Callable[[nn.Module, Any, int], Any]:
    """A step of a closure over the whole batch."""

    def run(model: nn.Module, opt: Any, step: int) -> None:
        x, y = batch(step)
        opt.step(lambda: factor * F.cross_entropy(model(x), y))

    return run


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


# Accumulation and steps without a closure -------------------------------------------------------------------------


def backward(model: nn.Module, x: Tensor, y: Tensor, divisor: float) -> Tensor:
    loss = F.cross_entropy(model(x), y) / divisor
    loss.backward()
    return loss.detach()


def in_a_closure(model: nn.Module, opt: Any, step: int, divisor: float) -> None:
    opt.step(lambda: torch.stack([backward(model, *part, divisor) for part in parts(step)]).sum())


def in_a_context(model: nn.Module, opt: Any, step: int, divisor: float) -> None:
    with opt.watch():
        losses = [backward(model, *part, divisor) for part in parts(step)]
    torch.testing.assert_close(opt.step(), torch.stack(losses).sum())


def forward_passes_first(model: nn.Module, opt: Any, step: int, divisor: float) -> None:
    with opt.watch():
        losses = [F.cross_entropy(model(x), y) / divisor for x, y in parts(step)]
        for loss in losses:
            loss.backward()
    opt.step()


def in_several_contexts(model: nn.Module, opt: Any, step: int, divisor: float) -> None:
    for part in parts(step):
        with opt.watch():
            backward(model, *part, divisor)
    opt.step()


def around_the_loop_body(model: nn.Module, opt: Any, step: int, divisor: float) -> None:
    with opt.watch():
        opt.zero_grad()
        for part in parts(step):
            backward(model, *part, divisor)
        opt.step()
        opt.zero_grad()


def last_part_in_the_steps_closure(model: nn.Module, opt: Any, step: int, divisor: float) -> None:
    """As Lightning does."""
    first, *middle, last = parts(step)
    with opt.watch():
        for part in (first, *middle):
            backward(model, *part, divisor)
        opt.step(lambda: backward(model, *last, divisor))


LOOPS = [
    in_a_closure, in_a_context, forward_passes_first, in_several_contexts, around_the_loop_body,
    last_part_in_the_steps_closure,
]  # fmt: skip


@pytest.mark.thinned(2)
@exact
@pytest.mark.parametrize(
    ("loop", "divisor"), [*((loop, K) for loop in LOOPS), (in_a_closure, 1), (in_several_contexts, 1)],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_parts_of_a_batch_are_the_whole_batch(name: str, loop: Callable[..., Any], divisor: int) -> None:
    def run(model: nn.Module, opt: Any, step: int) -> None:
        opt.zero_grad()
        loop(model, opt, step, float(divisor))

    same(trained(OPTIMIZERS[name], run), trained(OPTIMIZERS[name], whole(K / divisor)))


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("divisor", [K, 1])
def test_parts_that_a_closure_adds_up_are_the_whole_batch(name: str, divisor: int) -> None:
    """AltMin runs the model again; its closure gives one loss, of views of one batch, with all rows."""

    def run(model: nn.Module, opt: Any, step: int) -> None:
        x, y = batch(step)
        opt.step(lambda: sum(F.cross_entropy(model(x[i : i + 2]), y[i : i + 2]) for i in range(0, 6, 2)) / divisor)

    same(trained(CODES[name], run), trained(CODES[name], whole(K / divisor)))


def test_backward_passes_in_a_closure_of_altmin_are_the_whole_batch() -> None:
    def run(model: nn.Module, opt: Any, step: int) -> None:
        in_a_closure(model, opt, step, float(K))

    same(trained(CODES["AltMin, jacobi"], run), trained(CODES["AltMin, jacobi"], whole()))


@pytest.mark.parametrize("kind", ["kflr", "foof", "diag-ggn", "diag-hessian"])
@pytest.mark.parametrize("contexts", [1, K])
def test_parts_in_front_of_another_optimizer(kind: Any, contexts: int) -> None:
    def run(pieces: bool) -> Tensor:
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        pre = lw.optim.Preconditioner(model, kind)
        for step in range(STEPS):
            opt.zero_grad()
            if not pieces or contexts == 1:
                with pre.watch():
                    for x, y in parts(step) if pieces else [batch(step)]:
                        (F.cross_entropy(model(x), y) / (K if pieces else 1)).backward()
            else:
                for part in parts(step):
                    with pre.watch():
                        backward(model, *part, K)
            pre.step()
            opt.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    same(run(True), run(False))


# Gradient scalers --------------------------------------------------------------------------------------------------


def scaler() -> GradScaler:
    """Doubles its factor at every step."""
    return GradScaler("cpu", init_scale=2.0**9, growth_interval=1)


def scaled_in_a_closure(model: nn.Module, opt: Any, step: int, own: GradScaler) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        own.scale(loss).backward(retain_graph=True)
        return loss

    opt.step(closure)
    own.update(own.get_scale() * 2)


def unscaled_in_a_closure(model: nn.Module, opt: Any, step: int, own: GradScaler) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        own.scale(loss).backward(retain_graph=True)
        own.unscale_(opt)
        return loss

    opt.step(closure)
    own.update()


def scaled_and_returned(model: nn.Module, opt: Any, step: int, own: GradScaler) -> None:
    x, y = batch(step)
    opt.step(lambda: own.scale(F.cross_entropy(model(x), y)))
    own.update(own.get_scale() * 2)


def scaled_under_watch(model: nn.Module, opt: Any, step: int, own: GradScaler) -> None:
    opt.zero_grad()
    with opt.watch():
        for x, y in parts(step) if not isinstance(opt, lw.optim.KFAC) else [batch(step)]:
            own.scale(F.cross_entropy(model(x), y) * (len(y) / 6)).backward()
    own.step(opt)
    own.update()


def scaled_and_stepped_inside(model: nn.Module, opt: Any, step: int, own: GradScaler) -> None:
    with opt.watch():
        opt.zero_grad()
        x, y = batch(step)
        own.scale(F.cross_entropy(model(x), y)).backward()
        own.unscale_(opt)
        own.step(opt)
        own.update()


SCALED = [
    scaled_in_a_closure, unscaled_in_a_closure, scaled_and_returned, scaled_under_watch, scaled_and_stepped_inside,
]  # fmt: skip


@every
@pytest.mark.parametrize("loop", SCALED, ids=lambda loop: loop.__name__)
def test_a_scaler_changes_no_step(name: str, loop: Callable[..., Any]) -> None:
    own = scaler()
    found = trained(OPTIMIZERS[name], lambda model, opt, step: loop(model, opt, step, own))
    assert own.get_scale() == 2.0 ** (9 + STEPS)
    same(found, trained(OPTIMIZERS[name], whole()))


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("loop", SCALED[:2], ids=lambda loop: loop.__name__)
def test_a_scaler_changes_no_step_with_codes(name: str, loop: Callable[..., Any]) -> None:
    own = scaler()
    if loop is unscaled_in_a_closure and name != "AltMin, jacobi":
        pytest.skip("leaves the closure's backward pass out, so there is nothing to unscale")
    found = trained(CODES[name], lambda model, opt, step: loop(model, opt, step, own))
    same(found, trained(CODES[name], whole()))


@pytest.mark.parametrize("kind", ["kfac", "kflr", "kfra", "ekfac", "foof", "diag-ggn", "diag-hessian"])
@pytest.mark.parametrize("first", ["unscale", "precondition", "clip"])
def test_a_scaler_in_front_of_another_optimizer(kind: Any, first: str) -> None:
    def run(own: GradScaler) -> Tensor:
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        pre = lw.optim.Preconditioner(model, kind)
        for step in range(STEPS):
            opt.zero_grad()
            x, y = batch(step)
            with pre.watch():
                own.scale(F.cross_entropy(model(x), y)).backward()
            if first != "precondition":
                own.unscale_(opt)
            if first == "clip":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            pre.step()
            own.step(opt)
            own.update()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    same(run(scaler()), run(GradScaler("cpu", enabled=False)))


@pytest.mark.parametrize("unscaled", [True, False])
def test_a_scaler_in_front_of_local_learning_into_grad(unscaled: bool) -> None:
    def run(own: GradScaler) -> Tensor:
        model = net()
        outer = torch.optim.SGD(model.parameters(), lr=1.0)
        opt = lw.LocoProp(model, write="grad")
        for step in range(STEPS):
            outer.zero_grad()
            x, y = batch(step)
            with opt.watch():
                own.scale(F.cross_entropy(model(x), y)).backward()
                if unscaled:
                    own.unscale_(outer)
                opt.step()
            own.step(outer)
            own.update()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    same(run(scaler()), run(GradScaler("cpu", enabled=False)))


@every
def test_what_overflows_is_skipped_and_lowers_the_scale(name: str) -> None:
    norm = [] if name == "KFAC" else [nn.BatchNorm1d(5)]  # exact curvature refuses samples that mix
    model = nn.Sequential(nn.Linear(4, 5), *norm, nn.Tanh(), nn.Linear(5, 3))
    opt, own = OPTIMIZERS[name](model), GradScaler("cpu", init_scale=2.0**9, backoff_factor=0.5)
    before = copy.deepcopy(model.state_dict())
    x, y = batch(0)
    with opt.watch():
        own.scale(F.cross_entropy(model(x), y) * float("inf")).backward()
    own.step(opt)
    own.update()
    assert own.get_scale() == 2.0**8
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    opt.zero_grad()
    with opt.watch():
        own.scale(F.cross_entropy(model(x), y)).backward()
    own.step(opt)
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("first", ["unscale", "precondition"])
def test_a_gradient_that_overflows_is_found_by_the_scaler(first: str) -> None:
    """The loss is finite, its gradient is not."""

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * float("nan")

    model = net()
    opt, own = torch.optim.SGD(model.parameters(), lr=0.1), GradScaler("cpu", init_scale=2.0**9)
    pre = lw.optim.Preconditioner(model, "foof")
    x, y = batch(0)
    with pre.watch():
        own.scale(F.cross_entropy(model[1:](Bad.apply(model[0](x))), y)).backward()
    if first == "unscale":
        own.unscale_(opt)
    assert not pre.step()
    own.step(opt)
    own.update()
    assert own.get_scale() == 2.0**8 and pre.skipped == 1


@every
def test_two_scales_in_one_step_are_refused(name: str) -> None:
    model, own = net(), scaler()
    opt = OPTIMIZERS[name](model)
    with pytest.raises(BadInput, match="512"), opt.watch():
        for x, y in parts(0):
            own.scale(F.cross_entropy(model(x), y)).backward()
            own.update(own.get_scale() * 2)
    with pytest.raises(BadInput, match="scale their sum"), opt.watch():
        x, y = batch(0)
        (own.scale(F.cross_entropy(model(x), y)) + F.cross_entropy(model(x), y)).backward()


@exact
def test_weights_of_a_backward_pass_belong_to_the_loss(name: str) -> None:
    def run(model: nn.Module, opt: Any, step: int) -> None:
        opt.zero_grad()
        x, y = batch(step)
        with opt.watch():
            loss = F.cross_entropy(model(x), y)
            loss.backward(gradient=torch.tensor(2.0))
        torch.testing.assert_close(opt.step(), 2 * loss.detach())

    same(trained(OPTIMIZERS[name], run), trained(OPTIMIZERS[name], whole(2.0)))


def test_a_users_own_factor_belongs_to_the_loss() -> None:
    """Whatever it is: a number, or a tensor like the scaler's."""
    for factor in (7.0, torch.tensor(7.0, dtype=torch.float32)):

        def run(model: nn.Module, opt: Any, step: int, factor: Any = factor) -> None:
            opt.zero_grad()
            with opt.watch():
                x, y = batch(step)
                (F.cross_entropy(model(x), y) * factor).backward()
            opt.step()

        same(trained(OPTIMIZERS["KFAC"], run), trained(OPTIMIZERS["KFAC"], whole(7.0)))


# The order of calls ------------------------------------------------------------------------------------------------


@exact
def test_a_context_that_was_left_without_a_step_is_dropped_with_its_gradients(name: str) -> None:
    zeroed: list[Callable[[nn.Module, Any], Any]] = [
        lambda model, opt: opt.zero_grad(),
        lambda model, opt: model.zero_grad(),
        lambda model, opt: model.zero_grad(set_to_none=False),
    ]
    for zero in zeroed:

        def run(model: nn.Module, opt: Any, step: int, zero: Any = zero) -> None:
            opt.zero_grad()
            with opt.watch():
                backward(model, *batch(step + 100), 1.0)
            zero(model, opt)
            in_a_context(model, opt, step, float(K))

        same(trained(OPTIMIZERS[name], run), trained(OPTIMIZERS[name], whole()))


@every
def test_gradients_may_be_zeroed_between_forward_and_backward(name: str) -> None:
    """As Lightning does; what ran before is dropped."""

    def run(model: nn.Module, opt: Any, step: int) -> None:
        with opt.watch():
            x, y = batch(step)
            loss = F.cross_entropy(model(x), y)
            opt.zero_grad()
            loss.backward()
        opt.step()

    same(trained(OPTIMIZERS[name], run), trained(OPTIMIZERS[name], whole()))


@every
def test_calls_out_of_order_are_refused(name: str) -> None:
    model = net()
    opt = OPTIMIZERS[name](model)
    x, y = batch(0)
    with pytest.raises(BadInput, match="closure"):
        opt.step()
    with pytest.raises(BadInput, match="backward"):
        with opt.watch():
            F.cross_entropy(model(x), y)
        opt.step()
    with opt.watch(), pytest.raises(BadInput, match="active already"), opt.watch():
        pass
    opt = OPTIMIZERS[name](model)
    with pytest.raises(KeyError), opt.watch():
        backward(model, x, y, 1.0)
        raise KeyError
    assert not torch.overrides._get_current_function_mode_stack()
    with pytest.raises(BadInput, match="closure"):
        opt.step()
    opt.zero_grad()
    with opt.watch():
        backward(model, x, y, 1.0)
    copied = copy.deepcopy((model, opt))[1]
    opt.step()
    with pytest.raises(BadInput, match="closure"):
        opt.step()
    with pytest.raises(BadInput, match="closure"):
        copied.step()


@pytest.mark.parametrize("name", CODES)
def test_altmin_says_that_it_runs_the_model_again(name: str) -> None:
    opt = CODES[name](net())
    with pytest.raises(BadInput, match=r"AltMin runs the model again.*step\(closure\)"), opt.watch():
        pass
    with pytest.raises(BadInput, match="closure") as error:
        opt.step()
    assert "watch" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: lw.optim.KFAC(m, step_size="quadratic"),
        lambda m: lw.optim.DiagNewton(m, adapt_damping_every=2),
        lambda m: lw.LocoProp(m, order="output_to_input"),
    ],
)
def test_settings_that_run_the_model_again_say_so(make: Make) -> None:
    with pytest.raises(BadInput, match=r"runs the model again.*step\(closure\)"), make(net()).watch():
        pass


@every
def test_a_batch_of_nan_is_skipped_with_its_buffers(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    opt = OPTIMIZERS[name](model)
    x, y = batch(0)
    before = copy.deepcopy(model.state_dict())
    with opt.watch():
        F.cross_entropy(model(x * float("nan")), y).backward()
    opt.step()
    assert opt.skipped == 1
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    opt = lw.optim.KFAC(model, on_nonfinite="raise")
    with pytest.raises(NonFinite), opt.watch():
        F.cross_entropy(model(x * float("nan")), y).backward()
        opt.step()


@every
def test_a_scheduler_and_clipping_take_part(name: str) -> None:
    """The scheduler steps; a gradient that is clipped to nothing moves nothing where `.grad` is what moves."""
    model = net()
    opt = OPTIMIZERS[name](model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    start = opt.param_groups[0]["lr"]
    before = copy.deepcopy(model.state_dict())
    with opt.watch():
        backward(model, *batch(0), 1.0)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-30)
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["lr"] == start / 2
    moved = sum(float((t - before[n]).abs().sum()) for n, t in model.state_dict().items())
    assert (moved < 1e-20) == ("LocoProp" not in name)


@pytest.mark.parametrize("two_heads", [False, True])
@every
def test_a_second_pass_through_one_forward_is_refused_for_its_reason(name: str, two_heads: bool) -> None:
    model = nn.ModuleDict({"trunk": net(), "head": nn.Linear(3, 2)})
    opt, (x, y), before = OPTIMIZERS[name](model), batch(0), [p.detach().clone() for p in model.parameters()]
    with opt.watch():
        z = model["trunk"](x)
        last = model["head"](z) if two_heads else z
        F.cross_entropy(z, y).backward(retain_graph=True)
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        with pytest.raises(Undefined, match="retain_graph"):
            last.square().mean().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=0, atol=0)
    torch.testing.assert_close([p.detach() for p in model.parameters()], before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["LocoProp", "AltMin, jacobi"])
def test_a_closure_with_two_passes_through_one_forward_is_refused(name: str) -> None:
    model, (x, y) = net(), batch(0)

    def closure() -> Tensor:
        z = model(x)
        F.cross_entropy(z, y).backward(retain_graph=True)
        z.square().mean().backward()
        return z.detach().sum()

    with pytest.raises(Undefined, match="retain_graph"):
        (OPTIMIZERS | CODES)[name](model).step(closure)


# Contexts that are kept --------------------------------------------------------------------------------------------


@exact
def test_a_context_that_is_kept_is_entered_anew(name: str) -> None:
    """As `torch.no_grad()` is: each time it records another part."""

    def run(model: nn.Module, opt: Any, step: int) -> None:
        opt.zero_grad()
        context = opt.watch()
        for part in parts(step):
            with context:
                backward(model, *part, float(K))
        opt.step()

    same(trained(OPTIMIZERS[name], run), trained(OPTIMIZERS[name], whole()))


def test_a_context_of_a_preconditioner_or_a_monitor_is_entered_anew_and_decorates() -> None:
    model = net()
    pre, history = lw.optim.Preconditioner(model, "kflr"), lw.monitor.History()
    watching, measuring = pre.watch(), lw.monitor.Monitor(model, history, every=1).step()
    for step in range(3):
        model.zero_grad()
        with measuring, watching as watched:
            backward(model, *batch(step), 1.0)
        assert watched.passes == 1 and pre.step()
    assert [record["step"] for record in history.records] == [0, 1, 2]
    measuring(backward)(model, *batch(3), 1.0)
    assert len(history) == 4
    with watching, pytest.raises(BadInput, match="active already"), watching:
        pass
