"""The engine of an observation: runs the user's backward pass with everything that it is observed with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, NonFinite
from layerwise.gradient.row_sums import add_to_grad, backward_without
from layerwise.graph.coverage import prove
from layerwise.graph.loss_curvature import resolved
from layerwise.graph.loss_scale import loss_scale
from layerwise.graph.products import SecondOrder
from layerwise.graph.samples import said_count
from layerwise.graph.walk import nodes
from layerwise.observation.backward_pass import BackwardPass, PassSettings
from layerwise.observation.guards import (
    ask_finite,
    check_alone,
    check_covered,
    check_finite,
    check_gradient,
    check_values,
    retained_grads_preserved,
    rollback,
    snapshot,
    unread,
)
from layerwise.observation.results import Results
from layerwise.observation.root_columns import send_roots
from layerwise.observation.stream import Stream
from layerwise.quantities.base import Quantity
from layerwise.ranks.trainers import GraphTrainers, whole_parameters
from layerwise.tape.binding import chosen_names
from layerwise.tape.pull import OnePass, accumulated, hooked, without_autocast
from layerwise.tape.tape import Tape
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import Verdict

__all__ = ["Observation"]


class Observation:
    """Quantities of backward passes through recorded forwards, added to its `Results`.

    As a context it records on a tape of its own and gives the results; `start` takes a tape of the caller's, whose
    handler then calls `run`. keeps_inputs: whether what uses hold is read after the user's backward pass.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        quantities: Sequence[Quantity],
        settings: PassSettings = PassSettings(),  # noqa: B008
        keeps_inputs: bool = False,
    ) -> None:
        for q in quantities:
            if not isinstance(q, Quantity):
                hint = " (an instance, not the class)" if isinstance(q, type) else ""
                raise BadInput(f"asked to observe {q!r}; give quantities such as Variance(){hint}")
        if settings.grad not in ("autograd", "rows"):
            raise BadInput(f'grad must be "autograd" or "rows", got {settings.grad!r}')
        if settings.scale not in ("loss", "sample"):
            raise BadInput(f'scale must be "loss" or "sample", got {settings.scale!r}')
        dtype = settings.dtype
        if dtype not in (None, torch.float32, torch.float64):
            held = "a floating-point type that sums can be held in"
            raise BadInput(f"dtype must be None or {held}, torch.float32 or torch.float64; got {dtype!r}")
        said_count(settings.samples, "observe's samples")
        self._model, self._settings, self._keeps_inputs = model, settings, keeps_inputs
        self._quantities = quantities
        self._results: Results | None = None
        self._tape: Tape | None = None
        self._second_order: SecondOrder | None = None
        if settings.parameters is not None:
            self._asked([name for name, p in named_parameters_of(model).items() if p.requires_grad])

    def _asked(self, names: Iterable[str]) -> list[str]:
        """Those among the names of all parameters whose quantities are wanted."""
        return chosen_names("parameters", self._settings.parameters, list(names))

    def _follow(self, results: Results, tape: Tape) -> None:
        names = self._asked(tape.parameters)
        results.follow(names, {name: tape.owners[name] for name in names})

    def say(self, samples: int | Tensor | None) -> None:
        """What the user says of the samples of the backward passes to come, each."""
        self._settings = self._settings._replace(samples=samples)

    def restart(self, quantities: Sequence[Quantity] | None = None) -> Results:
        """Observe these quantities (None: the same) from now on, with results of their own, empty at first."""
        self._quantities = self._quantities if quantities is None else quantities
        self._results = Results(self._quantities, self._settings.scale, self._settings.pooled)
        return self._results

    def __enter__(self) -> Results:
        tape = Tape(self._model, self.run, own_losses=True)
        tape.whole = True
        return self.start(tape)

    def __exit__(self, *exc: Any) -> None:
        self.stop(*exc)

    def start(self, tape: Tape, results: Results | None = None) -> Results:
        """Record on a tape until `stop`; adds to earlier results of the same quantities, or to none."""
        if self._tape is not None:
            raise BadInput("this observe() is active already; make another one to observe inside it")
        try:
            self._tape = tape
            if results is None:
                results = self.restart()
            self._results = results
            self._follow(results, tape)
            tape.__enter__()
            if any(q.cotangent.twice for q in self._quantities):
                self._second_order = SecondOrder()
                self._second_order.__enter__()
            return results
        except BaseException as error:  # an interrupt, after which `with` does not call `__exit__`
            self.stop(type(error), error, error.__traceback__)
            raise

    def stop(self, *exc: Any) -> None:
        """End the record; the results live on with whoever holds them."""
        if self._tape is None:  # an interrupt ended it on the way in
            return
        if self._second_order is not None:
            self._second_order.__exit__(*exc)
            self._second_order = None
        self._tape.__exit__(*exc)
        self._tape.close()
        self._tape = self._results = None  # at last, for after an interrupt it is called again

    def send(self, total: Tensor) -> None:
        """Observe the cotangents that `total` sends down the graph, in place of a backward pass: no `.grad` is made.

        That saves the weights' own gradients, and all of a backward pass where every quantity sends its own columns.
        """
        assert self._tape is not None
        self.run(self._tape, total, None, None)

    def run(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any] | None) -> Any:
        """Run the user's backward pass from `total` (times `weight`) and observe it; the result of `run`.

        run: None sends cotangents down the graph alone, as `send` says.
        """
        if total.is_meta:
            raise BadInput("asked to observe a backward pass from a loss on the meta device, which holds no numbers")
        results = self._results
        assert results is not None
        self._follow(results, tape)
        if run is not None and total.requires_grad and not any(map(tape.leaves().name, nodes([(total.grad_fn, 0)]))):
            return _run_unobserved(tape, total, run)
        with whole_parameters(self._model, nodes([(total.grad_fn, 0)])) as trainers:
            return self._run(tape, total, weight, run, results, trainers)

    def _run(
        self,
        tape: Tape,
        total: Tensor,
        weight: Tensor | None,
        run: Callable[[], Any] | None,
        results: Results,
        trainers: GraphTrainers,
    ) -> Any:
        device, scale, deferred = total.device.type, 1.0, self._settings.defer
        deferred = device != "cpu" if deferred is None else deferred
        at_once = device == "cpu" and not deferred  # else all is read after the backward pass, once, or with a result
        with (
            torch._C.DisableTorchFunction(),
            without_autocast(device),
            retained_grads_preserved(tape.retained()),
            trainers.paused(),
        ):
            if at_once:
                check_finite(total)
            if self._settings.unscaled:
                scale = loss_scale(tape.scaler_calls, total) or 1.0
            own_losses = tape.returned is not None
            graph, known = resolved(lambda without: prove(tape, total, weight, without=without), own_losses)
            graph = replace(graph, unread=None if at_once else [])
            verdict = Verdict() if at_once else unread(graph, known)
            if self._settings.parameters is not None:
                graph = replace(graph, asked=frozenset(self._asked(tape.parameters)))
            observed = BackwardPass(tape, graph, known, results.quantities, self._model, self._settings)
            results.check(observed.batch)
            send_roots(observed)
            stream = Stream(observed, self._keeps_inputs)
        before = {name: snapshot(p) for name, p in tape.owners.items()}
        covered = set(graph.covered())
        stream.release()
        if stream.summed:
            weights = [tape.parameters[name] for name in stream.summed]
            without = backward_without(weights, graph.uses, nodes([(total.grad_fn, 0)]))
            run = partial(without, total, weight, retain_graph=tape.retain)
        try:
            with (
                OnePass(total) as within,
                hooked(stream.awaited(), stream.receive, within),
                accumulated(tape.parameters, True, within) as arrived,
            ):
                out = run() if run is not None else None
                if run is None:
                    stream.send(total)
            with torch._C.DisableTorchFunction(), without_autocast(device):
                check_alone(within.strangers)
                check_covered(tape, before, arrived, covered)
                found = arrived | stream.complete()
                gradient = {name: found[name] for name in graph.parameters() if name in found}
                if at_once:
                    check_gradient(gradient)
                else:
                    ask_finite(verdict, graph, total, gradient, deferred)
                    if not deferred:
                        verdict.read()
                stream.finish(gradient)
                for sent in observed.values.values() if run is None else ():
                    check_values(sent)
            add_to_grad(tape.parameters, stream.sums)
            with torch._C.DisableTorchFunction(), without_autocast(device):
                # a parameter with a use that gave it no gradient, as a bias below a penalty on slopes: of zero
                unmoved = {name for sent in observed.values.values() for name in sent} - gradient.keys()
                gradient |= {name: torch.zeros_like(tape.parameters[name]) for name in unmoved}
                values = {name: (g,) for name, g in gradient.items()}
                results.add(observed.batch, observed.values, values, scale, verdict)
        except BaseException as error:
            if not (self._settings.keeps_non_finite and isinstance(error, NonFinite)):
                rollback(tape, before)
            raise
        tape.forget(graph.uses, graph.losses)
        return out


def _run_unobserved(tape: Tape, total: Tensor, run: Callable[[], Any]) -> Any:
    """Run a backward pass whose graph has no parameter of the model, as of another model's loss; the result of `run`.

    Raises UncoveredUse where a parameter gets a gradient nevertheless.
    """
    before = {name: snapshot(p) for name, p in tape.owners.items()}
    try:
        with OnePass(total) as within, accumulated(tape.parameters, True, within) as arrived:
            out = run()
        check_alone(within.strangers)
        check_covered(tape, before, arrived, ())
    except BaseException:
        rollback(tape, before)
        raise
    return out
