"""How much LocoProp's T local steps look like a second-order update: cosines, layer by layer, against T.

    python -m benchmarks.papers.alignment [--seeds 0 1 2] [--batch 1000] [--out benchmarks/results/alignment.json]

A tanh autoencoder 196-100-50-16 and back on MNIST at 14 x 14 pixels, in float64, at its initial weights and after 300
steps of Adam. One batch gives each layer's change `[ΔW, Δb]` by T local steps: with the matching (M) and the squared
loss (S), by gradient steps on all rows at the constant rate 1/L (L: the largest curvature of the local problem), and
by the preset's own TFRMSProp and schedule, from fresh state, on R/T rows a step. On the same batch, without momentum
or averages:

    gradient         −G
    input factor     −G (A + λI)⁻¹                          FOOF
    K-FAC            −(B ⊗ A + λI)⁻¹ G, exactly damped, with B from the exact loss Hessian
    GGN              −(GGN + λI)⁻¹ G over all layers together, by conjugate gradient on `lw.GGN`

Damping λ is a factor, from one grid for all three, times the mean eigenvalue: of A, of B ⊗ A (each layer its own), and
of the GGN (T plain steps act much as a damping of 1/(rate·T), so a fixed λ would fit one T alone). At each T a curve
has the factor with which its mean cosine over seeds and layers is highest, one for all layers. With much damping each
of the three is the gradient, so only what exceeds the gradient's own curve says anything.
Writes the curves, and the means by factor, as JSON, and a picture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from benchmarks import probe
from benchmarks.autoencoder import deep_autoencoder, reconstruction_loss
from benchmarks.data import load
from layerwise import local
from layerwise.local.layers.record import problem_of, record
from layerwise.local.solvers.closed import largest_curvature
from layerwise.operators.kronecker import EigenKronecker
from layerwise.operators.ridge import ridge

from .alignment_plot import plot, table

SIZES = (196, 100, 50, 16, 50, 100, 196)
STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)
FACTORS = tuple(float(f"{10 ** (n / 2):.3g}") for n in range(-4, 9))  # two a decade, from 0.01 to 10,000
GAMMA = 10.0
REFERENCES = ("gradient", "input factor", "K-FAC", "GGN")

Layers = dict[str, Tensor]  # by layer: `[o, i + 1]`, the bias last
Solver = Callable[[local.LocalProblem, int], tuple[Tensor, Tensor | None]]


def images(count: int) -> Tensor:
    """MNIST at 14 x 14 pixels, means of four, `[count, 196]`."""
    x = load("mnist", flat=True).x_train[:count].view(-1, 1, 28, 28)
    return F.avg_pool2d(x, 2).flatten(1).double()


def trained(seed: int, x: Tensor, steps: int, batch: int) -> nn.Sequential:
    """The autoencoder after some steps of Adam."""
    model = deep_autoencoder(seed, SIZES).double()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        reconstruction_loss(model, x[torch.randint(len(x), (batch,), generator=generator)]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


# -- LocoProp's changes -------------------------------------------------------------------------------------------


def _gradient_steps(problem: local.LocalProblem, steps: int) -> tuple[Tensor, Tensor | None]:
    rate = 1 / (float(largest_curvature(problem)) * problem.transfer.slope)
    return local.LocalSteps(steps, torch.optim.SGD, rows="all", schedule="constant")(problem, rate)


def _preset(lr: float, momentum: float) -> Solver:
    def solve(problem: local.LocalProblem, steps: int) -> tuple[Tensor, Tensor | None]:
        def optimizer(groups: Any, lr: float) -> torch.optim.Optimizer:
            return local.TFRMSProp(groups, lr=lr, momentum=momentum)

        rows = -(-problem.a.shape[0] // steps)
        return local.LocalSteps(steps, optimizer, rows)(problem, lr)

    return solve


SOLVERS: dict[str, tuple[bool, Solver]] = {
    "M, gradient steps": (True, _gradient_steps),
    "S, gradient steps": (False, _gradient_steps),
    "M, default RMSProp": (True, _preset(5e-5, 0.99)),
    "S, default RMSProp": (False, _preset(1e-5, 0.999)),
}


def local_changes(model: nn.Module, x: Tensor) -> Iterator[tuple[str, int, Layers]]:
    """(solver, T, change by layer) from one batch; the model stays as it is."""
    recorded = record(model, lambda: reconstruction_loss(model, x))
    for name, (matching, solver) in SOLVERS.items():
        transfers = [layer.transfer if matching else local.IDENTITY for layer in recorded.layers]
        problems = [problem_of(recorded, layer, GAMMA, f) for layer, f in zip(recorded.layers, transfers, strict=True)]
        for steps in STEPS:
            found: Layers = {}
            for layer, problem in zip(recorded.layers, problems, strict=True):
                dw, db = solver(problem, steps)
                assert db is not None
                found[layer.name] = torch.cat((dw[0], db[0, :, None]), 1)
            yield name, steps, found


# -- the references -----------------------------------------------------------------------------------------------


def references(model: nn.Module, x: Tensor) -> dict[tuple[str, float], Layers]:
    """Steps downhill by name and damping factor (0 for the gradient)."""
    with lw.observe(model, lw.KFLR(joint=True)) as seen:
        reconstruction_loss(model, x).backward()
    gradients = dict(seen.grad)
    model.zero_grad()
    kron = seen.kflr
    spectra = {name: EigenKronecker({name: block.eigh(name)}) for name, block in kron.blocks.items()}
    steps = {("gradient", 0.0): _layers(gradients)}
    for factor in FACTORS:
        foof: Layers = {}
        kfac: Layers = {}
        for name, (a, b) in kron.factors.items():
            own = {n: gradients[n] for n in (name, name.removesuffix("weight") + "bias")}
            (g,) = _layers(own).values()
            foof[name] = ridge(a[0], g, factor * float(a.diagonal(dim1=1, dim2=2).mean()))
            mean = float(a.diagonal(dim1=1, dim2=2).mean() * b.diagonal(dim1=1, dim2=2).mean())
            kfac |= spectra[name].inverse(factor * mean) @ own
        steps["input factor", factor] = foof
        steps["K-FAC", factor] = _layers(kfac)
    ggn = lw.GGN(model, lambda: reconstruction_loss(model, x))
    flat = torch.cat([gradients[n].flatten() for n in ggn.names])
    shifts = [factor * mean_eigenvalue(ggn) for factor in FACTORS]
    for factor, solution in zip(FACTORS, shifted_solve(ggn.__matmul__, flat, shifts), strict=True):
        parts = solution.split([gradients[n].numel() for n in ggn.names])
        named = {n: part.view_as(gradients[n]) for n, part in zip(ggn.names, parts, strict=True)}
        steps["GGN", factor] = _layers(named)
    return {key: {n: -step for n, step in found.items()} for key, found in steps.items()}


def _layers(values: Mapping[str, Tensor]) -> Layers:
    """Weights with their biases as a last column."""
    return {n: torch.cat((w, values[n.removesuffix("weight") + "bias"][:, None]), 1)
            for n, w in values.items() if n.endswith("weight")}  # fmt: skip


def mean_eigenvalue(matrix: lw.GGN, probes: int = 8) -> float:
    """tr / P by random signs (Hutchinson, 1990), always the same ones."""
    signs = torch.randint(2, (matrix.shape[0], probes), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return float((signs.double() * (matrix @ signs.double())).sum() / signs.numel())


def shifted_solve(
    product: Callable[[Tensor], Tensor], b: Tensor, shifts: Sequence[float], tol: float = 1e-5, most: int = 5000
) -> list[Tensor]:
    """`(M + λI)⁻¹ b` for several λ > 0 from one run of conjugate gradient: their residuals are parallel.

    Runs on the smallest shift until its residual is `tol |b|`; those of the others are smaller. Raises
    ArithmeticError where `most` products do not suffice. Source: Frommer and Maass (1999), algorithm 6.
    """
    low = min(shifts)
    extra = [shift - low for shift in shifts]
    x, p = [torch.zeros_like(b) for _ in shifts], [b.clone() for _ in shifts]
    zeta, zeta_old = [1.0] * len(shifts), [1.0] * len(shifts)
    r, q = b.clone(), b.clone()
    rr, alpha_old, beta_old = float(r @ r), 1.0, 0.0
    enough = tol**2 * rr
    for _ in range(most):
        mq = product(q) + low * q
        alpha = rr / float(q @ mq)
        r = r - alpha * mq
        rr_new = float(r @ r)
        beta = rr_new / rr
        for n, shift in enumerate(extra):
            z, z_old = zeta[n], zeta_old[n]
            if z < 1e-14:  # of the residual: this one is solved
                continue
            below = alpha_old * z_old * (1 + alpha * shift) + alpha * beta_old * (z_old - z)
            new = z * z_old * alpha_old / below
            x[n] += (alpha * new / z) * p[n]
            p[n] = new * r + beta * (new / z) ** 2 * p[n]
            zeta[n], zeta_old[n] = new, z
        q = r + beta * q
        rr, alpha_old, beta_old = rr_new, alpha, beta
        if rr <= enough:
            return x
    raise ArithmeticError(f"conjugate gradient: residual {(rr / enough) ** 0.5 * tol:.1e} after {most} products")


# -- the curves ---------------------------------------------------------------------------------------------------


def cosines(
    model: nn.Module, x: Tensor
) -> tuple[dict[tuple[str, str, float], Tensor], dict[tuple[str, float], Tensor]]:
    """By (solver, reference, factor): `[T, layer]`; by (reference, factor): its cosine with the gradient, `[layer]`."""
    known = references(model, x)
    rows: dict[tuple[str, str, float], list[Tensor]] = {}
    for solver, _, change in local_changes(model, x):
        for (reference, factor), step in known.items():
            rows.setdefault((solver, reference, factor), []).append(_cosine(change, step))
    near = {key: _cosine(step, known["gradient", 0.0]) for key, step in known.items()}
    return {key: torch.stack(row) for key, row in rows.items()}, near


def _cosine(a: Layers, b: Layers) -> Tensor:
    return torch.stack([F.cosine_similarity(a[n].flatten(), b[n].flatten(), 0) for n in a])


def curves(found: Sequence[Mapping[tuple[str, str, float], Tensor]], near: Sequence[Any]) -> list[dict[str, Any]]:
    """Each curve at the best damping for each T, from one state's cosines for each seed."""
    lines = []
    for solver in SOLVERS:
        for reference in REFERENCES:
            keys = [key for key in found[0] if key[:2] == (solver, reference)]
            every = torch.stack([torch.stack([f[key] for f in found]) for key in keys])  # [factor, seed, T, layer]
            means = every.mean((1, 3))
            best = means.argmax(0)
            at = every[best, :, torch.arange(len(STEPS))]  # [T, seed, layer]
            own = torch.stack([torch.stack([n[reference, keys[b][2]] for n in near]).mean() for b in best.tolist()])
            lines.append({
                "solver": solver, "reference": reference, "factors": [keys[b][2] for b in best.tolist()],
                "mean": _short(at.mean(1)), "low": _short(at.amin(1)), "high": _short(at.amax(1)),
                "reference and gradient": _short(own),
                "by factor": {f"{key[2]:g}": _short(row) for key, row in zip(keys, means, strict=True)},
            })  # fmt: skip
    return lines


