"""AltMin: the self-checks of its specification, and what every layer is fitted to."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from grids import one_in
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadInput, Undefined
from layerwise.local.codes.code_step import CodeStep, Terms, sweep
from layerwise.local.problem import LocalProblem, local_gradient
from layerwise.local.solvers.closed import prox_step
from layerwise.operators.ridge import coordinate_descent, ridge
from layerwise.replay.coded import CodedModel

Closure = Callable[[], Tensor]
codes_kinds = pytest.mark.parametrize("codes", ["jacobi", "sweep"])


def mlp(*sizes: int, f: Callable[[], nn.Module] = nn.Tanh, norm: bool = False, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for number, (i, o) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(i, o))
        if number < len(sizes) - 2:
            layers += [nn.BatchNorm1d(o), f()] if norm else [f()]
    return nn.Sequential(*layers).double()


def lenet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10),
    ).double()  # fmt: skip


def batch(n: int = 12, i: int = 5, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, i, generator=gen, dtype=torch.float64), torch.randint(classes, (n,), generator=gen)


def images(n: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 12, 12, generator=gen, dtype=torch.float64), torch.randint(10, (n,), generator=gen)


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(x: Tensor, y: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=rtol * max(1e-6, float(y.abs().max())))


def descent(model: Any, closure: Closure, **settings: Any) -> dict[str, Tensor]:
    """The local gradients of a step, by name: one step of plain gradient descent of rate 1."""
    params = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items()}
    lw.AltMin(model, weights="sgd", lr=1.0, momentum=0.0, steps=1, rows="all", **settings).step(closure)
    found = {name: before[name] - p.detach() for name, p in params.items()}
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(before[name])
    return found


# Codes ------------------------------------------------------------------------------------------------------


def swept(prox: float, steps: int = 5, nesterov: bool = True, coupling: float = 0.5) -> tuple[Tensor, Tensor]:
    """The code of a two-layer net after a sweep; and by hand, with momentum, on the same objective."""
    net, (x, y) = mlp(5, 4, 3), batch()
    coded = CodedModel(net, lambda: F.cross_entropy(net(x), y))
    step = CodeStep(steps=steps, lr=0.2, momentum=0.8, nesterov=nesterov, prox=prox)
    z = net[0](x).detach()
    found = sweep(coded, {0: z}, Terms({0: coupling}, float(len(x))), step)[0]
    code, velocity = z.clone(), torch.zeros_like(z)
    for _ in range(steps):
        c = (code + 0.8 * velocity if nesterov else code).requires_grad_()
        energy = (
            F.cross_entropy(net[2](c.tanh()), y, reduction="sum")
            + coupling / 2 * (c - z).square().sum()
            + prox / 2 * (c - z).square().sum()
        )
        velocity = 0.8 * velocity - 0.2 * torch.autograd.grad(energy, c)[0]
        code = (code + velocity).detach()
    return found, code


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("prox", [0.0, 2.0])
def test_a_sweep_follows_its_objective_by_hand(prox: float, nesterov: bool) -> None:
    close(*swept(prox, nesterov=nesterov), 1e-12)


def test_the_proximal_term_has_a_gradient() -> None:
    """In the released program its anchor was not detached, so it had none."""
    with_it, without = swept(2.0)[0], swept(0.0)[0]
    assert float((with_it - without).abs().max()) > 1e-2
    z = mlp(5, 4, 3)[0](batch()[0]).detach()
    assert (with_it - z).norm() < (without - z).norm()
    assert torch.equal(swept(2.0, steps=1)[0], swept(0.0, steps=1)[0])  # at its anchor it is 0


def test_a_sweep_of_three_layers_uses_the_codes_above_already_moved() -> None:
    net, (x, y) = mlp(5, 4, 4, 3), batch()
    coded = CodedModel(net, lambda: F.cross_entropy(net(x), y))
    start = {0: net[0](x).detach(), 1: net[2](net[1](net[0](x))).detach()}
    coupling = {0: 0.7, 1: 0.3}
    found = sweep(coded, start, Terms(coupling, 12.0), CodeStep(steps=1, lr=0.5, momentum=0.0))

    c = start[1].clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[4](c.tanh()), y, reduction="sum"), c)
    upper = start[1] - 0.5 * g
    close(found[1], upper)
    c = start[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(0.3 / 2 * (upper - net[2](c.tanh())).square().sum(), c)
    close(found[0], start[0] - 0.5 * g)


@pytest.mark.parametrize("kind", ["tanh", "lenet"])
def test_one_small_code_step_gives_backprops_direction_at_every_layer(kind: str) -> None:
    net, (x, y) = (lenet(), images()) if kind == "lenet" else (mlp(5, 6, 6, 6, 3), batch())

    def closure() -> Tensor:
        return F.cross_entropy(net(x), y)

    grads = dict(zip(dict(net.named_parameters()), torch.autograd.grad(closure(), list(net.parameters())), strict=True))
    # each code moves by rate·μ of what the one above does: small against it, and large against rounding
    found = descent(net, closure, codes="sweep", coupling=1.0, code_step=CodeStep(steps=1, lr=2e-4, momentum=0.0))
    for name, g in grads.items():
        assert found[name].norm() > 0
        one, two = found[name].flatten(), g.flatten()
        assert float(one @ two / one.norm() / two.norm()) >= 1 - 1e-6, name


def test_a_sweep_sends_no_cotangent_through_a_block() -> None:
    """An autograd Function after each layer counts the backward passes through it."""
    passed = [0] * 4

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
            ctx.number = number
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            passed[ctx.number] += 1
            return grads[0], None

    class Spy(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: Tensor) -> Tensor:
            return Counted.apply(x, self.number)

    layers = [m for k in range(4) for m in (nn.Linear(5 if k == 0 else 4, 4), Spy(k), nn.Tanh())]
    net, (x, y) = nn.Sequential(*layers, nn.Linear(4, 3)).double(), batch()
    # one code: only the block above it is crossed, whatever its depth
    coded = CodedModel(net, lambda: F.cross_entropy(net(x), y))
    for index in range(4):
        passed[:] = [0] * 4
        codes = {i: torch.randn(12, 4, dtype=torch.float64) for i in range(4)}
        sweep(coded, {index: codes[index]}, Terms({index: 1.0}, 12.0), CodeStep(steps=1))
        assert passed == [int(k >= index) for k in range(4)]  # without codes above, all the way to the loss
    passed[:] = [0] * 4
    sweep(coded, codes, Terms(dict.fromkeys(codes, 1.0), 12.0), CodeStep(steps=3))
    assert passed == [3, 3, 3, 3]  # each code's three steps, through its own block and no other
    passed[:] = [0] * 4
    opt = lw.AltMin(net, codes="sweep", code_step=CodeStep(steps=3))
    opt.step(lambda: F.cross_entropy(net(x), y))
    assert passed == [3, 3, 3, 3]  # the weights need no cotangent of the activations
    passed[:] = [0] * 4
    lw.AltMin(net).step(lambda: F.cross_entropy(net(x), y))
    assert passed == [1, 1, 1, 1]  # jacobi: one backward pass


def test_jacobi_codes_are_backprops() -> None:
    """With T = 1 the local gradients are backprop's own, whatever μ."""
    net, (x, y) = mlp(5, 6, 6, 3), batch()
    grads = dict(
        zip(params_of(net), torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())), strict=True)
    )
    for coupling in (1e-3, 1.0, 50.0):
        found = descent(net, lambda: F.cross_entropy(net(x), y), coupling=coupling)
        for name, g in grads.items():
            close(found[name], g, 1e-11)


