"""Curvature matrices of a model's loss as matrix-free operators: matrix-vector products without building the matrix.

The closure runs once, in the constructor, and its graph is kept, so products refer to the parameters at that time.
Attention runs unfused, since torch's fused kernels have no second derivative.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, NonFinite, Undefined
from layerwise.graph.coverage import Graph, known_losses, prove
from layerwise.graph.loss_curvature import loss_hessian, resolved
from layerwise.graph.products import (
    GaussNewtonProducts,
    HessianProducts,
    Products,
    SecondOrder,
    dense_embedding,
    scaled_embedding,
)
from layerwise.graph.residuals import proved, residual_curvature
from layerwise.losses import Likelihood
from layerwise.operators.diagonal import check_names
from layerwise.rows.layout import MatrixLayout
from layerwise.tape.pull import without_autocast
from layerwise.tape.tape import Tape
from layerwise.tape.uses import named_parameters_of

__all__ = ["GGN", "PCH", "CurvatureOperator", "Hessian"]

_STACK_ELEMENTS = 2**22  # elements of directions that are multiplied at once
_DENSE_BYTES = 2**32


class CurvatureOperator:
    """Base of `GGN`, `Hessian` and `PCH`: a symmetric matrix over all trainable parameters of a model.

    names: the parameters in the model's order; the flat form concatenates them, flattened.
    shape: `(P, P)` for P parameter elements.
    """

    _embedding: Callable[..., Tensor] = staticmethod(dense_embedding)

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        closure: Callable[[], Tensor],
        blocks: Literal["parameter"] | None = None,
    ) -> None:
        if blocks not in (None, "parameter"):
            raise BadInput(f'{self._asked}: blocks is {blocks!r}; give None (the whole matrix) or "parameter"')
        if not callable(closure):
            raise BadInput(f"{self._asked}: asked for a closure that returns the loss, got {type(closure).__name__}")
        tape = Tape(model, self._refuse_backward, own_losses=True)
        self._parameters = dict(tape.parameters)
        if not self._parameters:
            raise BadInput(f"{self._asked}: the model has no parameter that requires grad")
        for name, p in self._parameters.items():
            if p.is_complex():
                raise Undefined(
                    f"{self._asked}: the parameter {name!r} is complex; hold its parts as one real parameter [..., 2] "
                    "and call torch.view_as_complex on it in the forward, or freeze it"
                )
        self.blocks = blocks
        with torch.enable_grad(), tape, SecondOrder(self._embedding):
            total = closure()
        self._parameters = {name: p for name, p in named_parameters_of(model).items() if name in tape.parameters}
        self._check_total(total)
        device = total.device.type
        with torch.autocast(device, enabled=False):
            self._products = self._make(tape, total)
        self._state = [_state(p) for p in self._parameters.values()]
        tape.clear()

    def _make(self, tape: Tape, total: Tensor) -> Products:
        raise NotImplementedError

    @property
    def _asked(self) -> str:
        return type(self).__name__

    def _refuse_backward(self, *_: Any) -> Any:
        raise BadInput(f"{self._asked}: the closure called backward; it must return the loss and leave the graph")

    def _check_total(self, total: Any) -> None:
        if not isinstance(total, Tensor) or total.numel() != 1:
            seen = f"a tensor of shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
            raise BadInput(f"{self._asked}: the closure must return the loss, one number; it returned {seen}")
        if not total.requires_grad:
            raise BadInput(
                f"{self._asked}: the loss depends on no parameter; was it detached, or computed under no_grad?"
            )
        if not bool(torch.isfinite(total).all()):
            raise NonFinite(f"{self._asked}: the closure's loss is {total.detach().tolist()}")

    # -- what it is ------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of the parameters, in the order of the flat form."""
        return list(self._parameters)

    @property
    def shape(self) -> tuple[int, int]:
        """`(P, P)`."""
        size = sum(p.numel() for p in self._parameters.values())
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of flat results, to which all parameter dtypes promote."""
        found = [p.dtype for p in self._parameters.values()]
        result = found[0]
        for dtype in found[1:]:
            result = torch.promote_types(result, dtype)
        return result

    def __repr__(self) -> str:
        blocks = "" if self.blocks is None else f", blocks={self.blocks!r}"
        return f"{self._asked}(shape={self.shape}, parameters={len(self._parameters)}{blocks})"

    # -- products --------------------------------------------------------------------------------------

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    def __matmul__(self, other: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """The product with one direction or a stack of m.

        A vector `[P]` gives `[P]` and a matrix `[P, m]` gives `[P, m]`. A mapping of all names to `[*shape]`, or
        to `[m, *shape]` (all of them), gives a dict of the same shapes.
        Raises: `BadInput` for names, shapes or types that do not fit; `Undefined` where the graph holds an
        operation without a second derivative, or a loss without a Hessian.
        """
        if isinstance(other, Tensor):
            return self._flat(other)
        if isinstance(other, Mapping):
            return self._named(other)
        raise BadInput(f"{self._asked} @: got {type(other).__name__}; give a tensor [P], [P, m], or a dict of them")

    def _flat(self, v: Tensor) -> Tensor:
        size = self.shape[0]
        if v.dim() not in (1, 2) or v.shape[0] != size or not v.is_floating_point():
            raise BadInput(
                f"{self._asked} @: got {v.dtype} {tuple(v.shape)}; expected floats [{size}] or [{size}, m], or a dict"
            )
        stack = v.unsqueeze(1) if v.dim() == 1 else v
        sizes = [p.numel() for p in self._parameters.values()]
        parts = [
            part.T.reshape(stack.shape[1], *p.shape).to(p)
            for part, p in zip(stack.detach().split(sizes), self._parameters.values(), strict=True)
        ]
        rows = [row.reshape(len(row), n).T.to(v) for row, n in zip(self._apply(parts), sizes, strict=True)]
        result = torch.cat(rows)
        return result[:, 0] if v.dim() == 1 else result

    def _named(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_names(f"{self._asked} @", self._parameters, other)
        counts = set()
        for name, p in self._parameters.items():
            v = other[name]
            lead = v.dim() - p.dim()
            if not v.is_floating_point() or lead not in (0, 1) or v.shape[lead:] != p.shape:
                raise BadInput(
                    f"{self._asked} @: {name!r} is {v.dtype} {tuple(v.shape)}; expected floats {list(p.shape)}, or "
                    f"[m, *{list(p.shape)}] for a stack"
                )
            counts.add(None if lead == 0 else v.shape[0])
        if len(counts) > 1:
            raise BadInput(f"{self._asked} @: the directions are stacks of {counts} (None: one); give all alike")
        single = counts == {None}
        parts = [
            (other[name].unsqueeze(0) if single else other[name]).detach().to(p) for name, p in self._parameters.items()
        ]
        rows = dict(zip(self._parameters, self._apply(parts), strict=True))
        return {name: (rows[name][0] if single else rows[name]) for name in other}

    def _apply(self, stack: list[Tensor]) -> list[Tensor]:
        """The product with a stack of directions `[m, *shape]`, computed a few directions at a time."""
        for (name, p), state in zip(self._parameters.items(), self._state, strict=True):
            if _state(p) != state:
                raise BadInput(f"{self._asked} @: {name!r} has changed since it was made; make the operator again")
        count = len(stack[0])
        if not count:
            return stack
        each = max(1, _STACK_ELEMENTS // max(1, self.shape[0]))
        chunks = [self._one([s[start : start + each] for s in stack]) for start in range(0, count, each)]
        return chunks[0] if len(chunks) == 1 else [torch.cat(rows) for rows in zip(*chunks, strict=True)]

    def _one(self, stack: list[Tensor]) -> list[Tensor]:
        device = stack[0].device.type
        with torch._C.DisableTorchFunction(), without_autocast(device):
            if self.blocks is None:
                return self._products.apply(stack, range(len(stack)))
            rows = []
            for i, part in enumerate(stack):
                only: list[Tensor | None] = [None] * len(stack)
                only[i] = part
                rows += self._products.apply(only, [i])
            return rows

    # -- other forms -----------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """The dense matrix, `[P, P]` in the flat order, from P products.

        Raises: `BadInput` for a matrix of more than 4 GiB.
        """
        size = self.shape[0]
        if size * size * self.dtype.itemsize > _DENSE_BYTES:
            raise BadInput(f"{self._asked}.to_dense: {self.shape} elements of {self.dtype} are more than 4 GiB")
        first = next(iter(self._parameters.values()))
        return self @ torch.eye(size, dtype=self.dtype, device=first.device)

    def to_scipy(self) -> Any:
        """The matrix as a `scipy.sparse.linalg.LinearOperator`, for its solvers and eigenvalues.

        Raises: `BadInput` where scipy is not installed.
        """
        try:
            linalg = importlib.import_module("scipy.sparse.linalg")
        except ImportError as error:
            raise BadInput(f"{self._asked}.to_scipy needs scipy, which cannot be imported: {error}") from error
        first = next(iter(self._parameters.values()))

        def product(v: Any) -> Any:
            x = torch.as_tensor(v).to(dtype=self.dtype, device=first.device)
            return (self @ (x.reshape(-1) if x.dim() == 2 and x.shape[1] == 1 else x)).cpu().numpy().reshape(v.shape)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return linalg.LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, dtype=dtype)


def _state(p: Tensor) -> tuple[Any, ...]:
    """A fingerprint that changes whenever the parameter is written to."""
    return p.data_ptr(), p._version, p.dtype, p.device


class Hessian(CurvatureOperator):
    """The Hessian of the loss that a closure returns.

    H = d²L / dtheta², `[P, P]`; `blocks="parameter"`: only its diagonal blocks, one for each parameter. The loss may
    be any function that torch can differentiate twice.

        H = lw.Hessian(model, lambda: F.cross_entropy(model(x), y))
        H @ v

    The closure runs once, with attention by its formula (fused kernels have no second derivative).
    Units: those of the loss over parameter units squared, with the loss's own reduction.
    Raises: `BadInput`, `NonFinite`, `Undefined` (an operation without a second derivative).
    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    def _make(self, tape: Tape, total: Tensor) -> Products:
        return HessianProducts.of(total, None, list(self._parameters.values()))


