"""Lesser-used calls and parameters: exact where there is an answer, else refused by name."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import layerwise as lw
from layerwise import errors
from layerwise.tape.pull import pull

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::layerwise.errors.SlowPath"),
]


class Learned(nn.Module):
    """Outputs and a scale that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_scale = nn.Linear(4, 3), nn.Parameter(torch.randn(3))


@pytest.mark.parametrize("kind", ["Normal", "Laplace", "Gumbel"])
def test_distributions_with_a_learned_scale(kind: str) -> None:
    torch.manual_seed(0)
    model, x, y = Learned(), torch.randn(5, 4), torch.randn(5, 3)

    def terms() -> Tensor:
        found = getattr(torch.distributions, kind)(model.mean(x), model.log_scale.exp()).log_prob(y)
        return -found.sum(1) / 5

    with lw.observe(model, lw.PerSampleGrad()) as seen:
        terms().sum().backward()
    for name, p in model.named_parameters():
        want = torch.stack([torch.autograd.grad(term, p, retain_graph=True)[0] for term in terms()])
        oracle.assert_close({name: seen.per_sample_grad[name]}, {name: want})


@pytest.mark.parametrize("quantity", [lw.DiagGGN(), lw.SqrtGGN(), lw.ClippedGrad(0.1), lw.KFAC(), lw.DiagHessian()])
def test_a_parameter_without_elements_alone_is_no_error(quantity: lw.Quantity) -> None:
    model = nn.ParameterDict({"none": nn.Parameter(torch.zeros(0))})
    layer, x, y = nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    model["weight"] = layer.weight
    with lw.observe(model, quantity):
        rows = torch.cat([x, model["none"].expand(5, -1)], 1)
        F.cross_entropy(rows @ model["weight"].T, y).backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda z, c: torch.cdist(z, c),
        lambda z, c: torch.cdist(z, c, p=3),
        lambda z, c: F.layer_norm(z, (4,), None, c[0]),
    ],
)
def test_products_through_calls_that_torch_cannot_differentiate_twice(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    params = nn.ParameterDict({"weight": model.weight, "bias": model.bias, "c": nn.Parameter(torch.randn(4, 4))})

    def loss() -> Tensor:
        return F.cross_entropy(call(F.linear(x, params["weight"], params["bias"]), params["c"]), y)

    operator = lw.GGN(params, loss)
    got = torch.stack([operator @ e for e in torch.eye(operator.shape[0])]).diagonal()
    with lw.observe(params, lw.DiagGGN()) as seen:
        loss().backward()
    zero = {name: torch.zeros_like(p) for name, p in params.items()}  # of a parameter that a call does not read
    want = torch.cat([(zero | dict(seen.diag_ggn))[name].flatten() for name in operator.names])
    oracle.assert_close({"diagonal": got}, {"diagonal": want})


PIECEWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "hardsigmoid": F.hardsigmoid, "hardsigmoid_": lambda z: F.hardsigmoid(z * 1, inplace=True),
    "hardsigmoid_, checkpointed": lambda z: checkpoint(
        lambda u: F.hardsigmoid(3 * u, inplace=True) * u, z, use_reentrant=False
    ),
    "squeezed": lambda z: z * nn.Hardsigmoid()(z.mean(1, keepdim=True)),
    "hardswish": F.hardswish, "hardswish_": lambda z: F.hardswish(z * 1, inplace=True),
    "hardtanh": lambda z: F.hardtanh(z, -0.3, 0.4), "hardtanh_": lambda z: F.hardtanh_(z * 1, -0.3, 0.4),
    "relu6": lambda z: F.relu6(6 * z), "threshold": lambda z: F.threshold(z, 0.1, 0.3),
    "hardshrink": F.hardshrink, "softshrink": lambda z: F.softshrink(z, 0.2), "leaky_relu": F.leaky_relu,
    "elu": F.elu, "celu": lambda z: F.celu(z, 0.5), "selu": F.selu, "clamp": lambda z: z.clamp(-0.3, 0.4),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECEWISE)
