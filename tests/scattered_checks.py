"""Brute force of a program whose samples lie scattered, and what each cell of programs by quantities must give."""

from __future__ import annotations

import re
from functools import cache, cached_property, lru_cache
from types import SimpleNamespace
from typing import Any

import oracle
import torch
from oracle_rows import EVERY, bias_rows, input_rows, output_rows
from quantity_checks import Drawn, Truth, refusal_says_enough
from quantity_table import Cell, Column
from torch import Tensor, nn
from zoo.scattered import Refusal, Scattered

from layerwise import errors

__all__ = ["ScatteredTruth", "allows", "reference", "scattered_outcome", "truth_of"]

ROOTS = ("DiagGGN", "SqrtGGN", "KFAC", "KFLR", "EKFAC")  # of the loss's curvature, which must be positive
NO_ROOT = Refusal("Undefined", "curvature|convex|negative|zero|root", "the loss has no positive curvature")
NO_LIKELIHOOD = Refusal("Undefined", "likelihood|label", "the loss is no likelihood")
NO_REDUCTION = Refusal("Undefined|UnknownLoss|BadInput", "mean|sum|reduction|likelihood", "the loss is no mean, no sum")


def reference(program: Scattered) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(g_n, .grad) in ten lines: the gradient of each sample's own loss by a loop, and that of the loss."""
    made = program.instance()
    each: dict[str, list[Tensor]] = {name: [] for name in made.params}
    for n in range(made.n):
        made.model.zero_grad()
        made.terms()[n].backward()
        for name, p in made.params.items():
            each[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    made.model.zero_grad()
    made.loss().backward()
    return {name: torch.stack(g) for name, g in each.items()}, {name: p.grad for name, p in made.params.items()}


class ScatteredTruth(Truth):
    """What brute force says about a program."""

    def __init__(self, program: Scattered) -> None:
        self.program = program
        self.instance = program.instance()
        self.case = SimpleNamespace(
            id=program.id,
            problem=SimpleNamespace(name=program.name, rel=program.rel),
            loss=SimpleNamespace(name=program.name),
        )
        self.params = self.instance.params
        self.rel, self.samples = program.rel, self.instance.samples

    @property
    def factor(self) -> int:
        """From g_n to the gradient of a sample's own loss; a loss of the user's own counts as a sum."""
        return 1 if self.program.reduction == "sum" or self.program.own else self.instance.n

    @cached_property
    def owners(self) -> Tensor:
        """The sample of everything that the losses receive, as masks `[N,D]`: of no sample, or of one."""
        leaf, shaped = oracle._leaf(self.instance.logits())
        masks = torch.stack([pull(term, [leaf])[0] != 0 for term in self.instance.terms_of(shaped)])
        assert self.program.refused or bool((masks.sum(0) <= 1).all())
        return masks.to(torch.float64)

    def flat_roots(self, drawn: Drawn) -> Tensor:
        """Drawn columns `[V,D]`; of a loss of the user's own the root itself, whose signs alone are drawn."""
        if not self.program.own:
            return super().flat_roots(drawn)
        hessians = [mask[:, None] * self.loss_hessian * mask for mask in self.owners]
        assert all(int(torch.linalg.matrix_rank(h)) <= 1 for h in hessians), "the draws do not square to the exact"
        values, vectors = torch.linalg.eigh(self.loss_hessian)
        return (vectors * values.clamp(min=0).sqrt()).T

    # Rows of layers ----------------------------------------------------------------------------

    @cached_property
    def calls(self) -> dict[str, list[tuple[nn.Module, Tensor, Tensor, Tensor]]]:
        """Of every layer's calls: the layer, its input, its output, and the samples `[N,R]` that its rows answer to."""
        kept: dict[str, list[tuple[nn.Module, Tensor, Tensor]]] = {}
        layers = {name: m for name, m in self.instance.model.named_modules() if isinstance(m, EVERY)}
        handles = [
            m.register_forward_hook(
                lambda m, args, out, name=name: kept.setdefault(name, []).append((m, args[0].detach().clone(), out))
            )
            for name, m in layers.items()
        ]
        try:
            terms = self.instance.terms()
        finally:
            for handle in handles:
                handle.remove()
        outs = [out for calls in kept.values() for _, _, out in calls]
        answers = [pull(term, outs) for term in terms]
        found: dict[str, list[tuple[nn.Module, Tensor, Tensor, Tensor]]] = {}
        at = 0
        for name, calls in kept.items():
            for m, x, out in calls:
                rows = [flat_rows(m, x, g[at], output_rows).flatten(1).ne(0).any(1) for g in answers]
                found.setdefault(name, []).append((m, x, out, torch.stack(rows)))
                at += 1
        return found

    def shared(self, name: str) -> bool:
        """Whether some row of a layer answers to several samples."""
        return any(bool((owners.sum(0) > 1).any()) for *_, owners in self.calls[name])

    def form(self, name: str) -> str | None:
        """Of a layer by its rows: a constant's have no sample, so that its factors come from gradients."""
        layer = name.rpartition(".")[0]
        if layer not in self.calls or self.program.refused:
            return None
        return "gradients" if self.shared(layer) else "rows"

    def row_factors(self, sharing: str, s: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) over the rows that some term of the loss sees: A a mean over them, or over the samples that have any.

        expand: A = mean over real rows of a aᵀ, B = sum over rows and columns of s sᵀ. reduce: a is the mean over a
        sample's real rows, s the sum.
        """
        found = {}
        for name, calls in self.calls.items():
            if self.form(f"{name}.weight") != "rows":
                continue
            owners = torch.cat([o for *_, o in calls], 1)
            real = owners.any(0)
            columns = self._pulled(name, s)
            groups = owners[:, real].to(s) if sharing == "reduce" else torch.eye(int(real.sum()), dtype=s.dtype)
            groups = groups[groups.any(1)]
            for part, lay in (("weight", output_rows), ("bias", bias_rows)):
                if getattr(calls[0][0], part, None) is None:
                    continue
                a = torch.cat([flat_rows(m, x, out.detach(), input_rows) for m, x, out, _ in calls])[real].to(s)
                g = torch.stack(
                    [
                        torch.cat([flat_rows(m, x, v, lay) for (m, x, *_), v in zip(calls, column, strict=True)])
                        for column in columns
                    ]
                )[:, real].to(s)
                a = torch.ones(len(a), g.shape[2], 1, dtype=s.dtype) if part == "bias" else a
                means = torch.einsum("nr,rki->nki", groups / groups.sum(1, keepdim=True), a)
                sums = torch.einsum("nr,vrko->vnko", groups, g)
                found[f"{name}.{part}"] = (
                    torch.einsum("nki,nkj->kij", means, means) / len(means),
                    torch.einsum("vnko,vnkp->kop", sums, sums),
                )
        return found

    def _pulled(self, name: str, s: Tensor) -> list[list[Tensor]]:
        """Every column of `[V,D]` pulled back to the outputs of a layer's calls."""
        outs: list[Tensor] = []
        handle = self.instance.model.get_submodule(name).register_forward_hook(lambda m, args, out: outs.append(out))
        try:
            z = oracle._flat(self.instance.logits())
        finally:
            handle.remove()
        return [pull((z * column.to(z)).sum(), outs) for column in s]


def pull(out: Tensor, wrt: list[Tensor]) -> list[Tensor]:
    """The gradient of a scalar, zeros where there is no path."""
    if not out.requires_grad:
        return [torch.zeros_like(w) for w in wrt]
    found = torch.autograd.grad(out, wrt, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wrt, strict=True)]


