"""The cookbook's pages run as they stand, and what they say holds against computations of other kinds.

Blocks of a page run one after the other in one namespace, in float32 as a user would run them, and in float64 for the
exact comparisons. Blocks that import a library that is not installed are left out.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import layerwise as lw
from layerwise.operators import inverse

pytestmark = [
    pytest.mark.usefixtures("float64"),  # of what the tests make; pages run in a type of their own
    pytest.mark.filterwarnings("ignore:By default `link_approx` is `probit`:UserWarning"),  # laplace says so always
]

COOKBOOK = Path(__file__).parent.parent / "docs" / "cookbook"
PAGES = sorted(page.stem for page in COOKBOOK.glob("*.md") if page.name != "README.md")
MOST_LINES = 15
OTHERS = ("laplace", "opacus", "scipy")  # libraries that a page may import besides torch and this one

Space = dict[str, Any]
Named = dict[str, Tensor]


def text(page: str) -> str:
    return (COOKBOOK / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text(page), flags=re.DOTALL)


def missing(block: str) -> list[str]:
    wanted = re.findall(r"^(?:from|import) (\w+)", block, flags=re.MULTILINE)
    return [name for name in wanted if name in OTHERS and importlib.util.find_spec(name) is None]


@cache
def _run(page: str, dtype: torch.dtype, count: int) -> Space:
    space: Space = {}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for number, block in enumerate(blocks(page)[:count]):
            if not missing(block):
                exec(compile(block, f"{page}.md, block {number}", "exec"), space)
    finally:
        torch.set_default_dtype(before)
    return space


def run(page: str, dtype: torch.dtype = torch.float32, count: int = 99) -> Space:
    """The names that a page's first blocks leave; its tensors and modules are shared between tests."""
    return dict(_run(page, dtype, count))


# -- the form of the pages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str) -> None:
    assert run(page)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_short(page: str) -> None:
    for block in blocks(page):
        lines = [line for line in block.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) <= MOST_LINES, f"{len(lines)} lines:\n{block}"
        assert all(len(line) <= 120 for line in lines)


