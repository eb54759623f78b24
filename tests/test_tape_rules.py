"""Corner cases of the tape, rule by rule: in-place calls, views, parametrizations, subclasses, gradients inside.

Each program meets the oracle or a typed error. What is not here: samples are measured (test_samples), derived
weights and programs (the zoo's `weights` and `programs`), coverage (the zoo's `refused`), the fallback checks itself
(test_ops), our own pulls and two observers (test_observe), the loss's scale (test_observe, test_losses), compiled
models (test_observe), composites (test_composite), memory (test_memory).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo.parts import Apply, leaf

from layerwise import errors
from layerwise.observation.observe import observe
from layerwise.quantities import DiagGGN, DiagHessian, PerSampleGrad, SecondMoment, Variance

pytestmark = pytest.mark.usefixtures("float64")
N = 5


def _check(
    model: nn.Module, x: Tensor | None = None, hessian: bool = True, run: Callable[..., Tensor] | None = None
) -> None:
    """Per-sample gradients, variance, GGN and Hessian diagonal against the oracle, twice (the second from the memo)."""
    x = torch.randn(N, 4) if x is None else x
    y = torch.randint(3, (N,))
    run = run or model
    params = oracle.parameters(model)
    with oracle.plain_operations():
        grads = oracle.per_sample_grad(params, lambda: F.cross_entropy(run(x), y, reduction="none") / N)
        ggn = oracle.diag_ggn(params, lambda: run(x), lambda z: F.cross_entropy(z, y))
        second = oracle.diag_hessian(params, lambda: F.cross_entropy(run(x), y)) if hessian else {}
    plain = oracle.gradient(params, lambda: F.cross_entropy(run(x), y))
    for _ in range(2):
        model.zero_grad()
        more = [DiagHessian()] if hessian else []
        with observe(model, PerSampleGrad(), Variance(), DiagGGN(), *more) as seen:
            F.cross_entropy(run(x), y).backward()
        oracle.assert_close(dict(seen.per_sample_grad), grads)
        oracle.assert_close(dict(seen.variance), oracle.variance(grads))
        oracle.assert_close(dict(seen.diag_ggn), ggn)
        if hessian:
            oracle.assert_close(dict(seen.diag_hessian), second)
        oracle.assert_close({n: p.grad for n, p in model.named_parameters()}, plain, rel=1e-12)


def _apply(forward: Callable[..., Any], **parts: Any) -> Apply:
    return Apply(forward, **({"a": nn.Linear(4, 4), "b": nn.Linear(4, 3)} | parts))


def _into_zeros(m: nn.Module, x: Tensor) -> Tensor:
    """A constant that data is written into becomes data."""
    h = x.new_zeros(len(x), 4)
    h[:, :2] = x[:, :2]
    h[:, 2:] += x[:, 2:].tanh()
    return m.b(m.a(h).tanh())


def _into_a_view_of_zeros(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 4)
    view = h[:, 1:3]
    view.copy_(x[:, 1:3])
    return m.b(m.a(h).tanh())


def _parameter_into_data(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    h = h * 1.0
    h += m.p
    h.mul_(m.p)
    return m.b(h)


def _written_output(m: nn.Module, x: Tensor) -> Tensor:
    """A use's output is overwritten in part, and its old values are gone."""
    h = m.a(x)
    h[:, 0] = 2 * x[:, 0]
    return m.b(h.relu_())


def _written_pieces(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x) * 1.0
    first, second = h[:, :2], h[:, 2:]
    first.mul_(2)
    second.mul_(x[:, :2])
    return m.b(h)


def _permuted(m: nn.Module, x: Tensor) -> Tensor:
    return m.b((x @ m.w.t()[:, [2, 0, 1, 3]]).tanh()) + F.linear(x, m.w.view(2, 8).view(4, 4))[:, :3]


def _strided(m: nn.Module, x: Tensor) -> Tensor:
    """Halves, a diagonal and an `as_strided` of one weight."""
    z = F.linear(x, m.w[:2]) + x[:, :2] * m.w.diagonal()[:2]
    return m.b(torch.cat([z, F.linear(x, m.w.as_strided((2, 4), (8, 1), 4))], 1).tanh())


def _detached(m: nn.Module, x: Tensor) -> Tensor:
    """One use through a detached weight, one of a detached activation."""
    h = m.a(x)
    return m.b(h.detach().tanh()) + F.linear(h.tanh(), m.b.weight.detach())


def _partly_without_grad(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m.a(x).abs().amax(1, keepdim=True) + m.p.abs().sum()
    with torch.set_grad_enabled(False):
        m.b(x)
    return m.b(m.a(x).div(scale).tanh() * m.p)


def _straight_through(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.b(h + (h.round() - h).detach())


def _own_hooks(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x)
    h.register_hook(lambda g: None)
    h.retain_grad()
    return m.b(h.tanh())


def _scaled(forward: Callable[..., Any]) -> Apply:
    return _apply(forward, p=leaf(4))


def _bare(forward: Callable[..., Any]) -> Apply:
    return _apply(forward, w=leaf(4, 4), a=nn.Identity())


PROGRAMS = {
    "data into zeros": (_apply, _into_zeros),
    "data into a view of zeros": (_apply, _into_a_view_of_zeros),
    "parameter into data": (_scaled, _parameter_into_data),
    "output written on": (_apply, _written_output),
    "pieces written on": (_apply, _written_pieces),
    "permuted weight": (_bare, _permuted),
    "strided weight": (_bare, _strided),
    "detach": (_apply, _detached),
    "no grad": (_scaled, _partly_without_grad),
    "straight through": (_apply, _straight_through),
    "hooks": (_apply, _own_hooks),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    make, forward = PROGRAMS[name]
    _check(make(forward))


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley", "householder"])
def test_orthogonal_weights(kind: str) -> None:
    """Exact; the derivatives of some of these maps have no batching rule."""
    layer = parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map=kind)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3))
    _check(model, hessian=False)