def flat_rows(layer: nn.Module, x: Tensor, z: Tensor, lay: Any) -> Tensor:
    """`[R,K,·]`: the rows of one call, whatever axes the batch has."""
    if isinstance(layer, nn.Linear):
        x, z = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
    elif isinstance(layer, nn.Embedding):
        x, z = x.reshape(-1), z.reshape(-1, z.shape[-1])
    if lay is input_rows:
        return input_rows(layer, x, z, 0).flatten(0, 1)
    return lay(layer, x, z, 0).flatten(0, 1)


# Cells ------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def truth_of(program: Scattered) -> ScatteredTruth:
    """Brute force of a program, shared by the columns."""
    return ScatteredTruth(program)


def refusals(truth: ScatteredTruth, column: Column) -> tuple[list[Refusal], bool]:
    """The errors that a cell may raise, and whether it must."""
    program, name = truth.program, column.name
    may, must = [program.may_refuse] if program.may_refuse else [], False
    if program.refused and (column.per_sample or (program.own and name.startswith(ROOTS))):
        may, must = [program.refused], True
    if program.own and name == "FisherDiag model":
        may, must = [*may, NO_LIKELIHOOD], True
    if name == "FisherDiag data" and (program.own or program.reduction is None):
        may.append(NO_REDUCTION)
    if name.startswith(ROOTS) and program.own and not must and no_root(truth):
        may, must = [*may, NO_ROOT], True
    return may, must


