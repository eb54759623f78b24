"""What other programs return on inputs that they take without an error: docs/same-input.md, a test for each row.

Each test asserts the version, what comes back there, and that ours is what brute force says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from ecosystem import prepare
from torch import Tensor, nn

import layerwise as lw

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore"),
]
N = 3
TARGETS = torch.tensor([0, 1, 2])


def peer(module: str, package: str, pinned: str) -> Any:
    """The peer in the version that the page names; the test is skipped where that is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare()
        found = pytest.importorskip(module, reason=f"{package} is not installed (requirements/peers.txt)")
    if version(package) != pinned:
        pytest.skip(f"{package} {version(package)} is installed; the page says what {pinned} returns")
    return found


def convolution(**options: Any) -> nn.Sequential:
    """A convolution that keeps the size of 4 by 4 pictures, and a head."""
    return nn.Sequential(nn.Conv2d(1, 2, **options), nn.Flatten(), nn.Linear(32, 3))


def differ(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors differ by more than a tenth."""
    return bool((got - want).abs().max() > 0.1 * want.abs().max())


def ours_is_exact(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Our per-sample gradients of the summed loss, equal to a loop over the samples."""
    with lw.observe(model, lw.PerSampleGrad()) as seen:
        F.cross_entropy(model(x), TARGETS, reduction="sum").backward()
    terms = lambda: F.cross_entropy(model(x), TARGETS, reduction="none")  # noqa: E731
    want = oracle.per_sample_grad(oracle.parameters(model), terms)
    oracle.assert_close(dict(seen.per_sample_grad), want)
    model.zero_grad()
    return want


@pytest.fixture(params=["same", "reflect", "replicate", "circular"])
def padded(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Sequential]]:
    """An even kernel whose padding is uneven, and the padding modes that are not zeros."""
    if request.param == "same":
        yield request.param, convolution(kernel_size=2, padding="same")
    else:
        yield request.param, convolution(kernel_size=3, padding=1, padding_mode=request.param)


def test_backpack_reads_padding_as_zeros_on_both_sides(padded: tuple[str, nn.Sequential]) -> None:
    backpack = peer("backpack", "backpack-for-pytorch", "1.7.1")
    model, x = padded[1], torch.randn(N, 1, 4, 4)
    want = ours_is_exact(model, x)["0.weight"]
    extended, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack.backpack(backpack.extensions.BatchGrad()):
        loss(extended(x), TARGETS).backward()
    assert differ(model[0].weight.grad_batch, want)
    assert differ(model[0].weight.grad_batch.sum(0), model[0].weight.grad)  # its rows do not even sum to the gradient


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_opacus_reads_padding_as_zeros(mode: str) -> None:
    opacus = peer("opacus", "opacus", "1.6.0")
    model, x = convolution(kernel_size=3, padding=1, padding_mode=mode), torch.randn(N, 1, 4, 4)
    want = ours_is_exact(model, x)["0.weight"]
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(wrapped(x), TARGETS, reduction="sum").backward()
    assert differ(model[0].weight.grad_sample, want)


def test_opacus_trains_the_padding_row() -> None:
    opacus = peer("opacus", "opacus", "1.6.0")
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 3))
    x = torch.tensor([[1, 0], [2, 3], [0, 4]])
    want = ours_is_exact(model, x)["0.weight"]
    assert not want[:, 0].any()
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(wrapped(x), TARGETS, reduction="sum").backward()
    assert not model[0].weight.grad[0].any() and model[0].weight.grad_sample[:, 0].any()


def test_opacus_ghost_norms_refuse_token_ids_that_are_a_slice() -> None:
    peer("opacus", "opacus", "1.6.0")
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    ids = torch.tensor([[1, 0, 2], [2, 3, 3], [0, 4, 4]])
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    want = oracle.total(oracle.squared_norm(ours_is_exact(model, ids[:, :-1]))).sqrt()

    def ghost_norms(x: Tensor) -> Tensor:
        inner = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
        inner.load_state_dict(model.state_dict())
        wrapped = GradSampleModuleFastGradientClipping(inner, loss_reduction="sum", max_grad_norm=1.0)
        F.cross_entropy(wrapped(x), TARGETS, reduction="sum").backward()
        return wrapped.get_norm_sample()

    with pytest.raises(RuntimeError, match="view size is not compatible"):
        ghost_norms(ids[:, :-1])
    oracle.assert_close(ghost_norms(ids[:, :-1].contiguous()), want)


def test_backpacks_factors_of_a_convolution_are_neither_expand_nor_reduce() -> None:
    backpack = peer("backpack", "backpack-for-pytorch", "1.7.1")
    model, x, y = (
        nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(50, 3)),
        torch.randn(1, 1, 6, 6),
        TARGETS[:1],
    )
    factors = {}
    for sharing in ("expand", "reduce"):
        with lw.observe(model, lw.KFLR(sharing=sharing)) as seen:
            F.cross_entropy(model(x), y).backward()
        factors[sharing] = seen.kflr.factors["0.weight"]
        want = oracle.kfac_factors(model, lambda: model(x), lambda z: F.cross_entropy(z, y), sharing=sharing)[
            "0.weight"
        ]
        for got, right in zip(factors[sharing], want, strict=True):
            oracle.assert_close(got, right)
    model.zero_grad()
    extended, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(backpack.extensions.KFLR()):
        loss(extended(x), y).backward()
    b, a = model[0].weight.kflr
    oracle.assert_close(b, factors["reduce"][1][0])  # cotangents are added over the positions
    oracle.assert_close(a, 25 * factors["expand"][0][0])  # inputs are not, and their products have no mean


