"""What alternating minimization did, step by step and layer by layer: numbers to plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem, predict
from layerwise.tensors import without_grad

__all__ = ["Trace"]

Series = dict[str, list[float]]


@dataclass
class Trace:
    """Diagnostics of `AltMin(trace=...)`, each a list of numbers by the weight's name, one for each noted step.

    steps: numbers of the noted steps. displacement: of a layer's codes, `rms(c − z)`. violation: of the constraint
    that remains after the weights moved, `rms(c − W a)`; over the displacement, the share of it that was not fitted.
    cosine: of the weight's movement with minus backpropagation's gradient, 0 where either is 0 (through functions
    without a derivative, with the surrogate gradient). drift: `|W − W₀|/|W₀|` since the first noted step's start.
    Layers without codes (those that make the loss's logits) have cosine and drift alone.

        trace = lw.optim.Trace(every=10)
        opt = lw.AltMin(model, trace=trace)
        ...
        plt.plot(trace.steps, trace.drift["0.weight"])

    every: record every so many steps. Raises BadInput for a number below 1.
    """

    every: int = 1
    steps: list[int] = field(default_factory=list, init=False)
    displacement: Series = field(default_factory=dict, init=False)
    violation: Series = field(default_factory=dict, init=False)
    cosine: Series = field(default_factory=dict, init=False)
    drift: Series = field(default_factory=dict, init=False)
    passed: int = field(default=0, init=False, repr=False)  # steps
    _start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise BadInput(f"Trace notes every n-th step with a whole n ≥ 1; got every={self.every!r}")

    def rows(self) -> list[dict[str, float | int | str]]:
        """All numbers as rows (step, layer, displacement, violation, cosine, drift), as for a table."""
        found: list[dict[str, float | int | str]] = []
        every = {"displacement": self.displacement, "violation": self.violation, "cosine": self.cosine,
                 "drift": self.drift}  # fmt: skip
        for number, step in enumerate(self.steps):
            for name in self.drift:
                values = {what: s[name][number] for what, s in every.items() if number < len(s.get(name, []))}
                found.append({"step": step, "layer": name, **values})
        return found

    # -- for the optimizer -----------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether the next step is recorded."""
        return self.passed % self.every == 0

    def held(self) -> tuple[Any, ...]:
        """What steps change, for `hold`."""
        return len(self.steps), self.passed, self._start, [list(series) for series in self._series()]

    def hold(self, held: tuple[Any, ...]) -> None:
        """Go back to before the steps that were taken back."""
        count, self.passed, self._start, names = held
        del self.steps[count:]
        for series, known in zip(self._series(), names, strict=True):
            for name in list(series):
                del series[name][count:]
                if name not in known:
                    del series[name]

    def _series(self) -> list[Series]:
        return [self.displacement, self.violation, self.cosine, self.drift]

    @without_grad
    def noted(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], slopes: Mapping[str, Tensor],
        problems: Mapping[str, tuple[LocalProblem, Tensor, bool]],
    ) -> Callable[[], None]:  # fmt: skip
        """What records a step, from the weights before and after it, and backpropagation's gradients.

        problems: each layer's problem, its outputs `z` at the weights before, and whether it has codes.
        """
        found: list[tuple[Series, str, float]] = []  # all numbers first: a step that raises notes none
        for name, (problem, z, coded) in problems.items():
            old, new = before[name], after[name]
            start = self._start.get(name, old)
            found.append((self.cosine, name, _cosine(old - new, slopes.get(name))))
            found.append((self.drift, name, float((new - start).norm() / start.norm().clamp_min(1e-30))))
            if coded:
                found.append((self.displacement, name, _rms(problem.target - z)))
                found.append((self.violation, name, _rms(problem.target - predict(problem))))
        starts = {**{name: before[name] for name in problems}, **self._start}
        steps = [*self.steps, self.passed]

        def write() -> None:
            self._start, self.steps[:] = starts, steps
            for series, name, value in found:
                values = series.setdefault(name, [])
                del values[len(steps) - 1 :]  # run again after an interrupt, it writes the same
                # NaN for the steps at which the layer was not seen
                values += [float("nan")] * (len(steps) - 1 - len(values)) + [value]

        return write


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _cosine(x: Tensor, y: Tensor | None) -> float:
    if y is None:
        return 0.0
    size = x.norm() * y.norm()
    return float((x * y).sum() / size) if size > 0 else 0.0