def test_second_order_through_functions_in_pieces(name: str) -> None:
    """Against differences of the gradient, which need no second derivative of torch."""
    torch.manual_seed(3)
    model, act = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), PIECEWISE[name]
    x, y = 3 * torch.randn(6, 4), torch.randn(6, 2)

    def loss() -> Tensor:
        return F.mse_loss(model[1](act(model[0](x))), y)

    check_against_differences(model, loss)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_second_order_through_distances_of_pairs(p: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    check_against_differences(model, lambda: lw.as_loss(lambda d: (d - 1).square().sum())(F.pdist(model(x), p)))


def check_against_differences(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Compare the Hessian, its diagonal and the symmetry of GGN products with central differences of the gradient."""
    step, params = 1e-5, list(model.parameters())
    columns = []
    for p in params:
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * step
                ends.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(), params)]))
                with torch.no_grad():
                    p.view(-1)[i] -= sign * step
            columns.append((ends[0] - ends[1]) / (2 * step))
    want = torch.stack(columns, 1)
    got = lw.Hessian(model, loss).to_dense()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7 * float(want.abs().max()))
    with lw.observe(model, lw.DiagHessian()) as seen:
        loss().backward()
    diagonal = torch.cat([seen.diag_hessian[name].flatten() for name, _ in model.named_parameters()])
    oracle.assert_close({"diagonal": diagonal}, {"diagonal": got.diagonal()})
    ggn = lw.GGN(model, loss).to_dense()
    oracle.assert_close({"ggn": ggn}, {"ggn": ggn.T})
    assert float(torch.linalg.eigvalsh(ggn)[0]) > -1e-9 * float(ggn.abs().max())


def test_a_linear_part_beside_a_curved_loss_adds_no_curvature() -> None:
    torch.manual_seed(0)
    body, x, y = nn.Linear(4, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])

    def run(weight: float) -> Tensor:
        with lw.observe(body, lw.DiagGGN()) as seen:
            z = body(x)
            (F.cross_entropy(z[:, :3], y) + weight * lw.as_loss(lambda u: u.mean())(z[:, 3])).backward()
        return seen.diag_ggn["weight"][:3]

    oracle.assert_close({"weight": run(0.5)}, {"weight": run(0.1)})


def test_lazy_parameters_are_named() -> None:
    with pytest.raises(errors.BadInput, match=r"0\.weight, 0\.bias of lazy modules"):
        lw.LocoProp(nn.Sequential(nn.LazyLinear(3)))


def test_products_through_a_grid_on_the_centres_of_pixels_are_refused() -> None:
    x, theta = torch.randn(5, 2, 3, 3), nn.Parameter(torch.eye(2, 3)[None])

    def loss() -> Tensor:
        grid = F.affine_grid(theta.expand(5, -1, -1), [5, 2, 3, 3], align_corners=False)
        return F.mse_loss(F.grid_sample(x, grid, align_corners=False), torch.zeros(5, 2, 3, 3))

    with pytest.raises(errors.Undefined, match="centre of a pixel"):
        lw.GGN({"theta": theta}, loss)


def test_a_known_loss_and_a_linear_term_by_hand() -> None:
    """The term has slopes alone: the curvature is that of the known loss."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 4), torch.randn(5, 3)

    def loss_of(rows: slice) -> Tensor:
        z = model(x[rows])
        return F.mse_loss(z, y[rows]) + 0.1 * z.abs().mean()

    with lw.observe(model, lw.PerSampleGrad(), lw.DiagGGN()) as seen:
        loss_of(slice(None)).backward()
    for name, p in model.named_parameters():
        want = torch.stack([torch.autograd.grad(loss_of(slice(n, n + 1)) / 5, p)[0] for n in range(5)])
        oracle.assert_close({name: seen.per_sample_grad[name]}, {name: want})
        jacobian = torch.stack([torch.autograd.grad(z, p, retain_graph=True)[0] for z in model(x).flatten()])
        oracle.assert_close({name: seen.diag_ggn[name]}, {name: 2 / 15 * jacobian.square().sum(0)})


def test_a_mesh_of_parameters() -> None:
    torch.manual_seed(0)
    model, x = nn.ParameterDict({"a": torch.randn(3), "b": torch.randn(4)}), torch.randn(5, 3, 4)

    def terms() -> Tensor:
        a, b = torch.meshgrid(model["a"], model["b"], indexing="ij")
        return (x * (a * b).tanh()).square().sum((1, 2)) / 5

    with lw.observe(model, lw.PerSampleGrad()) as seen:
        terms().sum().backward()
    for name, p in model.named_parameters():
        want = torch.stack([torch.autograd.grad(term, p, retain_graph=True)[0] for term in terms()])
        oracle.assert_close({name: seen.per_sample_grad[name]}, {name: want})


def test_a_derivative_that_torch_cannot_batch_is_taken_one_by_one() -> None:
    """The second derivative of group norm, with one loss that holds the first."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 2, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    (g,) = torch.autograd.grad(F.group_norm(x, 1, w).pow(3).sum(), x, create_graph=True)
    stack = torch.randn(3, *x.shape)
    for found, p in zip(pull([g], [stack], [x, w], batched=True), (x, w), strict=True):
        rows = [torch.autograd.grad(g, p, c, retain_graph=True)[0] for c in stack]
        oracle.assert_close({"": found}, {"": torch.stack(rows)})
