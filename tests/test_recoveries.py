"""Known algorithms as choices of losses, targets, regularizers and solvers: each beside its own equations.

Every oracle is written from the equations of its source, on inputs and output gradients that hooks and autograd give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from layerwise import local
from layerwise.optim.layer_local.choices import RECOVERIES
from layerwise.optim.layer_local.code_fit import RECOVERIES as CODED

Layers = dict[str, tuple[Tensor, Tensor]]  # by a module's name: rows of inputs with a 1 `[R,I+1]`, and of g `[R,O]`


def dense(bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 7, bias), nn.Tanh(), nn.Linear(7, 5, bias), nn.ReLU(), nn.Linear(5, 3, bias)]
    return nn.Sequential(*layers).double(), torch.randn(10, 6).double()


def conv(bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 4, 3, padding=1, bias=bias), nn.Tanh(), nn.Conv2d(4, 3, 2, stride=2, bias=bias), nn.ReLU(),
              nn.Flatten(), nn.Linear(12, 3, bias=bias)]  # fmt: skip
    return nn.Sequential(*layers).double(), torch.randn(10, 2, 4, 4).double()


nets = pytest.mark.parametrize("make", [dense, conv])
LABELS = torch.arange(10) % 3


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(net(x), LABELS)


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(net, x), list(net.parameters())))


def rows_of(
    net: nn.Sequential, x: Tensor, loss: Callable[[Tensor], Tensor] = lambda z: F.cross_entropy(z, LABELS)
) -> Layers:
    """Inputs and output gradients of each layer with a weight, one row for each sample and position."""
    values, out = {}, x
    for name, module in net.named_children():
        given, out = out, module(out)
        if hasattr(module, "weight"):
            values[name] = (module, given.detach(), out)
    gs = torch.autograd.grad(loss(out), [z for _, _, z in values.values()])
    found = {}
    for (name, (module, a, _)), g in zip(values.items(), gs, strict=True):
        if isinstance(module, nn.Conv2d):
            a = F.unfold(a, module.kernel_size, padding=module.padding, stride=module.stride).mT.flatten(0, 1)  # type: ignore[arg-type]
            g = g.flatten(2).mT.flatten(0, 1)
        found[name] = F.pad(a, (0, 1), value=1.0), g
    return found


def add(net: nn.Module, name: str, change: Tensor) -> None:
    """Add to a layer's weight and bias, the last column of `[O,I+1]`."""
    module: Any = net.get_submodule(name)
    with torch.no_grad():
        module.weight += change[:, :-1].view_as(module.weight)
        module.bias += change[:, -1]


