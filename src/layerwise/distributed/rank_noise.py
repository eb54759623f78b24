"""The gradient noise scale from the gradients of single ranks and their mean, without an extra pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerwise.errors import BadInput, NoBackward, Undefined
from layerwise.ranks.group import Ranks

__all__ = ["NoiseEstimate", "RankNoise", "noise_of_ranks"]

Gradient = Mapping[str, Tensor] | Iterable[Tensor]


class NoiseEstimate(NamedTuple):
    """Unbiased estimates, which may be negative; noise: tr(Sigma) of per-sample gradients; signal: |G|²."""

    noise: float
    signal: float

    @property
    def scale(self) -> float:
        """tr(Sigma) / |G|², in samples; infinite where the estimated signal is not positive."""
        return self.noise / self.signal if self.signal > 0 else math.inf


def noise_of_ranks(own: Gradient, mean: Gradient, samples: int, group: Any = None) -> NoiseEstimate:
    """The simple gradient noise scale from R ranks' own gradients g_r, and their mean over ranks, g = sum_r g_r / R.

    own: g_r, the gradient of a mean loss over this rank's `samples`, n_r of them, before any reduction: `seen.grad` of
    an `observe`. mean: the `.grad` from DDP or FSDP2, by name or in any order, without None. With
    B_small = R / sum_r (1/n_r), B_big = R B_small, and small the mean over ranks of |g_r|²,

        |G|² = (B_big |g|² - B_small small) / (B_big - B_small),    tr(Sigma) = (small - |g|²) / (1/B_small - 1/B_big),

    unbiased for any numbers of samples, if samples are drawn independently. A collective with one message of four
    numbers: all ranks of `group` call it, and all get the same result.
    Raises, on all ranks: Undefined (a single rank cannot separate noise and signal), BadInput (no samples).
    Source: McCandlish et al. (2018), eq. A.2 and A.3; the harmonic mean for uneven batches.
    """
    ranks = Ranks(group)
    if ranks.size < 2:
        raise Undefined(
            "asked for the gradient noise scale between ranks, but there is one process; observe lw.NoiseScale(), "
            "which tells a batch's samples apart"
        )
    said = ranks.gather(samples)
    bad = [n for n in said if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if bad:
        raise BadInput(f"noise_of_ranks: samples must be a whole number of at least 1 on every rank, got {said}")
    big, device = _squared(mean)
    mine, _ = _squared(own)
    (small,) = ranks.sum([torch.tensor([mine], dtype=torch.float64, device=device)])
    return _estimate(float(small) / ranks.size, big, sum(1 / n for n in said) / ranks.size, ranks.size)


def _estimate(small: float, big: float, inverse: float, size: int) -> NoiseEstimate:
    """The formulas of `noise_of_ranks`; inverse: 1 / B_small."""
    noise = (small - big) / (inverse - inverse / size)
    return NoiseEstimate(noise, (size * big - small) / (size - 1))


def _squared(gradient: Gradient) -> tuple[float, torch.device]:
    """The squared norm in float64 (of the whole tensor for DTensors), and its device."""
    tensors = gradient.values() if isinstance(gradient, Mapping) else gradient
    total, device = 0.0, torch.device("cpu")
    for g in tensors:
        if g is None:
            continue
        square = g.detach().double().square().sum()
        whole = getattr(square, "full_tensor", None)
        square = square if whole is None else whole()
        total, device = total + float(square), square.device
    return total, device


class RankNoise:
    """A running average of the gradient noise scale over training steps on several ranks, without an extra pass.

        noise = RankNoise(decay=0.99)
        for x, y in loader:
            with lw.observe(model) as seen:  # no quantity: only this rank's own gradient
                loss = F.cross_entropy(model(x), y); loss.backward()
            noise.update(seen.grad, (p.grad for p in model.parameters()), len(x))
        noise.scale

    tr(Sigma) and |G|² are averaged separately, since their ratio is biased: over all steps with equal weights
    (`decay=None`), or by a bias-corrected exponential moving average with `decay`.
    Raises BadInput, and the errors of `noise_of_ranks`.
    Source: McCandlish et al. (2018), appendix A.1.
    """

    def __init__(self, decay: float | None = None, group: Any = None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise BadInput(f"RankNoise's decay must lie between 0 and 1, or be None, got {decay!r}")
        self.decay, self._group = decay, group
        self._noise = self._signal = self._weight = 0.0

    def update(self, own: Gradient, mean: Gradient, samples: int) -> NoiseEstimate:
        """Add one step, and return its own estimate. Arguments as for `noise_of_ranks`."""
        found = noise_of_ranks(own, mean, samples, self._group)
        keep, new = (1.0, 1.0) if self.decay is None else (self.decay, 1 - self.decay)
        self._noise = keep * self._noise + new * found.noise
        self._signal = keep * self._signal + new * found.signal
        self._weight = keep * self._weight + new
        return found

    @property
    def average(self) -> NoiseEstimate:
        """The running averages; raises NoBackward before the first step."""
        if not self._weight:
            raise NoBackward("asked for the average of RankNoise, but no step was taken; call update() first")
        return NoiseEstimate(self._noise / self._weight, self._signal / self._weight)

    @property
    def scale(self) -> float:
        """The ratio of the running averages, in samples."""
        return self.average.scale

    def state_dict(self) -> dict[str, float]:
        """The running sums, to resume from."""
        return {"noise": self._noise, "signal": self._signal, "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Resume from saved sums."""
        self._noise, self._signal, self._weight = state["noise"], state["signal"], state["weight"]