def _short(values: Tensor) -> Any:
    return [_short(row) for row in values] if values.dim() > 1 else [round(v, 4) for v in values.tolist()]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write both files and print the table."""
    arguments = probe.parsed(
        probe.parser("benchmarks.papers.alignment", __doc__, seeds=[0, 1, 2], batch=1000, train_steps=300,
                     out=probe.RESULTS / "alignment.json"),
        argv,
    )  # fmt: skip
    x = images(20_000)
    states = {"initial weights": 0, f"after {arguments.train_steps} steps of Adam": arguments.train_steps}
    body: dict[str, Any] = {
        "model": "-".join(map(str, SIZES)), "batch": arguments.batch, "seeds": arguments.seeds, "gamma": GAMMA,
        "steps": STEPS, "factors": FACTORS, "states": {},
    }  # fmt: skip
    for state, steps in states.items():
        found = []
        for seed in arguments.seeds:
            model = trained(seed, x, steps, 500)
            batch = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))[: arguments.batch]]
            found.append(cosines(model, batch))
            print(f"{state}, seed {seed}: done", file=sys.stderr, flush=True)
        body["states"][state] = curves(*zip(*found, strict=True))
    probe.write(arguments.out, body, indent=None, allow_nan=False)
    plot(arguments.out.with_suffix(".png"), body)
    print(table(body))
    print(f"wrote {arguments.out} and {arguments.out.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
