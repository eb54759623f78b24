"""The Kronecker family and the root of the GGN against brute force: KFAC, KFLR, EKFAC, SqrtGGN."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from grids import one_in
from support_page import table_cases
from torch import Tensor, nn
from zoo import Case, Instance, case, cases
from zoo.parts import Apply, Mean, leaf

from layerwise import errors
from layerwise.observation.observe import observe
from layerwise.operators.kronecker import EigenKronecker, Kronecker
from layerwise.quantities import EKFAC, KFAC, KFLR, Quantity, SqrtGGN

pytestmark = pytest.mark.usefixtures("float64")

# Models with a parameter that has no matrix of its own, so that its factors have another form: `test_forms.py`.
OTHER_FORMS = {
    "position_embedding", "temperature", "affine_by_hand", "tied_embedding", "tied_autoencoder", "matmul_forms",
    "weight_norm", "weight_norm_conv", "spectral_norm", "orthogonal", "lora", "chunked", "softmax_weights",
    "seq_first_recurrent",
    "constant_start", "constant_input", "learned_start", "causal_lm", "attention_cross", "transformer_decoder",
    "char_gpt", "gru_learned_start", "attention_learned_queries",
}  # fmt: skip
# Models in which linear layers read [T, N, i], and what the names of these layers start with.
TIME_FIRST = {
    "seq_first_flat_square": "", "seq_first_square": "", "seq_first_pooled": "", "transformer_pre_norm": "encoder.",
}  # fmt: skip
UNHOOKED = {"no_grad_gate"}  # the oracle pulls at every call, and one of this model's has no gradient


def oracle_reads(c: Case) -> bool:
    """Whether the oracle's hooks see all calls: the model is a module."""
    return "functional" not in c.problem.tags and c.problem.name not in UNHOOKED


TABLE = table_cases()  # whose roots test_matrix.py compares with the same GGN
WITH_MATRIX = [c for c in cases() if c.problem.name not in OTHER_FORMS]
FIRST_LOSSES = [c for c in cases(first_loss_only=True) if c.problem.name not in OTHER_FORMS]


def ids(c: Case) -> str:
    return c.id


def watch(instance: Instance, *quantities: Quantity) -> Any:
    """The results of one backward pass."""
    with observe(instance.subject, *quantities) as seen:
        instance.loss().backward()
    return seen


def dense_factors(operator: Kronecker) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each block; a diagonal A as a matrix, a constant one as `[K,1,1]`."""
    found = {}
    for name, block in operator.blocks.items():
        a = block.input_factor
        found[name] = torch.diag_embed(a) if a.ndim == 2 else a, block.B
    return found


def blocks_of(matrix: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The diagonal blocks `[p,p]` of a matrix over all parameters."""
    sizes = [p.numel() for p in params.values()]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {n: matrix[s : s + p, s : s + p] for n, s, p in zip(params, starts, sizes, strict=True)}


def trained(instance: Instance) -> dict[str, Tensor]:
    """The parameters that have a gradient after a backward pass."""
    return {name: p for name, p in instance.params.items() if p.grad is not None}


# Factors ----------------------------------------------------------------------------------------


@one_in(2, case=[c for c in WITH_MATRIX if oracle_reads(c)], sharing=["expand", "reduce"])
def test_exact_factors_equal_the_oracle(case: Case, sharing: str) -> None:
    instance = case.make()
    apart, joint = KFLR(sharing), KFLR(sharing, joint=True)
    seen = watch(instance, apart, joint)
    first = TIME_FIRST.get(case.problem.name, "none")
    axis = {name: 1 for name, _ in instance.model.named_modules() if name.startswith(first)}
    want = oracle.kfac_factors(
        instance.model, instance.logits, instance.loss_of, sharing=sharing, axis=axis, joint=True
    )
    names = want.keys() & trained(instance).keys()
    layers = {name: instance.model.get_submodule(name.rpartition(".")[0]) for name in names}
    with_bias = {name for name in names if layers[name].bias is not None}
    plain = {n: a[:, :-1, :-1] if n in with_bias else a for n, (a, _) in want.items()}
    merged = {n for n in with_bias if layers[n].bias.requires_grad}  # a frozen one is no part of any block
    blocks = seen[joint].blocks
    assert {n for n in names if blocks[n].bias is not None} == merged
    assert all(blocks[n].bias == n.removesuffix("weight") + "bias" not in blocks for n in merged)
    for quantity in (apart, joint):
        got = dense_factors(seen[quantity])
        a = {n: want[n][0] if quantity is joint and n in merged else plain[n] for n in names}
        oracle.assert_close({n: got[n][0] for n in names}, a)
        # before an instance norm positions cancel and B is zero: the other blocks say how large rounding may be
        others = {n: b for n, (_, b) in got.items() if n not in names}
        oracle.assert_close({n: b for n, (_, b) in got.items()}, {n: want[n][1] for n in names} | others)