def dense(operator: Any) -> Tensor:
    return operator @ torch.eye(operator.shape[1])


def test_curvlinops_takes_the_last_use_of_a_parameter_alone() -> None:
    curvlinops = peer("curvlinops", "curvlinops-for-pytorch", "3.0.1")
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(4, 3))
    x, options = torch.randn(N, 4), {"fisher_type": curvlinops.FisherType.TYPE2, "check_deterministic": False}
    tied = curvlinops.KFACLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, TARGETS)], **options
    )
    above, h = model[2:], model[:2](x).detach()
    last = curvlinops.KFACLinearOperator(
        above, nn.CrossEntropyLoss(), list(above.parameters()), [(h, TARGETS)], **options
    )
    oracle.assert_close(dense(tied)[:16, :16], dense(last)[:16, :16])
    with lw.observe(model, lw.KFLR()) as seen:
        F.cross_entropy(model(x), TARGETS).backward()
    (a, b), (a_last, b_last) = seen.kflr.factors["0.weight"], _last_factors(above, h)
    assert differ(torch.kron(b[0], a[0]), torch.kron(b_last[0], a_last[0]))


def _last_factors(above: nn.Module, h: Tensor) -> Any:
    with lw.observe(above, lw.KFLR()) as seen:
        F.cross_entropy(above(h), TARGETS).backward()
    return seen.kflr.factors["2.weight"]


@pytest.mark.parametrize("options", [{"weight": torch.tensor([1.0, 5.0, 0.2]).double()}, {"ignore_index": 0}], ids=str)
def test_curvlinops_factors_read_no_option_of_the_loss(options: dict[str, Any]) -> None:
    curvlinops = peer("curvlinops", "curvlinops-for-pytorch", "3.0.1")
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(N, 4)
    data, parameters = [(x, TARGETS)], list(model.parameters())

    def both(kind: Any, **given: Any) -> list[Tensor]:
        losses = nn.CrossEntropyLoss(**options), nn.CrossEntropyLoss()
        return [dense(kind(model, f, parameters, data, check_deterministic=False, **given)) for f in losses]

    factors = both(curvlinops.KFACLinearOperator, fisher_type=curvlinops.FisherType.TYPE2)
    sampled = both(curvlinops.FisherMCLinearOperator, mc_samples=2)
    for with_options, without in (factors, sampled):
        oracle.assert_close(with_options, without)
    assert differ(*both(curvlinops.GGNLinearOperator))  # where the options are read
    with lw.observe(model, lw.KFLR()) as seen:
        F.cross_entropy(model(x), TARGETS, **options).backward()
    want = oracle.kfac_factors(model, lambda: model(x), lambda z: F.cross_entropy(z, TARGETS, **options))
    for got, right in zip(seen.kflr.factors["0.weight"], want["0.weight"], strict=True):
        oracle.assert_close(got, right)


def test_laplace_leaves_out_what_a_bias_shares_with_its_weight() -> None:
    laplace = peer("laplace", "laplace-torch", "0.3")
    model, x, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 3), torch.tensor([1])
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=1)
    fitted = laplace.Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron")
    fitted.fit(data)
    want = oracle.ggn(oracle.parameters(model), lambda: model(x), lambda z: F.cross_entropy(z, y))
    kron = fitted.H_facs.to_matrix()
    oracle.assert_close(kron[:6, :6], want[:6, :6])
    assert not kron[:6, 6:].any() and want[:6, 6:].any()
    with lw.observe(model, lw.KFLR(joint=True)) as seen:
        F.cross_entropy(model(x), y).backward()
    a, b = seen.kflr.factors["0.weight"]
    joint = torch.kron(b[0], a[0]).reshape(2, 4, 2, 4)
    oracle.assert_close(joint[:, :3, :, 3].reshape(6, 2), want[:6, 6:])


def test_torchs_second_derivative_of_weight_norm() -> None:
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"torch {torch.__version__} is installed; the page says what 2.13 returns")
    v, g = torch.randn(3, 2, 2, requires_grad=True), torch.rand(3, 1, 1) + 0.5
    with oracle.plain_operations():
        want = oracle.hessian({"v": v}, lambda: torch._weight_norm(v, g, 0).pow(3).sum())
    assert differ(oracle.hessian({"v": v}, lambda: torch._weight_norm(v, g, 0).pow(3).sum()), want)
    oracle.assert_close(lw.Hessian({"v": v}, lambda: torch._weight_norm(v, g, 0).pow(3).sum()).to_dense(), want)


def test_no_module_hook_sees_the_output_projection_of_attention() -> None:
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"torch {torch.__version__} is installed; the page says what 2.13 returns")
    model, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(N, 2, 4)
    seen_by_hooks: list[Any] = []
    model.out_proj.register_forward_hook(lambda *args: seen_by_hooks.append(args))
    loss = lambda x: F.mse_loss(model(x, x, x)[0], x)  # noqa: E731
    with lw.observe(model, lw.PerSampleGrad()) as seen:
        loss(x).backward()
    assert not seen_by_hooks
    params = oracle.parameters(model)
    want = oracle.per_sample_grad(params, lambda: torch.stack([loss(one) / N for one in x.split(1)]))
    oracle.assert_close(dict(seen.per_sample_grad), want)


def test_accelerate_drops_what_a_closure_returns() -> None:
    accelerate = peer("accelerate", "accelerate", "1.15.0")
    model, x = nn.Linear(2, 1), torch.randn(N, 2)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure() -> Tensor:
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) is None and plain.step(closure) is not None
    assert lw.LocoProp(model).step(lambda: F.mse_loss(model(x), torch.zeros(N, 1))) is not None
