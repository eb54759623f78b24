"""Products of curvature matrices with stacks of directions, by double backward passes through a retained graph.

A direction is one tensor for each parameter; a stack of V directions has a leading axis. Torch's batched second
derivatives are wrong for some operations (group norm), so every batched pass is compared with one pass along a random
combination of its directions, and replaced by single passes where the two differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from layerwise.errors import NonFinite, Undefined
from layerwise.graph.coverage import Graph
from layerwise.graph.decisions import decided
from layerwise.graph.second.custom_functions import check_adjoint, check_functions, check_sparse
from layerwise.graph.second.known_zeros import KnownZeros
from layerwise.graph.walk import nodes
from layerwise.losses import Unread
from layerwise.ops import bags_of_rows
from layerwise.tape.activation_checkpoints import standing_in
from layerwise.tape.modes import leave
from layerwise.tape.pull import Place, pull, pull_stack
from layerwise.tape.uses import LossUse

__all__ = [
    "GaussNewtonProducts",
    "HessianProducts",
    "Products",
    "SecondOrder",
    "check_second",
    "dense_embedding",
    "gradient_of",
    "scaled_embedding",
    "twice",
]

_NO_SECOND = re.compile(
    r"derivative for .* is not implemented|once_differentiable|use_reentrant=True|double.?backward|invalid strides"
    r"|expected sparse coordinate tensor layout"
    r"|expected a proper tensor but got none|cannot reshape tensor of 0 elements",
    re.IGNORECASE,
)


class SecondOrder(TorchFunctionMode):
    """Run a forward so that it can be differentiated twice: enter it after the tape.

    Attention runs by its formula, since fused kernels have no second derivative; so do bags of embeddings and the calls
    in `_FORMULAS`, whose second derivatives torch 2.13 lacks or gets wrong.
    embedding: what looks up tables in place of `F.embedding`, where the graph is of no other use.
    """

    def __init__(self, embedding: Callable[..., Tensor] = F.embedding) -> None:
        super().__init__()
        self._embedding = embedding

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parts, kwargs = _FORMULAS.get(func), dict(kwargs or {})
        if func is F.embedding and self._embedding is not func:
            parts = self._embedding
        elif func is F.embedding_bag:
            parts = partial(bags_of_rows, self._embedding)
        if parts is None:
            return func(*args, **kwargs)
        written = kwargs.pop("inplace", False)
        out = standing_in(func, parts, args, kwargs)
        return args[0].copy_(out) if written else out

    _kernel: AbstractContextManager[None] | None = None

    def __enter__(self) -> Self:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernel = sdpa_kernel(SDPBackend.MATH)
        kernel.__enter__()
        self._kernel = kernel
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._kernel is not None:
            kernel, self._kernel = self._kernel, None
            kernel.__exit__(*exc)
        leave(self)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`g v / |v|`, the norm over all axes but `dim` (-1: over all)."""
    axes = [axis for axis in range(v.dim()) if axis != dim]
    return v * (g / v.square().sum(axes, keepdim=dim != -1).sqrt())


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5) -> Tensor:  # fmt: skip
    """`F.layer_norm`; torch fails at the second derivative of a bias without a weight."""
    if weight is not None or bias is None:
        return F.layer_norm(x, shape, weight, bias, eps)
    return F.layer_norm(x, shape, None, None, eps) + bias


def _norms(x: Tensor, p: float) -> Tensor:
    """p-norms along the last axis, with derivatives of zero at zero."""
    if p == 1:
        return x.abs().sum(-1)
    if p == math.inf:
        return x.abs().amax(-1)
    powers = (x.square() if p == 2 else x.abs().pow(p)).sum(-1)
    zero = powers == 0
    return powers.masked_fill(zero, 1).pow(1 / p).masked_fill(zero, 0)


def _cdist(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """The p-norms of the differences of all rows of two tensors."""
    return _norms(x.unsqueeze(-2) - y.unsqueeze(-3), p) if p else torch.cdist(x, y, p)


def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    """The p-norms of the differences of all pairs of rows of a tensor."""
    one, other = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return _norms(x[one] - x[other], p) if p else torch.pdist(x, p)


def _hardsigmoid(x: Tensor) -> Tensor:
    """`min(max(x / 6 + 1/2, 0), 1)`."""
    return F.relu6(x + 3) / 6


_FORMULAS: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: _hardsigmoid,
    torch._weight_norm: _weight_norm,
    F.layer_norm: _layer_norm,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    F.pdist: _pdist,
}


def dense_embedding(index: Tensor, table: Tensor, *args: Any, sparse: bool = False, **kwargs: Any) -> Tensor:
    """`F.embedding` with a dense gradient."""
    return F.embedding(index, table, *args[:4], **kwargs)


