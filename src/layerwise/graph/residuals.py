"""The residuals of the Hessian beyond the Gauss-Newton matrix, where only elementwise functions are curved.

With z the output of some uses, the parameters of all others fixed,

    d²L/dz² = J_f^T H_L J_f + sum_k J_k^T diag(r_k) J_k,      r_k = g_k s_k''(x_k)

the generalized Gauss-Newton matrix, and a residual for each elementwise function s_k, J_k the Jacobian of its input x_k
and g_k the gradient at its output. Whether and how a node of the autograd graph is curved is measured by
differentiating the node's own backward function: there is no rule for any activation. A node that is curved in another
way (a product of two activations, a softmax, a norm) is listed by name, with the uses below it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from layerwise.graph.coverage import Graph
from layerwise.graph.decisions import decided
from layerwise.graph.probes import same
from layerwise.graph.products import twice
from layerwise.graph.second.known_zeros import KnownZeros
from layerwise.graph.walk import Edge, Node, by_node, children, distinct, finished, inputs, next_uses, nodes
from layerwise.tape.pull import pull
from layerwise.tape.uses import Use

__all__ = ["Residual", "ResidualCurvature", "powers", "proved", "residual_curvature"]

_Sent = Callable[["_Walk", Node, int], Tensor | None]  # the cotangent that is sent into an output of a node
LossHessian = Callable[[Sequence[Tensor]], list[Tensor]]

_EXPONENTS = 12  # probes are powers of two up to this exponent: products with them round like those with one


class Residual(NamedTuple):
    """The second derivatives r of elementwise functions, at an edge of the graph.

    edge: of the functions' input. value: r, of the input's shape. below: the indices of the uses below the edge.
    """

    edge: GradientEdge
    value: Tensor
    below: frozenset[int]


@dataclass(frozen=True)
class ResidualCurvature:
    """The curvature between the losses of a graph and its uses.

    residuals: in the order in which cotangents meet them. other: by the index of a use, the name of a node above the
    use that is curved in another way. flat: whether each node's second derivatives were found to be zero.
    """

    residuals: Sequence[Residual]
    other: dict[int, str]
    walk: _Walk
    flat: bool = False

    def next_uses(self, edges: Sequence[GradientEdge]) -> list[Use]:
        """The uses nearest to some edges: those that are reached without passing through another one."""
        return next_uses(edges, self.walk.use_at)


def residual_curvature(graph: Graph) -> ResidualCurvature:
    """The residuals of a graph, and the uses with nodes above them that are curved in another way.

    Second derivatives times gradients are zero for any gradient where they are for random ones, which takes no pass.
    Raises Undefined where an operation has no second derivative.
    """
    walk = _Walk(graph)
    if all(_of(node, walk, _Walk.noise)[0] == "flat" for node in walk.order):
        return ResidualCurvature([], {}, walk, flat=True)
    found: dict[Edge, Residual] = {}
    other: dict[int, str] = {}
    for node in walk.order:
        edges = walk.live(node)
        kind, value = _of(node, walk, _Walk.gradient)
        if kind == "other":
            name = ", ".join(map(repr, walk.use_at[node])) if node in walk.use_at else node.name()
            for index in walk.indices(edges):
                other.setdefault(index, name)
        elif value is not None:
            (edge,) = distinct(edges)
            key = edge.node, edge.output_nr
            old = found.pop(key, None)  # two functions of one tensor: their second derivatives add
            value = value if old is None else old.value + value
            found[key] = Residual(edge, value, frozenset(walk.indices([edge])))
    return ResidualCurvature(list(found.values()), other, walk)


class _Walk:
    """The nodes between losses and uses, in the order in which cotangents meet them, and their gradients."""

    def __init__(self, graph: Graph) -> None:
        self.use_at = by_node(graph.uses)
        self._below = inputs(self.use_at)
        self._reach: dict[Node | None, int] = {None: 0}  # the uses below each node, one bit each
        for node in finished([loss.logits.node for loss in graph.losses], self._below):
            self._reach[node] = sum(1 << use.index for use in self.use_at.get(node, ()))
            for child, *_ in children(node, self._below):
                self._reach[node] |= self._reach[child]
        self.order = [node for node in reversed(self._reach) if node is not None and self._reach[node]]
        self._graph = graph

    @cached_property
    def _gradients(self) -> dict[Edge, Tensor | None]:
        places = [(node, nr) for node in self.order for nr in range(len(node._input_metadata))]
        pulled = pull([self._graph.total], [self._graph.seed], [GradientEdge(*place) for place in places])
        return {place: None if g is None else g.detach() for place, g in zip(places, pulled, strict=True)}

    def gradient(self, node: Node, nr: int) -> Tensor | None:
        """The gradient of the total at one output of a node; None where there is no path."""
        return self._gradients[node, nr]

    def noise(self, node: Node, nr: int) -> Tensor | None:
        """Random numbers in the place of a gradient."""
        like = node._input_metadata[nr]
        return _random(like.shape, like.dtype, like.device, nr)

    def live(self, node: Node) -> list[GradientEdge | None]:
        """The edges of a node's data, in the node's order; None where no use is below."""
        return [GradientEdge(*edge) if self._reach[edge[0]] else None for edge in children(node, self._below)]

    def inputs(self, use: Use) -> list[GradientEdge]:
        """The edges of a use's data that have other uses below them."""
        return [edge for edge in distinct(use.inputs) if self._reach[edge.node]]

    def indices(self, edges: Sequence[GradientEdge | None]) -> list[int]:
        """The indices of the uses below some edges."""
        bits = 0
        for edge in edges:
            bits |= 0 if edge is None else self._reach[edge.node]
        return [i for i in range(bits.bit_length()) if bits >> i & 1]


