"""LocoProp: its local problems on every model of the zoo, the published rule, and what moves when."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from grids import one_in
from local_cases import mlp
from torch import Tensor, nn

import layerwise as lw
from layerwise import local
from layerwise.errors import BadInput
from layerwise.local import transfer as tr
from layerwise.local.layers.layer import Layer
from layerwise.local.layers.record import Recorded, problem_of, record
from layerwise.local.problem import local_gradient, predict
from layerwise.local.transfer import IDENTITY

CASES = zoo.cases(first_loss_only=True)
every_case = one_in(2, case=CASES)
GAMMA = 7.0


def close(x: Tensor, y: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(x, y, rtol=0, atol=rtol * max(1e-3, float(y.abs().max())))


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def batch(n: int = 12, i: int = 5, classes: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, i, generator=gen, dtype=torch.float64), torch.randint(classes, (n,), generator=gen)


# The local problems, on the whole zoo -----------------------------------------------------------------


@one_in(2, case=CASES, loss=["matching", "squared"])
def test_first_local_gradients_are_gamma_times_backprop(case: zoo.Case, loss: str) -> None:
    made = case.make()
    wanted = oracle.gradient(made.params, made.loss)
    recorded = record(made.subject, made.loss)
    found = {name: GAMMA * g for name, g in recorded.gradients.items()}
    for layer in recorded.layers:
        f = layer.transfer if loss == "matching" and not layer.transfer.stand_in else IDENTITY
        problem = problem_of(recorded, layer, GAMMA, f)
        dw, db = local_gradient(problem)
        assert layer.names[0] not in found
        found[layer.names[0]] = layer.fold(dw)
        if db is not None:
            found[layer.names[1]] = db.reshape(recorded.tape.parameters[layer.names[1]].shape)
    for name, g in wanted.items():
        if name in found:
            close(found[name], GAMMA * g)
        else:
            assert not g.any()


@every_case
def test_local_problems_predict_the_layers_outputs_at_other_weights(case: zoo.Case) -> None:
    """`W a + b + rest` is what the call itself gives, also far from the weights it was made at."""
    made = case.make()
    recorded = record(made.subject, made.loss)
    for layer in recorded.layers:
        problem = problem_of(recorded, layer, GAMMA, layer.transfer)
        # rows that the layer leaves out (an embedding's padding) are zero in `rows`
        kept = layer.join([part.rows(problem.weight.new_ones(part.call.out_shape)) for part in layer.parts])
        close(kept * predict(problem), layer.join([part.rows(part.output()) for part in layer.parts]))
        with torch.no_grad():
            for name in layer.names:
                recorded.tape.parameters[name].add_(torch.randn_like(recorded.tape.parameters[name]))
            again = []
            for part in layer.parts:
                args = tuple(a.clone() if isinstance(a, Tensor) and not a.requires_grad else a for a in part.call.args)
                again.append(part.rows(part.call.func(*args, **part.call.kwargs)))
        close(kept * predict(problem), layer.join(again))


def test_the_zoo_has_enough_layers_for_these_tests() -> None:
    counts = [len(record((made := case.make()).subject, made.loss).layers) for case in CASES]
    assert sum(counts) >= 100 and sum(c == 0 for c in counts) <= len(counts) / 3


TRANSFERS: list[tuple[Any, tr.Transfer]] = [
    (torch.tanh, tr.TANH),
    (Tensor.tanh_, tr.TANH),
    (nn.Tanh(), tr.TANH),
    (torch.sigmoid, tr.SIGMOID),
    (nn.Sigmoid(), tr.SIGMOID),
    (F.relu, tr.RELU),
    (nn.ReLU(inplace=True), tr.RELU),
    (Tensor.relu, tr.RELU),
    (nn.LeakyReLU(0.2), tr.leaky_relu(0.2)),
    (nn.Hardtanh(), tr.HARD_TANH),
    (nn.ReLU6(), tr.hard_tanh(0, 6)),
    (nn.ELU(), tr.ELU),
    (nn.Softplus(), tr.SOFTPLUS),
    (torch.atan, tr.ARCTAN),
    (nn.Identity(), tr.IDENTITY),
    (lambda z: z.view(-1, 4).tanh(), tr.TANH),
    (lambda z: z.clone().contiguous().tanh(), tr.TANH),
    (lambda z: z.transpose(0, 1).tanh().transpose(0, 1), tr.TANH),
    (lambda z: (z + 0).tanh(), tr.IDENTITY),
]


def recorded_of(model: Any, closure: Callable[[], Tensor]) -> tuple[Recorded, dict[str, Layer]]:
    found = record(model, closure)
    return found, {layer.name: layer for layer in found.layers}


@pytest.mark.parametrize(("f", "transfer"), TRANSFERS, ids=lambda t: getattr(t, "__name__", type(t).__name__))
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_transfer_function_is_found_and_its_optimizer_starts_along_backprop(
    f: Any, transfer: tr.Transfer, conv: bool
) -> None:
    if conv:
        first: nn.Module = nn.Conv2d(1, 4, 3, padding=1)
        x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
        model = nn.ModuleList([first, nn.Linear(64, 3)]).double()
    else:
        x = torch.randn(5, 6, dtype=torch.float64)
        model = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 3)]).double()
    y = torch.tensor([0, 1, 2, 0, 1])

    def loss() -> Tensor:
        h = f(model[0](x))
        return F.cross_entropy(model[1](h.flatten(1) if h.shape[0] == 5 else h.reshape(5, -1)), y)

    _, layers = recorded_of(model, loss)
    assert layers["0.weight"].transfer.name == transfer.name
    assert layers["1.weight"].transfer is tr.SOFTMAX
    for kind in ("matching", "squared"):
        assert_first_step_is_backprop(model, loss, kind)


def assert_first_step_is_backprop(model: nn.Module, loss: Callable[[], Tensor], kind: Any) -> None:
    """With ε large enough TFRMSProp is gradient descent of rate lr/√ε, so the step is γ times the gradient."""
    before = params_of(model)
    wanted = dict(zip(before, torch.autograd.grad(loss(), list(model.parameters()), allow_unused=True), strict=True))
    opt = lw.LocoProp(model, loss=kind, gamma=GAMMA, steps=1, lr=1e8, eps=1e16, momentum=0.0, rows="all")
    opt.step(loss)
    for name, p in model.named_parameters():
        g = wanted[name]
        close(before[name] - p.detach(), torch.zeros_like(p) if g is None else GAMMA * g)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])


@every_case
def test_one_step_of_the_optimizer_is_gamma_times_backprop(case: zoo.Case) -> None:
    """Layers and the parameters without a local problem alike."""
    made = case.make()
    wanted = oracle.gradient(made.params, made.loss)
    before = {name: p.detach().clone() for name, p in made.params.items()}
    frozen = {n: p.detach().clone() for n, p in made.model.named_parameters() if not p.requires_grad}
    opt = lw.LocoProp(made.subject, gamma=GAMMA, steps=1, lr=1e8, eps=1e16, momentum=0.0, rows="all")
    opt.step(made.loss)
    for name, p in made.params.items():
        close(before[name] - p.detach(), GAMMA * wanted[name])
    for name, p in made.model.named_parameters():
        assert p.requires_grad or torch.equal(p, frozen[name])


class Pair(nn.Module):
    """Two layers and a way to join them."""

    def __init__(self, forward: Callable[[Pair, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def test_two_readers_of_an_output_mean_the_identity() -> None:
    net = Pair(lambda m, x: m.b((z := m.a(x)).tanh() + z.relu()), a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    x, y = batch()
    _, layers = recorded_of(net, lambda: F.cross_entropy(net(x), y))
    assert layers["a.weight"].transfer is tr.IDENTITY


@pytest.mark.parametrize(
    ("loss", "link"),
    [
        (lambda z, y: F.cross_entropy(z, y), tr.SOFTMAX),
        (lambda z, y: F.nll_loss(z.log_softmax(1), y), tr.SOFTMAX),
        (lambda z, y: F.cross_entropy(z.float(), y), tr.SOFTMAX),
        (lambda z, y: F.cross_entropy(input=torch.reshape(input=z, shape=(-1, 3)), target=y), tr.IDENTITY),
        (lambda z, y: F.cross_entropy(input=z.clone(), target=y), tr.SOFTMAX),
        (lambda z, y: F.cross_entropy(z.view(4, 3, 3).mT, y.view(4, 3)), tr.SOFTMAX),
        (lambda z, y: F.cross_entropy(z[y > 0], y[y > 0]), tr.SOFTMAX),
        (lambda z, y: F.cross_entropy(z[:, :2], y % 2), None),  # a choice of classes
        (lambda z, y: F.cross_entropy(z.view(9, 4), y[:9]), None),
        (lambda z, y: F.cross_entropy(z / 2, y), tr.IDENTITY),
        (lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).double()), tr.SIGMOID),
        (lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double()), tr.IDENTITY),
        (lambda z, y: 3 * F.mse_loss(z, F.one_hot(y, 3).double(), reduction="sum") / 12, tr.IDENTITY),
    ],
)
def test_output_layer_takes_the_losss_link(loss: Any, link: tr.Transfer | None) -> None:
    net, (x, y) = mlp(5, 4, 3), batch()
    _, layers = recorded_of(net, lambda: loss(net(x), y))
    if link is None:  # treated as S
        assert layers["2.weight"].transfer.stand_in
    else:
        assert layers["2.weight"].transfer is link


@pytest.mark.parametrize("hooks", ["forward", "backward", "both"])
def test_hooks_that_hand_on_the_output_hide_no_transfer_function(hooks: str) -> None:
    net, (x, y) = mlp(5, 4, 3), batch()
    for module in net.children():
        if hooks != "backward":
            module.register_forward_hook(lambda m, given, out: out.clone())
        if hooks != "forward":
            module.register_full_backward_hook(lambda m, given, out: None)
    _, layers = recorded_of(net, lambda: F.cross_entropy(net(x.requires_grad_()), y))
    assert (layers["0.weight"].transfer, layers["2.weight"].transfer) == (tr.TANH, tr.SOFTMAX)


def test_softmax_counts_only_over_the_outputs_of_a_row() -> None:
    x = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    for dim, joint in ((1, True), (-3, True), (3, False), (-1, False)):
        net = Pair(lambda m, x, dim=dim: m.b(m.a(x).softmax(dim).flatten(1)), a=nn.Conv2d(3, 3, 1), b=nn.Linear(27, 2))
        _, layers = recorded_of(net, lambda net=net: net(x).square().sum())
        found = layers["a.weight"].transfer
        assert found.joint == joint and found.stand_in == (not joint)
    for dim, joint in ((-1, True), (2, True), (1, False)):
        net = Pair(lambda m, x, dim=dim: m.b(m.a(x).softmax(dim).flatten(1)), a=nn.Linear(3, 3), b=nn.Linear(9, 2))
        _, layers = recorded_of(net, lambda net=net: net(x[:, :, :, 0]).square().sum())
        assert layers["a.weight"].transfer.joint == joint


def test_classes_along_another_axis_than_the_layers_outputs_have_no_link() -> None:
    """Cross entropy of `[N, C, d]` couples the classes of axis 1, a linear layer the last axis."""
    net = nn.Linear(4, 3).double()
    x, y = torch.randn(5, 3, 4, dtype=torch.float64), torch.randint(3, (5, 3))
    _, layers = recorded_of(net, lambda: F.cross_entropy(net(x), y))
    assert layers["weight"].transfer.stand_in
    conv = nn.Conv1d(3, 4, 1).double()
    _, layers = recorded_of(conv, lambda: F.cross_entropy(conv(x), y[:, :1].expand(5, 4)))
    assert layers["weight"].transfer is tr.SOFTMAX


@pytest.mark.parametrize("f", [nn.GELU, nn.SiLU, nn.Mish])
def test_functions_that_are_not_monotone_are_treated_as_s(f: type[nn.Module]) -> None:
    x, y = batch()
    results = []
    for loss in ("matching", "squared"):
        net = mlp(5, 6, 3, f=f)
        opt = lw.LocoProp(net, loss=loss, rows="all", lr=1e-3, momentum=0.99)  # type: ignore[arg-type]
        for _ in range(3):
            opt.step(lambda net=net: F.mse_loss(net(x), F.one_hot(y, 3).double()))
        results.append(params_of(net))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


# The published rule ---------------------------------------------------------------------------------------


def published(model: nn.Sequential, x: Tensor, steps: int, matching: bool) -> Iterator[dict[str, Tensor]]:
    """The authors' rule on tanh layers and a sigmoid output, written out: nothing of the library in it."""
    linears = [m for m in model if isinstance(m, nn.Linear)]
    weights = [[m.weight.detach().clone(), m.bias.detach().clone()] for m in linears]
    state = [[[torch.ones_like(p), torch.zeros_like(p)] for p in pair] for pair in weights]
    for _ in range(steps):
        inputs, pre, h = [], [], x
        for number, (w, b) in enumerate(weights):
            inputs.append(h)
            pre.append((h @ w.T + b).requires_grad_())
            h = torch.tanh(pre[-1]) if number < len(weights) - 1 else pre[-1]
        loss = (F.softplus(h) - x * h).sum() / len(x)  # sigmoid cross entropy with the input as target
        grads = torch.autograd.grad(loss, pre)
        for number, (a, z, g) in enumerate(zip(inputs, pre, grads, strict=True)):
            a, z = a.detach(), z.detach()
            f = (torch.tanh if number < len(weights) - 1 else torch.sigmoid) if matching else (lambda v: v)
            target = f(z) - 10.0 * g
            for t in range(10):
                w, b = weights[number]
                delta = f(a @ w.T + b) - target
                rate = 1e-5 * max(1.0 - t / 10.0, 0.25)
                for part, gradient in enumerate((delta.T @ a, delta.sum(0))):
                    ms, momentum = state[number][part]
                    ms.mul_(0.9).add_(0.1 * gradient**2)
                    momentum.mul_(0.999).add_(rate * gradient / torch.sqrt(ms + 1e-5))
                    weights[number][part] = weights[number][part] - momentum
        names = [f"{i}.{kind}" for i, m in enumerate(model) if isinstance(m, nn.Linear) for kind in ("weight", "bias")]
        yield dict(zip(names, [p for pair in weights for p in pair], strict=True))


