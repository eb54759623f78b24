"""Scripts as BackPACK's users write them: one import changed, and every result against torch alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.compat.backpack import backpack, disable, extend, extensions
from layerwise.compat.backpack.custom_module.permute import Permute
from layerwise.compat.backpack.custom_module.reduce_tuple import ReduceTuple
from layerwise.compat.backpack.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from layerwise.compat.backpack.hessianfree.ggnvp import ggn_vector_product_from_plist
from layerwise.compat.backpack.hessianfree.hvp import hessian_vector_product
from layerwise.compat.backpack.utils.convert_parameters import vector_to_parameter_list
from layerwise.compat.backpack.utils.kroneckers import apply_inv_kfac_mat_prod

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0, 1, 2, 0, 1])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def small_images() -> tuple[Tensor, Tensor]:
    """Thirty images of three classes that a small net tells apart."""
    images = torch.randn(30, 1, 6, 6)
    labels = images.mean((1, 3)).unflatten(1, (3, 2)).mean(2).argmax(1)
    return images + 2 * F.one_hot(labels, 3).repeat_interleave(2, 1)[:, None, :, None], labels


def small_conv_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))


def fields(model: nn.Module, field: str) -> dict[str, Any]:
    return {name: getattr(p, field) for name, p in model.named_parameters()}


def gradients_one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    plain = copy.deepcopy(model)
    with disable():
        return oracle.per_sample_grad(
            oracle.parameters(plain), lambda: F.cross_entropy(plain(x), y, reduction="none") / len(x)
        )


def assert_first_order(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """All first-order fields, each by its definition from the gradients of single samples."""
    each = gradients_one_by_one(model, x, y)
    oracle.assert_close(fields(model, "grad_batch"), each)
    oracle.assert_close(fields(model, "batch_l2"), {k: g.flatten(1).square().sum(1) for k, g in each.items()})
    oracle.assert_close(fields(model, "sum_grad_squared"), oracle.second_moment(each))
    oracle.assert_close(fields(model, "variance"), oracle.variance(each))


# -- first order -----------------------------------------------------------------------------------------------


def test_script_gradients_one_by_one() -> None:
    """Per-sample gradients against a loop over the samples."""
    model, criterion = extend(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))), extend(nn.CrossEntropyLoss())
    images = torch.randn(5, 1, 4, 4)
    loss = criterion(model(images), Y)
    with backpack(BatchGrad(), BatchL2Grad(), Variance()):
        loss.backward()
    for n in range(5):
        single = criterion(model(images[n : n + 1]), Y[n : n + 1]) / 5
        gradients = torch.autograd.grad(single, list(model.parameters()))
        for p, g in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad_batch[n], g)
            torch.testing.assert_close(p.batch_l2[n], g.square().sum())
    for p in model.parameters():
        torch.testing.assert_close(p.variance, p.grad_batch.var(0, unbiased=False))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, with one ReLU module for both places and an in-place sum."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module | None = None
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(BasicBlock(3, 3, 1), BasicBlock(3, 4, 2))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(F.relu(self.conv(x)))), 1))


def trained_resnet() -> nn.Module:
    model = ResNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_script_resnet() -> None:
    """A residual net with shortcuts, in-place operations and shared activations, as it is, in eval mode."""
    model, criterion = extend(trained_resnet(), use_converter=True), extend(nn.CrossEntropyLoss())
    x = torch.randn(5, 2, 6, 6)
    loss = criterion(model(x), Y)
    with backpack(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), DiagGGNExact(), BatchDiagGGNExact()):
        loss.backward()
    assert_first_order(model, x, Y)
    plain = copy.deepcopy(model)
    with disable():
        diagonal = oracle.diag_ggn(oracle.parameters(plain), lambda: plain(x), lambda z: F.cross_entropy(z, Y))
    oracle.assert_close(fields(model, "diag_ggn_exact"), diagonal)
    oracle.assert_close({k: v.sum(0) for k, v in fields(model, "diag_ggn_exact_batch").items()}, diagonal)


class Scale(nn.Module):
    """A user's own layer with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp()


def test_script_custom_module() -> None:
    """A layer of one's own needs no rule, in first or second order."""
    model, criterion = extend(nn.Sequential(nn.Linear(4, 6), Scale(), nn.Linear(6, 3))), extend(nn.CrossEntropyLoss())
    x = torch.randn(5, 4)
    with backpack(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), DiagGGNExact(), DiagHessian()):
        criterion(model(x), Y).backward()
    assert_first_order(model, x, Y)
    plain = copy.deepcopy(model)
    with disable():
        diagonal = oracle.diag_ggn(oracle.parameters(plain), lambda: plain(x), lambda z: F.cross_entropy(z, Y))
        hessian = oracle.diag_hessian(oracle.parameters(plain), lambda: F.cross_entropy(plain(x), Y))
    oracle.assert_close(fields(model, "diag_ggn_exact"), diagonal)
    oracle.assert_close(fields(model, "diag_h"), hessian)