# -- one node -----------------------------------------------------------------------------------------------


def _of(node: Node, walk: _Walk, sent: _Sent) -> tuple[str, Tensor | None]:
    """A node's kind for some cotangents: flat, elementwise (with its second derivative times them) or other."""
    return (_of_uses if node in walk.use_at else _of_node)(node, walk, sent)


def _of_node(node: Node, walk: _Walk, sent: _Sent) -> tuple[str, Tensor | None]:
    """The kind of a node without uses."""
    cotangents = [sent(walk, node, nr) for nr in range(len(node._input_metadata))]
    if all(g is None for g in cotangents):
        return "flat", None
    if not callable(node):  # a Python function: its backward may read anything
        return "other", None
    with twice():
        back = node(*cotangents)
    back = (back,) if isinstance(back, Tensor) or back is None else back
    return _second(list(back), walk.live(node))


def _of_uses(node: Node, walk: _Walk, sent: _Sent) -> tuple[str, Tensor | None]:
    """The kind of a node of uses, as a function of their data: linear uses are flat, all others other."""
    wanted = distinct(walk.live(node))
    places = {use.edge.output_nr: use.edge for use in walk.use_at[node]}
    pairs = [(edge, g) for nr, edge in places.items() if (g := sent(walk, node, nr)) is not None]
    if not wanted or not pairs or _reads_no_data([edge for edge, _ in pairs], [g for _, g in pairs], wanted):
        return "flat", None
    with twice():
        back = pull([edge for edge, _ in pairs], [g for _, g in pairs], wanted, create_graph=True)
    kind, value = _second(back, wanted)
    return ("flat" if kind == "flat" else "other"), None


def _reads_no_data(edges: Sequence[GradientEdge], like: Sequence[Tensor], wanted: Sequence[GradientEdge]) -> bool:
    """Whether the graph of the cotangents sent from some edges, of zeros, does not lead to where they are sent."""
    zeros = KnownZeros()

    def sent() -> list[Tensor | None]:
        with twice():
            return pull(edges, [zeros.zeros(g, g.shape) for g in like], wanted, create_graph=True)

    found = zeros.run(sent, dense=True)
    ends = {edge.node for edge in wanted}
    return not any(node in ends for node in nodes((g.grad_fn, 0) for g in found if g is not None))


def _second(back: Sequence[Tensor | None], edges: Sequence[GradientEdge | None]) -> tuple[str, Tensor | None]:
    """The kind of a matrix M of second derivatives (zero, diagonal, other), from the gradient `back`; its diagonal."""
    pairs = [(b, e) for b, e in zip(back, edges, strict=True) if b is not None and e is not None and b.requires_grad]
    wanted = distinct(edges)
    if not pairs:
        return "flat", None

    def product(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        with twice():
            return pull([b for b, _ in pairs], cotangents, wanted)

    seen = product([_random(b.shape, b.dtype, b.device, seed) for seed, (b, _) in enumerate(pairs)])
    if all(m is None or not decided(m.any()) for m in seen):
        return "flat", None
    if len(wanted) > 1 or pairs[0][0].is_complex():  # of a complex number the second derivatives are a 2 by 2 block
        return "other", None
    signs = powers(pairs[0][0], 0)
    (m,), (r,) = (product([x.expand_as(b) for b, _ in pairs]) for x in (signs, torch.ones_like(signs)))
    if m is None or r is None:
        return "other", None
    by_element = m.shape == signs.shape and same(m, r * signs)  # bitwise, in each element by itself
    return ("elementwise", r.detach()) if by_element else ("other", None)


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Uniform random numbers, the same in every run: no sum of products with them is zero by chance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tuple(shape), generator=generator, dtype=dtype if dtype.is_complex else None).to(device, dtype)


