"""Proof that the user's own autograd functions have the second derivatives that their first ones say.

A function may prepare its gradient in the forward pass (fused losses do): its backward then multiplies by a constant,
and torch differentiates that a second time without a word. So each such function is run again, once for each shape of
its arguments, at random ones: a directional finite difference of its gradient is compared with the product.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function

from layerwise.errors import Undefined
from layerwise.graph.walk import Edge, Node, nodes
from layerwise.tape.pull import pull
from layerwise.tape.uses import place
from layerwise.tensors import is_out_of_memory

__all__ = ["check_adjoint", "check_functions", "check_sparse", "custom_functions", "is_custom", "written_at"]

Map = Callable[[Sequence[Tensor]], Sequence[Tensor]]

# A memo of proofs by function: nothing in it changes a result.
_PROVED: weakref.WeakKeyDictionary[type, dict[Any, bool]] = weakref.WeakKeyDictionary()
_MEMO_LIMIT = 64
_NOT_FOUND = object()
_WRONG = (
    "it gives others than its gradient has at neighbouring points (does its forward prepare the gradient, as fused "
    "losses do?)"
)
_DETACHED = "its backward, differentiated in its argument, is not its own adjoint (does it detach it?)"
_UNKNOWN = (
    "they cannot be proved, since it cannot be run again (keep its arguments under their own names on the context, "
    "`ctx.gamma = gamma`)"
)
_OPERATOR = "they cannot be proved, since operators of torch.library cannot be run again as autograd ran them"
_GRID = "GridSampler"
_SPARSE = ("SparseCooTensorWithDimsAndTensorsBackward0",)
_OUTLIERS = 0.02  # of the elements: those next to a kink


def custom_functions(roots: Iterable[Any], ends: Collection[Node] = ()) -> Iterator[Node]:
    """The nodes of functions of the user's own below some edges; ends: nodes at which the walk ends."""
    for node in nodes(roots, dict.fromkeys(ends, ())):
        if node not in ends and is_custom(node):
            yield node


def check_functions(roots: Iterable[Any], ends: Collection[Node] = ()) -> None:
    """Raise Undefined, by its name, for a function of the user's own without a proved second derivative.

    roots: edges to walk down from. ends: nodes at which the walk ends.
    """
    for node in custom_functions(roots, ends):
        found = _proved(node)
        if not found:
            unknown = _OPERATOR if _is_operator(node) else _UNKNOWN
            raise Undefined(_refusal(node, _WRONG if found is False else unknown))


def check_sparse(roots: Iterable[Any]) -> None:
    """Raise Undefined where sparse tensors are made below some edges: torch takes their gradient for a constant."""
    for node in nodes(roots):
        if node.name() in _SPARSE:
            raise Undefined(
                f"asked for second derivatives through torch.sparse_coo_tensor (autograd's {node.name()}), which torch "
                "takes for zero. Write the values into a dense tensor (`w = torch.zeros(shape)`, "
                "`w[rows, columns] = values`), or freeze them"
            )


def check_adjoint(
    roots: Iterable[Any], outputs: Sequence[Tensor], inputs: Sequence[Tensor], maps: tuple[Map, Map]
) -> None:
    """Raise Undefined where J v, by two backward passes, is other than the adjoint of J^T below some edges.

    Functions of the user's own may do so, and bilinear sampling of a grid at the centres of pixels, where it has a kink
    and torch takes another side of it in the second pass.
    outputs, inputs: tensors of the shapes of those of J. maps: v to J v, and u to J^T u.
    """
    found = next(custom_functions(roots), None)
    grid = next((node for node in nodes(roots) if node.name().startswith(_GRID)), None) if found is None else None
    if found is None and grid is None:
        return
    forward, back = maps
    u, v = ([d.detach() for d in _noise(like, 3 + i)] for i, like in enumerate((outputs, inputs)))
    pairs = zip((*u, *back(u)), (*forward(v), *(-x for x in v)), strict=True)
    terms = torch.cat([(a.double() * b.double()).flatten().cpu() for a, b in pairs])
    eps = max(torch.finfo(x.dtype).eps for x in (*u, *v))
    if float(terms.sum().abs()) <= eps**0.5 * float(terms.abs().sum()):
        return
    if found is None:
        raise Undefined(
            "asked for products with the Jacobian through F.grid_sample, some points of "
            "which lie on the centre of a pixel, where the interpolation has a kink: torch takes one side of it in "
            "the gradient and the other in its derivative. Move the points a little (grid + 1e-6), take "
            'mode="bicubic", or ask for '
            "DiagGGN or a Kronecker factor, which need the gradient's side alone"
        )
    raise Undefined(_refusal(found, _DETACHED))