@pytest.mark.parametrize("preset", ["published-M", "published-S"])
def test_published_preset_follows_the_authors_rule_for_three_steps(preset: Any) -> None:
    net = mlp(6, 8, 3, 8, 6)
    x = torch.rand(20, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = params_of(net)
    opt = lw.LocoProp(net, preset=preset)
    for wanted in published(copy.deepcopy(net), x, 3, preset.endswith("M")):
        opt.step(lambda: F.binary_cross_entropy_with_logits(net(x), x, reduction="sum") / len(x))
        for name, p in net.named_parameters():
            # of the movement, not of the weight, which a wrong rule would hardly change
            moved, expected = p.detach() - start[name], wanted[name] - start[name]
            torch.testing.assert_close(moved, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_presets_hold_exactly_the_published_settings() -> None:
    settings = {"lr": 1e-5, "gamma": 10.0, "steps": 10, "rows": "all", "decay": 0.9, "momentum": 0.999, "eps": 1e-5}
    for preset, loss in (("published-M", "matching"), ("published-S", "squared")):
        (group,) = lw.LocoProp(mlp(2, 2), preset=preset).param_groups  # type: ignore[arg-type]
        assert {k: v for k, v in group.items() if k not in ("params", "param_names")} == {**settings, "loss": loss}
    (group,) = lw.LocoProp(mlp(2, 2), preset="published-M", lr=3e-5, steps=4).param_groups
    assert (group["lr"], group["steps"], group["gamma"]) == (3e-5, 4, 10.0)


# Rows ---------------------------------------------------------------------------------------------------


def run(net: nn.Module, closure: Callable[[], Tensor], count: int = 3, **settings: Any) -> dict[str, Tensor]:
    opt = lw.LocoProp(net, **settings)
    for _ in range(count):
        opt.step(closure)
    return params_of(net)


def test_rows_auto_is_a_share_and_a_hundred_at_least_for_squared_losses() -> None:
    x, y = batch(n=240)
    runs: dict[tuple[str, int, Any], dict[str, Tensor]] = {}
    for loss in ("matching", "squared"):
        for steps in (2, 10):
            for rows in ("auto", "all", 24, 100, 120, 240, 1000):
                net = mlp(5, 7, 3)
                runs[loss, steps, rows] = run(
                    net, lambda net=net: F.cross_entropy(net(x), y), loss=loss, rows=rows, steps=steps, lr=1e-3
                )

    def same(loss: str, steps: int, one: Any, two: Any) -> bool:
        return all(torch.equal(t, runs[loss, steps, two][n]) for n, t in runs[loss, steps, one].items())

    assert same("matching", 10, "auto", 24) and not same("matching", 10, "auto", 100)
    assert same("squared", 10, "auto", 100) and not same("squared", 10, "auto", 24)
    for loss in ("matching", "squared"):
        assert same(loss, 2, "auto", 120) and not same(loss, 2, "auto", "all")
        assert same(loss, 2, "all", 240) and same(loss, 2, "all", 1000)


def test_rows_auto_of_the_gram_form_is_all() -> None:
    x, y = batch(n=240)
    found = []
    for solver in (local.LocalSteps(4, form="gram"), local.LocalSteps(4, rows="all", form="gram")):
        net = mlp(5, 7, 3)
        found.append(run(net, lambda net=net: F.cross_entropy(net(x), y), loss="squared", solver=solver, lr=1e-3))
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


@pytest.mark.parametrize(
    "act", [nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.ReLU(inplace=True), nn.Softmax(-1), nn.Softplus()]
)
def test_targets_read_the_transfer_function_off_the_run(act: nn.Module) -> None:
    """`f(z)` of the model, where autograd holds it, equals `f(z)` computed again; overwritten, it is computed again."""
    x, y = batch()
    net = nn.Sequential(nn.Linear(5, 7), act, nn.Linear(7, 3)).double()
    x = x.double()
    spoil = nn.Sequential(*net[:2], type("Spoil", (nn.Module,), {"forward": lambda self, h: h.add_(1)})(), net[2])
    for model, kept in ((net, not isinstance(act, nn.Softplus)), (spoil, False)):
        try:
            recorded = record(model, lambda model=model: F.cross_entropy(model(x), y))
        except RuntimeError:  # autograd itself needs what was overwritten
            assert model is spoil
            continue
        layer = recorded.layers[0]
        assert (layer.after is not None) == kept
        problem = problem_of(recorded, layer, 3.0, layer.transfer)
        z = x @ net[0].weight.detach().mT + net[0].bias.detach()
        f = layer.transfer.f(z)
        oracle.assert_close(problem.target[:, 0], f - 3.0 * problem.g[:, 0])
        if kept and layer.after is not None:  # it is indeed what is read
            layer.after.data.add_(0.5)
            moved = problem_of(recorded, layer, 3.0, layer.transfer)
            oracle.assert_close(moved.target[:, 0], f + 0.5 - 3.0 * problem.g[:, 0])
            other = problem_of(recorded, layer, 3.0, IDENTITY)  # another function is not read
            oracle.assert_close(other.target[:, 0], z - 3.0 * problem.g[:, 0])


@pytest.mark.parametrize("n", [20, 17, 4])
def test_local_minibatches_read_every_row(n: int) -> None:
    """A row left out would have no influence on the layer."""
    x, y = batch(n=n)
    base = run(net := mlp(5, 3), lambda: F.mse_loss(net(x), F.one_hot(y, 3).double(), reduction="sum"), 1)
    for row in range(n):
        other = x.clone()
        other[row] += 1
        net = mlp(5, 3)
        moved = run(net, lambda other=other, net=net: F.mse_loss(net(other), F.one_hot(y, 3).double(), reduction="sum"),
                    1, loss="matching")  # fmt: skip
        assert any(not torch.equal(base[name], moved[name]) for name in base)


# The closure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["layer_scale", "reused", "tied_autoencoder", "weight_norm", "residual", "dict_output"]
)
@pytest.mark.parametrize("zero", [False, True], ids=["kept", "zeroed"])
def test_a_closure_that_calls_backward_gives_the_same_bitwise(name: str, zero: bool) -> None:
    one, two = zoo.case(name).make(), zoo.case(name).make()

    def with_backward() -> Tensor:
        if zero:
            for p in two.params.values():
                p.grad = None
        loss = two.loss()
        loss.backward()
        return loss

    for made, closure in ((one, one.loss), (two, with_backward)):
        opt = lw.LocoProp(made.subject, lr=1e-3)
        for _ in range(3):
            opt.step(closure)
    for p, q in zip(one.params.values(), two.params.values(), strict=True):
        assert torch.equal(p, q)


def test_a_closures_own_gradients_are_what_backward_leaves() -> None:
    net, (x, y) = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double(), batch()
    wanted = torch.autograd.grad(2 * F.cross_entropy(net(x), y), list(net.parameters()))
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[1].weight.grad = torch.ones_like(net[1].weight)

    def closure() -> Tensor:
        loss = F.cross_entropy(net(x), y)
        (2 * loss).backward()
        return loss

    before = F.cross_entropy(net(x), y)
    assert torch.equal(lw.LocoProp(net).step(closure), before.detach())
    for (name, p), g in zip(net.named_parameters(), wanted, strict=True):
        assert p.grad is not None
        close(p.grad, g + (1.0 if name in ("0.weight", "1.weight") else 0.0))


def test_the_closure_runs_once_and_the_forward_too() -> None:
    net, (x, y) = mlp(5, 4, 3), batch()
    calls = []
    net.register_forward_hook(lambda *args: calls.append(1))
    opt = lw.LocoProp(net)
    for n in range(1, 4):
        opt.step(lambda: F.cross_entropy(net(x), y))
        assert len(calls) == n


def test_no_gradients_are_left_on_the_parameters() -> None:
    net, (x, y) = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double(), batch()
    lw.LocoProp(net).step(lambda: F.cross_entropy(net(x), y))
    assert all(p.grad is None for p in net.parameters())


# What moves ----------------------------------------------------------------------------------------------


def test_parameters_without_a_local_problem_move_along_gamma_times_their_gradient() -> None:
    """T steps of the same optimizer on a constant gradient, by hand."""
    made = zoo.case("tied_autoencoder").make()
    names = [n for n in made.params if n not in {m for la in record(made.subject, made.loss).layers for m in la.names}]
    assert names
    g = oracle.gradient(made.params, made.loss)
    before = {n: p.detach().clone() for n, p in made.params.items()}
    lw.LocoProp(made.subject, lr=1e-3, gamma=10.0, momentum=0.9, steps=4).step(made.loss)
    for name in names:
        w, ms, m = before[name], torch.ones_like(before[name]), torch.zeros_like(before[name])
        for t in range(4):
            ms = 0.9 * ms + 0.1 * (10 * g[name]) ** 2
            m = 0.9 * m + 1e-3 * max(1 - t / 4, 0.25) * 10 * g[name] / (ms + 1e-5).sqrt()
            w = w - m
        close(before[name] - made.params[name].detach(), before[name] - w, 1e-10)


def test_sparse_gradients_of_an_embedding_move_it() -> None:
    net = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3)).double()
    tokens, y = torch.tensor([[0, 1], [2, 2], [3, 1]]), torch.tensor([0, 1, 2])
    before = params_of(net)
    for closure in (lambda: F.cross_entropy(net(tokens), y), None):
        if closure is None:

            def closure() -> Tensor:
                loss = F.cross_entropy(net(tokens), y)
                loss.backward()
                return loss

        lw.LocoProp(net, momentum=0.0).step(closure)
    moved = (net[0].weight.detach() - before["0.weight"]).abs().sum(1)
    assert (moved[:4] > 0).all() and not moved[4:].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(4, 6, 3, groups=2),
        lambda: nn.ConvTranspose1d(4, 6, 3),
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
        lambda: nn.Conv1d(4, 4, 3, groups=4, bias=False),
        lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same", padding_mode="circular"),
    ],
)
def test_convolutions_of_every_kind_move_and_start_along_backprop(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    x, y = torch.randn(5, 4, 7, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    net(x)
    for kind in ("matching", "squared"):
        assert_first_step_is_backprop(net, lambda: F.cross_entropy(net(x), y), kind)


def test_a_frozen_bias_takes_part_in_the_local_problem_and_stays() -> None:
    """By hand: ten local steps of M with the frozen bias inside f, on all rows."""
    x, y = batch()
    net = mlp(5, 4, 3)
    net[0].bias.requires_grad_(False)
    w, b = net[0].weight.detach().clone(), net[0].bias.detach()
    z = (x @ w.T + b).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(net[2](z.tanh()), y), z)
    ms, m, target = torch.ones_like(w), torch.zeros_like(w), z.detach().tanh() - 10 * g
    for t in range(10):
        dw = ((x @ w.T + b).tanh() - target).T @ x
        ms = 0.9 * ms + 0.1 * dw**2
        m = 0.999 * m + 1e-2 * max(1 - t / 10, 0.25) * dw / (ms + 1e-5).sqrt()
        w = w - m
    lw.LocoProp(net, lr=1e-2, rows="all", gamma=10.0, momentum=0.999).step(lambda: F.cross_entropy(net(x), y))
    close(net[0].weight.detach(), w, 1e-11)
    assert torch.equal(net[0].bias, b)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    made = zoo.case("unused_parameter").make()
    before = {n: p.detach().clone() for n, p in made.params.items()}
    opt = lw.LocoProp(made.subject, lr=1e-2)
    opt.step(made.loss)
    idle = [n for n in before if n.startswith("idle")]
    assert idle and all(torch.equal(made.params[n], before[n]) for n in idle)
    assert all(not opt.state[made.params[n]] for n in idle)
    assert all(not torch.equal(p, before[n]) for n, p in made.params.items() if n not in idle)


# Groups and schedules ------------------------------------------------------------------------------------


def test_groups_have_their_own_settings() -> None:
    """Each half of a net moves as it does in an optimizer of its own settings."""
    x, y = batch()
    settings = (
        {"lr": 1e-3, "gamma": 5.0, "steps": 4},
        {"lr": 3e-3, "gamma": 20.0, "steps": 7, "loss": "squared", "momentum": 0.9},
    )
    net = mlp(5, 4, 3)
    halves = list(net[0].parameters()), net[2].named_parameters()
    groups = [{"params": half, **one} for half, one in zip(halves, settings, strict=True)]
    lw.LocoProp(net, groups).step(lambda: F.cross_entropy(net(x), y))
    for number, one in zip((0, 2), settings, strict=True):
        alone = mlp(5, 4, 3)
        run(alone, lambda alone=alone: F.cross_entropy(alone(x), y), 1, **one)
        assert torch.equal(net[number].weight, alone[number].weight)
        assert torch.equal(net[number].bias, alone[number].bias)


def test_a_bias_in_another_group_takes_its_rates_from_there() -> None:
    x, y = batch()
    nets = [mlp(5, 4, 3) for _ in range(3)]
    biases = [p for n, p in nets[0].named_parameters() if n.endswith("bias")]
    weights = [p for n, p in nets[0].named_parameters() if n.endswith("weight")]
    apart = lw.LocoProp(nets[0], [{"params": weights}, {"params": biases}], lr=1e-3)
    for _ in range(3):
        apart.step(lambda: F.cross_entropy(nets[0](x), y))
    run(nets[1], lambda: F.cross_entropy(nets[1](x), y), 3, lr=1e-3)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    start = params_of(nets[2])
    opt = lw.LocoProp(
        nets[2],
        [{"params": [p for n, p in nets[2].named_parameters() if n.endswith(k)], "lr": lr}
         for k, lr in (("weight", 1e-3), ("bias", 0.0))],
    )  # fmt: skip
    opt.step(lambda: F.cross_entropy(nets[2](x), y))
    for name, p in nets[2].named_parameters():
        assert torch.equal(p, start[name]) == name.endswith("bias")


def test_parameters_outside_the_optimizer_stay() -> None:
    x, y = batch()
    net = mlp(5, 4, 3)
    before = params_of(net)
    opt = lw.LocoProp(net, [net[0].weight, net[2].bias], lr=1e-3)
    for _ in range(3):
        opt.step(lambda: F.cross_entropy(net(x), y))
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"0.weight", "2.bias"}
    assert all(p.grad is None for p in net.parameters())


