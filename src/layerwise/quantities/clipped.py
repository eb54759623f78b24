"""The sum of clipped per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput, NonFinite, Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import ByParameter, Context, Quantity, Union
from layerwise.quantities.first_order import sample_factor
from layerwise.rows.cost import ghost_is_cheaper

__all__ = ["Clipped", "ClippedGrad"]


class Clipped(ByParameter):
    """Clipped gradients by parameter; norms: of each sample's whole gradient before it was clipped, `[N]`."""

    def __init__(self, values: Mapping[str, Tensor], norms: Tensor) -> None:
        super().__init__(values)
        self.norms = norms


class ClippedGrad(Quantity):
    """The sum of per-sample gradients, each clipped to a norm over all parameters together (ghost clipping).

    sum_n w_n g_n, `[*shape]` per parameter, in the units of `.grad`, with w_n = min(1, C / |g_n|), C = `max_norm` and
    |g_n| over all observed parameters. With `scale="sample"` the norm is that of the sample's own loss, |N g_n| for
    a mean over N, which is what private training clips; the sum is then the mean of the clipped gradients.
    `.norms`, `[N]`, are the norms that were compared with C.

    Two stages: first the norms over all parameters, then the weighted sums. Between them memory holds the
    cotangents of all uses beside the layers' inputs, about the size of the activations, and never `[N,P]`. Where
    parameters reach their uses through a derived tensor (a weight norm, LoRA), both stages run before the user's
    backward pass, since it frees the graph that they need: one more backward pass, a few samples at a time; a
    hook that changes gradients is then refused.
    Several backward passes add up, each g_n as its own pass has it; with `scale="sample"` and a mean they are refused,
    since N counts the samples still to come: C / N under `scale="loss"` is the same. Pooled batches (`accumulate`,
    ranks): a sum loss, or a mean with `scale="sample"` and equally many loss terms a sample in every batch.

    Clipping alone is not private: DP-SGD also adds noise scaled to C to the sum, and accounts for the privacy spent
    over all steps.
    Raises SamplesMixed, NonFinite (a norm), BadInput, or Undefined (batches that have no common scale).
    Source: Li et al. (2022), section 4 (ghost clipping); Abadi et al. (2016), algorithm 1.
    """

    powers = (1, 0)
    concatenate = (False, True)
    revisits = True
    wirtinger = True

    def __init__(self, max_norm: float) -> None:
        if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm > 0:
            raise BadInput(f"ClippedGrad's max_norm must be a positive number, got {max_norm!r}")
        self.max_norm = float(max_norm)

    def check_union(self, seen: Union, batch: Union) -> None:
        """Refuse batches whose samples' gradients depend on the size of further ones."""
        if not seen.mean or (not seen.pooled and seen.scale == "loss"):
            return
        if not seen.pooled:
            raise Undefined(
                'asked for ClippedGrad of several backward passes from a mean loss with scale="sample": |N g_n| '
                'depends on the number N of samples still to come; use scale="loss" with max_norm = C / N (the same '
                "gradient, with norms N times smaller), a sum loss, lw.accumulate, or one context a batch"
            )
        if seen.scale != "sample":
            raise Undefined(
                "asked for ClippedGrad of several batches of one mean loss: |g_n| would depend on the number "
                'of samples in the others; use scale="sample" (clips |N g_n|), a sum loss, or one context a batch'
            )
        a, b = float(seen.terms) / seen.samples, float(batch.terms) / batch.samples
        if abs(a - b) > 1e-9 * abs(a):
            raise Undefined(
                f"asked for ClippedGrad of several batches of one mean loss with {a:g} loss terms a sample so "
                f"far and {b:g} now: in the mean over all a sample's own loss would change; observe each alone"
            )

    def forms_rows(self, positions: int, outputs: int, inputs: int) -> bool:
        """For the norms, where Gram matrices over the positions cost more."""
        return not ghost_is_cheaper(1, positions, outputs, inputs)

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """Squared norms, `[N]`."""
        return (gradient.squared_norm()[0],)

    def survey(self, values: Mapping[str, tuple[Tensor, ...]], batch: Union) -> Any:
        """The clipping weights w_n `[N]`, and the squared norms by parameter, in the scale that is compared with C."""
        factor = sample_factor(batch) ** 2
        squares = {name: square * factor for name, (square,) in values.items()}
        if not squares:
            return None, squares
        norms = torch.stack(list(squares.values())).sum(0).sqrt()
        if norms.device.type == "cpu":  # an accelerator waits for it where the result is read
            self._check_norms(norms)
        return (self.max_norm / norms).clamp(max=1), squares

    def _check_norms(self, norms: Tensor) -> None:
        if not bool(torch.isfinite(norms).all()):
            raise NonFinite(
                f"asked for gradients clipped to {self.max_norm:g}, but the gradient of sample "
                f"{int((~torch.isfinite(norms)).nonzero()[0])} has norm {float(norms[~torch.isfinite(norms)][0])}"
            )

    def revisit(self, gradient: ParameterGradient, survey: Any) -> tuple[Tensor, ...]:
        """The weighted sum `[*shape]`, and the squared norms `[N]`."""
        weights, squares = survey
        return gradient.weighted_sum(weights[None]), squares[gradient.name]

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> Clipped:
        """The clipped gradients by parameter, with the norms over all parameters."""
        squares = [square for _, square in values.values()]
        norms = torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(union.samples)
        self._check_norms(norms)
        return Clipped({name: value for name, (value, _) in values.items()}, norms)

    def __repr__(self) -> str:
        return f"ClippedGrad({self.max_norm:g})"