# Identities ---------------------------------------------------------------------------------------------------


def reference(kind: str, params: Any) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.Adam(params, lr=0.01)
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("net", ["mlp", "lenet", "transposed", "norms"])
def test_one_local_step_on_all_rows_is_the_global_optimizer(kind: Any, net: str) -> None:
    def make() -> tuple[nn.Module, Closure]:
        torch.manual_seed(0)
        if net == "lenet":
            model: nn.Module = lenet()
            x, y = images()
        else:
            x, y = batch()
            model = {"mlp": lambda: mlp(5, 6, 6, 3), "transposed": Transposed}.get(
                net, lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
            )().double()
        return model, lambda: F.cross_entropy(model(x), y)

    (ours, loss), (plain, plain_loss) = make(), make()
    start = params_of(ours)
    opt = lw.AltMin(ours, weights=kind, lr=0.01 if kind == "adam" else 0.05, steps=1, rows="all", coupling=0.03)
    other = reference(kind, plain.parameters())
    for _ in range(5):
        opt.step(loss)
        other.zero_grad()
        plain_loss().backward()
        other.step()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert not torch.equal(q, start[name])
        # Adam divides by |g| + 1e-8: where a gradient is itself rounding, so is its step
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10 if kind == "sgd" else 1e-8)


class Transposed(nn.Module):
    """Weights that lie the other way round, so that their gradients' memory does as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7, 3))
        self.c = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.c, (x @ self.a).tanh(), self.b)


def test_exact_block_coordinate_descent_is_ridge() -> None:
    """The hidden layer's problem with its proximal term: closed form, ridge and coordinate descent agree."""
    gen = torch.Generator().manual_seed(0)
    a = torch.randn(40, 6, generator=gen, dtype=torch.float64)
    codes = torch.randn(40, 4, generator=gen, dtype=torch.float64)
    w = torch.randn(4, 6, generator=gen, dtype=torch.float64)
    damping = 0.3
    moments, b = a.T @ a, codes.T @ a + damping * w
    exact = ridge(moments, b, damping)
    problem = LocalProblem(a[:, None], w[None], None, codes[:, None], prox=1 / damping)
    close(w + prox_step(problem)[0][0], exact, 1e-12)
    close(coordinate_descent(w, moments, b, sweeps=400, damping=damping), exact, 1e-10)
    assert float(local_gradient(problem, exact[None])[0].abs().max()) < 1e-11