def no_root(truth: ScatteredTruth) -> bool:
    """Whether the loss's Hessian in what it receives has a negative eigenvalue, or is zero."""
    values = torch.linalg.eigvalsh(truth.loss_hessian)
    return float(values.min()) < -1e-9 * float(values.abs().max()) or not truth.loss_hessian.any()


@cache
def scattered_outcome(program: Scattered, column: Column) -> Cell:
    """Run one cell and check it; the same cell is run once.

    Raises: AssertionError where the result is not brute force's, or an error is none of those that are listed.
    """
    truth = truth_of(program)
    if (why := column.undefined(truth)) is not None:
        may, must = [Refusal("Undefined", "one sample|samples", why)], True
    else:
        may, must = refusals(truth, column)
    try:
        result, drawn = column.run(truth)
        if may and column.build is not None:  # an operator refuses at its first product
            result @ torch.ones(result.shape[0], dtype=result.dtype)
    except errors.LayerwiseError as error:
        return Cell("n/a" if why is not None else "refused", reason(truth, column, error, may))
    assert not must, f"{column.name} on {program.id} was not refused: {may[-1].why}"
    try:
        compare(truth, column, result, drawn)
    except errors.LayerwiseError as error:  # an operator whose first product was not among these
        return Cell("refused", reason(truth, column, error, may))
    return Cell("sampled" if column.sampled else "exact")


def reason(truth: ScatteredTruth, column: Column, error: errors.LayerwiseError, may: list[Refusal]) -> str:
    """Which of the listed errors this one is."""
    for refusal in may:
        if allows(refusal, error):
            refusal_says_enough(truth, column, error, names=False)
            return refusal.why
    raise AssertionError(
        f"{column.name} on {truth.program.id} is refused for a reason that is not listed: "
        f"{type(error).__name__}: {error}"
    ) from error


def allows(refusal: Refusal, error: errors.LayerwiseError) -> bool:
    """Whether an error is the one that is listed."""
    known = tuple(getattr(errors, name) for name in refusal.error.split("|"))
    return isinstance(error, known) and re.search(refusal.text, str(error)) is not None


def compare(truth: ScatteredTruth, column: Column, result: Any, drawn: Drawn) -> None:
    """Assert that a result is brute force's; of a loss that is neither a mean nor a sum under either scale."""
    if truth.program.reduction is None and column.name in ("FisherDiag data", "NoiseScale"):
        try:
            column.check(truth, result, drawn)
        except AssertionError:
            as_sum = ScatteredTruth(truth.program)
            as_sum.__dict__["grads"] = {name: g / truth.factor for name, g in truth.grads.items()}
            if column.name == "FisherDiag data":  # N Σ g² with 1 in place of N
                as_sum.__dict__["grads"] = {name: g / truth.factor**0.5 for name, g in truth.grads.items()}
            column.check(as_sum, result, drawn)
        return
    if column.name == "SqrtGGN sampled":
        same_squares(truth, result, drawn)
    else:
        column.check(truth, result, drawn)


def same_squares(truth: ScatteredTruth, got: Any, drawn: Drawn) -> None:
    """SᵀS of drawn columns, in whatever order they lie."""
    assert all(got[name].shape[1:] == (truth.instance.n, *p.shape) for name, p in truth.params.items())
    s = truth.flat(got, lead=2).flatten(0, 1).to(torch.float64)
    columns = truth.flat_roots(drawn)
    c = torch.cat([torch.stack([(column * mask) @ truth.jacobian for mask in truth.owners]) for column in columns])
    oracle.assert_close(s.T @ s, c.T @ c, rel=truth.rel)
