"""Random projections of the per-sample gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.gradient.parameter import ParameterGradient
from layerwise.quantities.base import ByParameter, Context, Quantity, Union, positive
from layerwise.quantities.first_order import sample_factor
from layerwise.rows import project

__all__ = ["Sketch"]


class Sketch(Quantity):
    """A linear random projection of every sample's gradient that keeps inner products on average.

    (S g)_j = sum_p <R_jp, g_p> / sqrt(dim), `[N, dim]` per parameter p, and `.total` for the whole gradient, with
    R_jp a random sign matrix of rank one: R[r,c] = u_r v_c with r the first axis of the parameter and c all others
    flattened (a sign vector for a parameter of one axis). E <S g, S h> = <g, h>, per parameter and in total, with

        Var <S g, S h> <= (9 |g|² |h|² - <g, h>²) / dim,

    so relative errors are at most about 3 / sqrt(dim) (a matrix of independent signs would give 1.4 for |g|²).
    Rank one lets a layer's inputs and cotangents be projected without forming its gradients `[N,P]`.

    The constructor draws the seed from `generator`: all batches of one `Sketch`, and of another one whose generator
    is in the same state, share one projection. `matrix` returns the projection itself.
    `scale="sample"`: the projection of N g_n for a mean loss. Raises SamplesMixed, or BadInput.
    Source: Achlioptas (2003), theorem 1.1 (signs). The bound: the fourth moment of u^T D v is at most 9 |D|^4.
    """

    powers = (1,)
    concatenate = True

    def __init__(self, dim: int, generator: torch.Generator | None = None) -> None:
        if positive("Sketch's dim", dim) is None:
            raise BadInput("Sketch's dim must be a whole number of at least 1, got None")
        self.dim = dim
        device = generator.device if generator is not None else None
        self._seed = int(torch.randint(2**62, (), generator=generator, device=device))

    def matrix(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """The projection matrix of one parameter, `[dim, *shape]`, in the type and on the device of `like`."""
        left, right = project.signs(name, shape, self.dim, self._seed, like)
        return torch.einsum("jr,jc->jrc", left, right).reshape(self.dim, *shape) / self.dim**0.5

    def project(self, vector: Mapping[str, Tensor]) -> ByParameter:
        """The sketch of one vector given as tensors by parameter: `[dim]` for each, and `.total` for the whole vector.

        (S v)_j as with `matrix`, without forming it: for a direction to compare with the samples' gradients.
        """
        sketches = {}
        for name, v in vector.items():
            left, right = project.signs(name, v.shape, self.dim, self._seed, v)
            sketches[name] = project.project_vectors(v.reshape(1, 1, -1), left, right)[0, 0] / self.dim**0.5
        return ByParameter(sketches, sum(sketches.values()) if sketches else None)

    def numbers(self, gradient: ParameterGradient) -> int:
        """V·N·dim."""
        return gradient.size.numel() * self.dim

    def compute(self, gradient: ParameterGradient) -> tuple[Tensor, ...]:
        """`[N, dim]`."""
        left, right = project.signs(gradient.name, gradient.shape, self.dim, self._seed, gradient.like)
        return (gradient.sketch(left, right)[0] / self.dim**0.5,)

    def finish(self, values: Mapping[str, tuple[Tensor, ...]], union: Union, context: Context) -> ByParameter:
        """The sketches by parameter; the total is the sketch of the whole gradient, `[N, dim]`."""
        factor = sample_factor(union)
        sketches = {k: v[0] * factor if factor != 1 else v[0] for k, v in values.items()}
        return ByParameter(sketches, sum(sketches.values()) if sketches else None)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Sketch({self.dim})"
