"""The oracle against itself, before anything is tested against it."""

from __future__ import annotations

from types import MappingProxyType

import oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from grids import one_in
from torch import nn
from zoo import Case, Instance

EVERY_CASE = one_in(3, case=zoo.cases())
FIRST_CASES = one_in(3, case=zoo.cases(first_loss_only=True))


# First order ------------------------------------------------------------------------------------


@EVERY_CASE
def test_per_sample_gradients_sum_to_grad(case: Case):
    made = case.make()
    grads = oracle.per_sample_grad(made.params, made.terms)
    made.loss().backward()
    want = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in made.params.items()}
    oracle.assert_close({name: g.sum(0) for name, g in grads.items()}, want, 1e-12)
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-4


@EVERY_CASE
def test_moments_agree_with_their_definitions(case: Case):
    made = case.make()
    grads = oracle.per_sample_grad(made.params, made.terms)
    n = made.n
    gradient = oracle.gradient(made.params, made.loss)
    moment = oracle.second_moment(grads)
    identity = {name: moment[name] / n - (gradient[name] / n) ** 2 for name in grads}
    # The identity subtracts nearly equal numbers, so its rounding is that of the second moment.
    for name, v in oracle.variance(grads).items():
        assert (v - identity[name]).abs().max() <= 1e-14 * max(float(moment[name].max()), 1e-3)
    norms = oracle.squared_norm(grads)
    oracle.assert_close({k: v.sum() for k, v in norms.items()}, {k: m.sum() for k, m in moment.items()}, 1e-12)
    whole = torch.stack([torch.cat([g[i].reshape(-1) for g in grads.values()]).square().sum() for i in range(n)])
    oracle.assert_close(oracle.total(norms), whole, 1e-12)
    # scale="sample": with h_n = N g_n, M is the mean of h², V the mean of h² less the square of the mean.
    scaled = oracle.second_moment(grads, "sample")
    oracle.assert_close(scaled, {k: (n * g).square().mean(0) for k, g in grads.items()}, 1e-12)
    want = {k: (n * g).var(0, correction=0) for k, g in grads.items()}
    oracle.assert_close(oracle.variance(grads, "sample"), want, 1e-12)


@pytest.mark.parametrize("name", ["mlp_relu", "conv2d", "reused", "seq_first_recurrent", "layer_norm"])
def test_per_sample_gradient_is_the_gradient_of_a_batch_of_one(name: str):
    made = zoo.case(name, "mse_sum" if "mse_sum" in zoo.PROBLEMS[name].losses else "mse_mean").make()
    if made.spec.name == "mse_mean":
        made = Instance(made.problem, zoo.LOSSES["mse_sum"], made.model, made.x, made.y)
    grads = oracle.per_sample_grad(made.params, made.terms)
    for n in range(made.n):
        alone = Instance(made.problem, made.spec, made.model, made.x[n : n + 1], made.y[n : n + 1])
        oracle.assert_close({k: g[n] for k, g in grads.items()}, oracle.gradient(made.params, alone.loss), 1e-12)


# Second order -----------------------------------------------------------------------------------


@FIRST_CASES
def test_per_sample_ggn_sums_to_the_whole(case: Case):
    made = case.make()
    rows = oracle.diag_ggn(made.params, made.logits, made.terms_of, per_sample=True)
    want = oracle.diag_ggn(made.params, made.logits, made.loss_of)
    oracle.assert_close({name: row.sum(0) for name, row in rows.items()}, want, 1e-12)
    assert all((w > -1e-12).all() for w in want.values())


# Some losses are worth it on one model: all that are not the first loss of any.
@pytest.mark.parametrize("loss", zoo.PROBLEMS["mlp_relu"].losses)
def test_ggn_equals_hessian_where_logits_are_linear_in_the_parameters(loss: str):
    """One linear layer, any loss: the residual term is zero."""
    spec = zoo.LOSSES[loss]
    model = nn.Linear(4, 3).double()
    x, y = zoo.PROBLEMS["mlp_relu"].batch(3, loss)
    params = oracle.parameters(model)
    got = oracle.diag_ggn(params, lambda: model(x), lambda z: spec.call(z, y))
    want = oracle.diag_hessian(params, lambda: spec.call(model(x), y))
    oracle.assert_close(got, want, 1e-12)
    assert all(w.max() > 0 for w in want.values())