# What each layer is fitted to ------------------------------------------------------------------------------


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce mean": lambda z, y: F.cross_entropy(z, y),
    "ce sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "ce scaled": lambda z, y: 0.3 * F.cross_entropy(z, y, label_smoothing=0.1),
    "bce mean": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).double()),
    "bce pixels": lambda z, y: (
        F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).double(), reduction="sum") / len(y)
    ),
    "mse mean": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double()),
    "mse sum": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double(), reduction="sum"),
}


@pytest.mark.parametrize("name", LOSSES)
@codes_kinds
def test_the_output_layer_descends_the_loss_itself(name: str, codes: Any) -> None:
    """Four steps on all rows are four steps on the loss of that layer alone, on its inputs, by autograd."""
    net, (x, y) = mlp(5, 4, 3), batch()
    weight, bias = net[2].weight.detach().clone(), net[2].bias.detach().clone()
    step, lr = CodeStep(steps=2, lr=0.1, momentum=0.5), 0.01 if "sum" in name else 0.1
    opt = lw.AltMin(net, codes=codes, weights="sgd", lr=lr, momentum=0.0, steps=4, rows="all",
                    code_step=step if codes == "sweep" else None,
                    coupling=0.4, reduction="sum" if "sum" in name else "mean")  # fmt: skip
    h = net[0](x).detach()
    if codes == "sweep":
        coded = CodedModel(net, lambda: LOSSES[name](net(x), y))
        h = sweep(coded, {0: h}, Terms({0: 0.4}, 1.0 if "sum" in name else 12.0), step)[0]
    opt.step(lambda: LOSSES[name](net(x), y))
    for _ in range(4):
        w, b = weight.requires_grad_(), bias.requires_grad_()
        dw, db = torch.autograd.grad(LOSSES[name](F.linear(h.tanh(), w, b), y), [w, b])
        weight, bias = (w - lr * dw).detach(), (b - lr * db).detach()
    close(net[2].weight.detach(), weight, 1e-12)
    close(net[2].bias.detach(), bias, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@codes_kinds
def test_hidden_layers_descend_their_coupling(codes: Any, reduction: Any) -> None:
    """Three steps on `(μ/B) ½ |c − W a|²`, by autograd, at each hidden layer with a μ of its own."""
    net, (x, y) = mlp(5, 4, 6, 3), batch()
    scale = 12.0 if reduction == "mean" else 1.0
    step = CodeStep(steps=3, lr=0.1, momentum=0.5)

    def closure() -> Tensor:
        return F.cross_entropy(net(x), y, reduction=reduction)

    coupling = {0: 0.3, 1: 0.8}
    z = [net[0](x).requires_grad_()]
    z.append(net[2](z[0].tanh()))
    if codes == "jacobi":
        grads = torch.autograd.grad(F.cross_entropy(net[4](z[1].tanh()), y, reduction=reduction), z)
        target = {i: (z[i] - scale / coupling[i] * grads[i]).detach() for i in (0, 1)}
        inputs = {0: x, 1: z[0].detach().tanh()}
    else:
        coded = CodedModel(net, closure)
        target = sweep(coded, {i: z[i].detach() for i in (0, 1)}, Terms(coupling, scale), step)
        inputs = {0: x, 1: target[0].tanh()}
    weights = {i: [net[2 * i].weight.detach().clone(), net[2 * i].bias.detach().clone()] for i in (0, 1)}
    groups = [{"params": net[k].parameters(), "coupling": coupling.get(k // 2, 0.5)} for k in (0, 2, 4)]
    opt = lw.AltMin(net, groups, codes=codes, weights="sgd", lr=0.2, momentum=0.0, steps=3, rows="all",
                    code_step=step if codes == "sweep" else None, reduction=reduction)  # fmt: skip
    opt.step(closure)
    for i in (0, 1):
        w, b = weights[i]
        for _ in range(3):
            w, b = w.requires_grad_(), b.requires_grad_()
            energy = coupling[i] / scale / 2 * (target[i] - F.linear(inputs[i], w, b)).square().sum()
            dw, db = torch.autograd.grad(energy, [w, b])
            w, b = (w - 0.2 * dw).detach(), (b - 0.2 * db).detach()
        close(net[2 * i].weight.detach(), w, 1e-11)
        close(net[2 * i].bias.detach(), b, 1e-11)


@codes_kinds
def test_reduction_sum_is_the_mean_times_b(codes: Any) -> None:
    """The same codes and, with SGD at rate 1/B, the same weights."""
    x, y = batch()
    step = CodeStep(steps=3, lr=0.1)
    nets = [mlp(5, 4, 6, 3) for _ in range(2)]
    for net, reduction, lr in zip(nets, ("mean", "sum"), (0.12, 0.01), strict=True):
        opt = lw.AltMin(net, codes=codes, weights="sgd", lr=lr, reduction=reduction, coupling=0.5,
                        code_step=step if codes == "sweep" else None)  # type: ignore[arg-type]  # fmt: skip
        for _ in range(3):
            opt.step(lambda net=net, r=reduction: F.cross_entropy(net(x), y, reduction=r))
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-10)


def test_parameters_between_codes_get_the_relaxed_objectives_gradient() -> None:
    """A LayerNorm's scale after the first code: by autograd on the objective at the moved codes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)
    )
    net, (x, y) = net.double(), batch()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    step, coupling = CodeStep(steps=2, lr=0.1, momentum=0.5), 0.6
    coded = CodedModel(net, lambda: F.cross_entropy(net(x), y))
    layers = [u.index for u in coded.uses if u.call.func is F.linear]
    z = [net[0](x).detach(), net[:4](x).detach()]
    codes = sweep(coded, dict(zip(layers[:2], z, strict=True)), Terms(dict.fromkeys(layers[:2], coupling), 12.0), step)
    c0, c1 = (codes[i] for i in layers[:2])
    objective = F.cross_entropy(net[4:](c1), y) + coupling / 12 / 2 * (
        (c0 - net[0](x)).square().sum() + (c1 - net[1:4](c0)).square().sum()
    )
    names = list(dict(net.named_parameters()))
    wanted = dict(zip(names, torch.autograd.grad(objective, list(net.parameters())), strict=True))
    found = descent(net, lambda: F.cross_entropy(net(x), y), codes="sweep", code_step=step, coupling=coupling)
    for name in names:
        close(found[name], wanted[name], 1e-11)
    assert all(wanted[n].any() for n in ("1.weight", "1.bias", "4.weight", "4.bias"))


def test_a_sweep_on_convolutions_with_in_place_relu_starts_at_the_layers_outputs() -> None:
    """The in-place function overwrites them in the first run: codes must not start at what it left."""
    net, (x, y) = lenet(), images()
    # codes that do not move leave every hidden layer where it is
    found = descent(net, lambda: F.cross_entropy(net(x), y), codes="sweep", code_step=CodeStep(steps=1, lr=0.0))
    for name, moved in found.items():
        assert bool(moved.any()) == name.startswith("9."), name
    wanted = torch.autograd.grad(F.cross_entropy(net(x), y), [net[9].weight, net[9].bias])
    close(found["9.weight"], wanted[0])
    close(found["9.bias"], wanted[1])


# Every layer drifts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["lenet", "sigmoid"])
@codes_kinds
@pytest.mark.parametrize("weights", ["adam", "sgd"])
def test_every_layer_drifts(depth: str, codes: Any, weights: Any) -> None:
    """In the released program LeNet's first convolution never moved."""
    if depth == "lenet":
        net, (x, y) = lenet(), images(32)
    else:
        net, (x, y) = mlp(5, *[8] * 6, 3, f=nn.Sigmoid), batch(32)
    before = params_of(net)
    opt = lw.AltMin(net, codes=codes, weights=weights, **({} if weights == "adam" else {"lr": 0.05}))
    for _ in range(20):
        opt.step(lambda: F.cross_entropy(net(x), y))
    # plain gradients vanish in a deep sigmoid net: there SGD's drift is only not 0
    least = {"adam": 1e-3, "sgd": 1e-9 if depth == "sigmoid" else 1e-4}[weights]
    for name, p in net.named_parameters():
        if name.endswith("weight"):
            moved = float((p.detach() - before[name]).norm() / before[name].norm())
            assert moved > least, (name, moved)


@pytest.mark.parametrize("drop", [0.0, 0.3], ids=["replay", "substitution"])
@codes_kinds
def test_batch_norm_statistics_advance_once_a_step(codes: Any, drop: float) -> None:
    x, y = batch()
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(drop), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Linear(6, 3),
        ).double())  # fmt: skip
    opt = lw.AltMin(nets[0], codes=codes)
    for _ in range(3):
        with torch.no_grad():
            for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
                q.copy_(p)
        state = torch.get_rng_state()
        opt.step(lambda: F.cross_entropy(nets[0](x), y))
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        nets[1](x)
        assert torch.equal(torch.get_rng_state(), after)  # and the generator as far as one forward pass brings it
        for one, two in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
            assert torch.equal(one, two)
    assert int(nets[0][1].num_batches_tracked) == 3


@codes_kinds
def test_a_closure_that_calls_backward_changes_nothing(codes: Any) -> None:
    x, y = batch()
    nets = [mlp(5, 6, 6, 3) for _ in range(2)]

    def with_backward() -> Tensor:
        loss = F.cross_entropy(nets[1](x), y)
        loss.backward()
        return loss

    for net, closure in zip(nets, (lambda: F.cross_entropy(nets[0](x), y), with_backward), strict=True):
        opt = lw.AltMin(net, codes=codes)
        for _ in range(3):
            opt.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@one_in(2, case=zoo.cases(first_loss_only=True), codes=["jacobi", "sweep"])
def test_every_model_of_the_zoo_can_be_stepped(case: zoo.Case, codes: Any) -> None:
    """Whatever has a gradient moves, the rest stays, nothing else changes."""
    made = case.make()
    # a single output per sample under cross entropy, say, has no gradient at all
    grads = torch.autograd.grad(made.loss(), list(made.params.values()), allow_unused=True)
    idle = {n for n, g in zip(made.params, grads, strict=True) if g is None}
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    opt = lw.AltMin(made.subject, codes=codes)
    loss = opt.step(made.loss)
    assert opt.skipped == 0 and bool(torch.isfinite(loss))
    for name, p in made.model.named_parameters():
        assert bool(torch.isfinite(p).all())
        if name in idle or not p.requires_grad:
            assert torch.equal(p, before[name]), name
        elif codes == "jacobi" and "dead" not in case.problem.tags:
            assert not torch.equal(p, before[name]), name


# Settings ------------------------------------------------------------------------------------------------


def test_the_published_preset() -> None:
    opt = lw.AltMin(mlp(2, 2), preset="published")
    (group,) = opt.param_groups
    got = {k: group[k] for k in ("weights", "lr", "coupling", "steps", "rows", "betas", "eps")}
    assert got == {
        "weights": "adam",
        "lr": 8e-3,
        "coupling": 3e-3,
        "steps": 1,
        "rows": "all",
        "betas": (0.9, 0.999),
        "eps": 1e-8,
    }
    assert opt._fitter.codes == "sweep" and opt._fitter.code_step == CodeStep(
        steps=5, lr=0.3, momentum=0.9, nesterov=True, prox=0.0
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0}, {"lr": float("nan")}, {"coupling": 0.0}, {"steps": 0}, {"steps": 1.5}, {"rows": 0},
        {"rows": "few"},
        {"weights": "lion"}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"momentum": 1.0}, {"codes": "gauss"},
        {"preset": "best"}, {"reduction": "none"}, {"on_nonfinite": "pass"},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        lw.AltMin(mlp(2, 2), **wrong)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": -1.0}, {"momentum": 1.0}, {"prox": -0.1}])
def test_wrong_code_steps_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        CodeStep(**wrong)


def test_a_sweep_over_a_path_that_depends_on_the_codes_is_refused_and_changes_nothing() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.runs = 0

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            self.runs += 1
            if float(h.detach().sum()) < 1e9 and self.runs > 1:
                h = self.b(h)
            return self.c(h)

    net, (x, y) = Branching().double(), batch()
    before = params_of(net)
    with pytest.raises(Undefined, match="codes='jacobi'"):
        lw.AltMin(net, codes="sweep").step(lambda: F.cross_entropy(net(x), y))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