def same(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def against(
    make: Callable[..., tuple[nn.Sequential, Tensor]], settings: dict[str, Any], rule: Callable[..., None],
    steps: int = 3,
) -> None:  # fmt: skip
    """Three steps of LocoProp with some settings, and of a rule `(net, x)` that moves a net in place."""
    (ours, x), (theirs, _) = make(), make()
    start = [p.detach().clone() for p in ours.parameters()]
    opt = lw.LocoProp(ours, **settings)
    for _ in range(steps):
        opt.step(lambda: loss_of(ours, x))
        rule(theirs, x)
    same(ours, theirs)
    assert all(not torch.equal(p, old) for p, old in zip(ours.parameters(), start, strict=True))


# First-order rules: one step of a linearized problem within a norm ball -----------------------------------------


@nets
def test_gradient_descent(make: Any) -> None:
    """W ← W − lr G."""

    def rule(net: nn.Module, x: Tensor) -> None:
        for p, g in zip(net.parameters(), gradients(net, x), strict=True):
            p.data -= 0.1 * g

    against(make, {"preset": "gradient-descent", "lr": 0.1}, rule)
    against(make, {"preset": "gradient-descent", "lr": 0.1, "loss": "squared"}, rule)


def unit(g: Tensor, dim: int | None = None) -> Tensor:
    return (g / (g.norm() if dim is None else g.norm(dim=dim, keepdim=True))).nan_to_num()  # 0/0 of a dead unit


FIRST_ORDER: dict[str, Callable[[Tensor], Tensor]] = {
    "normalized": unit,
    "sign": torch.sign,
    "row-normalized": lambda g: unit(g, 1),
    "column-normalized": lambda g: unit(g, 0),
}


@nets
@pytest.mark.parametrize("preset", FIRST_ORDER)
def test_normalized_sign_and_row_or_column_normalized_descent(preset: str, make: Any) -> None:
    """Of each tensor as a matrix `[O,I]`, a bias as one column.

    Block-normalized gradients: Yu et al. (2017), algorithm 1; signs: Bernstein et al. (2018), algorithm 1.
    """

    def rule(net: nn.Module, x: Tensor) -> None:
        for p, g in zip(net.parameters(), gradients(net, x), strict=True):
            p.data -= 0.02 * FIRST_ORDER[preset](g.flatten(1) if g.dim() > 1 else g[:, None]).view_as(p)

    against(make, {"preset": preset, "lr": 0.02}, rule)


def flat_muon(net: nn.Module, momentum: float, **settings: Any) -> Callable[[nn.Module, Tensor], None]:
    """`torch.optim.Muon` of the weights as matrices, of which convolutions' are views."""
    matrices = [p.data.flatten(1) for p in net.parameters()]
    opt = torch.optim.Muon(matrices, momentum=momentum, **settings)

    def rule(net: nn.Module, x: Tensor) -> None:
        for m, g in zip(matrices, gradients(net, x), strict=True):
            m.grad = g.flatten(1)
        opt.step()

    return rule


@nets
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_muon(make: Any, adjust: Any) -> None:
    """torch's Muon without momentum and weight decay, in its bfloat16: a flipped bit there is an error of 1e-4."""
    theirs, _ = make(bias=False)
    rule = flat_muon(theirs, 0.0, lr=0.02, weight_decay=0.0, adjust_lr_fn=adjust)
    ball = local.SpectralNorm(adjust=adjust or "original")

    ours, x = make(bias=False)
    opt = lw.LocoProp(ours, preset="muon", lr=0.02, regularizer=ball)
    for _ in range(3):
        opt.step(lambda: loss_of(ours, x))
        rule(theirs, x)
    same(ours, theirs)


@nets
def test_muon_with_weight_decay_is_a_ball_around_zero(make: Any) -> None:
    """W ← (1 − lr λ) W − lr O: a step of lr λ towards a vertex of the ball ‖W‖ ≤ 1/λ."""
    (ours, x), (theirs, _) = make(bias=False), make(bias=False)
    rule = flat_muon(theirs, 0.0, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    ball = local.SpectralNorm(1 / 0.3, "zero", adjust="match_rms_adamw")
    opt = lw.LocoProp(ours, preset="muon", lr=0.02 * 0.3, regularizer=ball)
    for _ in range(3):
        opt.step(lambda: loss_of(ours, x))
        rule(theirs, x)
    same(ours, theirs)


def test_muon_with_momentum_is_an_optimizer_of_local_steps() -> None:
    """The momentum of torch's Muon is state from batch to batch, which local steps have, at T = 1."""
    (ours, x), (theirs, _) = dense(bias=False), dense(bias=False)
    rule = flat_muon(theirs, 0.95, lr=0.02)
    opt = lw.LocoProp(ours, target=local.GradientStep(1.0), lr=0.02, rows="all", steps=1,
                      solver=local.LocalSteps(1, torch.optim.Muon, "all"))  # fmt: skip
    for _ in range(3):
        opt.step(lambda: loss_of(ours, x))
        rule(theirs, x)
    same(ours, theirs)


@nets
def test_projected_steps_of_a_large_rate_are_the_exact_factor_of_the_momentum(make: Any) -> None:
    """W ← W − r U Vᵀ of Nesterov's momentum `G + β M`, where the rate takes every singular value beyond the ball."""
    (ours, x), (theirs, _) = make(bias=False), make(bias=False)
    sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
    opt = lw.LocoProp(ours, target=local.GradientStep(1.0), solver=local.LocalSteps(1, sgd, "all"), lr=1e6,
                      regularizer=local.SpectralNorm(0.02))  # fmt: skip
    memory = [torch.zeros_like(p) for p in theirs.parameters()]
    for _ in range(3):
        opt.step(lambda: loss_of(ours, x))
        for p, m, g in zip(theirs.parameters(), memory, gradients(theirs, x), strict=True):
            m.mul_(0.9).add_(g)
            u, s, vt = torch.linalg.svd((g + 0.9 * m).flatten(1), full_matrices=False)
            p.data -= 0.02 * ((u * (s > 1e-9)) @ vt).view_as(p)  # of full rank but for softmax's, whose rows sum to 0
    same(ours, theirs, 1e-9)  # cancellation: a change of 0.02 from a step of 1e6 times the gradient


# Second-order rules: targets and exact solves ----------------------------------------------------------------------


@nets
def test_foof(make: Any) -> None:
    """ΔW = −lr G (A + λ I)⁻¹ with A the mean of a aᵀ over samples (Benzing, 2022, equation of FOOF, no momentum)."""

    def rule(net: nn.Sequential, x: Tensor) -> None:
        for name, (a, g) in rows_of(net, x).items():
            damped = a.T @ a / len(x) + 0.1 * torch.eye(a.shape[1]).double()
            add(net, name, -0.5 * g.T @ a @ torch.linalg.inv(damped))

    against(make, {"preset": "foof", "lr": 0.5, "solver": local.ProximalSolve(1 / (10 * 0.1))}, rule)


def test_gradient_descent_on_neurons() -> None:
    """The least change of the weights that moves every neuron by −γ g, for fewer rows than inputs (Benzing, 2022)."""
    torch.manual_seed(0)
    net, x = nn.Linear(20, 3, bias=False).double(), torch.randn(10, 20).double()
    z = net(x)
    (g,) = torch.autograd.grad(F.cross_entropy(z, LABELS), z)
    start = net.weight.detach().clone()
    opt = lw.LocoProp(net, preset="gradient-descent-on-neurons")
    opt.step(lambda: loss_of(net, x))
    torch.testing.assert_close(net(x), z - 10 * g, rtol=0, atol=1e-12)
    torch.testing.assert_close(net.weight.detach() - start, -10 * g.T @ torch.linalg.pinv(x.T), rtol=0, atol=1e-12)


@nets
def test_proxprop(make: Any) -> None:
    """θ ← argmin ½‖θ a − z⁺‖² + ‖θ − θ₀‖²/2τ, z⁺ = z − ∂L/∂z; the last layer by the gradient (Frerix et al., 2018)."""
    last = list(rows_of(*make()))[-1]

    def rule(net: nn.Sequential, x: Tensor) -> None:
        for name, (a, g) in rows_of(net, x).items():
            if name == last:
                add(net, name, -0.3 * g.T @ a)
                continue
            tall = torch.cat((a, torch.eye(a.shape[1]).double() / 0.3**0.5))  # the two squares as one
            add(net, name, torch.linalg.lstsq(tall, torch.cat((-g, g.new_zeros(a.shape[1], g.shape[1])))).solution.T)

    explicit = {last: {"solver": local.LocalSteps(1, torch.optim.SGD, "all"), "lr": 0.3}}
    against(make, {"preset": "proxprop", "regularizer": local.Proximal(0.3), "layers": explicit}, rule)


@nets
def test_kfac_with_the_empirical_output_factor(make: Any) -> None:
    """ΔW = −lr (B + λ_B I)⁻¹ G (A + λ_A I)⁻¹ (Martens and Grosse, 2015, section 4; the labels' own gradients in B)."""

    def rule(net: nn.Sequential, x: Tensor) -> None:
        n = len(x)
        for name, (a, g) in rows_of(net, x).items():
            own = n * g  # of each sample's own loss
            A, B = a.T @ a / n, own.T @ own / n
            A, B = A + 0.02 * torch.eye(len(A)).double(), B + 0.1 * B.trace() / len(B) * torch.eye(len(B)).double()
            add(net, name, -0.05 * torch.linalg.inv(B) @ (g.T @ a) @ torch.linalg.inv(A))

    target, solver = local.NaturalStep(0.05, damping=0.1), local.ProximalSolve(1 / (10 * 0.02))
    against(make, {"preset": "kfac", "target": target, "solver": solver}, rule)


@pytest.mark.parametrize("k", [1, 3])
def test_natural_steps_by_group_stay_where_nothing_comes_back(k: int) -> None:
    gen = torch.Generator().manual_seed(0)
    z, g = torch.randn(2, 9, k, 4, generator=gen, dtype=torch.float64)
    g[:, 0] = 0 if k > 1 else g[:, 0]
    y = local.NaturalStep(2.0, damping=0.5)(z, g, local.TANH)
    for n in range(k):
        b = sum(torch.outer(row, row) for row in g[:, n])
        b = b + 0.5 * b.trace() / 4 * torch.eye(4).double()
        wanted = z[:, n].tanh() - (2 * g[:, n] @ torch.linalg.inv(b) if g[:, n].any() else 0)
        torch.testing.assert_close(y[:, n], wanted)


# Targets that come from elsewhere ------------------------------------------------------------------------------------


def propagated(kind: str, difference: bool) -> tuple[nn.Sequential, Tensor]:
    """Three blocks with inverses, and a linear layer."""
    torch.manual_seed(0)
    if kind == "dense":
        blocks = [nn.Sequential(nn.Linear(i, o), nn.Tanh()) for i, o in pairwise([6, 7, 5, 4])]
        back: list[nn.Module] = [nn.Sequential(nn.Linear(o, i), nn.Tanh()) for i, o in pairwise([6, 7, 5, 4])]
        x, out = torch.randn(10, 6), [nn.Linear(4, 3)]
    else:
        blocks = [nn.Sequential(nn.Conv1d(i, o, 2), nn.Tanh()) for i, o in pairwise([2, 3, 4, 2])]
        back = [nn.ConvTranspose1d(o, i, 2) for i, o in pairwise([2, 3, 4, 2])]
        x, out = torch.randn(10, 2, 6), [nn.Flatten(), nn.Linear(6, 3)]  # type: ignore[list-item]
    made = [lw.nn.TargetPropagation(f, g, 0.1, difference) for f, g in zip(blocks, back, strict=True)]
    return nn.Sequential(*made, *out).double(), x.double()


@pytest.mark.parametrize("kind", ["dense", "conv"])
@pytest.mark.parametrize("difference", [False, True], ids=["plain", "difference"])
@pytest.mark.parametrize("backward", [False, True])
def test_target_propagation(kind: str, difference: bool, backward: bool) -> None:
    """ĥ = h − η ∂L/∂h at the top; ĥ_below = g(ĥ), or h_below + g(ĥ) − g(h); a step on ½‖f(h_below) − ĥ‖² each.

    Lee et al. (2015), algorithm 1, equations 8 and 15.
    """
    (ours, x), (theirs, _) = propagated(kind, difference), propagated(kind, difference)
    opt = lw.LocoProp(ours, preset="target-propagation", gamma=0.1, lr=0.7)

    def closure() -> Tensor:
        loss = F.cross_entropy(ours(x), LABELS, reduction="sum")
        if backward:
            opt.zero_grad()
            loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
        blocks: list[Any] = [m for m in theirs if isinstance(m, lw.nn.TargetPropagation)]
        h = [x]
        for block in blocks:
            h.append(block.block(h[-1].detach()))
        top = h[-1].detach().requires_grad_()
        loss = F.cross_entropy(theirs[len(blocks) :](top), LABELS, reduction="sum")
        out = list(theirs[-1].parameters())
        first, *of_out = torch.autograd.grad(loss, [top, *out])
        target, moves = top.detach() - 0.1 * first, [(p, 0.1 * g) for p, g in zip(out, of_out, strict=True)]
        for n in range(len(blocks), 0, -1):
            params = list(blocks[n - 1].block.parameters())
            moves += list(zip(params, torch.autograd.grad((h[n] - target).square().sum() / 2, params), strict=True))
            with torch.no_grad():
                back = blocks[n - 1].inverse
                target = back(target) + (h[n - 1] - back(h[n]) if difference else 0)
        for p, g in moves:
            p.data -= 0.7 * g
    same(ours, theirs)


def test_target_propagation_without_gradients_is_the_block_and_wrong_inverses_are_refused() -> None:
    block = lw.nn.TargetPropagation(nn.Linear(3, 2), nn.Linear(2, 4))
    x = torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(block(x), block.block(x))
    with pytest.raises(lw.errors.BadInput, match="inverse made"):
        block(x).sum().backward()
    with pytest.raises(lw.errors.BadInput, match="step"):
        lw.nn.TargetPropagation(nn.Linear(3, 2), nn.Linear(2, 3), step=0.0)


# Codes ---------------------------------------------------------------------------------------------------------------


def squared_loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - F.one_hot(LABELS, 3)).square().sum() / 2 / len(x)


def stages(net: nn.Sequential) -> list[nn.Sequential]:
    """A net cut behind each layer with a weight: the pieces between its codes."""
    cuts = [0, *(n + 1 for n, m in enumerate(net) if hasattr(m, "weight"))]
    return [net[i:j] for i, j in pairwise(cuts)]


def energy(net: nn.Sequential, x: Tensor, codes: list[Tensor]) -> Tensor:
    """½ Σ_l ‖c_l − f_l(c_{l−1})‖², the input and the labels held: the penalty of MAC, predictive coding's energy."""
    ends = [x, *codes, F.one_hot(LABELS, 3).double()]
    return sum((c - f(a)).square().sum() / 2 for f, (a, c) in zip(stages(net), pairwise(ends), strict=True))  # type: ignore[return-value]


def relaxed(net: nn.Sequential, x: Tensor, steps: int, lr: float) -> list[Tensor]:
    """Codes from the layers' outputs by gradient steps on the energy, block after block, the last first."""
    codes: list[Tensor] = []
    for f in stages(net)[:-1]:
        codes.append(f(codes[-1] if codes else x).detach())
    for n in range(len(codes) - 1, -1, -1):
        for _ in range(steps):
            codes[n].requires_grad_()
            (slope,) = torch.autograd.grad(energy(net, x, codes), codes[n])
            codes[n] = (codes[n] - lr * slope).detach()
    return codes


@nets
def test_predictive_coding(make: Any) -> None:
    """ΔW = −α ∂E/∂W = α ε aᵀ at the relaxed codes, ε = c − W a (Whittington and Bogacz, 2017, equations 2.14, 2.19)."""
    (ours, x), (theirs, _) = make(), make()
    opt = lw.AltMin(ours, preset="predictive-coding", lr=0.5, code_step=local.CodeStep(4, 0.2, momentum=0.0))
    for _ in range(3):
        opt.step(lambda: squared_loss(ours, x))
        params = list(theirs.parameters())
        slopes = torch.autograd.grad(energy(theirs, x, relaxed(theirs, x, 4, 0.2)), params)
        for p, g in zip(params, slopes, strict=True):
            p.data -= 0.5 * g / len(x)
    same(ours, theirs)


@nets
def test_method_of_auxiliary_coordinates(make: Any) -> None:
    """Each layer regresses its coordinates on those below, exactly and all at once (Carreira-Perpiñán and Wang, 2014).

    Equations 3 to 5 with μ = 1, the ridge as their W-step's regularizer.
    """
    (ours, x), (theirs, _) = make(), make()
    opt = lw.AltMin(ours, preset="mac", regularizer=local.WeightDecay(0.01),
                    code_step=local.CodeStep(4, 0.2, momentum=0.0))  # fmt: skip
    for _ in range(3):
        opt.step(lambda: squared_loss(ours, x))
        codes = relaxed(theirs, x, 4, 0.2)
        ends = [x, *codes, F.one_hot(LABELS, 3).double()]
        for f, (below, c) in zip(stages(theirs), pairwise(ends), strict=True):
            module: Any = f[-1]
            (a, _), *_ = rows_of(nn.Sequential(*f), below, lambda z: z.sum()).values()
            rows = c.flatten(2).mT.flatten(0, 1) if c.dim() > 2 else c
            w = torch.linalg.solve(a.T @ a + 0.01 * len(x) * torch.eye(a.shape[1]).double(), a.T @ rows).T
            module.weight.data, module.bias.data = w[:, :-1].reshape(module.weight.shape), w[:, -1].clone()
    same(ours, theirs)


# The linear case ---------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """The reconstruction `Wᵀ y` of x from its code `y = W x`, held fixed."""

    def __init__(self, k: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(k, 5, dtype=torch.float64) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w.T).detach() @ self.w


def pca_data() -> Iterator[Tensor]:
    gen = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(12, 5, generator=gen, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2])