def powers(like: Tensor, seed: int) -> Tensor:
    """Random powers of two with random signs, the same in every run; in both parts of complex numbers."""
    if like.is_complex():
        return torch.complex(powers(like.real, seed), powers(like.imag, seed + 2**16))
    steps = torch.arange(-_EXPONENTS, _EXPONENTS + 1, dtype=torch.float64).exp2()
    choice = torch.randint(2 * len(steps), like.shape, generator=torch.Generator().manual_seed(seed))
    return torch.cat([steps, -steps]).to(like.dtype)[choice].to(like.device)


# -- proof --------------------------------------------------------------------------------------------------


def proved(graph: Graph, hessian: LossHessian, found: ResidualCurvature, uses: Collection[int]) -> bool:
    """Whether the Hessian by the outputs of some uses is the GGN matrix plus the residuals, along a random direction.

    hessian: products with the Hessian of the total in what its losses receive.

    It is where all is flat: only the losses are curved then. Otherwise both are compared, at the uses that have no
    other one of `uses` below them: all curvature above acts there.
    """
    if found.flat:
        return True
    covered = [use for use in graph.uses if use.index in uses]
    below = {use.index: {u for u in found.walk.indices([use.edge]) if u != use.index} for use in covered}
    edges = [use.edge for use in covered if not below[use.index] & set(uses)]
    with twice():
        gradients = pull([graph.total], [graph.seed], edges, create_graph=True)
    reached = [(g, e) for g, e in zip(gradients, edges, strict=True) if g is not None]
    if not reached:
        return True
    wanted = [e for _, e in reached]
    generator = torch.Generator().manual_seed(0)
    v = [torch.rand(g.shape, generator=generator).sub_(0.5).to(g) for g, _ in reached]
    whole: list[Tensor | None] = [None] * len(wanted)
    pairs = [(g, x) for (g, _), x in zip(reached, v, strict=True) if g.requires_grad]
    if pairs:
        with twice():
            whole = pull([g for g, _ in pairs], [x for _, x in pairs], wanted)
    mine = _gauss_newton(graph, hessian, found.residuals, wanted, v)
    for h, m, x in zip(whole, mine, v, strict=True):
        h, m = (torch.zeros_like(x) if y is None else y for y in (h, m))
        if not x.numel():
            continue
        gap, scale = (h - m).abs().max(), torch.maximum(h.abs().max(), m.abs().max())
        if not decided(gap <= 1e4 * torch.finfo(x.dtype).eps * scale):  # NaN: not proved
            return False
    return True


def _gauss_newton(
    graph: Graph,
    hessian: LossHessian,
    residuals: Sequence[Residual],
    inputs: Sequence[GradientEdge],
    v: Sequence[Tensor],
) -> list[Tensor | None]:
    """The product of `J_f^T H_L J_f + sum_k J_k^T diag(r_k) J_k` with a direction at some edges."""
    places = [loss.logits for loss in graph.losses] + [r.edge for r in residuals]
    shapes = [loss.call.logits for loss in graph.losses] + [r.value for r in residuals]
    dummies = [torch.zeros_like(x).requires_grad_() for x in shapes]
    with twice():
        pulled = pull(places, dummies, inputs, create_graph=True)
        pairs = [(p, x) for p, x in zip(pulled, v, strict=True) if p is not None and p.requires_grad]
        pushed = pull([p for p, _ in pairs], [x for _, x in pairs], dummies) if pairs else [None] * len(dummies)
    kept = [torch.zeros_like(d) if x is None else x.detach() for d, x in zip(dummies, pushed, strict=True)]
    sent = [x[0] for x in hessian([x[None] for x in kept[: len(graph.losses)]])]
    sent += [r.value * x for r, x in zip(residuals, kept[len(sent) :], strict=True)]
    return pull(places, sent, inputs)
