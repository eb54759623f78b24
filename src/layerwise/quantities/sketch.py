"""Random projections of the per-sample gradients: tensor sketches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import ByParameter, Context, Quantity, Union, positive
from layerwise.quantities.first_order import sample_factor
from layerwise.rows.cost import convolution_is_cheaper
from layerwise.rows.project import TensorSketch

__all__ = ["Sketch"]


class Sketch(Quantity):
    """A linear random projection of every sample's gradient that keeps inner products on average.

    (S g)_j = sum over elements e with h_e = j of s_e g_e, `[N, dim]` per parameter p, and `.total` for the whole
    gradient: every element is added, with a sign s_e, to one of dim numbers. With r an element's place along the first
    axis of the parameter and c that in all others, s_e = u_r v_c and h_e = a_r + b_c modulo dim, of random signs and
    places of their own for each r and c, so that a layer's inputs and cotangents can be sketched apart.
    E <S g, S h> = <g, h>, per parameter and in total, with

        Var <S g, S h> <= 8 |g|² |h|² / dim,

    so relative errors are at most about 2.8 / sqrt(dim) (a matrix of independent signs would give 1.4 for |g|²).
    Costs what the gradients of a few samples at a time cost, or transforms of dim numbers where that is less.

    The constructor draws the seed from `generator`: all batches of one `Sketch`, and of another one whose generator
    is in the same state, share one projection. `matrix` returns the projection itself.
    `scale="sample"`: the projection of N g_n for a mean loss. Raises SamplesMixed, or BadInput.
    Source: Pham and Pagh (2013), section 3 (TensorSketch). The bound: two elements meet with probability 1/dim, and
    signs leave 8 of the ways to pair rows and columns of four elements, each at most |g|² |h|² by Cauchy and Schwarz.
    """

    powers = (1,)
    concatenate = True

    def __init__(self, dim: int, generator: torch.Generator | None = None) -> None:
        positive("Sketch's dim", dim, none=False)
        self.dim = dim
        self._known: dict[Any, TensorSketch] = {}  # two numbers for each row and column of a parameter
        device = generator.device if generator is not None else None
        self._seed = int(torch.randint(2**62, (), generator=generator, device=device))

    def matrix(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """The projection matrix of one parameter, `[dim, *shape]`, in the type and on the device of `like`."""
        return self._of(name, shape, like).matrix(like).reshape(self.dim, *shape)

    def project(self, vector: Mapping[str, Tensor]) -> ByParameter:
        """The sketch of one vector given as tensors by parameter: `[dim]` for each, and `.total` for the whole vector.

        (S v)_j as with `matrix`, without forming it: for a direction to compare with the samples' gradients.
        """
        sketches = {
            name: self._of(name, v.shape, v).of_gradients(v.reshape(1, 1, -1))[0, 0] for name, v in vector.items()
        }
        return ByParameter(sketches, sum(sketches.values()) if sketches else None)  # type: ignore[arg-type]

    def _of(self, name: str, shape: Sequence[int], like: Tensor) -> TensorSketch:
        key = name, tuple(shape), like.device
        if key not in self._known:
            self._known[key] = TensorSketch.drawn(name, shape, self.dim, self._seed, like.device)
        return self._known[key]

    def forms_rows(self, positions: int, outputs: int, inputs: int) -> bool:
        """Where Fourier transforms at each position cost more."""
        return not convolution_is_cheaper(positions, outputs, inputs, self.dim)

    def numbers(self, gradient: ParameterGradient) -> int:
        """V·N·dim."""
        return gradient.size.numel() * self.dim

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, dim]`."""
        return (gradient.sketch(self._of(gradient.name, gradient.shape, gradient.like))[0],)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """The sketches by parameter; the total is the sketch of the whole gradient, `[N, dim]`."""
        factor = sample_factor(union)
        sketches = {k: v[0] * factor if factor != 1 else v[0] for k, v in values.items()}
        return ByParameter(sketches, sum(sketches.values()) if sketches else None)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Sketch({self.dim})"