@pytest.mark.parametrize("k", [1, 3])
def test_oja(k: int) -> None:
    """ΔW = η (y xᵀ − y yᵀ W), for one neuron and for a subspace (Oja, 1982, equation 3; Oja, 1989)."""
    net = Decoder(k)
    w = net.w.detach().clone()
    opt = lw.LocoProp(net, preset="oja", lr=0.05)
    for _, x in zip(range(5), pca_data(), strict=False):
        opt.step(lambda x=x: (net(x) - x).square().sum() / 2 / len(x))
        y = w @ x.T
        w = w + 0.05 * (y @ x - y @ y.T @ w) / len(x)
        torch.testing.assert_close(net.w.detach(), w, rtol=0, atol=1e-12)
    assert "squared" in opt.describe()["w"] or "identity" in opt.describe()["w"]


def test_the_exact_solution_of_ojas_problem_is_em_for_pca() -> None:
    """Wᵀ ← X Yᵀ (Y Yᵀ)⁻¹ (Roweis, 1998, M-step)."""
    net = Decoder(3)
    x = next(pca_data())
    y = net.w.detach() @ x.T
    target = local.GradientStep(1.0, per="sample")
    opt = lw.LocoProp(net, target=target, solver=local.ConjugateGradient(100, 1e-14))
    opt.step(lambda: (net(x) - x).square().sum() / 2 / len(x))
    torch.testing.assert_close(net.w.detach().T, x.T @ y.T @ torch.linalg.inv(y @ y.T), rtol=0, atol=1e-12)