def scaled_embedding(
    index: Tensor,
    table: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding` with a dense gradient that torch can differentiate, for products with the Jacobian.

    Under `scale_grad_by_freq` each row's gradient is divided by how often it is looked up. So are the rows of the
    Jacobian then; the gradient is no derivative, and has none.
    """
    out = F.embedding(index, table, padding_idx, max_norm, norm_type)
    if not scale_grad_by_freq:
        return out
    count = torch.bincount(index.flatten(), minlength=len(table))[index]
    scaled = out / count.unsqueeze(-1)
    return scaled + (out - scaled).detach()


def _check_once(gradients: Sequence[Tensor | None]) -> None:
    """Refuse a graph with functions marked `once_differentiable`, which torch may drop without an error."""
    for node in nodes((g.grad_fn, 0) for g in gradients if g is not None):
        if node.name().split("::")[-1] in ("Error", "DelayedError"):
            raise Undefined(_once("a function marked once_differentiable"))


def _once(what: object) -> str:
    return (
        f"asked for second derivatives, but the graph holds an operation without them: {what}. Write it with torch "
        "calls that can be differentiated twice (checkpoint with use_reentrant=False), or freeze what is below it"
    )


@contextmanager
def twice() -> Iterator[None]:
    """Turn torch's error about a missing second derivative into Undefined."""
    try:
        with torch.enable_grad():
            yield
    except RuntimeError as error:
        if not _NO_SECOND.search(str(error)):
            raise
        raise Undefined(_once(str(error).rstrip("."))) from error


def check_second(gradients: Sequence[Tensor | None], inputs: Sequence[Place], unread: Unread | None = None) -> None:
    """Refuse second derivatives that torch lacks or gets wrong; the latter show as an asymmetric Hessian.

    gradients: of one scalar by `inputs`, tensors or edges. unread: takes what is read later. Raises Undefined or
    NonFinite.
    """
    _check_once(gradients)
    kept = [(g, x) for g, x in zip(gradients, inputs, strict=True) if g is not None and g.requires_grad]
    if not kept:
        return
    generator = torch.Generator().manual_seed(0)
    outputs, points = [g for g, _ in kept], [x for _, x in kept]

    def product() -> tuple[list[Tensor], list[Tensor]]:
        v = [torch.rand(g.shape, generator=generator).sub_(0.5).to(g) for g in outputs]
        with twice():
            found = pull(outputs, v, points)
        return v, [torch.zeros_like(d) if h is None else h for d, h in zip(v, found, strict=True)]

    (u, hu), (v, hv) = product(), product()
    pairs = [_wide(a) * _wide(b) for a, b in zip((*u, *v), (*hv, *(-h for h in hu)), strict=True)]
    device = pairs[0].device  # all sums are read at once
    sums = [torch.stack([x.sum().to(device) for x in xs]).sum() for xs in (pairs, [x.abs() for x in pairs])]
    judge = partial(_judge_symmetry, max(torch.finfo(g.dtype).eps for g in outputs))
    if unread is None:
        judge(torch.stack(sums).tolist())
    else:
        unread.append((torch.stack(sums), judge))


def _judge_symmetry(eps: float, found: list[float]) -> None:
    gap, scale = found
    if not math.isfinite(scale):
        raise NonFinite("asked for second derivatives, but the Hessian holds NaN or infinity")
    if abs(gap) > 1e4 * eps * scale:
        raise Undefined(
            f"asked for second derivatives, but those of this graph are not symmetric (off by {abs(gap) / scale:.1e}): "
            "an operation in it has a wrong derivative in torch (layer norm, and batch norm in training mode, under "
            "torch.autograd.grad do), a custom autograd Function detaches something, or what its backward returns is "
            "no derivative (a table with scale_grad_by_freq); write that operation with plain torch calls (a norm by "
            "its mean and variance)"
        )


def _wide(x: Tensor) -> Tensor:
    """In float64 on the CPU; in at least float32 elsewhere, where a device may lack it."""
    return x.double() if x.device.type == "cpu" else x.to(torch.promote_types(x.dtype, torch.float32))


def gradient_of(graph: Graph, wanted: Place) -> Tensor | None:
    """The gradient of a graph's total by a tensor or an edge, differentiable."""
    with twice():
        return pull([graph.total], [graph.seed], [wanted], create_graph=True)[0]


class Products(Protocol):
    """A symmetric matrix over parameters, known by its products."""

    def apply(self, directions: Sequence[Tensor | None], wanted: Sequence[int]) -> list[Tensor]:
        """The rows of the parameters `wanted` of the product with a stack; None: a direction of zero."""
        ...


class HessianProducts:
    """Products with the Hessian of a total, by differentiating its gradient.

    H v = d/dtheta (v . dL/dtheta). Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    def __init__(self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
        self._gradients = gradients
        self._parameters = parameters

    @classmethod
    def of(
        cls, total: Tensor, weight: Tensor | None, parameters: Sequence[Tensor], unread: Unread | None = None
    ) -> HessianProducts:
        """Products with the Hessian of `total` (times `weight`); raises as `check_second`, whose `unread` is."""
        weight = torch.ones_like(total) if weight is None else weight
        check_functions([(total.grad_fn, 0)])
        check_sparse([(total.grad_fn, 0)])
        with twice():
            gradients = pull([total], [weight], parameters, create_graph=True)
        check_second(gradients, parameters, unread)
        return cls(gradients, parameters)

    def apply(self, directions: Sequence[Tensor | None], wanted: Sequence[int]) -> list[Tensor]:
        """The rows `wanted` of the product, `[V, *shape]`."""
        pairs = [
            (g, d)
            for g, d in zip(self._gradients, directions, strict=True)
            if g is not None and g.requires_grad and d is not None
        ]
        return _rows(pairs, [self._parameters[i] for i in wanted], directions)


class GaussNewtonProducts:
    """Products with the generalized Gauss-Newton matrix, from the Hessian of the total in the losses' inputs.

    hessian: its product with stacks of directions, one `[V, *logits]` for each of the losses.

    G v = J^T H_L J v. J v is the derivative by u of v . (J^T u), so two reverse passes give it for any forward.
    diagonals: pairs of an edge and a tensor d, each of which adds J^T diag(d) J v, J the Jacobian of the edge's tensor.
    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """

    def __init__(
        self,
        losses: Sequence[LossUse],
        hessian: Callable[[Sequence[Tensor]], list[Tensor]],
        parameters: Sequence[Tensor],
        diagonals: Sequence[tuple[Place, Tensor]] = (),
    ) -> None:
        self._edges = [*(loss.logits for loss in losses), *(edge for edge, _ in diagonals)]
        self._hessian = hessian
        self._diagonals = [d for _, d in diagonals]
        self._parameters = parameters
        places = [*(loss.call.logits for loss in losses), *self._diagonals]
        self._pull(places)
        _check_once(self._pulled)
        check_sparse(self._edges)
        check_adjoint(self._edges, self._dummies, parameters, (self._forward, self._back))

    def _pull(self, places: Sequence[Tensor]) -> None:
        """Make the graph of J^T u at u = 0: its values are zeros, which nobody reads."""
        zeros = self._zeros = KnownZeros()

        def pulled() -> list[Tensor | None]:
            self._dummies = [zeros.zeros(x, x.shape).detach().requires_grad_() for x in places]
            with twice():
                return pull(self._edges, self._dummies, self._parameters, create_graph=True)

        self._pulled = zeros.run(pulled, dense=True)

    def _forward(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [x[0] for x in self._pushed([d[None] for d in v])]

    def _back(self, u: Sequence[Tensor]) -> list[Tensor]:
        found = pull(self._edges, u, self._parameters)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, self._parameters, strict=True)]

    def _pushed(self, directions: Sequence[Tensor | None]) -> list[Tensor]:
        """J times a stack of directions, `[V, *shape]` at each edge."""
        pairs = [
            (w, d)
            for w, d in zip(self._pulled, directions, strict=True)
            if w is not None and w.requires_grad and d is not None
        ]
        if torch.ops.aten.convolution_backward.default in self._zeros.skipped:
            found = self._zeros.run(lambda: _rows(pairs, self._dummies, directions))
            return [x.clone() if self._zeros.known(x) else x for x in found]
        return _rows(pairs, self._dummies, directions)

    def apply(self, directions: Sequence[Tensor | None], wanted: Sequence[int]) -> list[Tensor]:
        """The rows `wanted` of the product, `[V, *shape]`."""
        pushed = self._pushed(directions)
        top = len(self._edges) - len(self._diagonals)
        sent = self._hessian(pushed[:top])
        sent += [d * x for d, x in zip(self._diagonals, pushed[top:], strict=True)]
        return _rows(list(zip(self._edges, sent, strict=True)), [self._parameters[i] for i in wanted], directions)


def _rows(
    pairs: Sequence[tuple[Place, Tensor]], inputs: Sequence[Tensor], directions: Sequence[Tensor | None]
) -> list[Tensor]:
    """`pull_stack` of (output, stack) pairs, zeros without a path."""
    count = next(len(d) for d in directions if d is not None)
    found: list[Tensor | None] = [None for _ in inputs]
    if pairs and inputs:
        with twice():
            found = pull_stack([out for out, _ in pairs], [stack for _, stack in pairs], inputs, decided)
    return [
        x.new_zeros(count, *x.shape) if g is None else g.detach().to(x.dtype)
        for x, g in zip(inputs, found, strict=True)
    ]