class GGN(CurvatureOperator):
    """The generalized Gauss-Newton matrix of the loss that a closure returns.

    G = J^T H_L J, `[P, P]`, with J the Jacobian of the losses' inputs in the parameters, and H_L the Hessian of the
    total loss in these inputs, all weights included; `blocks="parameter"`: only its diagonal blocks. For likelihood
    losses it is the Fisher matrix. A custom loss is taken as a function of the model's output, or of the first argument
    of a call marked by `as_loss`; it need neither be convex nor a sum over samples. The model and the loss may be any
    functions that torch can differentiate twice.

        G = lw.GGN(model, lambda: F.cross_entropy(model(x), y))
        G @ v

    The closure runs once, with attention by its formula (fused kernels have no second derivative).
    Raises: `UnknownLoss`, `BadInput`, `NonFinite`, `Undefined` (a parameter inside the loss, a loss without
    curvature, an operation without a second derivative).
    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """

    _embedding = staticmethod(scaled_embedding)

    def _make(self, tape: Tape, total: Tensor) -> Products:
        graph, known = resolved(lambda without: known_losses(tape, total, without))
        return GaussNewtonProducts(graph.losses, loss_hessian(graph, known), list(self._parameters.values()))


class PCH(CurvatureOperator):
    """The positive-curvature Hessian (PCH) of the loss that a closure returns: positive semi-definite where G is.

    G + sum_k J_k^T diag(mod(r_k)) J_k, `[P, P]`, with G the generalized Gauss-Newton matrix, J_k the Jacobian of the
    input x_k of the elementwise function s_k in the parameters, r_k = g_k s_k''(x_k), g_k the gradient at its output.
    With r in place of mod(r), the blocks of parameters that are used once would be those of the Hessian.
    modify: "abs" takes |r|, "clip" max(r, 0).

        P = lw.PCH(model, lambda: F.cross_entropy(model(x), y), modify="clip")
        P @ v

    The closure runs once, with attention by its formula (fused kernels have no second derivative). Units: as `Hessian`.
    Raises: `Undefined`, by name, for any other nonlinearity than elementwise functions (a product of activations, a
    softmax, a norm, a parametrization); the errors of `GGN`; `UncoveredUse`.
    Source: Chen, Chou and Chang (2018), "BDA-PCH: block-diagonal approximation of positive-curvature Hessian".
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        closure: Callable[[], Tensor],
        modify: Literal["abs", "clip"] = "abs",
        blocks: Literal["parameter"] | None = None,
    ) -> None:
        if modify not in ("abs", "clip"):
            raise BadInput(f'PCH: modify is {modify!r}; give "abs" (|r|) or "clip" (max(r, 0))')
        self.modify = modify
        super().__init__(model, closure, blocks)

    def _make(self, tape: Tape, total: Tensor) -> Products:
        graph, known = resolved(lambda without: prove(tape, total, without=without))
        return self.products(tape, graph, known, list(self._parameters.values()), self.modify)

    @staticmethod
    def products(
        tape: Tape,
        graph: Graph,
        known: Sequence[Likelihood],
        parameters: Sequence[Tensor],
        modify: Literal["abs", "clip"] = "abs",
    ) -> Products:
        """The matrix-vector products for some parameters, from a recorded graph that can be differentiated twice.

        Raises: `Undefined` as the class.
        """
        _check_linear(tape, graph)
        found = residual_curvature(graph)
        if found.other:
            index, what = next(iter(found.other.items()))
            use = next(use for use in graph.uses if use.index == index)
            raise Undefined(
                f"PCH: asked for the residuals of elementwise functions, but between the loss and {use} the model is "
                f"curved in another way: {what}. Ask for GGN or Hessian, or freeze what is below it"
            )
        hessian = loss_hessian(graph, known)
        if not proved(graph, hessian, found, [use.index for use in graph.uses]):
            raise Undefined(
                "PCH: asked for the residuals of elementwise functions, but with those that were found the second "
                "derivatives do not add up (or are NaN). Ask for GGN or Hessian"
            )
        modified = torch.abs if modify == "abs" else (lambda r: r.clamp(min=0))
        diagonals = [(residual.edge, modified(residual.value)) for residual in found.residuals]
        return GaussNewtonProducts(graph.losses, hessian, parameters, diagonals)


def _check_linear(tape: Tape, graph: Graph) -> None:
    """Raise Undefined for uses whose output is not linear in the parameter."""
    for use in graph.uses:
        for derived, slot in zip(use.used, use.slots, strict=True):
            names = sorted(derived.names)
            mapped = len(names) == 1 and MatrixLayout.of_view(slot.used, tape.parameters[names[0]]) is not None
            if not (mapped and slot.linear and slot.factored):
                raise Undefined(
                    f"PCH: asked for the residuals of elementwise functions, but {use} is not known to be linear in "
                    f"{', '.join(names)} (a parametrization, or a call without row form). Ask for GGN or Hessian, or "
                    "freeze the parameter"
                )