@pytest.mark.parametrize("training", [False, True])
def test_spectral_norm(training: bool) -> None:
    """In training its power iteration moves on at every forward, without gradients; each one is exact for itself."""
    layer = parametrizations.spectral_norm(nn.Linear(4, 4), n_power_iterations=2)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3)).train(training)
    kept = {name: b.clone() for name, b in model.named_buffers()}

    def run(x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # unseen: what is written on buffers counts as data
            for name, b in model.named_buffers():
                b.data.copy_(kept[name])
        return model(x)

    _check(model, run=run)


def test_a_parametrization_that_is_cached() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    model = _apply(lambda m, x: m.b(m.a(m.a(x).tanh()).tanh()), a=layer)

    def run(x: Tensor) -> Tensor:
        with torch.nn.utils.parametrize.cached():
            return model(x)

    _check(model, run=run)


class _Tagged(Tensor):
    """A subclass that goes through torch's calls as it is."""


class _Loud(Tensor):
    """A subclass with a protocol of its own, which hands back plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        return out.as_subclass(cls) if func is Tensor.detach else out  # without which torch makes no parameter of it


@pytest.mark.parametrize("kind", [_Tagged, _Loud])
def test_parameters_of_a_subclass(kind: type) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none") / N)
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(kind))
    with observe(model, PerSampleGrad(), DiagGGN()) as seen:
        F.cross_entropy(model(x), y).backward()
    oracle.assert_close({k: v.as_subclass(Tensor) for k, v in seen.per_sample_grad.items()}, want)


@pytest.mark.parametrize("kind", [_Tagged, _Loud])
def test_a_batch_of_a_subclass(kind: type) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: F.cross_entropy(model(x), y, reduction="none") / N)
    with observe(model, PerSampleGrad()) as seen:
        F.cross_entropy(model(x.as_subclass(kind)), y).backward()
    oracle.assert_close({k: v.as_subclass(Tensor) for k, v in seen.per_sample_grad.items()}, want)


# Gradients inside the forward --------------------------------------------------------------------------


def _penalty(m: nn.Module, x: Tensor) -> Tensor:
    """The output depends on a derivative of the first layer by its input."""
    x = x.clone().requires_grad_()
    h = m.a(x).tanh()
    (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
    return m.b(h + slope)


def _inner_step(m: nn.Module, x: Tensor) -> Tensor:
    """A step on the first weight by its own gradient, as in meta-learning."""
    (g,) = torch.autograd.grad(m.a(x).square().sum(), m.a.weight, create_graph=True)
    return m.b(F.linear(x, m.a.weight - 0.1 * g, m.a.bias).tanh())


def _jvp(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(torch.func.jvp(m.a, (x,), (x,))[1].tanh())


def _vmapped(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(torch.vmap(m.a)(x).tanh())


def test_a_derivative_by_the_input_inside_the_forward() -> None:
    _check(_apply(_penalty))


@pytest.mark.parametrize("forward", [_inner_step, _jvp, _vmapped])
@pytest.mark.parametrize("quantity", [PerSampleGrad, SecondMoment, DiagGGN])
def test_derivatives_inside_the_forward_are_refused(forward: Callable, quantity: type) -> None:
    model = _apply(forward)
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    with pytest.raises(errors.LayerwiseError, match=r"a\.weight|a\.bias"), observe(model, quantity()):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


def test_detached_derivatives_inside_the_forward_are_data() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(m.a(x).tanh().sum(), x)
        return m.b(m.a(x).tanh() + slope)

    _check(_apply(forward))


def test_a_compiled_layer_with_in_place_calls() -> None:
    """Under observation it runs as written: a compiled backward would have lost the values before the ReLU."""
    model = _apply(lambda m, x: m.b(m.c(x)), a=nn.Identity(), c=nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))
    model.c.compile(backend="eager")
    model(torch.randn(N, 4))
    _check(model)


def _saved_and_loaded(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("read", [_saved_and_loaded, lambda x: pickle.loads(pickle.dumps(x))], ids=["load", "pickle"])
def test_a_batch_that_is_read_inside_is_data(read: Callable[[Tensor], Tensor]) -> None:
    """As from a file, or from the workers of a loader; torch makes it of `torch.empty(0)`, a constant."""
    _check(_apply(lambda m, x: m.b(m.a(read(x)).tanh())))


def test_a_tensor_without_elements_stays_a_constant() -> None:
    _check(_apply(lambda m, x: F.linear(m.a(x).tanh(), torch.cat([torch.empty(0, 4), m.b.weight]), m.b.bias)))


@pytest.mark.parametrize("recorded", [False, True])
def test_derivatives_by_torch_func_beside_the_observed_pass(recorded: bool) -> None:
    """Transformed tensors stand for others, and a target has no values to read."""
    model, x, y = nn.Linear(4, 3), torch.randn(N, 4), torch.randint(3, (N,))
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, p, (row,)), label)

    want = {"weight": [], "bias": []}
    for row, label in zip(x, y, strict=True):
        one = torch.autograd.grad(F.cross_entropy(model(row), label), [model.weight, model.bias])
        want = {name: [*found, g] for (name, found), g in zip(want.items(), one, strict=True)}
    with observe(model, PerSampleGrad()) as seen:
        if recorded:
            total = F.cross_entropy(model(x), y)
        found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
        (total if recorded else F.cross_entropy(model(x), y)).backward()
    oracle.assert_close(found, {name: torch.stack(g) for name, g in want.items()})
    oracle.assert_close(dict(seen.per_sample_grad), {name: g / N for name, g in found.items()})
