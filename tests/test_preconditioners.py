"""Every kind of curvature against dense linear algebra: `(C + λI)⁻¹ g` by building C and solving, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from curvature_kinds import ASKED
from grids import one_in
from torch import Tensor, nn
from zoo import Case, cases

import layerwise as lw
from layerwise.errors import BadInput, LayerwiseError, SamplesMixed, Undefined
from layerwise.replay.state import seed_of

pytestmark = pytest.mark.usefixtures("float64")
Preconditioner = lw.optim.Preconditioner
DAMPING = 0.03

KRONECKER = ("kfac", "kflr", "kfra", "ekfac", "foof")


def generator(step: int = 0, seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, step))


def preconditioned(subject: Any, loss: Callable[[], Tensor], pre: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and what `pre` makes of them, by name."""
    params = oracle.parameters(subject)
    for p in params.values():
        p.grad = None
    with pre.watch():
        loss().backward()
    before = {name: p.grad.to_dense().clone() for name, p in params.items() if p.grad is not None}
    assert pre.step()
    return before, {name: params[name].grad.to_dense().clone() for name in before}


def solved(matrix: Tensor, grads: list[Tensor], damping: float = DAMPING) -> list[Tensor]:
    """(C + λI)⁻¹ of the gradients, one after the other, in their shapes."""
    flat = torch.cat([g.flatten() for g in grads])
    found = torch.linalg.solve(matrix + damping * torch.eye(len(matrix)), flat)
    return [x.view(g.shape) for x, g in zip(found.split([g.numel() for g in grads]), grads, strict=True)]


# From nothing but plain autograd -------------------------------------------------------------------------------


class Hooked(nn.Module):
    """A grouped convolution, a norm, a shared layer and biases; all modules that the oracle's hooks read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 6, 2, groups=2)
        self.norm = nn.LayerNorm(6)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(self.embed(x).mT).mT.tanh())
        return self.head(self.twice(self.twice(h).tanh()).mean(1))


class Chain(nn.Sequential):
    """A chain of layers, which KFRA wants."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv1d(4, 6, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5), nn.Sigmoid(), nn.Linear(5, 3))


