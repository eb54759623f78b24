"""One observed backward pass: its losses, where its samples lie, and the values of each quantity."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import torch

from layerwise.errors import AmbiguousSamples, BadInput, SamplesMixed, Undefined
from layerwise.gradient.compiled import Backend, CompiledContractions
from layerwise.gradient.derived import without_rows
from layerwise.gradient.parameter import ParameterGradient
from layerwise.gradient.parts import Part, RowsPart, for_sums, parts_of
from layerwise.graph.coverage import Graph
from layerwise.graph.decisions import with_assumed_decisions
from layerwise.graph.loss_curvature import LossCurvature, loss_curvatures
from layerwise.graph.real_rows import RealRows, measure_rows
from layerwise.graph.samples import SampleLayout, measure
from layerwise.graph.samples.memo import memo_of, recalled, remember
from layerwise.losses import DeclaredLikelihood, Likelihood
from layerwise.observation.guards import Room
from layerwise.observation.union import Batch, Values
from layerwise.quantities.base import Quantity
from layerwise.ranks.trainers import started
from layerwise.rows.base import RowNumbers
from layerwise.tape.tape import Tape
from layerwise.tape.uses import Use
from layerwise.tensors import wide_type

__all__ = ["BackwardPass", "PassSettings"]

R = TypeVar("R")

_ANOTHER_KIND = (
    'asked for {!r} with on_nonfinite="defer", which waits for nothing, and so assumes that targets are ignored and '
    "second derivatives vanish where they did in the last batch of this layout; in this one they do elsewhere. Observe "
    'it again: batches of this layout are waited for from now on, as always with on_nonfinite=None or "raise"'
)


class PassSettings(NamedTuple):
    """How to observe: the samples (None: as the batch, the targets and the losses say), the scale, the results' type.

    samples: their number N, or a sample number for each loss term. parameters: patterns of the names of those whose
    quantities are wanted; None: all. pooled: whether several backward passes join to one
    batch, of which a mean runs over all terms; else losses add up. unscaled: whether the quantities are those of the
    loss without the factor by which a gradient scaler multiplied it. defer: whether NaN and infinity are looked for
    when a result is read, and not in the backward pass; None: on accelerators. grad: "autograd", or "rows" for the
    gradients of weights as sums of the per-sample gradients that a quantity forms. keeps_non_finite: whether a gradient
    that is not finite stays in `.grad`, as a backward pass that nobody observes leaves it; else it is taken out again.
    backend: what compiles the contractions; None: they are not compiled.
    """

    samples: int | torch.Tensor | None = None
    scale: str = "loss"
    dtype: torch.dtype | None = None
    pooled: bool = False
    unscaled: bool = False
    parameters: str | Sequence[str] | None = None
    defer: bool | None = False
    grad: str = "autograd"
    keeps_non_finite: bool = False
    backend: Backend | None = None


class BackwardPass:
    """What the stages of one observed backward pass share; `values` holds what each quantity has so far, by number.

    streamed, columns, in_graph: the numbers of the quantities by the kind of their cotangent.
    """

    def __init__(
        self,
        tape: Tape,
        graph: Graph,
        known: Sequence[Likelihood],
        quantities: Sequence[Quantity],
        model: Any,
        settings: PassSettings,
    ) -> None:
        self.tape, self.graph, self.quantities = tape, graph, quantities
        self.layout: SampleLayout | None = None
        self._likelihoods, self.model, self._settings = known, model, settings
        self._room = Room()
        self._compiled = None if settings.backend is None else _contractions_of(model, settings.backend)
        self._unstructured: Collection[str] = ()  # parameters whose rows need no sample structure where none is asked
        declared = [*known, *(DeclaredLikelihood(own.call, self._samples()) for own in graph.own)]
        _check_scale(settings.scale, graph, declared)
        for q in quantities:
            q.check_losses(declared)
            self._check_complex(q)
        mixed = self._mixed_parameters()
        if mixed or any(q.needs_samples or q.cotangent.needs_layout(bool(graph.own)) for q in quantities):
            self.layout = measure(tape, graph, model, settings.samples)
        elif len({id(use.batch) for use in graph.uses}) > 1:  # one of them may be a constant, which all samples share
            self.layout = self._layout_if_shared()
        if self.layout is not None:
            self.graph = self.layout.graph(graph)
        self._real_rows: RealRows | None = None
        if asked := [q for q in quantities if q.real_rows]:
            self._real_rows = self.decided(asked[0], "real rows", lambda: measure_rows(graph, known))
        self.batch = Batch(self._samples(), _terms(declared), _unknown_reduction(declared))
        self.union = self.batch.union(settings.scale)
        numbers = range(len(quantities))
        self.in_graph = [i for i in numbers if quantities[i].cotangent.in_graph]
        self.streamed = [i for i in numbers if quantities[i].cotangent.streamed]
        self.columns = [i for i in numbers if i not in self.in_graph and i not in self.streamed]
        self.values: dict[int, Values] = {i: {} for i in numbers}

    @property
    def sums_rows(self) -> bool:
        """Whether the gradients of weights may be sums of rows, each in its parameter's own type."""
        asked = self._settings.grad == "rows" and self._settings.dtype is None
        return asked and self.tape.ordinary and not started()

    def _layout_if_shared(self) -> SampleLayout | None:
        """The samples' layout where a use's output is shared by all of them, which takes its rows apart."""
        layout = self.known_layout()
        return layout if layout is not None and layout.shared else None

    def _check_complex(self, quantity: Quantity) -> None:
        found = [name for name in self.graph.parameters() if self.tape.parameters[name].is_complex()]
        if found and not quantity.wirtinger:
            raise Undefined(
                f"asked for {quantity!r}, but the parameter {found[0]!r} is complex; second order and sketches are "
                "defined for real parameters. Hold its parts as one real parameter [..., 2] and call "
                "torch.view_as_complex on it in the forward, or freeze it"
            )

    def _mixed_parameters(self) -> set[str]:
        """Parameters for which per-sample gradients are needed although no quantity asked for them (no row form)."""
        asked = [q for q in self.quantities if not (q.needs_samples or q.cotangent.in_graph)]
        if not asked:
            return set()
        mixed = without_rows(self.tape, self.graph.asked_uses)
        if all(q.rows_only for q in asked):
            self._unstructured = self.tape.parameters.keys()
            return set()
        self._unstructured = self.tape.parameters.keys() - mixed
        return mixed

    def _samples(self) -> int:
        if self.layout is not None:
            return self.layout.n
        asked = self._settings.samples
        if asked is not None:
            return int(asked.max()) + 1 if isinstance(asked, torch.Tensor) else asked
        batch = self.graph.batch
        return batch.shape[0] if batch is not None and batch.dim() else 1

    def known_layout(self) -> SampleLayout | None:
        """The samples' layout, or None where they cannot be told apart."""
        if self.layout is None:
            with suppress(SamplesMixed, AmbiguousSamples, BadInput):
                return measure(self.tape, self.graph, self.model, self._settings.samples)
        return self.layout

    def decided(self, quantity: Quantity, what: str, run: Callable[[], R]) -> R:
        """The result of a function for a quantity; what it decides by numbers is read with an accelerator's one wait.

        The decisions are compared with the first result where nothing is to be waited for, until they were others once.
        """
        graph = self.graph
        if graph.total.device.type == "cpu":
            return run()
        calls = tuple((use.call.func, use.call.out_shape, *use.names) for use in graph.uses)
        key, memo = (what, calls, tuple(map(str, graph.losses))), memo_of(self.model)
        differed = (*key, "differed")

        def later(flags: Sequence[torch.Tensor], assumed: list[bool]) -> None:
            def judge(found: list[float]) -> None:
                if list(map(bool, found)) != assumed:
                    remember(memo, differed, True)
                    raise BadInput(_ANOTHER_KIND.format(quantity))

            if flags and graph.unread is not None:
                graph.unread.append((list(flags), judge))

        waits = self._settings.defer is not True or recalled(memo, differed)
        found, answers = with_assumed_decisions(recalled(memo, key), run, None if waits else later)
        remember(memo, key, answers)
        return found

    @cached_property
    def curvatures(self) -> list[LossCurvature]:
        """Where curvature enters the graph."""
        return loss_curvatures(self.graph, self._likelihoods, self.layout)

    @property
    def stackable(self) -> bool:
        """Whether rows of several parameters may stand as those of one: nothing tells them apart by their use."""
        return self._real_rows is None and self._compiled is None

    def samples_of(self, use: Use) -> Any:
        """Where the samples lie in the output of a use; None where no parameter needs per-sample structure."""
        return None if self.layout is None else self.layout.uses[use.index]

    def gradient_of_many(self, name: str, part: RowsPart) -> ParameterGradient:
        """The gradients of parameters alike as that of one of them, in the type of their sums."""
        like = self.tape.parameters[name]
        return ParameterGradient(name, like.shape, [for_sums(part, like.dtype, self._settings.dtype)])

    def parts(
        self, use: Use, g: torch.Tensor, needs_samples: bool = True, rows_only: bool = False, later: bool = False
    ) -> list[tuple[str, Part]]:
        """What cotangents `[V, *out_shape]` of one use contribute to each parameter; arguments as for `parts_of`."""
        where = self.samples_of(use)
        unstructured: Collection[str] = () if needs_samples else self._unstructured
        found = parts_of(self.tape, use, g, where, later, unstructured, rows_only, self.graph.asked)
        if self._real_rows is not None:
            found = [(name, self._with_masks(part, None if name in unstructured else where)) for name, part in found]
        dtype, parameters = self._settings.dtype, self.tape.parameters
        return [(name, for_sums(part, parameters[name].dtype, dtype)) for name, part in found]

    def dtype_of(self, name: str) -> torch.dtype:
        """The type of the sums and results of a parameter."""
        return self._settings.dtype or wide_type(self.tape.parameters[name].dtype)

    def read_uses(self) -> list[Use]:
        """The uses of which something may be read for a quantity: all where real rows are told by those beside them."""
        return self.graph.asked_uses if self._real_rows is None else self.graph.uses

    def _with_masks(self, part: Part, where: Any) -> Part:
        """The part with a function that tells its real rows; where: the place of the samples that its rows follow."""
        if not isinstance(part, RowsPart) or part.slot.bias or self._real_rows is None:
            return part
        order = None if isinstance(where, RowNumbers) else where
        return replace(part, real=partial(self._real_rows.mask, part.use, part.slot, order))

    def compute(self, indices: Sequence[int], gradient: ParameterGradient) -> list[tuple[Any, ...]]:
        """The values of some quantities, by number, of one stack for the parameter.

        Raises Undefined where memory has no room, and BadInput where they are to be compiled and are not.
        """
        asked, like = [self.quantities[i] for i in indices], self.tape.parameters[gradient.name]
        compiled = None if self._compiled is None else self._compiled.of(asked, gradient)
        values = []
        for quantity in asked:
            self._room.take(quantity, gradient, like, self.dtype_of(gradient.name))
            if compiled is None:
                values.append(quantity.compute(gradient))
        return values if compiled is None else compiled()

    def add(self, i: int, gradient: ParameterGradient, new: tuple[Any, ...]) -> None:
        """Add one stack's values of the i-th quantity to those of the parameter."""
        old = self.values[i].get(gradient.name)
        self.values[i][gradient.name] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))