def test_script_character_model() -> None:
    """A recurrent net that predicts a class at each of several steps."""
    model = extend(
        nn.Sequential(
            nn.Embedding(7, 4), nn.LSTM(4, 5, batch_first=True), ReduceTuple(0), nn.Linear(5, 3), Permute(0, 2, 1)
        )
    )
    criterion = extend(nn.CrossEntropyLoss())
    x, y = torch.randint(7, (5, 4)), torch.randint(3, (5, 4))
    with backpack(BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()):
        criterion(model(x), y).backward()
    plain = copy.deepcopy(model)
    with disable():
        each = oracle.per_sample_grad(
            oracle.parameters(plain), lambda: F.cross_entropy(plain(x), y, reduction="none").sum(1) / y.numel()
        )
    oracle.assert_close(fields(model, "grad_batch"), each)
    oracle.assert_close(fields(model, "variance"), oracle.variance(each))


# -- second order ----------------------------------------------------------------------------------------------


def test_script_everything_at_once() -> None:
    """All extensions in one backward pass give what each gives alone."""
    names = [name for name in extensions.__all__ if name not in ("BackpropExtension", "PCHMP", "HMP", "GGNMP")]
    images, labels = small_images()
    start = small_conv_net()

    def run(*exts: Any) -> nn.Module:
        model, criterion = extend(copy.deepcopy(start)), extend(nn.CrossEntropyLoss())
        loss = criterion(model(images), labels)
        with backpack(*exts):
            loss.backward()
        return model

    exact = [getattr(extensions, name)() for name in names if "MC" not in name and name != "KFAC"]
    together = run(*exact)
    for ext in exact:
        alone = run(ext)
        for p, q in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(getattr(p, ext.savefield), getattr(q, ext.savefield), rtol=1e-10, atol=1e-14)
            assert torch.equal(p.grad, q.grad)
    sampled = [getattr(extensions, name)(mc_samples=2) for name in names if "MC" in name or name == "KFAC"]
    for p in run(*exact, *sampled).parameters():
        torch.testing.assert_close(p.diag_ggn_mc_batch.sum(0), p.diag_ggn_mc)  # the same draws
        torch.testing.assert_close(p.sqrt_ggn_mc.square().sum((0, 1)), p.diag_ggn_mc)


class DampedDiagonal(torch.optim.Optimizer):
    """`p -= lr * grad / (diagonal + damping)`, with the diagonal in a field of p."""

    def __init__(self, parameters: Any, lr: float, damping: float, field: str) -> None:
        super().__init__(parameters, {"lr": lr, "damping": damping, "field": field})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / (getattr(p, group["field"]) + group["damping"]))


@pytest.mark.parametrize("ext", [DiagGGNExact(), extensions.DiagGGNMC(mc_samples=4)])
def test_script_damped_diagonal_optimizer(ext: Any) -> None:
    """A small convolutional net, trained with the diagonal of the GGN as its preconditioner."""
    model = extend(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)))
    criterion = extend(nn.CrossEntropyLoss())
    images = torch.randn(30, 1, 6, 6)
    labels = images.mean((1, 3)).unflatten(1, (3, 2)).mean(2).argmax(1)
    images += 2 * F.one_hot(labels, 3).repeat_interleave(2, 1)[:, None, :, None]
    optimizer = DampedDiagonal(model.parameters(), lr=0.3, damping=1e-2, field=ext.savefield)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        with backpack(ext):
            loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < 0.2 * history[0]


@pytest.mark.parametrize("ext", [KFAC(mc_samples=4), KFLR(), KFRA()])
def test_script_kronecker_preconditioner(ext: Any) -> None:
    """Steps `(B + d I)^-1 (x) (A + d I)^-1` times the gradient, and one of them against the dense inverse."""
    model, criterion = extend(small_conv_net()), extend(nn.CrossEntropyLoss())
    images, labels = small_images()
    history, damping = [], 0.05
    for _ in range(30):
        model.zero_grad()
        loss = criterion(model(images), labels)
        with backpack(ext):
            loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                factors = getattr(p, ext.savefield)
                step = apply_inv_kfac_mat_prod(factors, p.grad.flatten(), damping)
                dense = torch.ones(1, 1)
                for factor in factors:
                    dense = torch.kron(dense, factor + damping * torch.eye(len(factor)))
                torch.testing.assert_close(step, torch.linalg.solve(dense, p.grad.flatten()))
                p.sub_(0.05 * step.view_as(p))
        history.append(float(loss.detach()))
    assert history[-1] < 0.5 * history[0]


def test_script_eigenvalues_of_the_ggn() -> None:
    """The GGN's spectrum from the Gram matrix of its root, on a part of the samples."""
    model, criterion, x = extend(net()), extend(nn.CrossEntropyLoss()), torch.randn(5, 4)
    chosen = [4, 0, 2]
    with backpack(SqrtGGNExact(subsampling=chosen)):
        criterion(model(x), Y).backward()
    root = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in model.parameters()], 2).flatten(0, 1)
    found = torch.linalg.eigvalsh(root @ root.T)
    plain = copy.deepcopy(model)
    with disable():
        ggn = oracle.ggn(
            oracle.parameters(plain),
            lambda: plain(x[chosen]),
            lambda z: F.cross_entropy(z, Y[chosen], reduction="sum") / 5,
        )
    torch.testing.assert_close(found, torch.linalg.eigvalsh(ggn)[-len(found) :], rtol=1e-8, atol=1e-12)