@pytest.mark.parametrize("name", ["mlp_relu", "mlp_inplace", "residual_relu", "conv_same_relu"])
def test_ggn_equals_hessian_for_piecewise_linear_layers(name: str):
    """Of the parameters taken one at a time, a piecewise linear net is linear in each."""
    torch.manual_seed(0)
    models = {
        "residual_relu": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.PReLU(), nn.Linear(4, 3)),
        "conv_same_relu": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 2, 2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(18, 3),
        ),
    }
    model = models[name]().double() if name in models else zoo.PROBLEMS[name].make().double()
    x = torch.randn(4, 4, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1])
    params = oracle.parameters(model)
    got = oracle.diag_ggn(params, lambda: model(x), lambda z: F.cross_entropy(z, y))
    oracle.assert_close(got, oracle.diag_hessian(params, lambda: F.cross_entropy(model(x), y)), 1e-12)


def test_ggn_differs_from_hessian_where_activations_curve():
    made = zoo.case("mlp_sigmoid", "ce_sum").make()
    ggn = oracle.diag_ggn(made.params, made.logits, made.loss_of)
    hessian = oracle.diag_hessian(made.params, made.loss)
    with pytest.raises(AssertionError, match="relative error"):
        oracle.assert_close(ggn, hessian, 1e-3)


def test_ggn_of_a_linear_layer_in_closed_form():
    """Mean cross entropy of W x: diag_[c,i] = (1/N) sum_n p_nc (1 - p_nc) x_ni²."""
    model = nn.Linear(4, 3).double()
    x, y = zoo.PROBLEMS["mlp_relu"].batch(0, "ce_mean")
    p = model(x).softmax(1).detach()
    h = p * (1 - p) / len(x)
    got = oracle.diag_ggn(oracle.parameters(model), lambda: model(x), lambda z: F.cross_entropy(z, y))
    oracle.assert_close(got, {"weight": h.T @ x.square(), "bias": h.sum(0)}, 1e-12)


def test_diag_hessian_by_finite_differences():
    made = zoo.case("mlp_sigmoid", "ce_sum").make()
    got = oracle.diag_hessian(made.params, made.loss)
    eps = 1e-4
    for name, p in made.params.items():
        flat = p.detach().view(-1)
        want = torch.zeros_like(flat)
        for i in range(flat.numel()):
            centre, values = flat[i].item(), []
            for step in (-eps, 0.0, eps):
                flat[i] = centre + step
                values.append(made.loss().item())
            flat[i] = centre
            want[i] = (values[0] - 2 * values[1] + values[2]) / eps**2
        oracle.assert_close(got[name], want.view(p.shape), 1e-5)


# Kronecker factors ------------------------------------------------------------------------------

CONVS = [
    nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2),
    nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"),
    nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(2, 2, 3, padding=(2, 1), padding_mode="reflect"),
    nn.Conv2d(2, 3, 2, padding=(1, 2), padding_mode="replicate"),
    nn.Conv2d(2, 3, 3, padding="same", dilation=(1, 2)),
    nn.Conv3d(2, 2, (1, 2, 2), padding=(0, 1, 0), groups=2),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_unfolded_input_times_weight_is_the_convolution(conv: nn.Module):
    conv = conv.double()
    sizes = {nn.Conv1d: (6,), nn.Conv2d: (5, 6), nn.Conv3d: (2, 3, 4)}[type(conv)]
    x = torch.randn(3, 2, *sizes, dtype=torch.float64)
    rows = oracle.unfold(x, conv)  # [N, T, K, I]
    weight = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
    out = torch.einsum("koi,ntki->nkot", weight, rows).flatten(1, 2) + conv.bias[:, None]
    oracle.assert_close(out, conv(x).flatten(2), 1e-12)


def _linear_case():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)).double()
    x, y = zoo.PROBLEMS["mlp_relu"].batch(0, "ce_weighted")
    spec = zoo.LOSSES["ce_weighted"]
    return model, x, lambda z: spec.call(z, y), lambda z: spec.elements(z, y)


def test_kfac_factors_of_the_last_layer_in_closed_form():
    """A = mean a aᵀ, B = sum_n of the Hessian of term n, which is w_y (diag p - p pᵀ)/sum w."""
    model, x, loss_of, _ = _linear_case()
    a, b = oracle.kfac_factors(model, lambda: model(x), loss_of)["2.weight"]
    h = model[:2](x).detach()
    p = model(x).softmax(1).detach()
    _, y = zoo.PROBLEMS["mlp_relu"].batch(0, "ce_weighted")
    w = torch.linspace(0.5, 2, 3, dtype=torch.float64)[y]
    want = torch.einsum("n,nij->ij", w / w.sum(), torch.diag_embed(p) - torch.einsum("ni,nj->nij", p, p))
    oracle.assert_close(a[0], h.T @ h / len(x), 1e-12)
    oracle.assert_close(b[0], want, 1e-12)


