"""The backends for laplace-torch against its own, and against its definitions where it has no backend that will do.

laplace-torch is a development extra (`requirements/peers.txt`); without it, or what it imports, this module is skipped.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from grids import one_in
from oracle import assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed (requirements/peers.txt)")
theirs = importlib.import_module("laplace.curvature")
ours = importlib.import_module("layerwise.compat.laplace")

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using non-full backward hooks:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
    pytest.mark.filterwarnings("ignore:ASDL backend is used which does not support backprop:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet:UserWarning"),
]

LIKELIHOODS = ("classification", "regression")
OUR_NAME = {"GGN": "LayerwiseGGN", "EF": "LayerwiseEF"}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


class Sequence(nn.Module):
    """An embedding, attention, layer norms and a tied weight, with one frozen and one unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.block.linear1.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        z = self.block(self.embedding(x))
        return self.head(self.twice(self.twice(z).tanh()).mean(1))


class Products(nn.Module):
    """A weight that is multiplied from the left, and a scale, written as plain products."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(((x * self.scale) @ self.weight).tanh())


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(75, 3, bias=False))


def vectors() -> Tensor:
    return torch.randn(7, 5)


def images() -> Tensor:
    return torch.randn(7, 2, 4, 4)


def tokens() -> Tensor:
    return torch.randint(7, (6, 5))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, vectors),
    "conv": (conv, images),
    "sequence": (Sequence, tokens),
    "products": (Products, vectors),
    "transposed": (transposed, images),
}


def problem(net: str, likelihood: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, batch = NETS[net]
    model, x = make().eval(), batch()
    model.output_size = 3  # as laplace sets it
    y = torch.randint(3, (len(x),)) if likelihood == "classification" else torch.randn(len(x), 3)
    return model, x, y


def value(backend: Any, what: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and matrix of a call, as tensors; the data set is twice the batch."""
    if what == "jacobians":
        return backend.jacobians(x)
    if what == "kron":
        loss, kron = backend.kron(x, y, 2 * len(x))
        return loss, kron.to_matrix()
    return getattr(backend, what)(x, y)


# -- backend against backend ----------------------------------------------------------------------------------------


@one_in(
    2,
    name=["CurvlinopsGGN", "BackPackGGN", "AsdlGGN", "CurvlinopsEF", "BackPackEF", "AsdlEF"],
    what=["jacobians", "gradients", "full", "diag", "kron"],
    net=["mlp", "conv"],
    likelihood=LIKELIHOODS,
)
def test_backend_equals(name: str, what: str, net: str, likelihood: str) -> None:
    if what == "kron" and name == "BackPackEF":
        pytest.skip("laplace has no Kronecker factors from BackPACK's gradients")
    if what == "kron" and name == "BackPackGGN" and net == "conv":
        pytest.skip("BackPACK's factors of a convolution are others: the A of expand times positions, the B of reduce")
    model, x, y = problem(net, likelihood)
    mine = getattr(ours, OUR_NAME["EF" if name.endswith("EF") else "GGN"])(copy.deepcopy(model), likelihood)
    other = getattr(theirs, name)(copy.deepcopy(model), likelihood)
    for a, b in zip(value(mine, what, x, y), value(other, what, x, y), strict=True):
        assert_close(a, b.detach())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_factors_that_reduce_equal_those_of_curvlinops(likelihood: str) -> None:
    model, x, y = problem("conv", likelihood)
    for mine, other in ((ours.LayerwiseGGN, theirs.CurvlinopsGGN), (ours.LayerwiseEF, theirs.CurvlinopsEF)):
        found, wanted = (b(model, likelihood).kron(x, y, 9, kfac_approx="reduce")[1] for b in (mine, other))
        assert_close(found.to_matrix(), wanted.to_matrix())
        assert not torch.allclose(found.to_matrix(), mine(model, likelihood).kron(x, y, 9)[1].to_matrix())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_hessian_equals(likelihood: str) -> None:
    model, x, y = problem("mlp", likelihood)
    loss, matrix = ours.LayerwiseHessian(model, likelihood).full(x, y)
    their_loss, their_matrix = theirs.CurvlinopsHessian(model, likelihood).full(x, y)
    assert_close(loss, their_loss)
    assert_close(matrix, their_matrix)
    assert_close(ours.LayerwiseHessian(model, likelihood).diag(x, y)[1], matrix.diag())
    some = torch.tensor([5, 0, 70])
    part = ours.LayerwiseHessian(model, likelihood, subnetwork_indices=some)
    assert_close(part.full(x, y)[1], matrix[some][:, some])
    assert_close(part.diag(x, y)[1], matrix.diag()[some])