def _alone(seed: int = 0, n: int = 1) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(3, 4), torch.randn(n, 3), torch.randint(4, (n,))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_one_sample_and_one_position_are_exact(sharing: str) -> None:
    model, x, y = _alone()
    params = dict(model.named_parameters())
    want = oracle.ggn(params, lambda: model(x), lambda z: F.cross_entropy(z, y))
    apart, joint = KFLR(sharing), KFLR(sharing, joint=True)
    with observe(model, apart, joint) as seen:
        F.cross_entropy(model(x), y).backward()
    blocks = blocks_of(want, params)
    for name in params:
        oracle.assert_close(seen[apart].to_dense(name), blocks[name])
    oracle.assert_close(seen[joint].to_dense("weight"), want)  # with the products of weight and bias


def test_a_linear_model_under_squared_error_is_exact_for_any_batch() -> None:
    """The Hessian of the loss is the same for all samples: the mean of a product is a product."""
    model, x, _ = _alone(n=5)
    y = torch.randn(5, 4)
    params = dict(model.named_parameters())
    with observe(model, KFLR(joint=True)) as seen:
        F.mse_loss(model(x), y).backward()
    want = oracle.ggn(params, lambda: model(x), lambda z: F.mse_loss(z, y))
    oracle.assert_close(seen.kflr.to_dense("weight"), want)
    oracle.assert_close(seen.kflr.trace(), want.trace())
    grad = torch.cat([p.grad.flatten() for p in params.values()])
    step = seen.kflr.inverse(1e-2, exact=True) @ seen.grad
    solved = torch.linalg.solve(want + 1e-2 * torch.eye(len(want)), grad)
    oracle.assert_close(torch.cat([step[name].flatten() for name in params]), solved)


def test_reduce_is_exact_where_all_positions_of_a_sample_are_alike() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Mean(1))
    x, y = torch.randn(1, 1, 3).expand(1, 5, 3), torch.randint(4, (1,))
    params = dict(model.named_parameters())
    reduce, expand = KFLR("reduce", joint=True), KFLR(joint=True)
    with observe(model, reduce, expand) as seen:
        F.cross_entropy(model(x), y).backward()
    want = oracle.ggn(params, lambda: model(x), lambda z: F.cross_entropy(z, y))
    oracle.assert_close(seen[reduce].to_dense("0.weight"), want)
    oracle.assert_close(5 * seen[expand].to_dense("0.weight"), want)  # it takes the positions for samples


def test_embedding_under_both_conventions() -> None:
    model = nn.Sequential(nn.Embedding(6, 3), Mean(1), nn.Linear(3, 3))
    x, y = torch.tensor([[0, 2, 2, 5], [1, 1, 1, 1], [4, 0, 2, 3]]), torch.randint(3, (3,))
    expand, reduce = KFLR(), KFLR("reduce")
    with observe(model, expand, reduce) as seen:
        F.cross_entropy(model(x), y).backward()
    hot = F.one_hot(x, 6).double()
    a = dense_factors(seen[expand])["0.weight"][0]
    oracle.assert_close(a[0], torch.einsum("nti,ntj->ij", hot, hot) / 12)
    a, b = dense_factors(seen[reduce])["0.weight"]
    mean = hot.mean(1)
    oracle.assert_close(a[0], mean.T @ mean / 3)
    # the sum over positions of the cotangent is the cotangent of the mean, that is the head's input
    w = model[2].weight.detach()
    p = torch.softmax(model(x).detach(), 1)
    h = sum(torch.diag(q) - torch.outer(q, q) for q in p) / 3
    oracle.assert_close(b[0], w.T @ h @ w)