def test_schedulers_drive_the_rate() -> None:
    x, y = batch()

    def losses(make: Callable[[Any], Any], rates: list[float]) -> None:
        one, two = mlp(5, 4, 3), mlp(5, 4, 3)
        opt, hand = lw.LocoProp(one, lr=1e-3), lw.LocoProp(two, lr=1e-3)
        scheduler = make(opt)
        for rate in rates:
            hand.param_groups[0]["lr"] = rate
            hand.step(lambda: F.cross_entropy(two(x), y))
            opt.step(lambda: F.cross_entropy(one(x), y))
            scheduler.step()
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))

    losses(lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1), [1e-3, 1e-3, 1e-3 * 0.1, 1e-3 * 0.1])
    losses(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda e: e / 2), [0.0, 1e-3 * 0.5, 1e-3, 1e-3 * 1.5])


def test_the_rates_of_a_group_come_back_after_a_step() -> None:
    net, (x, y) = mlp(5, 3), batch()
    opt = lw.LocoProp(net, lr=0.25)
    opt.step(lambda: F.cross_entropy(net(x), y))
    assert opt.param_groups[0]["lr"] == 0.25


# Bad settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"gamma": 0.0}, {"gamma": math.nan}, {"steps": 0},
        {"steps": 2.5}, {"rows": 0}, {"rows": 1.5}, {"rows": "some"}, {"decay": 1.0}, {"decay": -0.1},
        {"momentum": 1.0}, {"eps": -1e-3}, {"loss": "cubic"}, {"preset": "published"}, {"on_nonfinite": "ignore"},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        lw.LocoProp(mlp(2, 2), **wrong)
    if not wrong.keys() & {"preset", "on_nonfinite"}:
        net = mlp(2, 2)
        with pytest.raises(BadInput):
            lw.LocoProp(net, [{"params": net.parameters(), **wrong}])
        opt, before = lw.LocoProp(net), params_of(net)
        opt.param_groups[0].update(wrong)
        with pytest.raises(BadInput):
            opt.step(lambda: net(torch.ones(3, 2, dtype=torch.float64)).square().sum())
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
