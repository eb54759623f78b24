"""The interface of BackPACK against BackPACK itself: every extension on models that both support, in float64.

BackPACK is a development extra (`requirements/peers.txt`); without it this module is skipped as a whole.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise.compat.backpack as ours
from layerwise.compat.backpack import extensions as our_extensions
from layerwise.compat.backpack.custom_module import branching, pad, permute, reduce_tuple, scale_module, slicing

theirs = pytest.importorskip("backpack", reason="BackPACK is not installed (requirements/peers.txt)")
their_extensions = pytest.importorskip("backpack.extensions")

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients:UserWarning"),
    pytest.mark.filterwarnings("ignore:The Kronecker factors stored in the weight parameters of transpose:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning"),
]

CLOSE = 1e-10  # of a result's norm

FIRST = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
DIAGONAL = ("DiagGGNExact", "BatchDiagGGNExact", "DiagGGNMC", "BatchDiagGGNMC")
ROOT = ("SqrtGGNExact", "SqrtGGNMC")
HESSIAN = ("DiagHessian", "BatchDiagHessian")
KRONECKER = ("KFAC", "KFLR")
RECURSION = ("KFRA",)
PRODUCTS = ("HMP", "GGNMP", "PCHMP", "PCHMP-abs")
SUBSAMPLED = ("BatchGrad-subsampled", "SqrtGGNExact-subsampled")
GGN = FIRST + DIAGONAL + ROOT
ALL = (*GGN, *HESSIAN, *KRONECKER, *PRODUCTS)
SAMPLED = {"DiagGGNMC", "BatchDiagGGNMC", "SqrtGGNMC", "KFAC"}


@dataclass(frozen=True)
class Case:
    """A model, of nn modules and those of `custom_module`, its batch and loss, and what both libraries offer for it."""

    model: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    extensions: tuple[str, ...]
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    classes: int = 3


def mlp(activation: type[nn.Module], outputs: int = 3) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, outputs))


def flat(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


def images(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, 2, *size)


def vectors() -> Tensor:
    return torch.randn(5, 4)


def residual() -> nn.Module:
    block = branching.Parallel(
        scale_module.ScaleModule(0.5), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    )
    return nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), block, nn.ReLU(), nn.Linear(4, 3))


def recurrent(kind: type[nn.RNNBase]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return nn.Sequential(
            kind(4, 5, batch_first=True),
            reduce_tuple.ReduceTuple(0),
            permute.Permute(0, 2, 1),
            nn.Flatten(),
            nn.Linear(15, 3),
        )

    return build


def sequences() -> Tensor:
    return torch.randn(5, 3, 4)


CASES = {
    "mlp relu": Case(mlp(nn.ReLU), vectors, (*ALL, *RECURSION, *SUBSAMPLED)),
    "mlp sigmoid": Case(mlp(nn.Sigmoid), vectors, (*ALL, *RECURSION)),
    "mlp tanh sum": Case(mlp(nn.Tanh), vectors, (*ALL, *RECURSION), lambda: nn.CrossEntropyLoss(reduction="sum")),
    "mlp mse": Case(mlp(nn.Tanh), vectors, (*ALL, *RECURSION), nn.MSELoss),
    "mlp mse sum": Case(mlp(nn.ReLU), vectors, (*ALL, *RECURSION), lambda: nn.MSELoss(reduction="sum")),
    "mlp bce": Case(mlp(nn.Tanh, 1), vectors, (*GGN, *HESSIAN, *KRONECKER), nn.BCEWithLogitsLoss, classes=1),
    "mlp bce sum": Case(
        mlp(nn.Sigmoid, 1),
        vectors,
        (*GGN, *KRONECKER),
        lambda: nn.BCEWithLogitsLoss(reduction="sum"),
        classes=1,
    ),
    "leaky relu": Case(mlp(nn.LeakyReLU), vectors, GGN + HESSIAN),
    "logsigmoid": Case(mlp(nn.LogSigmoid), vectors, GGN + HESSIAN),
    "elu": Case(mlp(nn.ELU), vectors, GGN + HESSIAN),
    "selu": Case(mlp(nn.SELU), vectors, GGN + HESSIAN),
    "one sample": Case(mlp(nn.Tanh), lambda: torch.randn(1, 4), (*ALL, *RECURSION)),
    "no bias": Case(lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), vectors, ALL),
    "dropout eval": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.ReLU(), nn.Linear(5, 3)).eval(), vectors, ALL
    ),
    "further axis": Case(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(6, 3)),
        sequences,
        FIRST + DIAGONAL + ROOT,
    ),
    "conv1d": Case(
        lambda: flat(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Sigmoid(), nn.MaxPool1d(2), features=6),
        images(8),
        (*GGN, *HESSIAN),
    ),
    "conv1d kfac": Case(
        lambda: flat(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Tanh(), features=12), images(8), KRONECKER + RECURSION
    ),
    "conv2d": Case(
        lambda: flat(
            nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 2, (2, 1), dilation=(1, 2)),
            nn.Sigmoid(), nn.AvgPool2d(2, 1), features=4,
        ),
        images(7, 6),
        (*ALL, *SUBSAMPLED),
    ),
    "conv2d zero padding": Case(
        lambda: flat(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 2, 3), nn.ReLU(), features=50),
        images(4, 6),
        (*ALL, *RECURSION),
    ),
    "conv2d groups": Case(
        lambda: flat(nn.Conv2d(2, 4, 2, groups=2), nn.Sigmoid(), nn.AdaptiveAvgPool2d(2), features=16),
        images(5, 5),
        ("BatchGrad", "SumGradSquared", "Variance", *DIAGONAL),
    ),
    "conv3d": Case(
        lambda: flat(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.MaxPool3d(2), features=2), images(3, 3, 4), (*GGN, *HESSIAN)
    ),
    "conv3d kfac": Case(
        lambda: flat(nn.Conv3d(2, 2, 2), nn.Tanh(), features=16), images(3, 3, 3), KRONECKER + RECURSION
    ),
    "transposed 1d": Case(
        lambda: flat(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh(), features=27),
        images(4),
        GGN + HESSIAN + KRONECKER + RECURSION,
    ),
    "transposed 2d": Case(
        lambda: flat(nn.ConvTranspose2d(2, 3, (3, 2), stride=2, padding=1), nn.Sigmoid(), features=60),
        images(3, 3),
        GGN + KRONECKER,
    ),
    "transposed 3d": Case(
        lambda: flat(nn.ConvTranspose3d(2, 2, 2), nn.Tanh(), features=54), images(2, 2, 2), GGN + KRONECKER
    ),
    "batch norm eval": Case(
        lambda: trained(flat(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), features=12)), images(4, 4), GGN
    ),
    "batch norm 1d eval": Case(
        lambda: trained(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))), vectors, GGN
    ),
    "embedding": Case(
        lambda: flat(nn.Embedding(7, 3), features=12), lambda: torch.randint(7, (5, 4)), FIRST + DIAGONAL + ROOT
    ),
    "rnn": Case(recurrent(nn.RNN), sequences, FIRST + DIAGONAL),
    "lstm": Case(recurrent(nn.LSTM), sequences, FIRST + DIAGONAL),
    "conv2d relu pool, one sample": Case(
        lambda: flat(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1), features=8),
        lambda: torch.randn(1, 2, 5, 5),
        RECURSION,
    ),
    "conv2d average pool": Case(
        lambda: flat(nn.Conv2d(2, 3, 3, stride=2), nn.Sigmoid(), nn.AvgPool2d(2), features=3), images(7, 6), RECURSION
    ),
    "residual": Case(residual, vectors, (*GGN, "KFAC")),
    "pad and slice": Case(
        lambda: nn.Sequential(
            nn.Linear(4, 5), pad.Pad((1, 2)), nn.Tanh(), slicing.Slicing((slice(None), slice(0, 6))), nn.Linear(6, 3)
        ),
        vectors,
        DIAGONAL + ROOT + HESSIAN,
    ),
    "pixels": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 3, 1)), images(3, 3), GGN + KRONECKER
    ),
}  # fmt: skip


def trained(model: nn.Module) -> nn.Module:
    """Batch statistics that are neither zero nor one, in eval mode."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def translated(model: nn.Module) -> nn.Module:
    """The model with BackPACK's own modules in place of ours; parameters are shared."""
    import backpack.custom_module as custom  # noqa: F401
    from backpack.custom_module import branching as b
    from backpack.custom_module import pad as p
    from backpack.custom_module import permute as m
    from backpack.custom_module import reduce_tuple as r
    from backpack.custom_module import scale_module as s
    from backpack.custom_module import slicing as sl

    if isinstance(model, branching.Parallel):
        return b.Parallel(*(translated(child) for child in model.branch.values()))
    if isinstance(model, nn.Sequential):
        return nn.Sequential(*(translated(child) for child in model))
    if isinstance(model, scale_module.ScaleModule):
        return s.ScaleModule(model.weight)
    if isinstance(model, reduce_tuple.ReduceTuple):
        return r.ReduceTuple(model.index)
    if isinstance(model, permute.Permute):
        return m.Permute(*model.dims)
    if isinstance(model, pad.Pad):
        return p.Pad(model.pad)
    if isinstance(model, slicing.Slicing):
        return sl.Slicing(model.slice_info)
    return model