@pytest.mark.parametrize("net", ["sequence", "products"])
def test_hessian_of_any_model(net: str) -> None:
    model, x, y = problem(net, "classification")
    with oracle.plain_operations():
        wanted = oracle.hessian(
            oracle.parameters(model), lambda: nn.functional.cross_entropy(model(x), y, reduction="sum")
        )
    backend = ours.LayerwiseHessian(model, "classification")
    assert_close(backend.full(x, y)[1], wanted)
    assert_close(backend.diag(x, y)[1], wanted.diag())


# -- laplace with either, as a whole --------------------------------------------------------------------------------

# CurvlinopsEF's diagonal of a last layer is zero in laplace 0.3: it differentiates by the whole model's names.
FITS = [
    (weights, structure, kind, other)
    for weights in ("all", "last_layer", "subnetwork")
    for structure in ("full", "kron", "diag")
    for kind, other in (("GGN", "CurvlinopsGGN"), ("GGN", "BackPackGGN"), ("EF", "CurvlinopsEF"), ("EF", "AsdlEF"))
    if (weights, structure) != ("subnetwork", "kron")
    and (weights, structure, other) not in {("last_layer", "diag", "CurvlinopsEF"), ("last_layer", "full", "AsdlEF")}
]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("weights", "structure", "kind", "other"), FITS)
def test_fit_equals(weights: str, structure: str, kind: str, other: str, likelihood: str) -> None:
    model, _, _ = problem("mlp", likelihood)
    x = torch.randn(11, 5)
    y = torch.randint(3, (11,)) if likelihood == "classification" else torch.randn(11, 3)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    chosen = {"subnetwork_indices": torch.tensor([0, 3, 7, 40, 60])} if weights == "subnetwork" else {}

    def fitted(backend: Any) -> tuple[Tensor, ...]:
        la = laplace.Laplace(
            copy.deepcopy(model), likelihood, weights, structure, prior_precision=0.7, backend=backend, **chosen
        )
        la.fit(loader)
        out = la(x[:3])
        curvature = la.H if isinstance(la.H, Tensor) else la.H.to_matrix()
        return curvature, la.log_marginal_likelihood(), *(out if isinstance(out, tuple) else (out,))

    for a, b in zip(fitted(getattr(ours, OUR_NAME[kind])), fitted(getattr(theirs, other)), strict=True):
        assert_close(a.detach(), b.detach())


def test_fit_of_the_hessian_at_a_minimum(generator: torch.Generator) -> None:
    """Where the Hessian is positive, of a linear model, it is the GGN."""
    model, x, y = nn.Linear(5, 3), torch.randn(20, 5), torch.randint(3, (20,))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    found = []
    for backend in (ours.LayerwiseHessian, ours.LayerwiseGGN):
        la = laplace.Laplace(model, "classification", "all", "full", backend=backend)
        la.fit(loader)
        found.append(la.H)
    assert_close(*found)


# -- any model: laplace's definitions by torch.func -------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("net", ["sequence", "products", "transposed"])
def test_any_model_equals_the_definition(net: str, likelihood: str) -> None:
    model, x, y = problem(net, likelihood)
    mine = ours.LayerwiseGGN(model, likelihood)
    definition = theirs.GGNInterface(model, likelihood)
    for what in ("jacobians", "full", "diag"):
        for a, b in zip(value(mine, what, x, y), value(definition, what, x, y), strict=True):
            assert_close(a, b)
    empirical = ours.LayerwiseEF(model, likelihood)
    gradients, loss = empirical.gradients(x, y)
    for n in range(len(x)):
        single = mine.lossfunc(model(x[n : n + 1]), y[n : n + 1])
        g = torch.autograd.grad(single, mine.params, allow_unused=True, materialize_grads=True)
        assert_close(gradients[n], torch.cat([part.flatten() for part in g]))
    assert_close(loss, mine.lossfunc(model(x), y).detach())
    assert_close(empirical.diag(x, y)[1], mine.factor * gradients.square().sum(0))
    assert_close(empirical.full(x, y)[1], mine.factor * gradients.T @ gradients)