def _contractions_of(model: Any, backend: Backend) -> CompiledContractions:
    """A model's graphs by a backend, which live as long as the model."""
    memo, key = memo_of(model), ("contractions", backend)
    found: CompiledContractions | None = recalled(memo, key)
    if found is None:
        found = CompiledContractions(backend)
        remember(memo, key, found)
    return found


def _check_scale(scale: str, graph: Graph, declared: Sequence[Likelihood]) -> None:
    unknown, means = _unknown_reduction(declared), {lik.mean for lik in declared}
    if scale == "sample" and unknown is not None:
        raise Undefined(
            f'scale="sample" asks for N g_n under a mean, but whether {unknown} is a mean is not said; mark it: '
            'lw.as_loss(fn, reduction="mean") or "sum", or take scale="loss"'
        )
    if scale == "sample" and len(means) > 1:
        raise Undefined('scale="sample" asks for N g_n under a mean, but this total adds a mean and a sum')
    if scale == "sample" and any(loss.call.reduction == "none" for loss in graph.losses):
        raise Undefined(
            'scale="sample" asks for N g_n under a mean, but this loss is reduced by hand (reduction="none"), so '
            'whether it is a mean cannot be told; use reduction="mean" or "sum", or scale="loss"'
        )


def _unknown_reduction(likelihoods: Sequence[Likelihood]) -> str | None:
    """The name of a loss that does not say whether it is a mean."""
    return next((lik.call for lik in likelihoods if lik.mean is None), None)


def _terms(likelihoods: Sequence[Likelihood]) -> tuple[float | torch.Tensor, ...] | None:
    if not all(lik.mean for lik in likelihoods):
        if any(lik.mean for lik in likelihoods):
            return tuple(lik.terms if lik.mean else float("nan") for lik in likelihoods)
        return None
    return tuple(lik.terms for lik in likelihoods)
