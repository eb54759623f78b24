"""The fallback for calls that no family describes: one vector-Jacobian product per sample."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from layerwise.errors import Undefined, UnsupportedCall
from layerwise.ops.arguments import replace, writes_first
from layerwise.ops.base import Call, DenseSlot
from layerwise.rows.base import RowNumbers, Samples
from layerwise.tensors import forked_random

__all__ = ["OpaqueSlot"]

_CHUNK = 2**24  # elements of the cotangents of one batched product


class OpaqueSlot(DenseSlot):
    """Any call: only `dense` is defined, by running the call again with one vector-Jacobian product a sample.

    dense[v,n] = (d out / d used)^T (g[v] at the indices of sample n, 0 elsewhere)

    The sum over n is compared with the product of a second run, so that a call which is random or
    whose batched derivative is wrong raises `Undefined` instead of returning numbers.
    """

    def __init__(self, call: Call, used: Tensor) -> None:
        self.used = used
        self.axes = range(len(call.out_shape))
        self._call = call

    def dense(self, g: Tensor, samples: Samples | RowNumbers) -> Tensor:
        """Per-sample gradients `[V,N,*used.shape]`; raises `Undefined` for a random call."""
        owner = samples.owners(g.shape[1:], g.device)
        g = g.detach()
        with _isolated(self.used):
            out, leaf = self._run()
            again, second = self._run()
            g = g.to(out.dtype)
            weights = torch.arange(1, len(g) + 1, device=g.device).to(g.dtype)
            mixed = torch.einsum("v,v...->...", weights, g)
            (whole,) = _pull(again, second, mixed.unsqueeze(0), batched=False)
            for batched in (True, False):
                rows = self._rows(out, leaf, g, owner, samples.n, batched)
                if rows is not None and _agrees(rows, weights.to(rows.dtype), whole):
                    return rows
        raise Undefined(
            f"asked for per-sample gradients at {self._where}, but they do not sum to the gradient of the call when it "
            "is run again, so the call is random or its derivative is not reproducible; draw its random numbers "
            "outside, in a call of their own, and give them to it"
        )

    def _rows(self, out: Tensor, leaf: Tensor, g: Tensor, owner: Tensor, n: int, batched: bool) -> Tensor | None:
        """`[V,N,*used.shape]`, or None where torch cannot batch this derivative."""
        size = max(1, _CHUNK // max(1, out.numel(), leaf.numel()))
        ids = torch.arange(n, device=g.device)
        ids = ids.reshape(n, *(1,) * out.ndim)
        parts = []
        for cotangent in g:
            for some in ids.split(size):
                masked = torch.where(owner == some, cotangent, cotangent.new_zeros(()))
                try:
                    parts.append(_pull(out, leaf, masked, batched))
                except (RuntimeError, NotImplementedError):
                    if batched:
                        return None
                    raise
        return torch.cat(parts).reshape(len(g), n, *leaf.shape)

    def _run(self) -> tuple[Tensor, Tensor]:
        """Run the call again on detached copies: its output, and the leaf that replaces `used`."""
        call, dtype = self._call, self.used.dtype
        leaf = self.used.detach().requires_grad_()

        def change(x: Tensor) -> Tensor:
            if x is self.used:
                return leaf
            # under autocast the call mixed dtypes
            mixed = dtype.is_floating_point and x.is_floating_point()
            return x.detach().to(dtype) if mixed else x.detach()

        args, kwargs = replace(call.args, change), replace(call.kwargs, change)
        if writes_first(call.func):
            args = (args[0].clone(), *args[1:])
        out = call.func(*args, **kwargs)
        out = args[0] if out is None and writes_first(call.func) else out
        if not isinstance(out, Tensor) or out.shape != call.out_shape or not out.requires_grad:
            seen = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UnsupportedCall(
                f"{self._where} gave {seen} when it was run again, where one differentiable tensor of shape "
                f"{tuple(call.out_shape)} was recorded; write it with other torch functions"
            )
        return out, leaf

    def no_rows(self) -> Undefined:
        """The refusal of rows."""
        return Undefined(
            f"{self._where} is not known as a linear map, so it has per-sample gradients but no input and output rows; "
            "ask for quantities of the gradient, diagonals or operators, or describe the call by layerwise.ops.register"
        )

    @property
    def _where(self) -> str:
        """The call, and what it uses, in words."""
        return self.use or f"{_name(self._call)} of a tensor of shape {tuple(self.used.shape)}"


def _pull(out: Tensor, leaf: Tensor, cotangents: Tensor, batched: bool) -> Tensor:
    """The gradients `[B, *leaf.shape]` of cotangents `[B, *out.shape]`."""
    if batched:
        (rows,) = torch.autograd.grad(out, leaf, cotangents, retain_graph=True, is_grads_batched=True)
    else:
        rows = torch.stack([
            row.to_dense() if row.layout is not torch.strided else row
            for c in cotangents
            for row in torch.autograd.grad(out, leaf, c, retain_graph=True)
        ])  # fmt: skip
    return rows


def _agrees(rows: Tensor, weights: Tensor, whole: Tensor) -> bool:
    """Whether the rows sum to the whole gradient; True where that is not finite."""
    if not bool(torch.isfinite(whole).all()):
        return True
    error = torch.einsum("v,vn...->...", weights, rows) - whole
    scale = torch.einsum("v,vn...->...", weights.abs(), rows.abs()).abs().max() + whole.abs().max()
    tolerance = max(1e-6, torch.finfo(whole.dtype).eps ** 0.5)
    return bool(error.abs().max() <= tolerance * scale)


@contextmanager
def _isolated(used: Tensor) -> Iterator[None]:
    """Run a repeated call without effect on, or of, the caller's random state, autocast and warnings."""
    with (
        forked_random([used.device]),
        torch.autocast(used.device.type, enabled=False),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # torch warns where it batches by looping
        yield


def _name(call: Call) -> str:
    return getattr(call.func, "__qualname__", None) or getattr(call.func, "__name__", None) or repr(call.func)