def extension(module: Any, name: str) -> Any:
    name, _, option = name.partition("-")
    kwargs: dict[str, Any] = {"mc_samples": 2} if name in SAMPLED else {}
    if option == "subsampled":
        kwargs["subsampling"] = [3, 0]
    if option == "abs":
        kwargs["modify"] = "abs"
    return getattr(module, name)(**kwargs)


def target_of(loss: nn.Module, out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.randint(out.shape[1], (len(out), *out.shape[2:]), generator=generator)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return torch.randint(2, out.shape, generator=generator).to(out)
    return torch.randn(out.shape, generator=generator, dtype=out.dtype)


def run(library: Any, ext: Any, model: nn.Module, loss: nn.Module, x: Tensor, seed: int = 3) -> list[Any]:
    """The fields of all parameters, in order; the draws follow the seed."""
    model, loss = library.extend(model), library.extend(loss)
    with library.backpack(ext):
        out = model(x)
        value = loss(out, target_of(loss, out))
        torch.manual_seed(seed)
        value.backward()
    return [getattr(p, ext.savefield) for p in model.parameters()]


def both(case: Case, name: str) -> list[tuple[Any, Any]]:
    """Our field and theirs of every parameter."""
    torch.manual_seed(1)
    model, x, loss = case.model(), case.input(), case.loss()
    found = run(ours, extension(our_extensions, name), copy.deepcopy(model), copy.deepcopy(loss), x)
    expected = run(theirs, extension(their_extensions, name), translated(copy.deepcopy(model)), loss, x)
    assert len(found) == len(expected) > 0
    return list(zip(found, expected, strict=True))


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            assert_equal(f, e)
        return
    assert found.shape == expected.shape
    assert torch.linalg.vector_norm(found - expected) <= CLOSE * torch.linalg.vector_norm(expected) + 1e-13


def draws_otherwise(case: str, name: str) -> bool:
    """Whether the two draw labels in different ways: Bernoulli labels, whose law is tested on its own."""
    return name in SAMPLED and isinstance(CASES[case].loss(), nn.BCEWithLogitsLoss)


PAIRS = [(case, name) for case in CASES for name in CASES[case].extensions]
FIELDS = [
    pytest.param(case, name, marks=() if (i + j) % 2 == 0 else pytest.mark.slow)  # every case, every extension
    for i, case in enumerate(CASES)
    for j, name in enumerate(CASES[case].extensions)
    if name not in PRODUCTS and not draws_otherwise(case, name)
]
FUNCTIONS = [pair for pair in PAIRS if pair[1] in PRODUCTS]


@pytest.mark.parametrize(("case", "name"), FIELDS)
def test_field_equals_backpacks(case: str, name: str) -> None:
    for found, expected in both(CASES[case], name):
        assert_equal(found, expected)


@pytest.mark.parametrize(("case", "name"), FUNCTIONS)
def test_products_equal_backpacks(case: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PCHMP once the gradient counts once: BackPACK 1.7.1 multiplies its residuals by it in two places."""
    if name.startswith("PCHMP"):
        elementwise = importlib.import_module("backpack.core.derivatives.elementwise")
        second = lambda self, module, g_inp, g_out: self.d2f(module, g_inp, g_out)  # noqa: E731
        monkeypatch.setattr(elementwise.ElementwiseDerivatives, "hessian_diagonal", second)
    generator = torch.Generator().manual_seed(7)
    shapes = [p.shape for p in CASES[case].model().parameters()]
    for shape, (found, expected) in zip(shapes, both(CASES[case], name), strict=True):
        stack = torch.randn(3, *shape, generator=generator)
        assert_equal(found(stack), expected(stack))


@pytest.mark.parametrize("name", sorted(SAMPLED - {"SqrtGGNMC"}))
def test_bernoulli_draws_have_backpacks_mean(name: str) -> None:
    torch.manual_seed(1)
    model, x, loss = mlp(nn.Tanh, 1)(), torch.randn(6, 4), nn.BCEWithLogitsLoss()

    def mean(library: Any, module: Any) -> list[Tensor]:
        ext = getattr(module, name)(mc_samples=4000)
        fields = run(library, ext, copy.deepcopy(model), copy.deepcopy(loss), x)
        return [field[0] if isinstance(field, list) else field for field in fields]

    for found, expected in zip(mean(ours, our_extensions), mean(theirs, their_extensions), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0.2, atol=float(expected.abs().max()) * 0.05)


class Functional(nn.Module):
    """A residual net in functions, which BackPACK converts to modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.relu, self.tanh = nn.ReLU(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        return self.last(self.tanh(self.second(x)) + x)


class Block(nn.Module):
    """Two convolutions and norms beside a shortcut, with one ReLU in two places."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(out) for _ in range(3))
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.bn3(self.shortcut(x)))


class ResNet(nn.Module):
    """A small residual net for images, flattened by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(2, 3, 1), Block(3, 4, 2))
        self.pool, self.head = nn.AvgPool2d(3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(x)), 1))


CONVERTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual net": (Functional, (5, 4)),
    "resnet": (lambda: trained(ResNet()), (5, 2, 6, 6)),
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in CONVERTED for n in GGN] + [("residual net", "KFAC")])
def test_converted_model(kind: str, name: str) -> None:
    torch.manual_seed(1)
    build, size = CONVERTED[kind]
    model, x, loss = build(), torch.randn(size), nn.CrossEntropyLoss()
    target = torch.tensor([0, 1, 2, 0, 1])

    def fields(library: Any, module: Any) -> dict[str, Any]:
        ext = extension(module, name)
        net = library.extend(copy.deepcopy(model), use_converter=True)
        criterion = library.extend(copy.deepcopy(loss))
        value = criterion(net(x), target)
        torch.manual_seed(3)
        with library.backpack(ext):
            value.backward()
        return {n: getattr(p, ext.savefield) for n, p in net.named_parameters()}

    found, expected = fields(ours, our_extensions), fields(theirs, their_extensions)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for n in expected:
        assert_equal(found[n], expected[n])


def test_hessian_free_products() -> None:
    from backpack.hessianfree import ggnvp, hvp, lop, rop

    from layerwise.compat.backpack.hessianfree import ggnvp as our_ggnvp
    from layerwise.compat.backpack.hessianfree import hvp as our_hvp
    from layerwise.compat.backpack.hessianfree import lop as our_lop
    from layerwise.compat.backpack.hessianfree import rop as our_rop

    torch.manual_seed(1)
    model, x = mlp(nn.Tanh)(), torch.randn(5, 4)
    out = model(x)
    loss = nn.functional.cross_entropy(out, torch.tensor([0, 1, 2, 0, 1]))
    params = list(model.parameters())
    v = [torch.randn_like(p) for p in params]
    assert_equal(our_hvp.hessian_vector_product(loss, params, v), hvp.hessian_vector_product(loss, params, v))
    assert_equal(our_ggnvp.ggn_vector_product(loss, out, model, v), ggnvp.ggn_vector_product(loss, out, model, v))
    assert_equal(our_rop.R_op(out, params, v), rop.R_op(out, params, v))
    w = torch.randn_like(out)
    assert_equal(our_lop.L_op(out, params, w), lop.L_op(out, params, w))
    assert_equal(our_rop.jacobian_vector_product(out, params, v), rop.jacobian_vector_product(out, params, v))