@pytest.mark.parametrize("net", ["sequence", "products"])
def test_factors_of_any_model_are_those_of_kflr(net: str) -> None:
    """Whatever the layout of a weight (a table, a left factor, a scale), the block is the operator's."""
    model, x, y = problem(net, "classification")
    kron = ours.LayerwiseGGN(model, "classification").kron(x, y, len(x))[1]
    with lw.observe(model, lw.KFLR()) as seen:
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(kron) == len(named)
    matrix, start = kron.to_matrix(), 0
    for name, p in named.items():
        block = matrix[start : start + p.numel(), start : start + p.numel()]
        assert_close(block, seen.kflr.to_dense(name) if name != "unused" else torch.zeros_like(block))
        start += p.numel()


def test_blocks_of_several_batches_add_up_to_the_whole() -> None:
    model, x, y = problem("mlp", "classification")
    backend = ours.LayerwiseGGN(model, "classification")
    parts = [backend.kron(a, b, len(x))[1] for a, b in zip(x.split(3), y.split(3), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert_close(total.to_matrix(), backend.kron(x, y, len(x))[1].to_matrix())


@pytest.mark.parametrize(
    ("first", "features"),
    [(nn.Conv2d(2, 4, 2, groups=2), 36), (nn.ConvTranspose2d(2, 3, 2), 75)],
    ids=["grouped", "transposed"],
)
def test_weights_that_are_no_product_over_the_first_axis_are_refused(first: nn.Module, features: int) -> None:
    model = nn.Sequential(first.double(), nn.Flatten(), nn.Linear(features, 3))
    x, y = images(), torch.randint(3, (7,))
    backend = ours.LayerwiseGGN(model, "classification")
    with pytest.raises(lw.errors.Undefined, match=r"one product.*'0.weight'"):
        backend.kron(x, y, 7)
    assert_close(backend.diag(x, y)[1], theirs.GGNInterface(model, "classification").diag(x, y)[1])


def test_factors_of_a_subnetwork_are_refused() -> None:
    model, x, y = problem("mlp", "classification")
    backend = ours.LayerwiseGGN(model, "classification", subnetwork_indices=torch.tensor([0, 1]))
    with pytest.raises(lw.errors.Undefined, match="subnetwork"):
        backend.kron(x, y, 7)


# -- details ----------------------------------------------------------------------------------------------------------


def test_classes_at_several_positions() -> None:
    model, x = nn.Linear(5, 3), torch.randn(4, 2, 5)
    y = torch.randint(3, (4, 2))
    found = ours.LayerwiseGGN(model, "classification")
    flat = theirs.GGNInterface(model, "classification")
    for a, b in zip(found.jacobians(x), flat.jacobians(x), strict=True):
        assert_close(a, b)
    for what in ("full", "diag", "kron"):
        if what != "kron":
            assert_close(getattr(found, what)(x, y)[1], getattr(flat, what)(x.flatten(0, 1), y.flatten())[1])
        assert_close(getattr(found, what)(x, y, N=4)[0], flat.lossfunc(model(x).flatten(0, 1), y.flatten()).detach())


def test_sampled_labels_estimate_the_exact_matrix() -> None:
    model, x, y = problem("mlp", "classification")
    exact, sampled = (
        ours.LayerwiseGGN(model, "classification", **options)
        for options in ({}, {"stochastic": True, "num_samples": 4000})
    )
    for what in ("diag", "full", "kron"):
        (_, a), (_, b) = value(exact, what, x, y), value(sampled, what, x, y)
        error = (a - b).norm() / a.norm()
        assert 0 < error < 0.1, what


def test_one_label_a_sample_by_default() -> None:
    model, x, y = problem("mlp", "classification")
    matrix = ours.LayerwiseGGN(model, "classification", stochastic=True).full(x, y)[1]
    assert torch.linalg.matrix_rank(matrix) <= len(x)


def test_selected_outputs() -> None:
    model, x, _ = problem("mlp", "regression")
    mine, definition = (b(model, "regression") for b in (ours.LayerwiseGGN, theirs.GGNInterface))
    for index in (torch.randint(3, (7,)), torch.randint(3, (7, 2))):
        for a, b in zip(
            mine.selected_output_jacobians(x, index), definition.selected_output_jacobians(x, index), strict=True
        ):
            assert_close(a, b)
    with pytest.raises(ValueError, match="one row a sample"):
        mine.selected_output_jacobians(x, torch.zeros(3, dtype=torch.long))


def test_jacobians_can_be_differentiated() -> None:
    model, x, _ = problem("mlp", "regression")
    x.requires_grad_()
    jacobians, f = ours.LayerwiseGGN(model, "regression").jacobians(x, enable_backprop=True)
    (g,) = torch.autograd.grad(jacobians.square().sum() + f.sum(), x)
    assert g.shape == x.shape and bool(g.any())


def test_model_is_left_alone() -> None:
    model, x, y = problem("mlp", "classification")
    first = model[0].weight
    first.grad = torch.full_like(first, 3.0)
    backend = ours.LayerwiseGGN(model, "classification")
    backend.diag(x, y), backend.jacobians(x), backend.kron(x, y, 7), backend.full(x, y)
    assert bool((first.grad == 3).all())
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert not model._forward_hooks and not first._backward_hooks


def test_dictionaries_of_inputs() -> None:
    class Wrapped(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(batch["tokens"])

    net, x, y = problem("mlp", "classification")
    model = Wrapped(net)
    backend = ours.LayerwiseGGN(model, "classification", dict_key_x="tokens")
    assert_close(backend.diag({"tokens": x}, y)[1], ours.LayerwiseGGN(net, "classification").diag(x, y)[1])
    jacobians, f = backend.jacobians({"tokens": x})
    named = dict(model.named_parameters())
    wanted = torch.func.jacrev(lambda p: functional_call(model, p, ({"tokens": x},)))(named)
    assert_close(jacobians, torch.cat([j.flatten(2) for j in wanted.values()], 2))
    assert_close(f, net(x).detach())


def test_what_observe_refuses_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))  # in training mode, which laplace never is
    with pytest.raises(lw.errors.SamplesMixed):
        ours.LayerwiseGGN(model, "classification").diag(vectors(), torch.randint(3, (7,)))


def test_without_laplace_the_import_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "laplace.curvature", None)
    monkeypatch.delitem(sys.modules, "layerwise.compat.laplace")
    with pytest.raises(ImportError, match="pip install laplace-torch"):
        importlib.import_module("layerwise.compat.laplace")


