"""Curvature backends for laplace-torch by layerwise's quantities: `Laplace(..., backend=LayerwiseGGN)`.

Importing this module imports laplace; nothing else in the library does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import Undefined
from layerwise.graph.cotangents import Gradient
from layerwise.observation.observe import observe
from layerwise.observation.seen import Seen
from layerwise.operators import Kronecker, KroneckerBlock
from layerwise.operators.curvature import Hessian
from layerwise.quantities import KFAC, KFLR, DiagGGN, DiagHessian, PerSampleGrad, Quantity, SecondMoment, SqrtGGN
from layerwise.quantities.kronecker.factors import KroneckerFactors
from layerwise.replay.state import Gradients

try:
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
    from laplace.utils import Kron
except ImportError as error:
    raise ImportError(
        f"layerwise.compat.laplace needs laplace-torch, which cannot be imported ({error}): pip install laplace-torch"
    ) from error

__all__ = ["LayerwiseEF", "LayerwiseGGN", "LayerwiseHessian", "LayerwiseInterface"]

_ALL = 2**62  # laplace needs dense Jacobians: their size is its user's choice


class LayerwiseInterface(CurvatureInterface):
    """Base of the backends: one forward and backward pass, observed for the trainable parameters.

    Nothing is written onto the model, `.grad` included. Any model that `observe` covers is allowed: weights may be
    tied, frozen, derived (a weight norm) or unused (with zero curvature). Errors are those of `observe`.
    Results follow laplace's conventions: parameters flattened one after the other, losses and curvature summed over
    the batch and multiplied by `factor` (1/2 for regression, whose loss is the squared error).
    """

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """The Jacobians of the outputs in the parameters, `[N,C,P]`, and the outputs `[N,C]`, from one forward pass.

        enable_backprop: return results that can be differentiated in x, by laplace's own torch.func computation.
        """
        if enable_backprop:
            return super().jacobians(x, enable_backprop=True)
        return self._jacobians(x, lambda f: f)

    def last_layer_jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """The Jacobians of the outputs in the last layer's parameters, `[N,C,P]`, and the outputs `[N,C]`.

        From one forward pass, whatever lies behind the last layer; outputs at several positions, `[N,*,C]`, are rows of
        their own, as in the loss. enable_backprop: return results that can be differentiated in x, by laplace's own
        formula, for features `[N,I]` that the last layer maps to the outputs.
        """
        if enable_backprop:
            return super().last_layer_jacobians(x, enable_backprop=True)
        columns, f = self._jacobians(x, lambda f: f)
        return columns.flatten(0, -3), f.flatten(0, -2)

    def selected_output_jacobians(
        self, x: Any, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The Jacobians of some outputs of each sample, `[N,S,P]`, and all outputs `[N,C]`; outputs: `[N]` or `[N,S]`.

        Other outputs are not differentiated. Raises ValueError for selectors of another batch size.
        """
        if enable_backprop:
            return super().selected_output_jacobians(x, outputs, enable_backprop=True)
        index = outputs[:, None] if outputs.ndim == 1 else outputs

        def chosen(f: Tensor) -> Tensor:
            if len(index) != len(f):
                raise ValueError(f"selectors of {len(index)} samples for outputs of {len(f)}; give one row a sample")
            return f.gather(1, index.to(f.device, torch.long))

        return self._jacobians(x, chosen)

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of each sample's loss, `[N,P]`, and the summed loss, both without `factor`."""
        quantity = PerSampleGrad()
        loss, seen = self._observed(x, y, quantity)
        return self._flat(seen[quantity]), loss

    def _jacobians(self, x: Any, chosen: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Jacobian rows and outputs, from the GGN root of `½ ‖chosen(f)‖²`, whose Hessian is the identity."""
        quantity, kept = SqrtGGN(max_elements=_ALL), []

        def loss(f: Tensor) -> Tensor:
            kept.append(f.detach())
            kept.append(chosen(f))
            return torch.nn.functional.mse_loss(kept[1], torch.zeros_like(kept[1]), reduction="sum")

        _, seen = self._pass(x, loss, quantity)
        f, selected = kept
        columns = self._flat(seen[quantity], 2).movedim(0, 1) / 2**0.5
        return columns.reshape(*selected.shape, columns.shape[-1]), f

    def _loss(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss of laplace; a sample may have class labels at several positions."""
        if self.likelihood == "classification":
            f, y = f.flatten(0, -2), y.flatten()
        return self.lossfunc(f, y)

    def _observed(self, x: Any, y: Tensor, *quantities: Quantity) -> tuple[Tensor, Seen]:
        """The summed loss of the batch, and the observed results."""
        return self._pass(x, lambda f: self._loss(f, y), *quantities)

    def _pass(self, x: Any, loss_of: Callable[[Tensor], Tensor], *quantities: Quantity) -> tuple[Tensor, Seen]:
        """One observed forward and backward pass; `.grad` is restored."""
        samples = len(x[self.dict_key_x] if isinstance(x, Mapping) else x)
        gradients = Gradients(self.params, values=False)
        try:
            for p in self.params:
                p.grad = None
            with torch.enable_grad(), observe(self.params_dict, *quantities, samples=samples) as seen:
                loss = loss_of(self.model(x))
                loss.backward(inputs=self.params)
        finally:
            gradients.put_back()
        return loss.detach(), seen

    def _flat(self, values: Mapping[str, Tensor], lead: int = 1) -> Tensor:
        """Concatenate `[*lead, *shape]` by name to `[*lead, P]` in laplace's order; zeros for unused parameters."""
        like = next(iter(values.values()))
        front = like.shape[:lead]
        columns = [
            values[name].reshape(*front, -1) if name in values else like.new_zeros(*front, p.numel())
            for name, p in self.params_dict.items()
        ]
        return self._subnetwork(torch.cat(columns, -1))

    def _subnetwork(self, flat: Tensor) -> Tensor:
        """The subnetwork's elements of the last axis."""
        return flat if self.subnetwork_indices is None else flat[..., self.subnetwork_indices]

    def _diag(self, x: Any, y: Tensor, quantity: Quantity) -> tuple[Tensor, Tensor]:
        loss, seen = self._observed(x, y, quantity)
        return self.factor * loss, self.factor * self._flat(seen[quantity], 0)

    def _kron(self, x: Any, y: Tensor, data: int, quantity: Quantity) -> tuple[Tensor, Any]:
        """The loss and factors, which laplace sums over batches: A, a mean, is weighted by M/N, B is a sum."""
        if self.subnetwork_indices is not None:
            raise Undefined(
                "asked for Kronecker factors of a subnetwork, which cut through the factors; freeze parameters as a "
                'whole (requires_grad_(False)), or take hessian_structure="full" or "diag"'
            )
        loss, seen = self._observed(x, y, quantity)
        share = len(y) / data
        operator = seen[quantity]
        kron = Kron([_factors(operator, name, p, share) for name, p in self.params_dict.items()])
        return self.factor * loss, self.factor * kron


class LayerwiseGGN(LayerwiseInterface, GGNInterface):
    """The generalized Gauss-Newton matrix, exact or from sampled labels, for laplace.

        la = Laplace(model, "classification", hessian_structure="kron", backend=LayerwiseGGN)

    backend_kwargs: `stochastic=True` draws `num_samples` labels from the model (the true Fisher).
    Raises: Undefined, where laplace's `Kron` cannot hold a parameter's factors (groups, slices).
    Source: Daxberger et al. (2021), "Laplace redux"; quantities `DiagGGN`, `SqrtGGN`, `KFLR` and `KFAC`.
    """

    @property
    def _draws(self) -> int | None:
        return self.num_samples if self.stochastic else None

    def full(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The summed loss, and the matrix `[P,P]`, from its root `[V,N,P]` in memory at once."""
        quantity = SqrtGGN(draws=self._draws, max_elements=_ALL)
        loss, seen = self._observed(x, y, quantity)
        root = self._flat(seen[quantity], 2).flatten(0, 1)
        return self.factor * loss, self.factor * (root.T @ root)

    def diag(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The summed loss, and the diagonal `[P]`, without Jacobians."""
        return self._diag(x, y, DiagGGN(draws=self._draws))

    def kron(self, x: Any, y: Tensor, N: int, kfac_approx: str = "expand") -> tuple[Tensor, Any]:
        """The summed loss, and the factors of `KFLR`, or of `KFAC` for sampled labels.

        kfac_approx: the quantities' `sharing`, "expand" or "reduce". N: the size of the data set.
        """
        draws = self._draws
        rows = "all"  # laplace weighs a batch's A by its samples
        if draws is None:
            return self._kron(x, y, N, KFLR(sharing=kfac_approx, rows=rows))
        return self._kron(x, y, N, KFAC(draws=draws, sharing=kfac_approx, rows=rows))


class LayerwiseEF(LayerwiseInterface, EFInterface):
    """The empirical Fisher (labels of the data), for laplace; laplace computes `full` from our per-sample gradients.

    For regression laplace multiplies squared gradients of the squared error by 1/2, where a Gaussian log-likelihood
    needs 1/4; these results follow laplace.
    Raises: as `LayerwiseGGN`. Source: Kunstner, Balles and Hennig (2019), eq. 3; quantity `SecondMoment`.
    """

    def diag(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The summed loss, and the diagonal `[P]`, without per-sample gradients `[N,P]`."""
        return self._diag(x, y, SecondMoment())

    def kron(self, x: Any, y: Tensor, N: int, kfac_approx: str = "expand") -> tuple[Tensor, Any]:
        """The summed loss, and Kronecker factors with B the sum of g g^T of the gradients g at the outputs."""
        return self._kron(x, y, N, _EmpiricalFactors(Gradient(), kfac_approx, joint=False, rows="all"))


class LayerwiseHessian(LayerwiseInterface):
    """The Hessian itself, for laplace: `full` and `diag`. It need not be positive; laplace adds the prior's precision.

    Raises: as `lw.Hessian`. Source: MacKay (1992).
    """

    def full(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The summed loss, and the matrix `[P,P]`, by P products (all P where a subnetwork is asked for)."""
        kept: list[Tensor] = []

        def closure() -> Tensor:
            kept.append(self._loss(self.model(x), y))
            return kept[-1]

        hessian = Hessian(self.params_dict, closure).to_dense()
        rows = self._subnetwork(hessian)
        return self.factor * kept[-1].detach(), self.factor * self._subnetwork(rows.T)

    def diag(self, x: Any, y: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """The summed loss, and the diagonal `[P]`."""
        return self._diag(x, y, DiagHessian())


class _EmpiricalFactors(KroneckerFactors):
    """Kronecker factors from the gradients of the loss itself (the empirical Fisher)."""

    powers = (2,)


def _factors(operator: Kronecker, name: str, p: Tensor, share: float) -> list[Tensor]:
    """The factors of one parameter: one matrix for a vector, otherwise two, of the first axis and of the rest.

    share: M/N, which multiplies the factor that is a mean over the batch.
    """
    blocks = {key: block for key, block in operator.blocks.items() if (block.parameter or key) == name}
    if p.ndim < 2:
        return [operator.to_dense(name) if blocks else p.new_zeros(p.numel(), p.numel())]
    if not blocks:
        return [p.new_zeros(len(p), len(p)), p.new_zeros(p[0].numel(), p[0].numel())]
    factors = _product(next(iter(blocks.values())), p, share) if len(blocks) == 1 else None
    if factors is None:
        layout = ", ".join(
            f"{key}: {block.size.numel()} elements as {tuple(block.size)}" for key, block in blocks.items()
        )
        raise Undefined(
            f"laplace's Kron holds one product, of the first axis and the rest, for a parameter, but {name!r} "
            f"{tuple(p.shape)} has blocks [groups, out, in] of another kind ({layout}); freeze it "
            '(requires_grad_(False)), or take hessian_structure="diag" or "full"'
        )
    return factors


def _product(block: KroneckerBlock, p: Tensor, share: float) -> list[Tensor] | None:
    """The two factors of a block in the order of the parameter's axes, or None if it has groups or another layout."""
    if len(block.B) > 1:
        return None
    places = block.matrix(torch.arange(p.numel()).reshape(p.shape))[0]
    out, into = block.B[0], p.new_full((1, 1), share)
    if block.A is not None:
        into = share * (block.A[0] if block.A.ndim == 3 else block.A[0].diag())
    for rows, factors in ((places, [out, into]), (places.T, [into, out])):
        if len(rows) == len(p) and torch.equal(rows.flatten(), torch.arange(p.numel())):
            return factors
    return None