def test_a_large_vocabulary_has_its_factors_from_gradients() -> None:
    """The mean of its inputs would be a dense matrix; the factor of the long side is a diagonal."""
    model, x, y = nn.Sequential(nn.Embedding(20_000, 2), Mean(1)), torch.randint(20_000, (2, 3)), torch.tensor([0, 1])
    with observe(model, KFLR("reduce"), SqrtGGN()) as seen:
        F.cross_entropy(model(x), y).backward()
    block = seen.kflr.blocks["0.weight"]
    assert block.form == "gradients"
    d = seen.sqrt_ggn["0.weight"].flatten(0, 1)  # [M, vocabulary, 2]
    b = sum(g.T @ g for g in d)
    oracle.assert_close(block.B[0], b)
    oracle.assert_close(block.A[0], d.square().sum((0, 2)) / b.trace())
    v = {"0.weight": torch.randn(20_000, 2)}
    oracle.assert_close((seen.kflr @ v)["0.weight"], block.A[0][:, None] * v["0.weight"] @ b)


# Draws ------------------------------------------------------------------------------------------

DRAWS, REPEATS = 300, 20


def near(found: list[Tensor], want: Tensor) -> None:
    """The mean lies within 4 standard errors of `want`, and is not noise alone."""
    means = torch.stack(found)
    error = means.std(0) / len(means) ** 0.5
    slack = 1e-12 * want.abs().max()
    assert ((means.mean(0) - want).abs() <= 4 * error + slack).all()
    assert error.max() <= 0.2 * want.abs().max() + slack


SEQUENCES = [
    "tokens_class_second",
    "seq_first_square",
    "positions_equal_samples",
    "conv2d_pixels",
    "two_heads",
    "reused",
]