def test_index_has_every_page_and_readme_has_the_index() -> None:
    links = re.findall(r"\]\(([^)]+)\.md\)", (COOKBOOK / "README.md").read_text(encoding="utf-8"))
    assert sorted(links) == PAGES
    assert "(docs/cookbook/README.md)" in (COOKBOOK.parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_page_names_its_source(page: str) -> None:
    assert re.search(r"^Source: .*\(\d{4}\)", text(page), flags=re.MULTILINE)


# -- brute force ----------------------------------------------------------------------------------------------------


def named_parameters(model: nn.Module) -> Named:
    return {name: p.detach() for name, p in model.named_parameters()}


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Named:
    """The gradient of each sample's own loss, `[N, *shape]`, one backward pass each."""
    rows = []
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        rows.append(torch.autograd.grad(loss, list(model.parameters())))
    return {name: torch.stack([row[i] for row in rows]) for i, (name, _) in enumerate(model.named_parameters())}


def flat(by_name: Named) -> Tensor:
    """`[N, P]`."""
    return torch.cat([g.flatten(1) for g in by_name.values()], 1)


def jacobian(model: nn.Module, x: Tensor) -> Named:
    """The derivative of each output of each sample, `[N, C, *shape]`."""
    return torch.func.jacrev(lambda p: functional_call(model, p, (x,)))(named_parameters(model))


def softmax_hessians(logits: Tensor) -> Tensor:
    """`[N, C, C]`."""
    p = logits.detach().softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


# -- gradient noise -------------------------------------------------------------------------------------------------


def test_noise_scale_is_that_of_the_samples_gradients() -> None:
    space = run("gradient-noise", torch.float64, 2)
    g = flat(gradients(space["model"], space["x"], space["y"]))
    trace = g.var(0).sum()
    signal = g.mean(0).square().sum() - trace / len(g)
    assert_close(space["noise"].noise.total, trace)
    assert_close(space["noise"].signal.total, signal)
    assert_close(space["noise"].total, trace / signal)


def test_at_the_critical_batch_size_a_step_gains_half(generator: torch.Generator) -> None:
    """Over drawn batches: with curvature 1 the best step gains |G|⁴ / (2 E|G_B|²), and E|G_B|² is twice |G|²."""
    space = run("gradient-noise", torch.float64, 2)
    g = flat(gradients(space["model"], space["x"], space["y"]))
    size = round(float(space["noise"].total))
    drawn = [g[torch.randint(len(g), (size,), generator=generator)].mean(0).square().sum() for _ in range(3000)]
    whole = g.mean(0).square().sum()
    gain, most = whole**2 / torch.stack(drawn).mean() / 2, whole / 2
    assert abs(float(gain / most) - 0.5) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_two_batch_sizes_find_the_same_noise_scale(dtype: torch.dtype) -> None:
    space = run("gradient-noise", dtype, 2)
    assert 0.85 < float(space["two_batch"] / space["noise"].total) < 1.15
    assert 50 < float(space["noise"].total) < 200
    equations = torch.tensor([[1, 1 / space["small"]], [1, 1 / space["big"]]], dtype=torch.float64)
    signal, trace = torch.linalg.solve(equations, torch.stack([space["by_small"], space["by_big"]]).double())
    assert float(space["two_batch"]) == pytest.approx(float(trace / signal), rel=1e-10 if dtype.itemsize == 8 else 1e-3)


def test_noise_scale_grows_in_training() -> None:
    history = run("gradient-noise")["history"]
    assert history[-1] > 3 * history[0]
    assert all(after > 2 * history[0] for after in history[1:])


# -- clipping -------------------------------------------------------------------------------------------------------


def clipped_by_loop(model: nn.Module, x: Tensor, y: Tensor, clip: float) -> Tensor:
    g = flat(gradients(model, x, y))
    return (g * (clip / g.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


def test_private_gradient_is_clipped_sum_and_noise() -> None:
    space = run("per-sample-clipping", torch.float64, 2)
    model, x, y = copy.deepcopy(space["model"]), space["x"][:40], space["y"][:40]
    torch.manual_seed(3)
    clipped = space["private_gradient"](model, x, y, clip=0.5, sigma=2.0, expected=50)
    torch.manual_seed(3)
    noise = torch.cat([torch.randn_like(p).flatten() for p in model.parameters()])
    total = clipped_by_loop(model, x, y, 0.5)
    assert_close(torch.cat([v.flatten() for v in clipped.values()]), total)
    assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), (total + 2.0 * 0.5 * noise) / 50)


def test_one_sample_moves_the_sum_by_the_clip_at_most() -> None:
    space = run("per-sample-clipping", torch.float64, 2)
    model, x, y = copy.deepcopy(space["model"]), space["x"][:12], space["y"][:12]

    def total(keep: Tensor) -> Tensor:
        out = space["private_gradient"](model, x[keep], y[keep], clip=0.5, sigma=0.0, expected=1)
        return torch.cat([v.flatten() for v in out.values()])

    everything = torch.ones(12, dtype=torch.bool)
    moved = [(total(everything) - total(everything & (torch.arange(12) != n))).norm() for n in range(12)]
    assert max(moved) <= 0.5 + 1e-12
    assert max(moved) > 0.5 - 1e-12  # the bound is reached: these samples are clipped


def test_an_empty_batch_is_a_step_of_noise() -> None:
    space = run("per-sample-clipping", torch.float64, 2)
    model = copy.deepcopy(space["model"])
    clipped = space["private_gradient"](model, space["x"][:0], space["y"][:0], clip=0.5, sigma=1.0, expected=10)
    assert not any(bool(v.any()) for v in clipped.values())
    assert all(bool(p.grad.all()) for p in model.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning:opacus")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients:UserWarning")
def test_clipping_equals_that_of_opacus() -> None:
    sampling = pytest.importorskip("opacus.grad_sample", reason="Opacus is not installed (requirements/peers.txt)")
    space = run("per-sample-clipping", torch.float64, 2)
    x, y = space["x"][:40], space["y"][:40]
    model = sampling.GradSampleModule(copy.deepcopy(space["model"]), loss_reduction="sum")
    F.cross_entropy(model(x), y, reduction="sum").backward()
    g = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1)
    total = (g * (0.5 / g.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)
    plain = copy.deepcopy(space["model"])
    clipped = space["private_gradient"](plain, x, y, clip=0.5, sigma=0.0, expected=1)
    assert_close(torch.cat([v.flatten() for v in clipped.values()]), total)


def test_private_training_learns_and_the_accountant_counts() -> None:
    space = run("per-sample-clipping")
    assert accuracy(space["model"], space["x"], space["y"]) > 0.88
    assert 0.3 < float((space["clipped"].norms > 0.5).float().mean()) < 0.9
    if "epsilon" in space:
        assert 5.8 < space["epsilon"] < 6.8


# -- Fisher ---------------------------------------------------------------------------------------------------------


def test_the_two_fishers() -> None:
    space = run("fisher", torch.float64, 2)
    model, x, y = space["model_a"], space["xa"], space["ya"]
    p = model(x).detach().softmax(1)
    true = {name: torch.zeros_like(q) for name, q in model.named_parameters()}
    for c in range(4):
        g = gradients(model, x, torch.full_like(y, c))
        for name, total in true.items():
            total += torch.einsum("n,n...->...", p[:, c], g[name].square()) / len(x)
    empirical = gradients(model, x, y)
    for name, value in true.items():
        assert_close(space["exact"][name], value)
        assert_close(space["empirical"][name], empirical[name].square().mean(0))
    many = lw.accumulate(model, F.cross_entropy, [(x, y)], lw.FisherDiag("model", draws=2000)).fisher_diag
    assert abs(float(many.total / space["exact"].total) - 1) < 0.03


def test_the_true_fisher_is_the_curvature_of_the_kl_divergence() -> None:
    space = run("fisher", torch.float64, 2)
    model, x = space["model_a"], space["xa"]
    named = named_parameters(model)
    before = functional_call(model, named, (x,)).log_softmax(1)
    step = 1e-4
    for index in (3, 40, 200):
        moved = named["2.weight"].flatten().clone()
        moved[index] += step
        after = functional_call(model, named | {"2.weight": moved.view_as(named["2.weight"])}, (x,)).log_softmax(1)
        kl = (before.exp() * (before - after)).sum(1).mean()
        wanted = space["exact"]["2.weight"].flatten()[index] * step**2 / 2
        assert abs(float(kl / wanted) - 1) < 1e-2, index


def test_the_empirical_fisher_vanishes_where_the_task_is_solved() -> None:
    space = run("fisher")
    assert 0.7 < float(space["drawn"].total / space["exact"].total) < 1.3
    assert float(space["empirical"].total) < float(space["exact"].total) / 4


def test_ewc_remembers() -> None:
    space = run("fisher")
    a, b = (space["xa"], space["ya"]), (space["xb"], space["yb"])
    assert accuracy(space["model_a"], *a) > 0.99 > 0.5 > accuracy(space["model_a"], *b)
    for name in ("forgetful", "ewc"):
        assert accuracy(space[name], *b) > 0.98
    assert accuracy(space["ewc"], *a) > 0.98 > 0.95 > accuracy(space["forgetful"], *a)
    losses = [float(F.cross_entropy(space[name](a[0]), a[1]).detach()) for name in ("forgetful", "ewc")]
    assert losses[1] < losses[0] / 2


def test_the_pages_table_of_accuracies() -> None:
    space = run("fisher")
    table = re.findall(
        r"^\| .*?`?(model_a|forgetful|ewc|averaged|merged|after A)`?.*? \| (\d+) \| (\d+) \|$", text("fisher"), re.M
    )
    assert len(table) == 5
    for name, *percents in table:
        model = space["model_a" if name == "after A" else name]
        for task, percent in zip("ab", percents, strict=True):
            assert abs(100 * accuracy(model, space[f"x{task}"], space[f"y{task}"]) - int(percent)) < 2.5, name


def test_the_empirical_fisher_protects_less_at_the_same_strength() -> None:
    space = run("fisher")
    kept = []
    for fisher in (space["exact"], space["empirical"]):
        penalty = space["stay_near"](space["model_a"], fisher, 10.0)
        model = space["fit"](copy.deepcopy(space["model_a"]), space["xb"], space["yb"], penalty)
        kept.append(accuracy(model, space["xa"], space["ya"]))
    assert kept[0] > 0.97 > 0.96 > kept[1]
    ratio = torch.cat([(space["empirical"][k] / space["exact"][k]).flatten() for k in ("0.bias", "2.weight", "2.bias")])
    assert float(ratio.max() / ratio.min()) > 2


def test_ewc_penalty_is_the_quadratic_form() -> None:
    space = run("fisher", torch.float64, 3)
    penalty = space["stay_near"](space["model_a"], space["exact"], 100.0)
    assert float(penalty(space["model_a"]).detach()) == 0
    d = torch.cat(
        [(p - q).flatten() for p, q in zip(*(space[m].parameters() for m in ("ewc", "model_a")), strict=True)]
    )
    fisher = torch.cat([f.flatten() for f in space["exact"].values()])
    assert_close(penalty(space["ewc"]).detach(), 50.0 * (d @ torch.diag(fisher) @ d).detach())


def test_merging_keeps_more_than_averaging() -> None:
    space = run("fisher")
    for x, y in ((space["xa"], space["ya"]), (space["xb"], space["yb"])):
        assert accuracy(space["merged"], x, y) > accuracy(space["averaged"], x, y)
        loss = {name: float(F.cross_entropy(space[name](x), y).detach()) for name in ("merged", "averaged")}
        assert loss["merged"] < loss["averaged"]


def test_merging_minimizes_the_sum_of_both_penalties() -> None:
    space = run("fisher", torch.float64)
    for name, p in space["merged"].named_parameters():
        pull = torch.zeros_like(p)
        for model, fisher in ((space["model_a"], space["exact"]), (space["model_b"], space["fisher_b"])):
            pull += (fisher[name] + 1e-8) * (p - model.get_parameter(name))
        assert float(pull.detach().abs().max()) < 1e-12


# -- Laplace --------------------------------------------------------------------------------------------------------


def two_layers(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each linear layer of two, its inputs `[N, I]` and the derivative of the outputs by its own `[N, C, O]`."""
    first, function, second = model
    z = first(x).detach().requires_grad_()
    hidden = function(z)
    eye = torch.eye(second.out_features)
    (slope,) = torch.autograd.grad(hidden.sum(), z)
    backward = second.weight.detach()[None] * slope[:, None]
    return {"0": (x, backward), "2": (hidden.detach(), eye.expand(len(x), -1, -1))}


def kron_blocks(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The dense blocks of KFLR of the summed loss, from formulas for two layers."""
    h = softmax_hessians(model(x))
    found = {}
    for name, (a, j) in two_layers(model, x).items():
        outputs = torch.einsum("nco,ncd,ndp->op", j, h, j)
        found[f"{name}.weight"] = torch.kron(outputs.contiguous(), a.T @ a / len(a))
        found[f"{name}.bias"] = outputs
    return found


def test_evidence_and_variance_are_those_of_the_dense_matrices() -> None:
    space = run("laplace", torch.float64, 3)
    model, x, y = space["model"], space["x"], space["y"]
    found = kron_blocks(model, x)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    for delta in (0.01, 1.0, 30.0):
        logdet = sum(torch.logdet(b + delta * torch.eye(len(b))) for b in found.values())
        prior = len(theta) * np.log(delta) - delta * theta.square().sum()
        wanted = -F.cross_entropy(model(x), y, reduction="sum") + prior / 2 - logdet / 2
        assert_close(space["evidence"](delta), wanted.detach())
    j = jacobian(model, x[:1])
    wanted = torch.zeros(3)
    for name, b in found.items():
        rows = j[name][0].flatten(1)
        wanted += (rows @ torch.linalg.solve(b + space["best"] * torch.eye(len(b)), rows.T)).diagonal()
    assert_close(space["output_variance"](x[0]), wanted)


def test_evidence_has_an_inner_maximum_and_the_variance_grows() -> None:
    space = run("laplace")
    assert space["deltas"][0] < space["best"] < space["deltas"][-1]
    assert 0.3 < space["best"] < 3
    assert float((space["far"] / space["near"]).min()) > 300


def test_laplace_torch_finds_the_same_evidence() -> None:
    pytest.importorskip("laplace", reason="laplace-torch is not installed (requirements/peers.txt)")
    space = run("laplace", torch.float64)
    la = space["Laplace"](space["model"], "classification", "all", "kron", backend=space["LayerwiseGGN"])
    la.fit(space["DataLoader"](space["TensorDataset"](space["x"], space["y"]), batch_size=50))
    for delta in (0.1, 1.0, 5.0):
        assert_close(la.log_marginal_likelihood(prior_precision=torch.tensor([delta])), space["evidence"](delta))
    step = space["deltas"][1] / space["deltas"][0]
    assert space["best"] / step < float(space["la"].prior_precision) < space["best"] * step
    space = run("laplace")
    certain = float(space["model"](10 * space["x"][:1]).detach().softmax(1).max())
    assert certain > 0.999 > 0.8 > float(space["probabilities"].max()) > 0.7


# -- influence ------------------------------------------------------------------------------------------------------


def dense_ekfac(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigenvectors `[p, p]` and eigenvalues of each block, for the mean loss."""
    h = softmax_hessians(model(x)) / len(x)
    values, vectors = torch.linalg.eigh(h)
    roots = vectors * values.clamp(min=0).sqrt()[:, None]  # [N, C, V]
    found = {}
    for name, (a, j) in two_layers(model, x).items():
        s = torch.einsum("nco,ncv->nvo", j, roots)
        basis_out = torch.linalg.eigh(torch.einsum("nvo,nvp->op", s, s))[1]
        basis_in = torch.linalg.eigh(a.T @ a / len(a))[1]
        turned = s @ basis_out
        weight = torch.einsum("nvo,ni->oi", turned.square(), (a @ basis_in).square())
        found[f"{name}.weight"] = torch.kron(basis_out, basis_in), weight.flatten()
        found[f"{name}.bias"] = basis_out, turned.square().sum((0, 1))
    return found


def test_influence_is_that_of_all_gradients_and_the_dense_inverse() -> None:
    space = run("influence", torch.float64)
    model, x, y = space["model"], space["x"], space["y"]
    g, (query,) = gradients(model, x, y), space["queries"]
    q = gradients(model, *query)
    wanted = torch.zeros(len(query[0]), len(x))
    for name, (basis, spectrum) in dense_ekfac(model, x).items():
        damped = spectrum + 0.1 * spectrum.mean()
        wanted += (q[name].flatten(1) @ basis / damped) @ (g[name].flatten(1) @ basis).T
    assert_close(space["scores"], wanted)


def test_influence_finds_wrong_labels() -> None:
    space = run("influence")
    for scores in (space["scores"], space["approximate"]):
        worst = scores.mean(0).argsort()[:30]
        assert int(torch.isin(worst, space["wrong"]).sum()) >= 15
    both = torch.stack([space["scores"].flatten(), space["approximate"].flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.9
    assert space["index"].recall(space["queries"], space["loader"], 30) > 0.7


def test_names_of_other_attribution_libraries_give_inner_products_of_gradients() -> None:
    space = run("attribution-names", torch.float64)
    model, x, y = space["model"], space["x"], space["y"]
    g, q = gradients(model, x, y), gradients(model, x[:4], y[:4])
    last = {name: value for name, value in g.items() if name.startswith("2.")}
    assert_close(space["tracin"], flat(q) @ flat(g).T)
    assert_close(space["fast"], flat({name: q[name] for name in last}) @ flat(last).T)
    assert space["scores"].shape == space["measured"].shape == (4, 90) and space["who"].shape == (4, 5)
    assert not torch.equal(space["scores"], space["measured"]) and (space["alone"] > 0).all()


# -- layer Hessians -------------------------------------------------------------------------------------------------


def by_least_squares(W: Tensor, H: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Column by column: each error is followed by the solution for all columns to come, from scratch."""
    W, new = W.clone(), torch.empty_like(W)
    for j in range(W.shape[1]):
        new[:, j] = change(W[:, j], torch.linalg.inv(H[j:, j:])[0, 0].sqrt())
        error = W[:, j] - new[:, j]
        rest = slice(j + 1, None)
        if j + 1 < W.shape[1]:
            W[:, rest] += error[:, None] * torch.linalg.solve(H[rest, rest], H[rest, j])
    return new


def test_compensation_is_the_least_squares_solution() -> None:
    space = run("layer-hessians", torch.float64)
    assert_close(space["H"], space["x"].T @ space["x"] / len(space["x"]))
    W, H = space["W"], space["H"] + space["damped"] * torch.eye(len(space["H"]))
    assert_close(space["quantized"], by_least_squares(W, H, space["rounded"]))
    limit = (W.square() / torch.linalg.inv(H).diagonal()).median()
    assert_close(limit, space["limit"])
    kept = by_least_squares(W, H, lambda w, pivot: torch.where((w / pivot).square() > limit, w, 0.0))
    assert_close(space["pruned"], kept)


def test_a_plain_factorization_fails_and_the_damped_inverse_does_not() -> None:
    for dtype in (torch.float32, torch.float64):
        space = run("layer-hessians", dtype)
        with pytest.raises(torch.linalg.LinAlgError):
            torch.linalg.cholesky(space["H"])
        for damping in (0.0, 1e-8, 1e-2):
            assert bool(torch.isfinite(inverse(space["H"], damping)).all())
            new = space["compensated"](space["W"], space["H"], space["rounded"], damping)
            assert space["output_error"](new) < space["output_error"](space["plain"]) / 2


def test_compensation_beats_rounding_and_pruning() -> None:
    space = run("layer-hessians")
    error = space["output_error"]
    percent = [100 * error(space[name]) for name in ("plain", "quantized", "by_size", "pruned")]
    assert percent == pytest.approx([2.9, 0.8, 5.9, 0.7], rel=0.15)  # the page's table
    assert space["share"] == pytest.approx(0.4, abs=0.02)
    assert error(space["quantized"]) < error(space["plain"]) / 2
    assert error(space["pruned"]) < error(space["by_size"]) / 4
    assert (space["pruned"] == 0).sum() <= (space["by_size"] == 0).sum() + 1
    levels = space["quantized"] / space["grid"][:, None]
    assert float((levels - levels.round()).abs().max()) < 1e-4 and float(levels.abs().max()) < 3.001


# -- spectra --------------------------------------------------------------------------------------------------------


@pytest.fixture
def spectra() -> Iterator[Space]:
    pytest.importorskip("scipy")
    yield run("spectra", torch.float64)


def dense_curvature(space: Space) -> tuple[Tensor, Tensor]:
    """The GGN and the Hessian of the mean loss, `[P, P]`."""
    model, x, y = space["model"], space["x"], space["y"]
    j = torch.cat([v.flatten(2) for v in jacobian(model, x).values()], 2)
    ggn = torch.einsum("ncp,ncd,ndq->pq", j, softmax_hessians(model(x)), j) / len(x)
    named = named_parameters(model)
    shapes = [p.shape for p in named.values()]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes])
        return F.cross_entropy(
            functional_call(model, {k: v.view(s) for k, v, s in zip(named, parts, shapes, strict=True)}, (x,)), y
        )

    hessian = torch.func.hessian(loss)(torch.cat([p.flatten() for p in named.values()]))
    return ggn, hessian


def test_eigenvalues_are_those_of_the_dense_matrices(spectra: Space) -> None:
    ggn, hessian = dense_curvature(spectra)
    of_ggn, of_hessian = torch.linalg.eigvalsh(ggn), torch.linalg.eigvalsh(hessian)
    assert_close(torch.from_numpy(np.sort(spectra["top_ggn"])), of_ggn[-6:])
    assert_close(torch.from_numpy(np.sort(spectra["top"])), of_hessian[-6:])
    assert_close(torch.from_numpy(np.sort(spectra["bottom"])), of_hessian[:6])
    assert float(of_ggn[0]) > -1e-12 and of_hessian[0] < 0
    assert 30 < -float(of_hessian[-1] / of_hessian[0]) < 90
    assert float(abs(of_ggn[-1] / of_hessian[-1] - 1)) < 0.1


def test_probes_estimate_the_moments(spectra: Space) -> None:
    _, hessian = dense_curvature(spectra)
    assert abs(float(spectra["trace"] / hessian.trace()) - 1) < 0.15
    assert abs(float(spectra["square"] / hessian.square().sum()) - 1) < 0.3
    many = torch.randn(len(hessian), 2000).sign()
    products = spectra["H"] @ many
    assert abs(float((many * products).sum(0).mean() / hessian.trace()) - 1) < 0.03
    assert abs(float(products.square().sum(0).mean() / hessian.square().sum()) - 1) < 0.05


def test_gradient_descent_diverges_above_the_limit(spectra: Space) -> None:
    """On the quadratic with this Hessian, along its first eigenvector."""
    _, hessian = dense_curvature(spectra)
    vector = torch.linalg.eigh(hessian)[1][:, -1]
    for factor, grows in ((0.99, False), (1.01, True)):
        after = vector - factor * spectra["limit"] * (hessian @ vector)
        assert (after.norm() > vector.norm()) == grows