def _refusal(node: Node, why: str) -> str:
    return (
        f"asked for second derivatives through {node.name()}, the backward of a function of one's own"
        f"{written_at(node)} (torch.autograd.Function, torch.library): {why}. Write that function with torch calls, "
        "which can be differentiated twice, or freeze what is below it"
    )


def written_at(node: Any) -> str:
    """The line where the forward of a function of one's own is written, in words; nothing where it is not known."""
    if _is_operator(node):  # written in torch
        return ""
    forward = inspect.unwrap(getattr(getattr(node, "_forward_cls", None), "forward", None) or type(node))
    code = getattr(forward, "__code__", None)
    return "" if code is None else place((code.co_filename, code.co_firstlineno))


def is_custom(node: Any) -> bool:
    """Whether a node is the backward of a function that is neither torch's nor ours."""
    if not isinstance(node, BackwardCFunction):
        return "CppNode" in node.name()
    module = node._forward_cls.__module__  # type: ignore[attr-defined]
    return module.split(".")[0] not in ("torch", "layerwise") or _is_operator(node)


def _is_operator(node: Any) -> bool:
    """Whether a node is the backward of an operator of `torch.library`."""
    return getattr(getattr(node, "_forward_cls", None), "__module__", None) == "torch._library.autograd"


def _proved(node: Any) -> bool | None:
    """Whether the function's second derivatives are those of its first ones; None where it cannot be run again."""
    given = _arguments(node) if isinstance(node, BackwardCFunction) else None
    if given is None:
        return None
    memo = _PROVED.setdefault(node._forward_cls, {})
    key = tuple(_described(x) for x in given)
    if key not in memo:
        found = _tried(node._forward_cls.apply, given)
        if found is None:
            return None
        if len(memo) >= _MEMO_LIMIT:
            memo.clear()
        memo[key] = found
    return memo[key]


