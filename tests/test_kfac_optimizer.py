"""The K-FAC optimizer and its preconditioner against brute force: steps, averages, schedules, state, bad factors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from state_checks import same, through_a_file
from torch import Tensor, nn
from zoo import Case, cases

import layerwise as lw
from layerwise.errors import BadInput, NonFinite
from layerwise.operators.kronecker import KroneckerBlock
from layerwise.optim.second_order.averages import Average, average, invert, load, merge, save
from layerwise.optim.second_order.settings import is_due
from layerwise.replay.state import seed_of
from layerwise.rows.layout import MatrixLayout
from layerwise.tape.tape import Tape

KFAC, Preconditioner = lw.optim.KFAC, lw.optim.Preconditioner


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batch(seed: int = 0, n: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=gen, dtype=dtype), torch.randint(3, (n,), generator=gen)


def closure_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    x, y = batch(seed, dtype=next(model.parameters()).dtype)
    return lambda: F.cross_entropy(model(x), y)


def loops(model: nn.Sequential, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """KFLR's factors of the two layers from loops over samples: A with the constant 1, B from softmax Hessians."""
    w1, b1, w2, b2 = (p.detach() for p in model.parameters())
    found = {"0": [torch.zeros(5, 5), torch.zeros(5, 5)], "2": [torch.zeros(6, 6), torch.zeros(3, 3)]}
    one = torch.ones(1)
    for sample in x:
        h = (w1 @ sample + b1).tanh()
        p = (w2 @ h + b2).softmax(0)
        hessian = (p.diag() - torch.outer(p, p)) / len(x)
        back = (1 - h**2)[:, None] * w2.T  # dz1/dlogits, transposed: [5, 3]
        for key, a, b in (("0", sample, back @ hessian @ back.T), ("2", h, hessian)):
            a = torch.cat([a, one])
            found[key][0] += torch.outer(a, a) / len(x)
            found[key][1] += b
    return {key: (a, b) for key, (a, b) in found.items()}


def dense_inverse(a: Tensor, b: Tensor, damping: float, form: str) -> Tensor:
    """The damped inverse of B ⊗ A as one matrix."""
    if form == "eigen":
        return torch.linalg.inv(torch.kron(b, a) + damping * torch.eye(len(a) * len(b)))
    pi = math.sqrt((a.trace() / len(a)) / (b.trace() / len(b))) if form == "pi" else 1.0
    root = math.sqrt(damping)
    return torch.linalg.inv(torch.kron(b + root / pi * torch.eye(len(b)), a + root * pi * torch.eye(len(a))))


def directions(
    model: nn.Sequential, factors: dict[str, tuple[Tensor, Tensor]], grads: dict[str, Tensor], damping: float, form: str
) -> dict[str, Tensor]:
    found = {}
    for key, (a, b) in factors.items():
        g = torch.cat([grads[f"{key}.weight"], grads[f"{key}.bias"][:, None]], 1)
        d = (dense_inverse(a, b, damping, form) @ g.flatten()).view_as(g)
        found[f"{key}.weight"], found[f"{key}.bias"] = d[:, :-1], d[:, -1]
    return found


def gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(closure_of(model, seed)(), list(named.values())), strict=True))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# Against brute force -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("form", ["pi", "factored", "eigen"])
@pytest.mark.parametrize("clip", [None, 1e-4])
def test_three_steps_equal_brute_force(form: str, clip: float | None) -> None:
    model, lr, damping, beta, decay, rho = net(), 0.1, 0.02, 0.8, 0.05, 0.7
    opt = KFAC(
        model, kind="kflr", lr=lr, damping=damping, momentum=beta, weight_decay=decay, factor_decay=rho,
        damping_form=form, kl_clip=clip, update_factors_every=1, update_inverses_every=1,
    )  # fmt: skip
    mirror = copy.deepcopy(model)
    sums: dict[str, list[Tensor]] = {}
    buffers: dict[str, Tensor] = {}
    for t in range(1, 4):
        grads = gradients(mirror, t)
        for key, new in loops(mirror, batch(t)[0]).items():
            old = sums.get(key, [torch.zeros_like(f) for f in new])
            sums[key] = [rho * s + (1 - rho) * f for s, f in zip(old, new, strict=True)]
        factors = {key: (a / (1 - rho**t), b / (1 - rho**t)) for key, (a, b) in sums.items()}
        d = directions(mirror, factors, grads, damping, form)
        size = lr**2 * sum(float((grads[n] * d[n]).sum()) for n in d)
        nu = 1.0 if clip is None else min(1.0, math.sqrt(clip / size))
        assert clip is None or nu < 1
        with torch.no_grad():
            for name, p in mirror.named_parameters():
                buffers[name] = beta * buffers.get(name, 0) + nu * d[name]
                p.copy_((1 - lr * decay) * p - lr * buffers[name])
        opt.step(closure_of(model, t))
        oracle.assert_close(values(model), values(mirror))


@pytest.mark.usefixtures("float64")
def test_sampled_factors_are_those_of_the_quantity_with_the_same_draws() -> None:
    model = net()
    pre = Preconditioner(model, joint=False, seed=3, update_factors_every=1)
    x, y = batch()
    for step in range(2):
        with lw.observe(model, lw.KFAC(generator=torch.Generator().manual_seed(seed_of(3, step)))) as seen:
            F.cross_entropy(model(x), y).backward()
        state = torch.get_rng_state()
        with pre.watch() as watched:
            F.cross_entropy(model(x), y).backward()
        assert torch.equal(state, torch.get_rng_state())
        found = {n: (m.block.B,) if m.block.A is None else (m.block.A, m.block.B) for n, m in watched.blocks.items()}
        pre.step()
        for name, want in seen.kfac.factors.items():
            for f, w in zip(found[name], want, strict=True):
                assert torch.equal(f, w)