@pytest.mark.parametrize("problem", SEQUENCES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_sampled_factors_estimate_the_exact_ones(problem: str, sharing: str) -> None:
    instance = case(problem).make()
    want = watch(instance, KFLR(sharing)).kflr
    kfac, found = KFAC(DRAWS, torch.Generator().manual_seed(0), sharing), []
    for _ in range(REPEATS):
        found.append(dense_factors(watch(instance, kfac).kfac))
    for name, (a, b) in dense_factors(want).items():
        oracle.assert_close(found[0][name][0], a)
        near([f[name][1] for f in found], b)


# The eigenbasis ---------------------------------------------------------------------------------


def eigenvectors(operator: EigenKronecker, name: str) -> Tensor:
    """The block's eigenvectors as columns `[p, K·O·I]`, in the order of its spectrum."""
    block = operator.blocks[name]
    p = block.size.numel()
    return block.fold(block.rotate_back(torch.eye(p).view(p, *block.size))).reshape(p, p).T


@one_in(2, case=FIRST_LOSSES)
def test_ekfac_is_the_exact_diagonal_in_the_factors_eigenbasis(case: Case) -> None:
    instance = case.make()
    seen = watch(instance, EKFAC(draws=None), KFLR())
    used = trained(instance)
    ggn = blocks_of(oracle.ggn(used, instance.logits, instance.loss_of), used)
    assert seen.ekfac.blocks.keys() == used.keys()
    spectra, exact, factored, diagonal = {}, {}, {}, {}
    for name, g in ggn.items():
        q = eigenvectors(seen.ekfac, name)
        oracle.assert_close(q.T @ q, torch.eye(len(q)))
        kflr = seen.kflr.to_dense(name)
        factored[name] = q.T @ kflr @ q
        diagonal[name] = factored[name].diagonal().diag()
        spectra[name] = seen.ekfac.eigenvalues[name].flatten()
        exact[name] = (q.T @ g @ q).diagonal()
        # of all matrices with these eigenvectors it is the closest to the GGN's block
        distance = (g - seen.ekfac.to_dense(name)).norm()
        assert distance <= (g - kflr).norm() * (1 + 1e-9) + 1e-12 * g.norm()
    oracle.assert_close(factored, diagonal, rel=1e-9)
    oracle.assert_close(spectra, exact)


def test_ekfac_inverse_solves() -> None:
    instance = case("conv2d").make()
    seen = watch(instance, EKFAC(draws=None))
    step = seen.ekfac.inverse(damping=1e-2) @ seen.grad
    for name, g in seen.grad.items():
        dense = seen.ekfac.to_dense(name)
        solved = torch.linalg.solve(dense + 1e-2 * torch.eye(len(dense)), g.flatten())
        oracle.assert_close(step[name], solved.view_as(g))
    back = seen.ekfac @ step
    oracle.assert_close({n: back[n] + 1e-2 * step[n] for n in step}, dict(seen.grad))


@pytest.mark.parametrize("problem", ["mlp_tanh", "conv1d", "tokens_class_second", "reused"])
def test_sampled_ekfac_takes_basis_and_moments_from_the_same_draws(problem: str) -> None:
    instance = case(problem).make()
    generator = torch.Generator().manual_seed(3)
    seen = watch(instance, EKFAC(3, generator), KFAC(3, generator), SqrtGGN(3, generator))
    for name, block in seen.ekfac.blocks.items():
        q = eigenvectors(seen.ekfac, name)
        rotated = q.T @ seen.kfac.to_dense(name) @ q
        assert (rotated - rotated.diagonal().diag()).norm() <= 1e-9 * rotated.norm()
        columns = seen.sqrt_ggn[name].flatten(0, 1).flatten(1)
        oracle.assert_close(block.spectrum.flatten(), (columns @ q).square().sum(0))


def test_ekfac_outlives_the_batchs_memory() -> None:
    """A loader may write the next batch where the last one was."""
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 3), torch.randint(3, (5,))
    with observe(model, EKFAC(None)) as seen:
        F.cross_entropy(model(x), y).backward()
        x.fill_(7.0)
    late = seen.ekfac.eigenvalues
    torch.manual_seed(0)
    again = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(5, 3)
    with observe(again, EKFAC(None)) as seen:
        F.cross_entropy(again(x), y).backward()
    oracle.assert_close(late, seen.ekfac.eigenvalues)


# The root ---------------------------------------------------------------------------------------


def columns_of(root: Mapping[str, Tensor], names: Any) -> Tensor:
    """All columns side by side: `[V·N, P]`."""
    return torch.cat([root[name].reshape(root[name].shape[:2].numel(), -1) for name in names], 1)


@one_in(3, case=[c for c in cases() if c not in TABLE])
def test_the_root_squares_to_the_ggn(case: Case) -> None:
    instance = case.make()
    root = watch(instance, SqrtGGN()).sqrt_ggn
    used = trained(instance)
    assert set(root) == set(used)
    first = next(iter(root.values()))
    assert all(s.shape == (len(first), instance.n, *used[name].shape) for name, s in root.items())
    s = columns_of(root, used)
    want = oracle.ggn(used, instance.logits, instance.loss_of)
    assert ((s.T @ s - want).abs().max() <= 1e-10 * want.abs().max()) or not want.any()


def test_the_number_of_columns() -> None:
    assert len(watch(case("mlp_tanh", "ce_mean").make(), SqrtGGN()).sqrt_ggn["0.weight"]) == 2  # C - 1
    assert len(watch(case("conv2d_pixels", "ce_mean").make(), SqrtGGN()).sqrt_ggn["0.weight"]) == 2 * 12
    assert len(watch(case("linear_alone", "mse_mean").make(), SqrtGGN()).sqrt_ggn["weight"]) == 2