def test_kfac_bias_block_is_the_ggn_of_the_bias():
    """With one position, B's diagonal is the GGN's of the bias, under an in-place activation too."""
    model, x, loss_of, _ = _linear_case()
    factors = oracle.kfac_factors(model, lambda: model(x), loss_of)
    ggn = oracle.diag_ggn(oracle.parameters(model), lambda: model(x), loss_of)
    for layer in ("0", "2"):
        oracle.assert_close(factors[f"{layer}.weight"][1][0].diagonal(), ggn[f"{layer}.bias"], 1e-12)


def test_kfac_of_one_sample_is_the_ggn():
    """N = T = 1: the diagonal of B ⊗ A is the GGN's."""
    model, x, _, _ = _linear_case()
    x = x[:1]
    y = torch.tensor([1])
    factors = oracle.kfac_factors(model, lambda: model(x), lambda z: F.cross_entropy(z, y))
    ggn = oracle.diag_ggn(oracle.parameters(model), lambda: model(x), lambda z: F.cross_entropy(z, y))
    for name, (a, b) in factors.items():
        oracle.assert_close(torch.outer(b[0].diagonal(), a[0].diagonal()), ggn[name], 1e-12)


def test_kfac_conv_reduce_block_is_the_ggn_of_the_bias():
    """The bias sums over positions, so B of sharing="reduce" is its GGN, group by group."""
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).double()
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    y = torch.tensor([0, 2, 1])
    ggn = oracle.diag_ggn(oracle.parameters(model), lambda: model(x), lambda z: F.cross_entropy(z, y))
    factors = oracle.kfac_factors(model, lambda: model(x), lambda z: F.cross_entropy(z, y), sharing="reduce")
    a, b = factors["0.weight"]
    assert (a.shape, b.shape) == ((2, 4, 4), (2, 2, 2))
    oracle.assert_close(b.diagonal(dim1=1, dim2=2).reshape(-1), ggn["0.bias"], 1e-12)
    expanded = oracle.kfac_factors(model, lambda: model(x), lambda z: F.cross_entropy(z, y))["0.weight"][0]
    rows = oracle.unfold(x, model[0])
    oracle.assert_close(expanded, torch.einsum("ntki,ntkj->kij", rows, rows) / (3 * 16), 1e-12)
    means = rows.mean(1)
    oracle.assert_close(a, torch.einsum("nki,nkj->kij", means, means) / 3, 1e-12)


def test_kfac_of_a_reused_module_counts_its_calls_as_positions():
    made = zoo.case("reused").make()
    factors = oracle.kfac_factors(made.model, made.logits, made.loss_of, sharing="reduce")
    ggn = oracle.diag_ggn(made.params, made.logits, made.loss_of)
    oracle.assert_close(factors["inner.weight"][1][0].diagonal(), ggn["inner.bias"], 1e-12)


def test_kfac_hooks_are_gone_afterwards():
    model, x, loss_of, _ = _linear_case()
    oracle.kfac_factors(model, lambda: model(x), loss_of)
    assert not any(m._forward_hooks for m in model.modules())


# Comparison -------------------------------------------------------------------------------------

WANT = MappingProxyType({"a": torch.tensor([1.0, -2.0]).double(), "b": torch.zeros(2).double()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.tensor([1.0, -2.0 + 1e-9], dtype=torch.float64)}, "'a': relative error"),
        ({"a": torch.tensor([1.0, float("nan")]).double()}, "'a': not finite"),
        ({"a": torch.tensor([[1.0, -2.0]]).double()}, "'a': shape"),
        ({"b": torch.full((2,), 1e-13).double()}, "'b': relative error"),
        ({"c": torch.zeros(1)}, "extra"),
    ],
)
def test_assert_close_sees_every_difference(change: dict, message: str):
    oracle.assert_close(WANT, WANT)
    with pytest.raises(AssertionError, match=message):
        oracle.assert_close({**WANT, **change}, WANT)


def test_assert_close_needs_every_name_and_has_a_floor():
    with pytest.raises(AssertionError, match="missing"):
        oracle.assert_close({"a": WANT["a"]}, WANT)
    zero = torch.zeros(2).double()
    oracle.assert_close(zero + 1e-17, zero)
    with pytest.raises(AssertionError):
        oracle.assert_close(zero + 1e-15, zero)
    oracle.assert_close({"a": WANT["a"], "b": zero + 1e-15}, WANT)  # rounding noise of "a"
    oracle.assert_close(torch.zeros(0), torch.zeros(0))