@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4), (3, 2, 2, 2)])
@pytest.mark.parametrize("order", ["own", "transposed", "shuffled"])
def test_a_layout_repeats_the_function_that_it_was_read_off(shape: tuple[int, ...], order: str) -> None:
    numel = math.prod(shape)
    size = (2, 3, numel // 6)
    places = torch.randperm(numel, generator=torch.Generator().manual_seed(0))

    def matrix(p: Tensor) -> Tensor:
        if order == "own":
            return p.reshape(size)
        return p.reshape(numel // 6, 2, 3).permute(1, 2, 0) if order == "transposed" else p.flatten()[places].view(size)

    layout = MatrixLayout.whole(shape).then(matrix)
    assert layout == MatrixLayout.at(shape, matrix(torch.arange(numel).view(shape)))
    assert layout == pickle.loads(pickle.dumps(layout)) != MatrixLayout.whole(shape, (1, numel, 1))
    assert (layout.index is not None) == (order == "shuffled")
    p = torch.randn(shape)
    assert torch.equal(layout.matrix(p), matrix(p))
    assert torch.equal(layout.fold(matrix(p)), p)
    several = torch.stack([matrix(p), 2 * matrix(p)])
    assert torch.equal(layout.fold(several), torch.stack([p, 2 * p]))
    assert layout.fold(torch.empty(size, device="meta")).shape == p.shape


@pytest.mark.parametrize("size", [(1, 2, 3), (2, 3, 2), (1, 2, 2)])
def test_a_layout_is_saved_as_axes_or_as_places(size: tuple[int, int, int]) -> None:
    """States hold axes of a whole parameter, else each element's place, and a layout read from either is the same."""
    k, o, i = size
    places = torch.arange(12).view(4, 3)
    axes, index = (None, places.t()[:2, :i][None].contiguous()) if k == 1 else ((0, 2, 1), None)
    state = {
        "A": torch.eye(i).repeat(k, 1, 1), "B": torch.eye(o).repeat(k, 1, 1), "bias": None, "parameter": None,
        "form": "rows", "batches": 3, "shape": [4, 3], "size": list(size), "index": index,
        "axes": None if axes is None else list(axes), "inverse": None, "eigen": None,
    }  # fmt: skip
    held, _ = load(state, torch.device("cpu"))
    assert held.block.layout == MatrixLayout.whole((4, 3)).then(
        lambda p: p.t()[:2, :i][None] if k == 1 else p.reshape(k, i, o).mT
    )
    assert average(held, held.block, 0.9).batches == 4
    again = save(held, None)
    assert same(again, state) and again.keys() == state.keys()


def test_averages_begin_anew_where_a_block_changes_and_leave_no_parameter_twice() -> None:
    layout = MatrixLayout.whole((3, 2), (1, 3, 2))
    apart = KroneckerBlock(torch.ones(1, 2, 2), torch.ones(1, 3, 3), layout)
    joint = KroneckerBlock(torch.ones(1, 3, 3), torch.ones(1, 3, 3), layout, bias="b")
    lone = Average(KroneckerBlock(None, torch.ones(1, 3, 3), MatrixLayout.whole((3,), (1, 3, 1))))
    first = average(None, apart, 0.9)
    assert average(first, apart, 0.9).batches == 2
    assert average(first, joint, 0.9).batches == 1
    turned = replace(apart, layout=MatrixLayout.whole((3, 2), (1, 3, 2), (0, 2, 1)))
    assert average(first, turned, 0.9).batches == 1
    old = {"w": first, "b": lone, "other": lone}
    assert set(merge(old, {"w": average(None, joint, 0.9)})) == {"w", "other"}
    assert set(merge({"w": average(None, joint, 0.9)}, {"b": lone})) == {"b"}


def test_every_seed_and_step_has_draws_of_its_own() -> None:
    """A generator on the CPU reads the lower 32 bits of its seed alone."""
    seeds = {seed_of(seed, step) % 2**32 for seed in range(50) for step in range(50)}
    assert len(seeds) == 2500
    model, factors = net(), []
    for seed in range(2):
        pre = Preconditioner(model, seed=seed)
        with pre.watch() as watched:
            closure_of(model)().backward()
        factors.append(watched.blocks["2.weight"].block.B)
    assert not torch.equal(*factors)


# Amortisation -------------------------------------------------------------------------------------------------


DUE = {1: range(8), 2: (0, 1, 2, 4, 6), 3: (0, 1, 2, 3, 6), 10: (0, 1, 2, 4), 100: (0, 1, 2, 4)}  # of eight steps


def test_what_is_held_serves_for_no_longer_than_training_has_lasted_nor_than_its_period() -> None:
    for every in range(1, 40):
        due = [step for step in range(200) if is_due(step, every)]
        assert all(later - step <= min(every, max(1, step)) for step, later in pairwise(due))
        assert [step for step in due if step >= every] == [step for step in range(every, 200) if step % every == 0]


@pytest.mark.parametrize(("factors", "inverses"), [(1, 1), (2, 3), (3, 2), (10, 100)])
def test_factors_and_inverses_change_on_exactly_their_steps(factors: int, inverses: int) -> None:
    model = net()
    opt = KFAC(model, update_factors_every=factors, update_inverses_every=inverses)
    pre = opt.preconditioner
    for step in range(8):
        before = copy.copy(pre.blocks.averages), copy.copy(pre.blocks.inverses)
        opt.step(closure_of(model, step))
        changed = [
            any(new[n] is not old.get(n) for n in new)
            for old, new in zip(before, (pre.blocks.averages, pre.blocks.inverses), strict=True)
        ]
        assert changed == [step in DUE[factors], step in DUE[inverses]]
        assert pre.steps == step + 1


def test_a_step_without_factors_records_nothing() -> None:
    model = net()
    opt = KFAC(model, update_factors_every=2)
    modes = []

    def closure() -> Tensor:
        modes.append(sum(isinstance(m, Tape) for m in torch.overrides._get_current_function_mode_stack()))
        return closure_of(model)()

    for _ in range(6):
        opt.step(closure)
    assert modes == [1, 1, 1, 0, 1, 0]


# In front of another optimizer ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_watch_in_front_of_adamw() -> None:
    model, mirror = net(), net()
    pre = Preconditioner(model, "kflr", damping=0.1, update_factors_every=2, update_inverses_every=1, factor_decay=0.0)
    opt, other = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, mirror))
    for step in range(4):
        opt.zero_grad()
        with pre.watch():
            closure_of(model, step)().backward()
        assert pre.step()
        opt.step()
        if step in DUE[2]:
            factors = loops(mirror, batch(step)[0])
        d = directions(mirror, factors, gradients(mirror, step), 0.1, "pi")
        for name, p in mirror.named_parameters():
            p.grad = d[name]
        other.step()
        oracle.assert_close(values(model), values(mirror))