# -- products with matrices that are not made ------------------------------------------------------------------


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x with `product(x) = b`, for a symmetric positive definite product."""
    x, r = torch.zeros_like(b), b.clone()
    p, size = r.clone(), float(r @ r)
    for _ in range(steps):
        if size < 1e-26:
            break
        ap = product(p)
        alpha = size / float(p @ ap)
        x, r = x + alpha * p, r - alpha * ap
        size, old = float(r @ r), size
        p = r + size / old * p
    return x


def dense_steps(model: nn.Module, x: Tensor, y: Tensor, damping: float) -> dict[str, Tensor]:
    """The solution of every block's equation, from the block itself."""
    plain, steps = copy.deepcopy(model), {}
    with disable():
        for name, p in plain.named_parameters():
            block = oracle.ggn({name: p}, lambda: plain(x), lambda z: F.cross_entropy(z, y))
            grad = model.get_parameter(name).grad
            steps[name] = torch.linalg.solve(block + damping * torch.eye(len(block)), grad.flatten()).view_as(p)
    return steps


def test_script_newton_steps_by_blocks() -> None:
    """(G_p + d I) s_p = grad_p for every parameter's block by conjugate gradients, and training with these steps."""
    model, criterion = extend(small_conv_net()), extend(nn.CrossEntropyLoss())
    images, labels = small_images()
    damping, history = 0.1, []
    for epoch in range(12):
        model.zero_grad()
        loss = criterion(model(images), labels)
        with backpack(GGNMP()):
            loss.backward()
        steps = {}
        for name, p in model.named_parameters():

            def product(v: Tensor, p: Tensor = p) -> Tensor:
                return p.ggnmp(v.view(1, *p.shape)).flatten() + damping * v

            steps[name] = conjugate_gradients(product, p.grad.flatten(), 60).view_as(p)
            del p.ggnmp  # and with it the graph
        if epoch == 0:
            for name, expected in dense_steps(model, images, labels, damping).items():
                torch.testing.assert_close(steps[name], expected, rtol=1e-7, atol=1e-9)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.sub_(0.3 * steps[name])
        history.append(float(loss.detach()))
    assert history[-1] < 0.3 * history[0]


def test_script_hessian_free_step() -> None:
    """The same for the whole matrix, with no extension at all."""
    model, x = net(), torch.randn(5, 4)
    parameters = list(model.parameters())
    out = model(x)
    loss = F.cross_entropy(out, Y)
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])

    def product(v: Tensor) -> Tensor:
        found = ggn_vector_product_from_plist(loss, out, parameters, vector_to_parameter_list(v, parameters))
        return torch.cat([f.flatten() for f in found]) + 0.1 * v

    step = conjugate_gradients(product, grad, 100)
    ggn = oracle.ggn(oracle.parameters(model), lambda: model(x), lambda z: F.cross_entropy(z, Y))
    expected = torch.linalg.solve(ggn + 0.1 * torch.eye(len(ggn)), grad)
    torch.testing.assert_close(step, expected, rtol=1e-8, atol=1e-10)


def test_script_trace_of_the_hessian() -> None:
    """Three ways to one trace: random products, products in the user's own loop, and the diagonal."""
    model, criterion, x = extend(net()), extend(nn.CrossEntropyLoss()), torch.randn(5, 4)
    loss = criterion(model(x), Y)
    with backpack(DiagHessian(), HMP()):
        loss.backward(retain_graph=True)
    for p in model.parameters():
        trace = p.diag_h.sum()
        v = torch.empty(4000, *p.shape).bernoulli_().mul_(2).sub_(1)  # E v v^T = I
        draws = (v * p.hmp(v)).flatten(1).sum(1)
        assert (draws.mean() - trace).abs() <= 5 * draws.std() / 4000**0.5 + 1e-12
        unit = torch.eye(p.numel()).view(-1, *p.shape)
        torch.testing.assert_close((unit * p.hmp(unit)).sum(), trace)
        by_hand = torch.stack([(e * hessian_vector_product(loss, [p], [e])[0]).sum() for e in unit])
        torch.testing.assert_close(by_hand.sum(), trace)


# -- what the hook is for --------------------------------------------------------------------------------------


def test_script_inner_products_in_a_hook() -> None:
    """Pairwise inner products of gradients, made in a hook that lets the gradients go."""
    model, criterion = extend(net()), extend(nn.CrossEntropyLoss())

    def inner_products(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            rows = p.grad_batch.flatten(1)
            p.dots = rows @ rows.T
            del p.grad_batch

    x = torch.randn(5, 4)
    loss = criterion(model(x), Y)
    with backpack(BatchGrad(), extension_hook=inner_products):
        loss.backward()
    for name, expected in oracle.pairwise_dot(gradients_one_by_one(model, x, Y)).items():
        p = model.get_parameter(name)
        torch.testing.assert_close(p.dots, expected)
        assert not hasattr(p, "grad_batch")