# Presets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", RECOVERIES)
def test_a_preset_of_locoprop_is_the_keywords_it_stands_for(preset: str) -> None:
    """And combines with other losses, steps, layers and optimizers: nothing asks for its name."""
    (ours, x), (theirs, _), (third, _) = conv(), conv(), conv()
    a, b = lw.LocoProp(ours, preset=preset), lw.LocoProp(theirs, **RECOVERIES[preset])  # type: ignore[arg-type]
    both = lw.LocoProp(third, preset=preset, layers={"0": {"loss": "squared"}}, write="grad")  # type: ignore[arg-type]
    for _ in range(2):
        a.step(lambda: loss_of(ours, x))
        b.step(lambda: loss_of(theirs, x))
    same(ours, theirs, 0.0)
    assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"]
    both.step(lambda: loss_of(third, x))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in third.parameters())


@pytest.mark.parametrize("preset", CODED)
def test_a_preset_of_altmin_is_the_keywords_it_stands_for(preset: str) -> None:
    (ours, x), (theirs, _) = dense(), dense()
    a, b = lw.AltMin(ours, preset=preset), lw.AltMin(theirs, **CODED[preset])  # type: ignore[arg-type]
    for _ in range(2):
        a.step(lambda: squared_loss(ours, x))
        b.step(lambda: squared_loss(theirs, x))
    same(ours, theirs, 0.0)


def test_what_is_spelled_out_wins_over_a_preset() -> None:
    net, _ = dense()
    opt = lw.LocoProp(net, preset="sign", lr=0.5, gamma=2.0, loss="squared")
    group = opt.param_groups[0]
    assert (group["lr"], group["gamma"], group["loss"]) == (0.5, 2.0, "squared")
    with pytest.raises(lw.errors.BadInput, match="muon"):
        lw.LocoProp(net, preset="nuon")  # type: ignore[arg-type]
    with pytest.raises(lw.errors.BadInput, match="mac"):
        lw.AltMin(net, preset="nac")  # type: ignore[arg-type]
    weights = lw.AltMin(net, preset="mac", weights="adam", regularizer=local.WeightDecay(1e-4))
    assert weights.param_groups[0]["weights"] == "adam"