def test_kronecker_helpers() -> None:
    from backpack.utils import kroneckers
    from backpack.utils.convert_parameters import vector_to_parameter_list

    from layerwise.compat.backpack.utils import kroneckers as our_kroneckers
    from layerwise.compat.backpack.utils.convert_parameters import vector_to_parameter_list as our_list

    roots = [torch.randn(n, n) for n in (2, 3, 2)]
    factors = [r @ r.T for r in roots]
    assert_equal(our_kroneckers.kfacs_to_mat(factors), kroneckers.kfacs_to_mat(factors))
    for vector in (torch.randn(12), torch.randn(12, 5)):
        assert_equal(
            our_kroneckers.apply_kfac_mat_prod(factors, vector), kroneckers.apply_kfac_mat_prod(factors, vector)
        )
        for shift in (None, 0.5, [0.1, 0.2, 0.3]):
            assert_equal(
                our_kroneckers.apply_inv_kfac_mat_prod(factors, vector, shift),
                kroneckers.apply_inv_kfac_mat_prod(factors, vector, shift),
            )
    shapes = [torch.zeros(2, 3), torch.zeros(()), torch.zeros(4)]
    vector = torch.randn(11)
    assert_equal(our_list(vector, shapes), vector_to_parameter_list(vector, shapes))