def data(model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randint(5, (7, 5), generator=gen) if isinstance(model, Hooked) else torch.randn(7, 4, 5, generator=gen)
    return x, torch.randint(3, (7,), generator=gen)


def by_hand(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of every parameter alone, by the oracle's loops; A may be [K,I] where it is a diagonal."""

    def loss_of(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y)

    if kind == "kfra":
        return oracle.kfra_factors(model, lambda: model(x), loss_of)
    found = oracle.kfac_factors(model, lambda: model(x), loss_of, every=True)
    if kind == "foof":
        return {name: (a, torch.eye(b.shape[-1]).expand_as(b)) for name, (a, b) in found.items()}
    return found


def grouped(g: Tensor, k: int, o: int, i: int, name: str, model: nn.Module) -> Tensor:
    """A gradient as [K,O,I]: embeddings are read by columns, all else in order."""
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding):
        return g.T.reshape(k, o, i)
    return g.reshape(k, o, i)


@pytest.mark.parametrize(("kind", "make"), [("kflr", Hooked), ("foof", Hooked), ("kfra", Chain), ("kflr", Chain)])
def test_kronecker_kinds_equal_solutions_of_dense_systems(kind: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    x, y = data(model)
    pre = Preconditioner(model, kind, damping=DAMPING, damping_form="eigen", joint=False)
    grads, got = preconditioned(model, lambda: F.cross_entropy(model(x), y), pre)
    factors = by_hand(model, x, y, kind)
    assert factors.keys() == got.keys()
    want = {}
    for name, (a, b) in factors.items():
        (k, i), o = a.shape[:2], b.shape[1]
        g = grouped(grads[name], k, o, i, name, model)
        rows = [solved(torch.kron(b[q], a[q]), [g[q]])[0] for q in range(k)]
        d = torch.stack(rows)
        embedding = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        want[name] = d[0].T if embedding else d.view(grads[name].shape)
    oracle.assert_close(got, want)


@pytest.mark.parametrize("kind", ["diag-ggn", "diag-hessian"])
@pytest.mark.parametrize("make", [Hooked, Chain])
def test_diagonals_equal_brute_force(kind: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    x, y = data(model)
    pre = Preconditioner(model, kind, damping=DAMPING)
    grads, got = preconditioned(model, lambda: F.cross_entropy(model(x), y), pre)
    params = oracle.parameters(model)
    if kind == "diag-ggn":
        diagonal = oracle.diag_ggn(params, lambda: model(x), lambda z: F.cross_entropy(z, y))
    else:
        diagonal = oracle.diag_hessian(params, lambda: F.cross_entropy(model(x), y))
        assert any(bool((d < 0).any()) for d in diagonal.values())
    oracle.assert_close(got, {name: g / (diagonal[name].abs() + DAMPING) for name, g in grads.items()})


def draws_of(model: nn.Module, x: Tensor, y: Tensor, gen: torch.Generator) -> Tensor:
    """Roots [N,C] of the mean cross entropy from a drawn label a sample: the last bias's columns are they."""
    with lw.observe(model, lw.SqrtGGN(draws=1, generator=gen)) as seen:
        F.cross_entropy(model(x), y).backward()
    return seen.sqrt_ggn["2.bias"][0]


def gradients_of(layer: str, model: nn.Module, x: Tensor, s: Tensor) -> list[Tensor]:
    """For each sample the gradient [O, I+1] of s_n · f(x_n) by a layer's weight and bias."""
    layers = [model.get_parameter(f"{layer}.{part}") for part in ("weight", "bias")]
    found = []
    for n in range(len(x)):
        w, b = torch.autograd.grad((model(x[n : n + 1])[0] * s[n]).sum(), layers)
        found.append(torch.cat([w.flatten(1), b[:, None]], 1))
    return found


def ekfac_by_hand(a: Tensor, b: Tensor, samples: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(Q_A, Q_B, S): eigenvectors of the factors, and the sum of squares of the samples' gradients in them."""
    qa, qb = torch.linalg.eigh(a).eigenvectors, torch.linalg.eigh(b).eigenvectors
    return qa, qb, sum(((qb.T @ d @ qa) ** 2 for d in samples), torch.zeros(len(b), len(a)))


def test_ekfac_by_hand_over_five_steps() -> None:
    """Moments are averaged in the basis that is kept; a new one, due in all steps but 3, takes over their diagonal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    rho = 0.7
    pre = Preconditioner(
        model, "ekfac", damping=DAMPING, factor_decay=rho, update_factors_every=1, update_inverses_every=2
    )
    kept: dict[str, list[Tensor]] = {}
    sums: dict[str, list[Tensor]] = {}
    for step in range(5):
        gen = torch.Generator().manual_seed(step)
        x, y = torch.randn(7, 4, generator=gen), torch.randint(3, (7,), generator=gen)
        grads, got = preconditioned(model, lambda x=x, y=y: F.cross_entropy(model(x), y), pre)
        s = draws_of(model, x, y, generator(step))
        inputs = {"0": x, "2": model[:2](x).detach()}
        weight = (1 - rho) / (1 - rho ** (step + 1))
        for layer in ("0", "2"):
            rows = torch.cat([inputs[layer], torch.ones(7, 1)], 1)
            each = gradients_of(layer, model, x, s)
            back = [d[:, -1] for d in each]
            new = [rows.T @ rows / 7, sum(torch.outer(g, g) for g in back)]
            old = sums.get(layer, new)
            a, b = sums[layer] = [o + weight * (n - o) for o, n in zip(old, new, strict=True)]
            if step == 0:
                kept[layer] = list(ekfac_by_hand(a, b, each))
            else:
                qa, qb, spectrum = kept[layer]
                moment = sum((qb.T @ d @ qa) ** 2 for d in each)
                kept[layer][2] = spectrum + weight * (moment - spectrum)
            if step in (1, 2, 4):
                qa, qb, spectrum = kept[layer]
                whole = torch.kron(qb, qa)
                matrix = whole @ spectrum.flatten().diag() @ whole.T
                na, nb = torch.linalg.eigh(a).eigenvectors, torch.linalg.eigh(b).eigenvectors
                basis = torch.kron(nb, na)
                kept[layer] = [na, nb, (basis.T @ matrix @ basis).diagonal().view_as(spectrum)]
            qa, qb, spectrum = kept[layer]
            basis = torch.kron(qb, qa)
            g = torch.cat([grads[f"{layer}.weight"], grads[f"{layer}.bias"][:, None]], 1)
            (d,) = solved(basis @ spectrum.flatten().diag() @ basis.T, [g])
            oracle.assert_close(
                {n: got[f"{layer}.{n}"] for n in ("weight", "bias")}, {"weight": d[:, :-1], "bias": d[:, -1]}
            )


@pytest.mark.parametrize("joint", [False, True])
def test_ekfac_of_a_batch_is_the_quantity(joint: bool) -> None:
    """On the first step the basis is the batch's own; on the fourth it is kept from the third."""
    model = Hooked()
    pre = Preconditioner(model, "ekfac", damping=DAMPING, joint=joint, factor_decay=0.0, update_factors_every=1)
    basis = None
    for step in range(4):
        x, y = data(model, step)
        grads, got = preconditioned(model, lambda x=x, y=y: F.cross_entropy(model(x), y), pre)
        if joint:
            assert pre.describe()["twice.bias"] == "in the block of twice.weight"
            assert not any(torch.equal(got[n], grads[n]) for n in got)
            continue
        with lw.observe(model, lw.EKFAC(generator=generator(step), basis=basis if step == 3 else None)) as seen:
            F.cross_entropy(model(x), y).backward()
        basis = seen.ekfac
        if step in (1, 2):  # moments in the basis before, of which a new one takes over the diagonal
            continue
        want = {n: solved(basis.to_dense(n), [g])[0] for n, g in grads.items()}
        oracle.assert_close(got, want, 1e-9)


# On every model of the zoo -------------------------------------------------------------------------------------------


def matrices(instance: Any, kind: str) -> dict[tuple[str, ...], Tensor]:
    """The dense block of each parameter and what it holds, from the quantity with the same draws."""
    foof = kind == "foof"
    quantity: Any = {
        "kfac": lambda: lw.KFAC(generator=generator(), joint=True),
        "kflr": lambda: lw.KFLR(joint=True),
        "foof": lambda: lw.KFLR(joint=True),
        "ekfac": lambda: lw.EKFAC(generator=generator()),
        "diag-ggn": lambda: lw.DiagGGN(),
        "diag-ggn drawn": lambda: lw.DiagGGN(draws=1, generator=generator()),
        "diag-hessian drawn": lambda: lw.DiagHessian(draws=1, generator=generator()),
    }[kind]()
    with lw.observe(instance.subject, quantity) as seen:
        instance.loss().backward()
    found = seen[quantity]
    if kind.startswith("diag"):
        return {(name,): d.abs().flatten().diag() for name, d in found.items()}
    blocks = {}
    for key, block in found.blocks.items():
        if block.form == "gradients" or key.endswith("[rest]"):
            continue
        if foof:
            block = replace(block, B=torch.ones(block.size[:2]))
        name = block.parameter or key
        names = (name,) if block.bias is None else (name, block.bias)
        blocks[names] = blocks.get(names, 0) + block.to_dense(name)
    return blocks


@one_in(
    3,
    case=cases(first_loss_only=True),
    kind=["kfac", "kflr", "foof", "ekfac", "diag-ggn", "diag-ggn drawn", "diag-hessian drawn"],
)
def test_every_model_of_the_zoo(case: Case, kind: str) -> None:
    """Parameters with factors; those without have the diagonal of the same draws, or under FOOF their gradient."""
    instance = case.make()
    pre = Preconditioner(instance.subject, **ASKED[kind], damping=DAMPING, damping_form="eigen", joint=kind != "ekfac")
    try:
        want_blocks = matrices(instance, kind)
    except Undefined:  # a graph without second derivatives
        with pytest.raises(Undefined):
            preconditioned(instance.subject, instance.loss, pre)
        return
    grads, got = preconditioned(instance.subject, instance.loss, pre)
    want = {}
    for names, matrix in want_blocks.items():
        mine = [name for name in names if name in grads]
        if mine:
            want |= dict(zip(names, solved(matrix, [grads[name] for name in names]), strict=True))
    rest = grads.keys() - want.keys()
    if kind == "foof":
        want |= {name: grads[name] for name in rest}
    elif rest:
        diagonal = matrices(instance, "diag-ggn drawn")
        want |= {name: solved(diagonal[(name,)], [grads[name]])[0] for name in rest}
    diagonals = {"foof": set(), "diag-ggn drawn": set(grads)}.get(kind, rest)
    said = pre.describe()
    assert {name for name in grads if said[name] == "diag-ggn (draws=1)"} == diagonals
    oracle.assert_close(got, want, max(1e-9, case.problem.rel) if kind in ("ekfac", "kfac", "kflr") else 1e-10)


# Batches whose samples mix --------------------------------------------------------------------------------------------


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("kind", ["diag-ggn", "ekfac"])
def test_a_draw_for_the_whole_batch_has_the_mean_of_the_exact_ggn(kind: str) -> None:
    """Under batch norm in training, over 100 means of 100 draws, within five standard errors."""
    model = normed()
    gen = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 4, generator=gen), torch.randint(3, (6,), generator=gen)
    ggn = oracle.ggn(oracle.parameters(model), lambda: model(x), lambda z: F.cross_entropy(z, y))
    names = list(oracle.parameters(model))
    want = dict(zip(names, ggn.diagonal().split([p.numel() for p in model.parameters()]), strict=True))
    basis: Any = None
    draws = []
    for seed in range(101):
        pre = Preconditioner(model, kind, seed=seed, joint=False, draws=100)
        if basis is not None:
            pre.blocks = basis
        with pre.watch() as watched:
            F.cross_entropy(model(x), y).backward()
        if kind == "ekfac" and basis is None:
            pre.step()
            basis = pre.blocks
            q = basis.averages["3.weight"].eigen
            rotation = torch.kron(q.basis_out[0], q.basis_in[0])
            start = sum(p.numel() for n, p in model.named_parameters() if n < "3.weight" and n != "3.bias")
            part = ggn[start : start + 15, start : start + 15]
            wanted = (rotation.T @ part @ rotation).diagonal()
            continue
        if kind == "ekfac":
            draws.append(watched.blocks["3.weight"].moments(q).flatten())
        else:
            draws.append(torch.cat([watched.blocks[n].block.spectrum.flatten() for n in names]))
    if kind == "diag-ggn":
        wanted = torch.cat([want[n] for n in names])
    found = torch.stack(draws)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - wanted).abs() <= 5 * error + 1e-12).all())
    assert float((found.mean(0) - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("kind", ["kflr", "kfra", "diag-ggn"])
def test_exact_kinds_refuse_samples_that_mix(kind: str) -> None:
    model = normed()
    pre = Preconditioner(model, kind)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(LayerwiseError) as error, pre.watch():
        F.cross_entropy(model(x), y).backward()
    assert isinstance(error.value, SamplesMixed)
    assert all(p.grad is None for p in model.parameters())


def test_kfac_under_batch_norm_leaves_derived_weights_alone() -> None:
    """Their diagonal needs the samples, and their total no rows: they keep their gradient, and `describe` says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.BatchNorm1d(5), nn.Linear(5, 3))
    pre = Preconditioner(model)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    grads, got = preconditioned(model, lambda: F.cross_entropy(model(x), y), pre)
    plain = {name for name, text in pre.describe().items() if text == "plain gradient"}
    assert plain == {n for n in grads if "original" in n}
    assert all(torch.equal(got[n], grads[n]) == (n in plain) for n in grads)


def test_the_recursion_refuses_what_is_no_chain() -> None:
    model = Hooked()
    x, y = data(model)
    with pytest.raises(Undefined, match="chain"), Preconditioner(model, "kfra").watch():
        F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("kind", ["ekfac", "diag-ggn", "diag-hessian"])
def test_positions_meet_where_factors_have_them(kind: str) -> None:
    with pytest.raises(BadInput, match="reduce"):
        Preconditioner(Chain(), kind, sharing="reduce")


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "foof", "kflr", "diag-ggn", "diag-ggn drawn", "diag-hessian drawn"])
def test_microbatches_count_as_one_loss(kind: str) -> None:
    """Two backward passes in one watch: exact kinds equal the whole batch's, all are finite and step."""
    one, two = Hooked(), Hooked()
    x, y = data(one)
    grads: Mapping[str, Tensor] = {}
    made = []
    for model, parts in ((one, [slice(None)]), (two, [slice(3), slice(3, None)])):
        pre = Preconditioner(model, **ASKED[kind], damping=DAMPING, damping_form="eigen")
        with pre.watch():
            for part in parts:
                F.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        assert pre.step()
        made.append({n: p.grad for n, p in model.named_parameters()})
    assert grads
    if kind in ("kflr", "foof", "diag-ggn"):
        oracle.assert_close(made[1], made[0])
    assert all(bool(torch.isfinite(d).all()) for d in made[1].values())


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "foof"])
def test_what_lies_outside_of_the_measured_slices_keeps_its_gradient(kind: str) -> None:
    """A step that measures nothing may use a slice of which there are no factors."""
    torch.manual_seed(0)
    params = {"w": torch.randn(6, 4).requires_grad_(), "v": torch.randn(3, 2).requires_grad_()}
    x, y = torch.randn(7, 4), torch.randint(3, (7,))

    def loss(more: bool) -> Tensor:
        h = F.linear(x, params["w"][:2]) + (F.linear(x, params["w"][4:]) if more else 0)
        return F.cross_entropy(F.linear(h.tanh(), params["v"]), y)

    pre = Preconditioner(params, kind, damping=DAMPING)
    for _ in range(3):
        preconditioned(params, lambda: loss(False), pre)
    grads, got = preconditioned(params, lambda: loss(True), pre)
    assert torch.equal(got["w"][2:4], torch.zeros(2, 4)) and bool(grads["w"][4:].any())
    oracle.assert_close(got["w"][4:], grads["w"][4:])
    assert not torch.allclose(got["w"][:2], grads["w"][:2])


def test_foof_needs_no_root_of_the_loss() -> None:
    """A loss that is not convex has no GGN to factor; the input factor is there."""
    model = Chain()
    x, _ = data(model)

    def loss() -> Tensor:
        return model(x).sin().sum()

    with pytest.raises(LayerwiseError), Preconditioner(model, "kfac").watch():
        loss().backward()
    grads, got = preconditioned(model, loss, Preconditioner(model, "foof", damping=DAMPING))
    assert all(bool(torch.isfinite(got[n]).all()) and not torch.equal(got[n], grads[n]) for n in grads)