class Tagger(nn.Module):
    """A class for each token; pooled: one for the sequence, averaged behind the last layer."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.pooled = nn.Embedding(5, 4), nn.Linear(4, 3), pooled

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.embedding(x)))
        return z.mean(1) if self.pooled else z


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("pooled", [False, True])
def test_last_layer_predictive_of_features_at_several_positions(pooled: bool, structure: str) -> None:
    torch.manual_seed(0)
    model, x = Tagger(pooled), torch.randint(5, (6, 4))
    y = torch.randint(3, (6,) if pooled else (6, 4))
    la = laplace.Laplace(
        model, "classification", "last_layer", hessian_structure=structure, backend=ours.LayerwiseGGN
    )  # fmt: skip
    la.fit(DataLoader(TensorDataset(x, y), batch_size=3))
    columns, f = la.backend.last_layer_jacobians(x)
    want = model(x).reshape(-1, 3)
    assert_close(f, want)
    head = list(model.head.parameters())
    for n, row in enumerate(want):
        for c, out in enumerate(row):
            g = torch.autograd.grad(out, head, retain_graph=True)
            assert_close(columns[n, c], torch.cat([part.flatten() for part in g]))
    probabilities = la(x)
    precision = la.posterior_precision
    dense = precision.diag() if structure == "diag" else precision.to_matrix() if structure == "kron" else precision
    variance = torch.einsum("ncp,pq,ncq->nc", columns, torch.linalg.inv(dense), columns)
    assert_close(probabilities, torch.softmax(f / torch.sqrt(1 + torch.pi / 8 * variance), -1))