@pytest.mark.parametrize("every", [1, 2])
def test_a_bad_batch_in_front_of_adamw_changes_nothing(every: int) -> None:
    model = net(torch.float32)
    pre = Preconditioner(model, update_factors_every=every)
    opt = torch.optim.AdamW(model.parameters())
    x, y = batch(dtype=torch.float32)
    for step in range(4):
        before = values(model), copy.deepcopy(pre.state_dict())
        spoiled = x.clone()
        spoiled[2, 1] = float("nan")
        opt.zero_grad()
        with pre.watch():
            F.cross_entropy(model(spoiled if step % 2 else x), y).backward()
        assert pre.step() == (step % 2 == 0)
        opt.step()
        if step % 2:
            assert all(torch.equal(p, before[0][n]) for n, p in model.named_parameters())
            assert pre.skipped == before[1].pop("skipped") + 1
            assert same(before[1], {k: v for k, v in pre.state_dict().items() if k != "skipped"})
    pre = Preconditioner(model, on_nonfinite="raise", update_factors_every=every)
    with pre.watch():
        F.cross_entropy(model(spoiled), y).backward()
    with pytest.raises(NonFinite, match=r"input of 0\.bias, 0\.weight"):
        pre.step()


def test_calls_out_of_order_are_refused() -> None:
    model = net()
    pre = Preconditioner(model)
    with pytest.raises(BadInput, match=r"with pre\.watch"):
        pre.step()
    with pytest.raises(BadInput, match="no backward pass ran"), pre.watch():
        closure_of(model)()
    with pytest.raises(BadInput, match=r"with pre\.watch"):
        pre.step()
    with pre.watch():
        closure_of(model)().backward()
    pre.step()
    with pytest.raises(BadInput, match=r"with pre\.watch"):
        pre.step()


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"kind": "newton"}, "kfac, kflr"), ({"damping_form": "half"}, "pi, factored, eigen"),
     ({"damping": 0.0}, "damping"),
     ({"factor_decay": 1.0}, "factor_decay"), ({"update_factors_every": 0}, "update_factors_every"),
     ({"update_inverses_every": 2.5}, "update_inverses_every"), ({"largest_factor": 0}, "largest_factor"),
     ({"draws": 0}, "draws"), ({"sharing": "some"}, "sharing"), ({"on_nonfinite": "ignore"}, "on_nonfinite")],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    for make in (Preconditioner, KFAC):
        with pytest.raises(BadInput, match=text):
            make(net(), **settings)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"kl_clip": 0.0}])
def test_settings_of_the_optimizer_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=next(iter(settings))):
        KFAC(net(), **settings)


# State -------------------------------------------------------------------------------------------------------


