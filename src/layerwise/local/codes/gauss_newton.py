"""Codes from the loss's Gauss-Newton model, damped by the coupling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import NonFinite, SamplesMixed
from layerwise.graph.cotangents import Exact
from layerwise.graph.coverage import prove
from layerwise.graph.loss_curvature import loss_curvatures, resolved
from layerwise.graph.probes import join, split
from layerwise.graph.samples import measure
from layerwise.local.codes.code_step import code_type
from layerwise.local.layers.record import Recorded
from layerwise.losses import Unread
from layerwise.operators.ridge import by_cholesky, ridge
from layerwise.rows.base import RowNumbers, Samples
from layerwise.tape.pull import pull
from layerwise.tape.uses import Use
from layerwise.tensors import Verdict, WrongAssumption, without_grad

__all__ = ["AssumedCodes", "PulledRoots", "WrongCodes", "damped_cotangents", "pulled_roots"]


class PulledRoots(NamedTuple):
    """Roots of the loss's Hessian at uses, and what of the loss is still to be read; None: it was read at once.

    by_use: by use index, S as columns `[V, *out_shape]` with the samples' axis; `S Sᵀ` is the GGN of the use's output.
    """

    by_use: Mapping[int, tuple[Tensor, Samples | RowNumbers]]
    unread: Unread | None


class WrongCodes(WrongAssumption):
    """A factorization of codes that was assumed to be sound is not."""


class AssumedCodes(NamedTuple):
    """What codes assume on an accelerator, until it is read: that Cholesky's factorizations of them are sound.

    sound: whether they are; unread: of the loss. exact: the run with codes that assume nothing.
    """

    sound: list[Tensor]
    unread: Unread
    exact: Callable[[], Recorded]

    def ask(self, verdict: Verdict) -> None:
        """Read it with other numbers; WrongCodes where the exact run is to be taken."""

        def judge(found: list[float]) -> None:
            if not all(found):
                raise WrongCodes

        for values, judge_loss in self.unread:
            verdict.ask(values, partial(_quietly, judge_loss))
        verdict.ask(self.sound, judge)

    def settled(self, run: Recorded) -> Recorded:
        """The run, or the exact one, after one wait."""
        verdict = Verdict()
        self.ask(verdict)
        try:
            verdict.read()
        except WrongCodes:
            return self.exact()
        return run


def _quietly(judge: Callable[[list[float]], None], found: list[float]) -> None:
    with suppress(NonFinite):  # the cotangents are NaN then, too, and the batch is skipped
        judge(found)


def damped_cotangents(
    recorded: Recorded, roots: PulledRoots, gamma: Callable[[str], float]
) -> tuple[Recorded, AssumedCodes | None]:
    """The run with cotangents `−d/γ` of the Gauss-Newton displacements d, of each sample at each use on its own.

        d = argmin g·d + ½ dᵀ S Sᵀ d + |d|²/2γ = −γ (g − S (I/γ + SᵀS)⁻¹ Sᵀ g)

    gamma: γ of a layer's name, B/μ. The second result: what is assumed on an accelerator. Where curvature is small, d
    is `codes="jacobi"`'s.
    Source: Schraudolph (2002) for the Gauss-Newton matrix; Woodbury's identity.
    """
    sound: list[Tensor] = []

    def late(A: Tensor, B: Tensor, damping: float) -> Tensor:
        """As `ridge`; whether it is, an accelerator says of all uses at once."""
        found, good = by_cholesky(A, B, damping)
        sound.append(good.all())
        return found

    def solved(solve: Callable[[Tensor, Tensor, float], Tensor]) -> Recorded:
        cotangents = dict(recorded.cotangents)
        for layer in recorded.layers:
            for part in layer.parts:
                index = part.use.index
                if index in roots.by_use:
                    cotangents[index] = _damped(cotangents[index], *roots.by_use[index], gamma(layer.name), solve)
        return replace(recorded, cotangents=cotangents)

    if recorded.loss.device.type == "cpu":
        return solved(ridge), None
    return solved(late), AssumedCodes(sound, roots.unread or [], partial(solved, ridge))


@without_grad
def _damped(
    g: Tensor, columns: Tensor, samples: Samples | RowNumbers, gamma: float,
    solve: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:  # fmt: skip
    """The damped cotangent; NaN where the solve fails, so that the batch is skipped.

    In at least float32, also where autocast made activations of fewer digits.
    """
    g, columns = (x.to(code_type(x.dtype)) for x in (g, columns))
    rows = _by_sample(g[None], samples)  # [N,1,F]
    s = _by_sample(columns, samples)  # [N,V,F]
    try:
        part = solve(s @ s.mT, rows @ s.mT, 1 / gamma)  # [N,1,V]
    except NonFinite:
        return torch.full_like(g, torch.nan)
    return _from_sample(rows - part @ s, g, samples)


def _by_sample(x: Tensor, samples: Samples | RowNumbers) -> Tensor:
    """`[V, *out_shape]` as `[N,V,F]`."""
    if isinstance(samples, RowNumbers):
        return split(x, samples).transpose(0, 1)
    return samples.split(x, samples.axis + 1).movedim(samples.axis + 1, 0).flatten(2)


def _from_sample(x: Tensor, like: Tensor, samples: Samples | RowNumbers) -> Tensor:
    """`[N,1,F]` in the shape of `like`."""
    if isinstance(samples, RowNumbers):
        return join(x.transpose(0, 1), samples, like.shape)[0]
    shape = samples.split(like, samples.axis).movedim(samples.axis, 0).shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    samples.split(out, samples.axis).movedim(samples.axis, 0).copy_(x.view(shape))
    return out


def pulled_roots(model: Any, recorded: Recorded, loss: Tensor, samples: int | Tensor | None = None) -> PulledRoots:
    """The exact root of the loss's Hessian, pulled back to each use of the layers, with the samples' axis there.

    loss: with its graph. samples: as the user says. Raises UnknownLoss for a loss without a known Hessian
    root, SamplesMixed where batch statistics tie the samples together.
    """
    graph, known = resolved(lambda without: prove(recorded.tape, loss, without=without), own_losses=False)
    unread: Unread | None = None if loss.device.type == "cpu" else []
    for likelihood in known:
        likelihood.unread = unread
    layout = measure(recorded.tape, graph, model, samples)
    uses: list[Use] = [part.use for layer in recorded.layers for part in layer.parts]
    if shared := next((use for use in uses if use.index in layout.replaced), None):
        raise SamplesMixed(f"asked for the Gauss-Newton step of codes at {shared}, whose output all samples share")
    stacks: dict[int, list[Tensor]] = {use.index: [] for use in uses}
    for head in loss_curvatures(graph, known, layout):
        chunk = max(1, Exact().count(head.likelihood, head.rows))
        for stack in Exact().columns(head.likelihood, head.rows, chunk):
            pulled = pull(head.edges, head.cotangents(stack), [use.edge for use in uses], batched=True)
            for use, s in zip(uses, pulled, strict=True):
                if s is not None:
                    stacks[use.index].append(s)
    found = {i: (torch.cat(columns), layout.uses[i]) for i, columns in stacks.items() if columns}
    return PulledRoots(found, unread)