def test_the_sampled_root_is_unbiased() -> None:
    instance = case("tokens_class_second").make()
    want = oracle.ggn(instance.params, instance.logits, instance.loss_of)
    quantity, found = SqrtGGN(DRAWS, torch.Generator().manual_seed(0)), []
    for _ in range(REPEATS):
        root = watch(instance, quantity).sqrt_ggn
        assert all(s.shape[:2] == (DRAWS, instance.n) for s in root.values())
        s = columns_of(root, instance.params)
        found.append(s.T @ s)
    near(found, want)


@pytest.mark.parametrize(("samples", "classes", "columns"), [(None, 4, 3), (None, 2, 1), (None, 0, 4), (7, 4, 7)])
def test_a_root_above_the_cap_is_refused_before_the_work(samples: int | None, classes: int, columns: int) -> None:
    """For cross entropy of 4 and 2 classes, for squared error of 4 outputs (no classes), and for draws."""
    model, x = nn.Linear(3, classes or 4), torch.randn(5, 3)
    y = torch.randint(classes, (5,)) if classes else torch.randn(5, 4)
    loss = F.cross_entropy if classes else F.mse_loss
    size = columns * 5 * sum(p.numel() for p in model.parameters())
    with observe(model, SqrtGGN(samples, max_elements=size)) as seen:
        loss(model(x), y).backward()
    assert sum(s.numel() for s in seen.sqrt_ggn.values()) == size
    model.zero_grad()
    with pytest.raises(errors.Undefined, match=rf"{size} .*weight"), observe(model, SqrtGGN(samples, None, size - 1)):
        loss(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


# Several batches --------------------------------------------------------------------------------


def _sequence_model() -> nn.Module:
    return Apply(
        lambda m, x: m.head(m.inner(x).tanh().mean(1)), inner=nn.Linear(3, 4), head=nn.Linear(4, 3)
    )  # fmt: skip


EVERY = [
    lambda: KFLR(), lambda: KFLR("reduce"), lambda: KFLR(joint=True), lambda: KFLR("reduce", joint=True),
    lambda: EKFAC(None), lambda: SqrtGGN(),
]  # fmt: skip


def tensors(result: Any) -> dict[str, Tensor]:
    """A result as tensors that do not depend on the sign of an eigenvector."""
    if isinstance(result, Kronecker):
        return {f"{n}/{i}": f for n, fs in result.factors.items() for i, f in enumerate(fs)}
    if isinstance(result, EigenKronecker):
        return {name: result.to_dense(name) for name in result.blocks}
    s = columns_of(result, result)
    return {"ggn": s.T @ s}


@pytest.mark.parametrize("make", EVERY, ids=lambda make: repr(make()))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", [_sequence_model, lambda: nn.Sequential(nn.Conv1d(5, 4, 2), nn.Tanh(), Mean(-1))])
def test_two_parts_are_the_whole(make: Callable[[], Quantity], reduction: str, model: Callable) -> None:
    model, x, y = model(), torch.randn(7, 5, 3), torch.randint(3, (7,))
    parts, whole = make(), make()
    with observe(model, parts) as seen:
        for rows, share in ((slice(0, 2), 2 / 7), (slice(2, 7), 5 / 7)):
            loss = F.cross_entropy(model(x[rows]), y[rows], reduction=reduction)
            (loss * share if reduction == "mean" else loss).backward()
    model.zero_grad()
    with observe(model, whole) as once:
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    oracle.assert_close(tensors(seen[parts]), tensors(once[whole]))
    if isinstance(whole, SqrtGGN):  # and column by column
        oracle.assert_close(dict(seen[parts]), dict(once[whole]))


@pytest.mark.parametrize("make", EVERY, ids=lambda make: repr(make()))
def test_batches_of_several_lengths_add_up(make: Callable[[], Quantity]) -> None:
    """Sums over sequences of 2 and of 4 positions, each with its own loss terms."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    batches = [(torch.randn(n, t, 3), torch.randint(3, (n, t))) for n, t in ((3, 2), (2, 4))]

    def summed(y: Tensor, z: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="sum")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return summed(y, model(x).transpose(1, 2))

    quantity = make()
    with observe(model, quantity) as seen:
        for batch in batches:
            loss(*batch).backward()
    params = dict(model.named_parameters())
    if isinstance(quantity, SqrtGGN):
        total = torch.zeros(())
        for x, y in batches:
            logits, loss_of = partial(lambda x: model(x).transpose(1, 2), x), partial(summed, y)
            total = total + oracle.ggn(params, logits, loss_of)
        assert seen.sqrt_ggn["0.weight"].shape[:2] == (2 * 4, 5)
        oracle.assert_close(tensors(seen.sqrt_ggn)["ggn"], total)
        return
    apart = []
    for batch in batches:
        with observe(model, KFLR(getattr(quantity, "sharing", "expand"), quantity.joint)) as one:
            loss(*batch).backward()
        apart.append(dense_factors(one.kflr))
    rows = [3, 2] if quantity.sharing == "reduce" else [6, 8]
    want = {
        name: ((a * rows[0] + apart[1][name][0] * rows[1]) / sum(rows), b + apart[1][name][1])
        for name, (a, b) in apart[0].items()
    }
    result = seen[quantity]
    for name, (a, b) in want.items():
        if isinstance(result, EigenKronecker):
            q = eigenvectors(result, name)
            dense = q.T @ torch.kron(b[0], a[0]) @ q
            assert (dense - dense.diagonal().diag()).norm() <= 1e-9 * dense.norm()
        else:
            oracle.assert_close(dense_factors(result)[name][0], a)
            oracle.assert_close(dense_factors(result)[name][1], b)


# Biases -----------------------------------------------------------------------------------------


def test_products_with_a_joint_block_keep_the_parameters_apart() -> None:
    instance = case("conv2d_depthwise").make()
    seen = watch(instance, KFLR(joint=True))
    step = seen.kflr.inverse(damping=1e-3, exact=True) @ seen.grad
    assert {n: v.shape for n, v in step.items()} == {n: p.shape for n, p in instance.params.items()}
    back = seen.kflr @ step
    oracle.assert_close({n: back[n] + 1e-3 * step[n] for n in step}, dict(seen.grad), rel=1e-9)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.linear(F.linear(x, m.w, m.b).tanh(), m.u, m.b),  # one bias of two weights
        lambda m, x: F.linear(F.linear(F.linear(x, m.w, m.b).tanh(), m.frozen, m.b).tanh(), m.u),  # and of a frozen one
        lambda m, x: F.linear(F.linear(F.linear(x, m.w, m.b).tanh(), m.w).tanh(), m.u),  # a weight used without it
    ],
    ids=["shared", "frozen", "once"],
)
def test_a_bias_that_is_not_its_weights_alone_keeps_its_block(forward: Callable) -> None:
    model = Apply(forward, w=leaf(3, 3), u=leaf(3, 3), b=leaf(3), frozen=leaf(3, 3))
    model.frozen.requires_grad_(False)
    x, y = torch.randn(4, 3), torch.randint(3, (4,))
    apart, joint = KFLR(), KFLR(joint=True)
    with observe(model, apart, joint) as seen:
        F.cross_entropy(model(x), y).backward()
    assert all(block.bias is None for block in seen[joint].blocks.values())
    oracle.assert_close(tensors(seen[apart]), tensors(seen[joint]))


def test_bad_options_are_refused() -> None:
    for make in (
        lambda: KFAC(sharing="mean"), lambda: KFLR("both"), lambda: KFAC(draws=None), lambda: EKFAC(0),
        lambda: SqrtGGN(max_elements=0), lambda: SqrtGGN(max_elements=None), lambda: SqrtGGN(0),
    ):  # fmt: skip
        with pytest.raises(errors.BadInput):
            make()


@pytest.mark.parametrize("quantity", [KFLR(), KFAC(sharing="reduce"), EKFAC(), SqrtGGN()], ids=repr)
def test_mixed_samples_are_refused(quantity: Quantity) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(errors.SamplesMixed), observe(model, quantity):
        F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