def _described(x: Any) -> Any:
    return (x.shape, x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else (type(x), repr(x))


def _arguments(node: Any) -> list[Any] | None:
    """Arguments to run the function again with: random ones where it is differentiated, else those that it keeps.

    The others are looked up by their names among what the function has put onto its context; one more may be the only
    tensor that it has saved. None where some are not found.
    """
    needs: Sequence[bool] = getattr(node, "needs_input_grad", ())
    below: list[Edge] = [edge for edge in node.next_functions if edge[0] is not None]
    function = node._forward_cls
    names = list(inspect.signature(function.forward).parameters)
    if function.setup_context is Function.setup_context:
        names = names[1:]  # the context
    if not needs or len(below) != sum(needs) or len(names) != len(needs):
        return None
    kept = vars(node)
    given: list[Any] = [_NOT_FOUND] * len(needs)
    generator = torch.Generator().manual_seed(0)
    edge = iter(below)
    for i, need in enumerate(needs):
        given[i] = _random(*next(edge), generator) if need else kept.get(names[i], _NOT_FOUND)
    left = [i for i, x in enumerate(given) if x is _NOT_FOUND]
    if left:
        saved = [t for t in node.saved_tensors if t is not None and not t.requires_grad]
        if len(left) > 1 or len(saved) != 1:
            return None
        given[left[0]] = saved[0].detach()
    return given


def _random(child: Any, output: int, generator: torch.Generator) -> Tensor:
    """Random numbers like the tensor of an edge."""
    like = child.variable if hasattr(child, "variable") else child._input_metadata[output]
    x = torch.randn(tuple(like.shape), generator=generator, dtype=torch.float64)
    return x.to(like.device, like.dtype).requires_grad_()


def _tried(function: Callable[..., Any], given: Sequence[Any]) -> bool | None:
    """The comparison in double precision, or in the function's own where it takes no other; None where it fails."""
    double = [_as(x, torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
    for arguments in (double, given):
        try:
            with torch.enable_grad():
                return _agree(function, arguments)
        except Exception as error:  # whatever the user's own code raises on arguments that it does not expect
            if is_out_of_memory(error):
                raise
            continue
    return None


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).requires_grad_(x.requires_grad)


class _Point:
    """A function at one point: its outputs, its gradients for cotangents u, and their derivatives in u along v."""

    def __init__(self, function: Callable[..., Any], given: Sequence[Any], u: list[Tensor] | None = None) -> None:
        out = function(*given)
        out = out if isinstance(out, tuple) else (out,)
        self.outputs = [y for y in out if isinstance(y, Tensor) and y.requires_grad]
        self.x = [t for t in given if _differentiated(t)]
        self.u = _noise(self.outputs, 1) if u is None else u
        found = pull(self.outputs, self.u, self.x, create_graph=True)
        self.gradient = [torch.zeros_like(t) if g is None else g for g, t in zip(found, self.x, strict=True)]

    def pushed(self, v: Sequence[Tensor]) -> list[Tensor]:
        """J v, the derivative of v . J^T u by u."""
        return self._derivative(v, self.u)

    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """The derivative of v . J^T u by the arguments."""
        return self._derivative(v, self.x)

    def _derivative(self, v: Sequence[Tensor], by: Sequence[Tensor]) -> list[Tensor]:
        kept = [(g, d) for g, d in zip(self.gradient, v, strict=True) if g.requires_grad]
        found = pull([g for g, _ in kept], [d for _, d in kept], by) if kept else [None] * len(by)
        return [torch.zeros_like(t) if h is None else h for h, t in zip(found, by, strict=True)]


def _differentiated(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _noise(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).to(t).requires_grad_() for t in like]


def _agree(function: Callable[..., Any], given: Sequence[Any]) -> bool:
    """Whether central differences of outputs and gradients along a random direction are the products with it."""
    here = _Point(function, given)
    v = [d.detach() for d in _noise(here.x, 2)]
    step = 0.1 * torch.finfo(here.x[0].dtype).eps ** (1 / 3)
    ends = []
    for sign in (1, -1):
        moved = iter([(t + sign * step * d).detach().requires_grad_() for t, d in zip(here.x, v, strict=True)])
        ends.append(_Point(function, [next(moved) if _differentiated(t) else t for t in given], here.u))
    high, low = ends
    return _near(here.pushed(v), high.outputs, low.outputs, step, here.outputs) and _near(
        here.product(v), high.gradient, low.gradient, step, here.gradient
    )


def _near(
    products: Sequence[Tensor], high: Sequence[Tensor], low: Sequence[Tensor], step: float, values: Sequence[Tensor]
) -> bool:
    """Whether differences of values over 2 steps are products, but for a few elements next to a kink."""
    for product, above, below, value in zip(products, high, low, values, strict=True):
        slope = ((above - below) / (2 * step)).detach()
        scale = max(float(t.detach().abs().max()) for t in (slope, product, value) if t.numel()) if slope.numel() else 0
        near = (product.detach() - slope).abs() <= torch.finfo(slope.dtype).eps ** 0.25 * scale
        if slope.numel() and float((~near).double().mean()) > _OUTLIERS:
            return False
    return True
