"""How noisy the gradient is: the noise scale, and the signal-to-noise ratio of each element."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import ByParameter, Context, Quantity, Union
from layerwise.rows.cost import ghost_is_cheaper
from layerwise.tensors import dense, widened

__all__ = ["Noise", "NoiseScale"]


class Noise(ByParameter):
    """Noise scales by parameter, and the estimates of noise and signal behind them.

    noise: tr(Sigma), 0-dim each; signal: |G|², 0-dim each; snr: elementwise, `[*shape]`. All but `snr` have `.total`.
    """

    def __init__(self, noise: Mapping[str, Tensor], signal: Mapping[str, Tensor], snr: Mapping[str, Tensor] | None):
        self.noise, self.signal = ByParameter(noise), ByParameter(signal)
        self._snr = None if snr is None else ByParameter(snr)
        total = _ratio(self.noise.total, self.signal.total) if noise else None
        super().__init__({name: _ratio(s, signal[name]) for name, s in noise.items()}, total)

    @property
    def snr(self) -> ByParameter:
        """The signal-to-noise ratio of each element; Undefined where it was not asked for."""
        if self._snr is None:
            raise Undefined("asked for the elementwise signal-to-noise ratio of NoiseScale(snr=False); leave snr=True")
        return self._snr


class NoiseScale(Quantity):
    """The simple gradient noise scale, tr(Sigma) / |G|², per parameter and for the whole model (`.total`), in samples.

    With h_n the gradient of sample n's own loss (N g_n where there is a mean over N, g_n for sums, whatever
    `scale`), h their mean, and m = sum_n |h_n|² / N, both terms are estimated without bias from all batches together:

        `.noise`   tr(Sigma) = (m - |h|²) N / (N - 1)          `.signal`   |G|² = (N |h|² - m) / (N - 1)

    The ratio itself is biased, as any ratio is: to average over steps, average noise and signal and divide then. It
    is infinite where the estimated signal is not positive: the batch is too small to see the gradient. It does not
    change when the loss is multiplied by a constant. Elementwise,

        `.snr`     h² / s², `[*shape]`, s² = sum_n (h_n - h)² / (N - 1),

    at least 0, about 1/N on average for pure noise, infinite where the samples agree exactly, and 0
    where all their gradients are 0. `snr=False` needs only the norms and is cheaper. tr(Sigma) and s² suffer
    cancellation where the samples agree. Computed without holding `[N, P]`.
    Raises SamplesMixed, or Undefined for a single sample.
    Source: McCandlish et al. (2018), eq. 2.9 and appendix A.1 (small batch 1, big batch N).
    """

    wirtinger = True

    def __init__(self, snr: bool = True) -> None:
        self.snr = snr

    def forms_rows(self, positions: int, outputs: int, inputs: int) -> bool:
        """Always for second moments; for norms where Gram matrices over the positions cost more."""
        return self.snr or not ghost_is_cheaper(1, positions, outputs, inputs)

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """Second moment `[*shape]`, or its sum over the elements for `snr=False`; the mean is taken from `.grad`."""
        return (gradient.second_moment() if self.snr else gradient.squared_norm()[0].sum(),)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> Noise:
        """The estimates, from the moments over all batches."""
        n = union.samples
        if n < 2:
            raise Undefined(
                f"asked for the gradient noise scale of N = {n} sample, whose noise cannot be told from its signal; "
                "give at least two samples, in one batch or several"
            )
        factor = n if union.mean else 1
        noise, signal, snr = {}, {}, {}
        for name, (moment,) in values.items():
            mean = widened(dense(context.gradient[name])) * (factor / n)
            mean = mean.abs() if mean.is_complex() else mean
            big, small = mean.square().sum(), moment.sum() * (factor**2 / n)
            noise[name] = ((small - big) * (n / (n - 1))).clamp(min=0)
            signal[name] = (n * big - small) / (n - 1)
            if self.snr:
                variance = (moment * (factor**2 / n)).addcmul_(mean, mean, value=-1).clamp_(min=0) * (n / (n - 1))
                snr[name] = torch.where(mean == 0, mean, mean.square() / variance)
        return Noise(noise, signal, snr if self.snr else None)

    def __repr__(self) -> str:
        return "NoiseScale()" if self.snr else "NoiseScale(snr=False)"


def _ratio(noise: Tensor, signal: Tensor) -> Tensor:
    return torch.where(signal > 0, noise / signal, torch.full_like(noise, float("inf")))
