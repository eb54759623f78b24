"""`observe`: many quantities from the user's own backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.graph.cotangents import Second
from layerwise.graph.coverage import prove
from layerwise.graph.loss_curvature import resolved
from layerwise.graph.products import SecondOrder
from layerwise.graph.walk import nodes
from layerwise.observation.backward_pass import Pass
from layerwise.observation.guards import check_covered, check_finite, check_gradient, kept, restore, snapshot
from layerwise.observation.seen import Seen
from layerwise.quantities.base import Quantity, positive
from layerwise.ranks.trainers import GraphTrainers, whole_parameters
from layerwise.tape.pull import accumulated, alone, hooked
from layerwise.tape.tape import Tape

__all__ = ["observe"]


class observe:
    """Compute quantities in the user's ordinary `loss.backward()`.

        with observe(model, Variance(), DiagGGN()) as seen:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        seen.variance["conv1.weight"]

    `.grad` is what it would have been. Results are keyed by parameter name. Several backward passes in one
    context give the quantities of the loss of all batches together: a mean over their union.

    model: an nn.Module, or a mapping of names to tensors for a functional model. samples: the number of
    samples N, by default dim 0 of the batch. scale: "loss" (g_n sum to `.grad`) or "sample" (N g_n for a mean).
    dtype: of the sums and results of all quantities, by default each parameter's own (under autocast too). The
    cotangents come in the types of the graph, second derivatives are taken in them, and means are read off `.grad`.
    Raises UncoveredUse, UnknownLoss, SamplesMixed, Undefined, NonFinite, BadInput; then nothing was changed.
    """

    _keeps_inputs: ClassVar[bool] = False  # whether a subclass reads them after the user's backward pass
    _keeps_outputs = False  # whether it reads what the uses gave

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *quantities: Quantity,
        samples: int | None = None,
        scale: str = "loss",
        dtype: torch.dtype | None = None,
    ) -> None:
        for q in quantities:
            if not isinstance(q, Quantity):
                hint = " (an instance, not the class)" if isinstance(q, type) else ""
                raise BadInput(f"asked to observe {q!r}; give quantities such as Variance(){hint}")
        if scale not in ("loss", "sample"):
            raise BadInput(f'scale must be "loss" or "sample", got {scale!r}')
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise BadInput(f"dtype must be a floating-point type such as torch.float32, or None, got {dtype!r}")
        positive("observe's samples", samples)
        self._model = model
        self._quantities = quantities
        self._samples = samples
        self._scale = scale
        self._dtype = dtype
        self._tape: Tape | None = None
        self._seen: Seen | None = None
        self._second_order: SecondOrder | None = None

    def __enter__(self) -> Seen:
        if self._tape is not None:
            raise BadInput("this observe() is active already; make another one to observe inside it")
        self._tape = self._new_tape()
        self._seen = Seen(self._quantities, self._scale, list(self._tape.parameters))
        self._seen._follow(self._tape.parameters, self._tape.owners)
        self._tape.__enter__()
        if any(isinstance(q.cotangent, Second) for q in self._quantities):
            self._second_order = SecondOrder()
            self._second_order.__enter__()
        return self._seen

    def __exit__(self, *exc: Any) -> None:
        assert self._tape is not None
        tape, self._tape, self._seen = self._tape, None, None  # the results live on alone
        if self._second_order is not None:
            self._second_order.__exit__(*exc)
            self._second_order = None
        tape.__exit__(*exc)
        tape.clear()

    def _new_tape(self) -> Tape:
        tape = Tape(self._model, self._on_backward, self._keeps_outputs, own_losses=True)
        tape.whole = True
        return tape

    def through(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> tuple[Any, Seen]:
        """Observe one backward pass through what an ended tape recorded: the result of `run`, and what was seen.

        run: starts the pass from `total` (times `weight`). For interfaces that record in their own way.
        """
        seen = self._seen = Seen(self._quantities, self._scale, list(tape.parameters))
        return self._on_backward(tape, total, weight, run), seen

    def _on_backward(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        """Run the user's backward pass and everything that it is observed with."""
        seen = self._seen
        assert seen is not None
        if total.is_meta:
            raise BadInput("asked to observe a backward pass from a loss on the meta device, which holds no numbers")
        seen._follow(tape.parameters, tape.owners)
        with whole_parameters(self._model, nodes([(total.grad_fn, 0)])) as trainers:
            return self._observe(tape, total, weight, run, seen, trainers)

    def _observe(
        self,
        tape: Tape,
        total: Tensor,
        weight: Tensor | None,
        run: Callable[[], Any],
        seen: Seen,
        trainers: GraphTrainers,
    ) -> Any:
        device = total.device.type
        with alone(device), kept(tape.retained()), trainers.paused():
            check_finite(total)
            own_losses = tape.returned is not None
            graph, known = resolved(lambda without: prove(tape, total, weight, without=without), own_losses)
            pass_ = Pass(tape, graph, known, self._quantities, self._model, self._samples, self._scale, self._dtype)
            seen._check(pass_.batch)
            pass_.pull_roots()
            pass_.pull_gradient()
        before = {name: snapshot(p) for name, p in tape.owners.items()}
        covered = graph.parameters()
        pass_.keeps_inputs = self._keeps_inputs
        pass_.release()
        try:
            with hooked(graph.uses if pass_.listens else [], pass_.receive), accumulated(tape.parameters) as arrived:
                out = run()
            with alone(device):
                check_covered(tape, before, arrived, covered)
                gradient = {name: arrived[name] for name in covered if name in arrived}
                check_gradient(gradient)
                pass_.sent.check()
                values = pass_.values(gradient)
                seen._add(pass_.batch, values, {name: (g,) for name, g in gradient.items()})
        except BaseException:
            restore(tape, before)
            raise
        tape.forget(graph.uses, graph.losses)
        return out