class Forms(nn.Module):
    """A grouped and a transposed convolution, a transposed matrix, an embedding, a norm and a derived weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 4, 2, groups=2)
        self.up = nn.ConvTranspose1d(4, 2, 2)
        self.norm = nn.LayerNorm(2)
        self.matrix = nn.Parameter(torch.randn(2, 3))
        self.derived = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.conv(self.embed(x).mT).tanh()).mT
        return self.derived((self.norm(h).tanh() @ self.matrix).mean(1))


def words(seed: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(9, (6, 5), generator=gen), torch.randint(3, (6,), generator=gen)


@pytest.mark.parametrize("form", ["pi", "eigen"])
def test_resumed_at_every_step_it_goes_on_bitwise(form: str) -> None:
    def make(model: nn.Module) -> lw.optim.KFAC:
        return KFAC(model, damping_form=form, update_factors_every=3, update_inverses_every=4, lr=0.01)

    def step(model: nn.Module, opt: lw.optim.KFAC, seed: int) -> None:
        x, y = words(seed)
        opt.step(lambda: F.cross_entropy(model(x), y))

    model = Forms()
    opt = make(model)
    saved, wanted = [], []
    for t in range(9):
        saved.append(through_a_file((model.state_dict(), opt.state_dict())))
        step(model, opt, t)
        wanted.append(copy.deepcopy((model.state_dict(), opt.state_dict())))
    for t, (weights, state) in enumerate(saved):
        other = Forms()
        resumed = make(other)
        step(other, resumed, 77)
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        for later in range(t, min(t + 5, 9)):
            step(other, resumed, later)
            assert same((other.state_dict(), resumed.state_dict()), wanted[later]), (t, later)
    names = {n for n, _ in model.named_parameters()}
    assert set(opt.state_dict()["preconditioner"]["blocks"]) < names


def test_a_state_does_not_change_behind_its_holder() -> None:
    model = net()
    opt = KFAC(model, update_factors_every=1, update_inverses_every=1)
    opt.step(closure_of(model))
    state = opt.preconditioner.state_dict()
    before = copy.deepcopy(state)
    other = Preconditioner(model)
    other.load_state_dict(state)
    for step in range(2):
        opt.step(closure_of(model, step))
    assert same(state, before) and same(other.state_dict(), before)


def test_states_of_others_are_refused() -> None:
    model = net()
    opt = KFAC(model)
    opt.step(closure_of(model))
    before = copy.deepcopy(opt.state_dict())
    exact = KFAC(model, kind="kflr")
    exact.step(closure_of(model))
    with pytest.raises(BadInput, match=r"the saved factors are of kind 'kflr', and ours 'kfac'$"):
        opt.load_state_dict(exact.state_dict())
    wide = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    foreign = KFAC(wide)
    foreign.step(closure_of(wide))
    with pytest.raises(BadInput, match=r"0\.weight"):
        opt.load_state_dict(foreign.state_dict())
    assert same(opt.state_dict(), before)


# Parameters without factors ---------------------------------------------------------------------------------------


def test_parameters_without_factors_have_the_diagonal_of_the_same_draws() -> None:
    model = Forms()
    x, y = words(0)
    before = values(model)
    grads = dict(zip(before, torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())), strict=True))
    with lw.observe(model, lw.DiagGGN(draws=1, generator=torch.Generator().manual_seed(seed_of(0, 0)))) as seen:
        F.cross_entropy(model(x), y).backward()
    opt = KFAC(model, lr=0.1, damping=0.02, kl_clip=None)
    opt.step(lambda: F.cross_entropy(model(x), y))
    said = opt.describe()
    rest = {n for n, text in said.items() if text == "diag-ggn (draws=1)"}
    assert rest == {n for n in before if n.startswith("derived.parametrizations")}
    assert said["conv.weight"].startswith("kfac [2, 2, 5]") and said["conv.bias"] == "in the block of conv.weight"
    for name in before:
        moved = values(model)[name] - before[name]
        want = -0.1 * grads[name] / (seen.diag_ggn[name] + 0.02)
        assert torch.allclose(moved, want, rtol=1e-4, atol=1e-7) == (name in rest), name


@pytest.mark.parametrize("kind", ["kfac", "kflr", "ekfac"])
def test_factors_that_would_be_too_large_are_left_out(kind: str) -> None:
    model = net()
    opt = KFAC(model, kind=kind, largest_factor=4, joint=False)
    for step in range(2):
        opt.step(closure_of(model, step))
        rest = {name for name, text in opt.describe().items() if text == "diag-ggn (draws=1)"}
        assert rest == {"0.weight", "0.bias", "2.weight"}
        assert opt.describe()["2.bias"].startswith(kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_of_half_precision_are_kept_in_float32(dtype: torch.dtype) -> None:
    model = net(dtype)
    opt = KFAC(model)
    losses = [float(opt.step(closure_of(model))) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(b["B"].dtype == torch.float32 for b in opt.preconditioner.state_dict()["blocks"].values())


def test_a_closure_may_clip_and_accumulate_its_own_gradient() -> None:
    """What the closure leaves in `.grad` is the gradient; without a backward pass of its own `.grad` stays."""
    one, two = net(), net()
    opts = [KFAC(m, update_factors_every=2) for m in (one, two)]
    for step in range(4):

        def halved(step: int = step) -> Tensor:
            opts[0].zero_grad()
            loss = closure_of(one, step)()
            loss.backward()
            for p in one.parameters():
                p.grad.mul_(1.0)
            return loss

        opts[0].step(halved)
        opts[1].step(closure_of(two, step))
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert all(p.grad is None for p in two.parameters()) and all(p.grad is not None for p in one.parameters())
    assert torch.overrides._get_current_function_mode_stack() == []


# Bad batches and bad factors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["input", "loss", "gradient"])
def test_a_bad_batch_on_any_step_changes_nothing(where: str) -> None:
    model = net(torch.float32)
    opt = KFAC(model, update_factors_every=2)
    for step in range(4):
        x, y = batch(step, dtype=torch.float32)
        scale = 1.0
        if where == "input":
            x[1, 2] = float("inf")
        elif where == "loss":
            scale = float("nan")
        else:
            scale = 1e30

        def closure(x: Tensor = x, y: Tensor = y, scale: float = scale) -> Tensor:
            return scale * F.cross_entropy(model(x), y)

        before = copy.deepcopy((model.state_dict(), opt.state_dict()))
        opt.step(closure)
        assert opt.skipped == step + 1 and opt.preconditioner.steps == step
        after = opt.state_dict()
        for state in (before[1], after):
            del state["skipped"]
        assert same(before, (model.state_dict(), after))
        opt.step(closure_of(model, step))


def bad_factor(gen: torch.Generator, size: int) -> Tensor:
    """A factor of any rank and scale, with noise that is neither symmetric nor small against it."""
    rank = int(torch.randint(size + 1, (), generator=gen))
    root = torch.randn(1, size, rank, generator=gen)
    factor = root @ root.mT
    kind = int(torch.randint(4, (), generator=gen))
    if kind == 1:
        factor = factor + 0.1 * torch.randn(1, size, size, generator=gen)
    elif kind == 2:
        factor = -factor
    elif kind == 3:
        scales = 10.0 ** torch.empty(size).uniform_(-10, 10, generator=gen)
        factor = scales[:, None] * factor * scales
    return factor * 10.0 ** float(torch.empty(()).uniform_(-20, 20, generator=gen))


@pytest.mark.parametrize("form", ["pi", "factored", "eigen"])
def test_bad_factors_never_raise_and_never_give_nan(form: str) -> None:
    gen = torch.Generator().manual_seed(0)
    raised = identity = 0
    for trial in range(400):  # times three forms
        o, i = (int(torch.randint(1, 7, (), generator=gen)) for _ in range(2))
        block = KroneckerBlock(bad_factor(gen, i), bad_factor(gen, o))
        damping = 10.0 ** float(torch.empty(()).uniform_(-8, 1, generator=gen))
        found = invert("w", block, damping, form)
        raised += found.raised
        identity += found.block is None
        w = torch.randn(1, o, i, generator=gen)
        if found.block is not None:
            out = found.block.apply(w)
            assert bool(torch.isfinite(out).all()), trial
            # no direction is stretched further than an undamped zero would be
            assert float(out.norm()) <= 2.1 * max(o, i) * float(w.norm()) / damping, trial
    assert identity < 40 and (raised > 0 or form == "eigen")


def test_a_factor_of_nan_is_the_identity_in_the_end() -> None:
    layout = MatrixLayout.whole((2, 2), (1, 2, 2))
    block = KroneckerBlock(torch.full((1, 2, 2), float("nan")), torch.eye(2)[None], layout)
    for form in ("pi", "factored", "eigen"):
        assert invert("w", block, 1e-3, form) == (None, True, False)
    held, inverse = load(save(Average(block), invert("w", block, 1.0, "pi")), torch.device("cpu"))
    assert inverse == (None, True, False) and held.batches == 1
    model = net()
    pre = Preconditioner(model)
    with pre.watch():
        closure_of(model)().backward()
    pre.step()
    pre.blocks.inverses["0.weight"] = inverse
    assert pre.counters == {"raised": 0, "kept": 0, "identity": 1}
    assert "could not be inverted" in pre.describe()["0.weight"]
    grads = gradients(model)
    out = pre.precondition(grads)
    assert out["0.weight"] is grads["0.weight"] and not torch.equal(out["2.weight"], grads["2.weight"])


# Groups and models ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_groups_have_their_own_settings() -> None:
    model = net()
    before, grads = values(model), gradients(model)
    opt = KFAC(
        model, [{"params": model[0].parameters(), "lr": 0.1, "damping": 0.5}, {"params": model[2].parameters()}],
        kind="kflr", lr=0.2, damping=0.01, kl_clip=None,
    )  # fmt: skip
    factors = loops(model, batch()[0])
    opt.step(closure_of(model))
    for key, lr, damping in (("0", 0.1, 0.5), ("2", 0.2, 0.01)):
        want = directions(model, {key: factors[key]}, grads, damping, "pi")
        oracle.assert_close({n: (before[n] - values(model)[n]) / lr for n in want}, want, 1e-9)


@pytest.mark.parametrize("every", [{}, {"update_factors_every": 10, "update_inverses_every": 100}], ids=["", "10/100"])
def test_its_defaults_learn_faster_than_adam(every: dict[str, int]) -> None:
    """Scikit-learn's digits, 64-100-100-10 with ReLU, 3 epochs of batches of 50; Adam at its default rate."""
    digits = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn").load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    losses = []
    for make in (lambda m: KFAC(m, **every), lambda m: torch.optim.Adam(m.parameters())):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
        opt = make(model)
        for _ in range(3):
            for rows in torch.randperm(len(x)).split(50):

                def closure(rows: Tensor = rows, model: nn.Module = model, opt: Any = opt) -> Tensor:
                    opt.zero_grad()
                    loss = F.cross_entropy(model(x[rows]), y[rows])
                    loss.backward()
                    return loss

                opt.step(closure)
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(x), y)))
    assert losses[0] < 0.6 * losses[1], losses


@pytest.mark.usefixtures("float64")
@one_in(2, case=cases(first_loss_only=True))
def test_every_model_of_the_zoo_descends(case: Case) -> None:
    instance = case.make()
    opt = KFAC(instance.subject, lr=1e-3, momentum=0.0, damping=0.1, kl_clip=1e-5)
    losses = [float(opt.step(instance.loss)) for _ in range(3)]
    with torch.no_grad():
        losses.append(float(instance.loss()))
    assert opt.skipped == 0 and opt.counters["identity"] == 0
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
