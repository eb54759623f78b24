"""`Influence`: how much a weight on each training sample would change a loss, or any other function, of queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from layerwise.attribution.files import read, refuse_others, write
from layerwise.attribution.fit import estimated, resumable
from layerwise.attribution.inverse import DampedInverse, Solved, diagonal_blocks, of_rank
from layerwise.attribution.passes import Chosen, KnownWeights, Loader, given
from layerwise.errors import BadInput, Undefined
from layerwise.operators import EigenKronecker, Kronecker
from layerwise.operators.described import described, rebuilt
from layerwise.quantities import EKFAC, KFAC, KFLR, ByParameter, DiagGGN, Quantity
from layerwise.quantities.base import positive
from layerwise.quantities.inner_products import Direction, InnerProducts

__all__ = ["Best", "Influence", "Measure"]

Measure = Callable[..., Tensor]


class Influence:
    """Influence of training samples on queries, by the damped inverse of an approximate curvature.

    score[q, n] = <g_q, (G + λ I)⁻¹ g_n>, `[Q, N]`, with g_n the gradient of training sample n's own loss (the sum of
    its terms: a mean's 1/terms is left out), g_q that of query q's measure, and G the curvature of loss_fn over all
    fitted data. A weight ε more on sample n in that loss changes the measure of q by -ε score[q, n] / terms, to first
    order: where the measure is a loss, a positive score says that the sample lowers it.

    model, loss_fn: as for `accumulate`; loss_fn a known loss (or marked by `as_loss`). Padding and targets of -100
    count for nothing. Put the model into the mode, `eval()`, that it is asked about; it is left as it is.
    parameters: names or patterns, as for `observe`; None: all that require gradients.
    curvature: "ekfac", "kfac", "diag" (of the GGN), or "identity", which is TracIn's inner product of gradients, needs
    no fit, and takes no damping.
    damping: λ, in the units of G; None: a tenth of the mean eigenvalue of each block.
    draws: labels drawn from the model for each sample (the true Fisher); None: the exact root, one column a class.
    seed: of the draws.
    Raises BadInput, and what `accumulate` raises.
    Source: Koh and Liang (2017); Grosse et al. (2023), "Studying large language model generalization with influence
    functions", sections 2 and 3; "identity": Pruthi et al. (2020), eq. 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Measure,
        parameters: str | Sequence[str] | None = None,
        curvature: str = "ekfac",
        damping: float | None = None,
        draws: int | None = 1,
        seed: int = 0,
    ) -> None:
        if curvature not in ("ekfac", "kfac", "diag", "identity"):
            raise BadInput(f'curvature must be "ekfac", "kfac", "diag" or "identity", got {curvature!r}')
        if curvature == "identity" and damping is not None:
            raise BadInput(f'curvature="identity" takes no damping, got {damping}')
        self._chosen, self._loss_fn = Chosen(model, parameters), loss_fn
        self._curvature, self._draws, self._seed = curvature, positive("Influence's draws", draws), seed
        self._inverse = DampedInverse(None, damping)
        self._fitted = curvature == "identity"
        self._weights: KnownWeights | None = None  # those of the curvature

    @property
    def names(self) -> list[str]:
        """The names of the parameters that are attributed to."""
        return list(self._chosen.names)

    @property
    def curvature(self) -> EigenKronecker | None:
        """The fitted curvature G, not damped; None for the identity. Raises BadInput before `fit` or `load`."""
        return self.inverse.curvature

    @property
    def inverse(self) -> DampedInverse:
        """`(G + λ I)⁻¹`. Raises BadInput before `fit` or `load`, and where the weights were written since."""
        if not self._fitted:
            raise BadInput(f'curvature="{self._curvature}" is not known yet; call fit(loader) or load(folder) first')
        if self._weights is not None and not self._weights.are_the_same():
            raise BadInput(
                "the weights were written or frozen after `fit`; fit again, or load(folder) for the same weights"
            )
        return self._inverse

    def weights(self) -> KnownWeights:
        """The model's weights as they are now."""
        return KnownWeights(self._chosen.model)

    # -- the curvature -------------------------------------------------------------------------------------

    def estimate(self, loader: Loader) -> tuple[float, int]:
        """Seconds that `fit` takes, and bytes that its folder holds, told from one batch before work begins.

        Eigendecompositions come on top, once: of the order of I³ + O³ for each matrix `[O, I]`.
        Raises BadInput for a loader without a length.
        """
        quantity = self._quantity()
        return (0.0, 0) if quantity is None else estimated(self._chosen, self._loss_fn, loader, quantity)

    def fit(self, loader: Loader, folder: str | Path | None = None, progress: bool = False) -> Self:
        """Compute the curvature of the loss of all batches, in one pass over them, or two for "ekfac".

        folder: where the sums are saved after each batch; a fit that was killed goes on from there when it is called
        again with the same batches, and gives the bits that it would have given. Batches that were done are still
        loaded. progress: show a bar for each pass. Several processes each give the loader of their own share, and get
        the curvature of all.
        Raises BadInput: a folder of another fit, no batch, an iterator where two passes, or a folder, need the batches
        again.
        """
        quantity = self._quantity()
        if quantity is None:
            return self
        weights = self.weights()
        settings = {} if folder is None else self.settings(weights)
        found = resumable(self._chosen, self._loss_fn, loader, quantity, self._seed, folder, settings, progress)
        operator = found.eigh() if isinstance(found, Kronecker) else found
        if isinstance(operator, ByParameter):
            operator = diagonal_blocks(operator)
        saved = rebuilt(*described(operator))  # in the memory order of a loaded one, for the same bits
        self._take(DampedInverse(saved, self._inverse.damping), weights)
        return self

    def _take(self, inverse: DampedInverse, weights: KnownWeights) -> None:
        self._inverse, self._fitted, self._weights = inverse, True, weights

    def _quantity(self) -> Quantity | None:
        generator = None if self._draws is None else torch.Generator().manual_seed(self._seed)
        if self._curvature == "ekfac":
            return EKFAC(self._draws, generator)
        if self._curvature == "kfac":
            return KFLR() if self._draws is None else KFAC(self._draws, generator)
        return DiagGGN(self._draws, generator) if self._curvature == "diag" else None

    def settings(self, weights: KnownWeights) -> dict[str, Any]:
        """What must be the same where saved numbers are read, with a digest of all of the model's weights."""
        model = self._chosen.model
        shapes = {name: list(p.shape) for name, p in model.named_parameters() if name in self._chosen.names}
        settings = {"curvature": self._curvature, "draws": self._draws, "seed": self._seed}
        return settings | {"shapes": shapes, "weights": weights.digest}

    def save(self, folder: str | Path) -> None:
        """Save the curvature as tensors and JSON, with versions and a checksum; raises BadInput before `fit`."""
        operator = self.curvature
        tensors, facts = ({}, {}) if operator is None else described(operator)
        write(folder, "influence", tensors, {"settings": self.settings(self.weights()), "blocks": facts})

    def load(self, folder: str | Path) -> Self:
        """Take the curvature that `save` saved, for the same weights; no code is run from the files.

        Raises BadInput where there is none, where it is damaged, or of other weights, parameters or settings.
        """
        found = read(folder, "influence")
        if found is None:
            raise BadInput(f"{folder} holds no saved Influence; fit, and save() there")
        (tensors, facts), weights = found, self.weights()
        refuse_others(f"the Influence saved in {folder}", facts["settings"], self.settings(weights), "Ask for the same")
        if self._curvature != "identity":
            device = next(self._chosen.model.parameters()).device
            operator = rebuilt({key: t.to(device) for key, t in tensors.items()}, facts["blocks"])
            self._take(DampedInverse(operator, self._inverse.damping), weights)
        return self

    # -- scores --------------------------------------------------------------------------------------------

    def scores(
        self,
        queries: Loader,
        train_loader: Loader,
        measure: Measure | None = None,
        rank: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The scores of all training samples for each query, `[Q, N]`, summed over the parameters.

        From one pass over the training data, and no per-sample gradient is kept. Exact without a `rank`; the queries'
        preconditioned gradients `[Q, P]` are then held at once: ask about fewer queries where memory is short.

        queries: batches like those of the training data. measure: a function of queries, called as loss_fn is, whose
        value is a sum over its samples (a logit difference, minus the log-probability of an answer); None: loss_fn.
        rank: hold each query's matrix `[O, I]` as its best approximation of this rank, `rank * (O + I)` numbers.
        progress: show a bar. Raises BadInput before `fit`, SamplesMixed, or what `observe` raises.
        """
        directions = self.directions(queries, measure, rank)
        parts = [sum_of(values) for values in self._streamed(directions, train_loader, progress=progress)]
        return torch.cat(parts).T.contiguous()

    def per_layer(self, queries: Loader, train_loader: Loader, measure: Measure | None = None) -> dict[str, Tensor]:
        """The parts of the scores, `[Q, N]` for each parameter; they add up to `scores`."""
        parts = list(self._streamed(self.directions(queries, measure), train_loader))
        return {name: torch.cat([values[name] for values in parts]).T.contiguous() for name in parts[0]}

    def per_token(self, queries: Loader, train_loader: Loader, measure: Measure | None = None) -> list[Tensor]:
        """What each position of the training samples adds to the scores, `[Q, n, T]` for each training batch.

        sum over parameters of sum_{k,o} g[n,t,k,o] (V_q a)[n,t,k,o], the part of the gradient that parameters get at
        position t. They add up to `scores`.
        Raises Undefined where a parameter has no rows, or another number of positions than others have.
        Source: Grosse et al. (2023), section 3.3.
        """
        parts = []
        for values in self._streamed(self.directions(queries, measure), train_loader, by_position=True):
            lengths = {name: v.shape[1] for name, v in values.items()}
            if len(set(lengths.values())) > 1:
                raise Undefined(f"parameters have other numbers of positions, {lengths}; choose some by `parameters=`")
            parts.append(sum_of(values).permute(2, 0, 1).contiguous())
        return parts

    def top(
        self, queries: Loader, train_loader: Loader, k: int, measure: Measure | None = None, progress: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The k largest scores of each query and the numbers of their samples, `[Q, k]` both, in memory of two batches.

        For the smallest scores negate the measure. Raises BadInput for a k below 1 or above the number of samples.
        """
        positive("top's k", k, none=False)
        best = Best(k)
        for values in self._streamed(self.directions(queries, measure), train_loader, progress=progress):
            best.add(sum_of(values).T)
        return best.result()

    def self_influence(self, loader: Loader) -> Tensor:
        """<g_n, (G + λ I)⁻¹ g_n> of every sample, `[N]`: how much it says that no other sample says.

        Raises BadInput before `fit`. Source: Koh and Liang (2017), section 5.4.
        """
        quantity = Solved(self.inverse, as_norm=True)
        return torch.cat([sum_of(self.observed(batch, quantity)) for batch in given(loader, "loader")])

    def directions(
        self, queries: Loader, measure: Measure | None = None, rank: int | None = None
    ) -> dict[str, Direction]:
        """(G + λ I)⁻¹ g_q of all queries by parameter: `[Q, *shape]` alone, or its two factors of a rank."""
        positive("scores' rank", rank)
        found = []
        for batch in given(queries, "queries"):
            values = self.observed(batch, Solved(self.inverse), measure)
            found.append((len(next(iter(values.values()))), {name: of_rank(v, rank) for name, v in values.items()}))
        joined: dict[str, Direction] = {}
        for name in self._chosen.names:
            like = next((part[name] for _, part in found if name in part), ())
            each = [part.get(name) or tuple(t.new_zeros(n, *t.shape[1:]) for t in like) for n, part in found]
            whole = tuple(torch.cat(t) if len(t) > 1 else t[0] for t in zip(*each, strict=True))
            if whole:
                joined[name] = whole
        return joined

    def observed(self, batch: Any, quantity: Quantity, measure: Measure | None = None) -> Mapping[str, Tensor]:
        """The values of a quantity of one batch, by parameter; measure: as for `scores`."""
        results = self._chosen.observed(measure or self._loss_fn, batch, quantity)
        unknown = results.batch.unknown_reduction
        if measure is None and unknown is not None:
            raise BadInput(
                f'whether {unknown} is a mean or a sum is not said; mark it: lw.as_loss(fn, reduction="mean") or "sum"'
            )
        values: Mapping[str, Tensor] = results.result(0)
        return values

    def _streamed(
        self,
        directions: Mapping[str, Direction],
        train_loader: Loader,
        by_position: bool = False,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """For each training batch `[n, Q]`, or `[n, T, Q]`, by parameter; zero for those that a batch does not use."""
        quantity = InnerProducts(directions, by_position)
        for batch in given(train_loader, "train_loader", "scores" if progress else None):
            values = self.observed(batch, quantity)
            like = next(iter(values.values()))
            yield {name: values[name] if name in values else torch.zeros_like(like) for name in directions}


class Best:
    """The k largest of scores `[Q, n]` that come in pieces, and their numbers."""

    def __init__(self, k: int) -> None:
        self._k, self._seen = k, 0
        self._held: tuple[Tensor, Tensor] | None = None

    def add(self, scores: Tensor) -> None:
        """Take the next scores."""
        numbers = torch.arange(self._seen, self._seen + scores.shape[1], device=scores.device).expand(len(scores), -1)
        self._seen += scores.shape[1]
        if self._held is not None:
            scores, numbers = torch.cat([self._held[0], scores], 1), torch.cat([self._held[1], numbers], 1)
        values, places = scores.topk(min(self._k, scores.shape[1]), 1)
        self._held = values, numbers.gather(1, places)

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores and numbers, `[Q, k]`, the largest first; raises BadInput where there were fewer than k."""
        if self._held is None or self._seen < self._k:
            raise BadInput(f"asked for the {self._k} best of {self._seen} samples; ask for fewer")
        return self._held


def sum_of(values: Mapping[str, Tensor]) -> Tensor:
    """The sum over the parameters."""
    return torch.stack(list(values.values())).sum(0)
