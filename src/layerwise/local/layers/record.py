"""One recorded run of the closure: its layers, with inputs, outputs and cotangents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerwise.errors import AmbiguousSamples, BadInput, Undefined
from layerwise.graph.coverage import Graph, observed_before, prove
from layerwise.graph.loss_scale import loss_scale, mixed_scales
from layerwise.graph.samples import count, said_count
from layerwise.local.layers.kinds import Kinds
from layerwise.local.layers.layer import Layer, layers_of, over_passes
from layerwise.local.problem import LocalProblem, Term, predict, split_terms, target_m
from layerwise.local.targets import Target
from layerwise.local.transfer import Transfer
from layerwise.losses.gradient_scalers import GradientsLeft
from layerwise.replay.state import check_loss
from layerwise.replay.whole_passes import WholePasses
from layerwise.tape.pull import OnePass, accumulated, differentiated, hooked, pull
from layerwise.tape.tape import Tape
from layerwise.tensors import dense, is_finite, wide_type, widened, without_grad

__all__ = [
    "Recorded", "RunRecorder", "dense", "may_be_finite", "problem_of", "pulled", "record", "refreshed", "single_count",
]  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """One run of a closure.

    cotangents: by use index, `[*out_shape]`. gradients: of the parameters outside the layers, by name. counted: the
    number of samples, or in words which it may be. copies: what stands for parameters in half precision, by name.
    Where the loss is not finite, or depends on no parameter, there are no layers and no gradients.
    """

    loss: Tensor
    tape: Tape
    layers: list[Layer]
    cotangents: Mapping[int, Tensor]
    gradients: Mapping[str, Tensor]
    counted: int | str = 1
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    def parameter(self, name: str) -> Tensor:
        """A parameter, or its copy."""
        found = self.copies.get(name)
        return self.tape.parameters[name] if found is None else found

    @property
    def samples(self) -> int:
        """N. Raises AmbiguousSamples where it may be several numbers."""
        return single_count(self.counted)

    def cotangent_rows(self, layer: Layer) -> Tensor:
        """The cotangents of a layer's outputs at all its uses, `[R,K,O]`."""
        return layer.join([part.rows(self.cotangents[part.use.index]) for part in layer.parts])


def single_count(counted: int | str) -> int:
    """A number of samples. Raises AmbiguousSamples where there are words on the numbers it may be in its place."""
    if isinstance(counted, str):
        raise AmbiguousSamples(counted)
    return counted


class RunRecorder:
    """Records the layers of the passes inside its context, and their cotangents; entered again, it goes on.

    left: the gradients in `.grad` after the passes, where a gradient scaler multiplied the losses; else None.
    ours: whether a parameter is to be moved; the others are constants. matrices, kinds: as in `layers_of`; crosses: as
    for `Tape`. counted: whether the number of samples is asked for, which losses of one's own may say; else it is 1.

    Several backward passes are the sum of their losses: each layer has its rows of all of them. A second one through
    the same forward (`retain_graph`) is Undefined. Cotangents and gradients are those of the losses without a gradient
    scaler's factor.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        ours: Callable[[Tensor], bool] = lambda p: True,
        matrices: bool = False,
        crosses: bool = False,
        kinds: Kinds | None = None,
        counted: bool = True,
    ) -> None:
        self._ours, self._asked = ours, _Asked(ours, matrices, kinds, partial(count, model=model) if counted else None)
        self.left: GradientsLeft | None = None
        self._said: int | None = None
        self._counted = 0  # passes from before what is said
        self.whole = WholePasses()
        self._passes: list[_Pass] = []  # the tape's handler holds this list, not the recorder: `run` leaves no cycle
        self._tape = Tape(
            model, partial(_whole_pass, self.whole, self._passes, self._asked), keep_outputs=True, own_losses=counted,
            crosses=crosses,
        )  # fmt: skip

    def __enter__(self) -> None:
        self._tape.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._tape.__exit__(*exc)
        self.left = self._left_in_grad(self._passes[0].scale if self._passes else None)
        if self._said is not None:
            for at in range(self._counted, len(self._passes)):
                self._passes[at] = self._passes[at].of(self._said)

    def _left_in_grad(self, scale: float | None) -> GradientsLeft | None:
        ours = filter(self._ours, self._tape.parameters.values())
        return None if scale is None else GradientsLeft(ours, scale, self._tape.scaler_calls)

    def say(self, samples: int | Tensor | None) -> None:
        """What the user says of the samples of the passes to come, each; raises BadInput where it is no number."""
        self._said, self._counted = said_count(samples, "samples of a step, or of watch(),"), len(self._passes)

    def forget_passes(self) -> None:
        """Drop the backward passes so far, but not the forward pass of those to come."""
        self._passes.clear()
        self._counted = 0

    def mark(self) -> Callable[[], None]:
        """What drops all that is recorded from now on, and the calls with it."""
        passes, kept = len(self._passes), set(map(id, self._tape.uses))
        left, losses, now = self.left, set(map(id, self._tape.losses)), (self._said, self._counted)

        def put_back() -> None:
            del self._passes[passes:]
            self.left, (self._said, self._counted) = left, now
            self._tape.forget([use for use in self._tape.uses if id(use) not in kept],
                              [loss for loss in self._tape.losses if id(loss) not in losses])  # fmt: skip

        return put_back

    def run(self, loss: Tensor | None = None) -> Recorded:
        """What was recorded. loss: to be differentiated, where no backward pass ran.

        Raises BadInput without a pass and a loss, for passes that use a weight in ways that do not join, and where a
        pass failed half-way.
        """
        self.whole.check()
        passes = list(self._passes)
        self._passes.clear()
        if passes:
            run = joined([one.run for one in passes])
            return run if loss is None else replace(run, loss=loss.detach())
        if loss is None:
            raise BadInput(
                "step() follows a backward pass `with opt.watch()`, and none ran; call loss.backward() there, in the "
                "same thread"
            )
        scale = loss_scale(self._tape.scaler_calls, loss)
        self.left = self._left_in_grad(scale)
        run = _unscaled(_pulled(self._tape, loss, self._asked), scale)
        return run if self._said is None else replace(run, counted=self._said)


class _Asked(NamedTuple):
    """What is read of a pass. ours, matrices, kinds: as for `layers_of`. counter: of samples; None: not asked for."""

    ours: Callable[[Tensor], bool]
    matrices: bool
    kinds: Kinds | None
    counter: Callable[[Tape, Graph, Tensor], int | str] | None

    def layers(self, tape: Tape, graph: Graph) -> list[Layer]:
        """The layers of a graph."""
        return layers_of(tape, graph, self.ours, self.matrices, self.kinds)

    def rest(self, tape: Tape, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """The parameters to be moved outside the layers."""
        inside = {name for layer in layers for name in layer.names}
        return {n: p for n, p in tape.parameters.items() if n not in inside and self.ours(p)}

    def counted(self, tape: Tape, graph: Graph, total: Tensor) -> int | str:
        """The number of samples, or in words which it may be; 1 where it is not asked for."""
        return 1 if self.counter is None else self.counter(tape, graph, total)


class _Pass(NamedTuple):
    """A recorded backward pass, by what a gradient scaler multiplied its loss, or None, and the uses it ran through."""

    run: Recorded
    scale: float | None
    uses: frozenset[int]

    def of(self, samples: int) -> _Pass:
        """The same pass of so many samples."""
        return self._replace(run=replace(self.run, counted=samples))


def _whole_pass(whole: WholePasses, passes: list[_Pass], asked: _Asked, tape: Tape, *call: Any) -> Any:
    with whole.running(tape.owners):
        return _recorded_pass(passes, asked, tape, *call)


def _recorded_pass(
    passes: list[_Pass],
    asked: _Asked,
    tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any],
) -> Any:  # fmt: skip
    """Run a backward pass, and add what it gives to the passes."""
    scale = loss_scale(tape.scaler_calls, total)
    graph = prove(tape, total, weight, need_loss=False)
    uses = frozenset(use.index for use in graph.uses)
    if any(uses & before.uses for before in passes):
        raise observed_before()
    layers = asked.layers(tape, graph) if may_be_finite(total) else []
    rest = asked.rest(tape, layers)
    received: dict[int, Tensor] = {}
    counted = asked.counted(tape, graph, total)
    with (
        OnePass(total) as within,
        accumulated(rest, within=within) as added,
        hooked(
            [part.use for layer in layers for part in layer.parts],
            lambda use, g: received.__setitem__(use.index, g.detach()),
            within,
        ),
    ):
        out = run()
    gradients = {name: widened(dense(g)) for name, g in added.items()}
    layers = _reached(layers, received)
    if passes and scale != passes[0].scale:
        raise BadInput(mixed_scales(passes[0].scale, scale))
    recorded = Recorded(differentiated(total, weight), tape, layers, received, gradients, counted)
    passes.append(_Pass(_unscaled(recorded, scale), scale, uses))
    read = {use.edge.node for use in graph.uses}
    tape.forget_losses([loss for loss in tape.losses if loss.logits.node in read])
    return out


def record(
    model: nn.Module | Mapping[str, Tensor],
    closure: Callable[[], Tensor],
    ours: Callable[[Tensor], bool] = lambda p: True,
    matrices: bool = False,
    crosses: bool = False,
    kinds: Kinds | None = None,
) -> Recorded:
    """Run the closure once and take the cotangents of its layers, and gradients of the other parameters.

    Arguments as for `RunRecorder`. The closure returns the loss; where it calls backward itself, the cotangents stream
    from those passes. Raises BadInput for a closure without a tensor loss, UncoveredUse for a parameter no call covers.
    """
    recorder = RunRecorder(model, ours, matrices, crosses, kinds)
    with torch.enable_grad(), recorder:  # a tape would look at what switches gradients on
        loss = closure()
    check_loss(loss)
    return recorder.run(loss)


def joined(runs: Sequence[Recorded]) -> Recorded:
    """Runs whose losses add up as one: the rows of each layer are those of all runs, and gradients are summed.

    Raises BadInput where a parameter is fitted in one run, and not in the same way in another.
    """
    if len(runs) == 1:
        return runs[0]
    parts: dict[str, list[Layer]] = {}
    for layer in (layer for run in runs for layer in run.layers):
        parts.setdefault(layer.name, []).append(layer)
    gradients: dict[str, Tensor] = {}
    cotangents: dict[int, Tensor] = {}
    for run in runs:
        cotangents |= run.cotangents
        for name, g in run.gradients.items():
            gradients[name] = gradients[name] + g if name in gradients else g
    finite = all(may_be_finite(run.loss) for run in runs)
    layers = [over_passes(found) for found in parts.values()] if finite else []
    mixed = [name for layer in layers for name in layer.names if name in gradients]
    if mixed:
        raise BadInput(
            f"of the backward passes of this step some give {', '.join(mixed[:5])} a local problem, and others do not; "
            "the passes of one step must use each weight alike"
        )
    loss = torch.stack([run.loss for run in runs]).sum()
    unclear = next((run.counted for run in runs if isinstance(run.counted, str)), None)
    counted = sum(run.samples for run in runs) if unclear is None else unclear
    return Recorded(loss, runs[0].tape, layers, cotangents, gradients, counted)


def may_be_finite(loss: Tensor) -> bool:
    """Whether a loss is finite; on an accelerator it is not waited for, and read before anything moves."""
    return loss.device.type != "cpu" or is_finite(loss)


def _unscaled(run: Recorded, scale: float | None) -> Recorded:
    """A run's cotangents and gradients without the factor of a gradient scaler, at least in float32."""
    if scale is None:
        return run
    return replace(
        run, loss=run.loss / scale, cotangents={i: widened(g) / scale for i, g in run.cotangents.items()},
        gradients={name: g / scale for name, g in run.gradients.items()},
    )  # fmt: skip


def pulled(
    tape: Tape,
    loss: Tensor,
    ours: Callable[[Tensor], bool] = lambda p: True,
    matrices: bool = False,
    kinds: Kinds | None = None,
) -> Recorded:
    """The layers of a recorded loss, with cotangents from one vector-Jacobian product without weight gradients."""
    return _pulled(tape, loss, _Asked(ours, matrices, kinds, count))


def _pulled(tape: Tape, loss: Tensor, asked: _Asked) -> Recorded:
    if not loss.requires_grad:
        return Recorded(loss.detach(), tape, [], {}, {})
    graph = prove(tape, loss, None, need_loss=False)
    if not may_be_finite(loss):
        return Recorded(loss.detach(), tape, [], {}, {})
    layers = asked.layers(tape, graph)
    rest = asked.rest(tape, layers)
    uses = [part.use for layer in layers for part in layer.parts]
    found = pull([loss], [torch.ones_like(loss)], [*(use.edge for use in uses), *rest.values()])
    cotangents = {use.index: g for use, g in zip(uses, found, strict=False) if g is not None}
    layers = _reached(layers, cotangents)
    gradients = {n: widened(dense(g)) for n, g in zip(rest, found[len(uses) :], strict=True) if g is not None}
    return Recorded(loss.detach(), tape, layers, cotangents, gradients, asked.counted(tape, graph, loss))


def _reached(layers: list[Layer], cotangents: dict[int, Tensor]) -> list[Layer]:
    """The layers that have rows, and a use that the loss depends on; zero cotangents are set at their other uses."""
    found = [layer for layer in layers if layer.has_rows and any(part.use.index in cotangents for part in layer.parts)]
    for layer in found:
        for part in layer.parts:
            if part.use.index not in cotangents:
                cotangents[part.use.index] = layer.parameter.new_zeros(part.use.call.out_shape)
    return found


@without_grad
def problem_of(
    recorded: Recorded, layer: Layer, gamma: float, transfer: Transfer, target: Target | None = None,
    terms: tuple[Term, ...] = (),
) -> LocalProblem:  # fmt: skip
    """The local problem of a layer, from its rows, its targets and its parameters as matrices.

    target: `(z, g, transfer) -> y`; the default is `f(z) − γ g`, with which the problem keeps `g` and γ.
    """
    pulls, ball, metric = split_terms(terms) if terms else ((), None, None)
    a, g, known = layer.of_all(Layer.input), recorded.cotangent_rows(layer), not layer.kind.indexed
    weight = layer.matrix()
    bias = None if len(layer.names) == 1 else layer.offsets(recorded.parameter(layer.names[1]))
    shifted = layer.shifted or any(part.shifted for part in layer.others)
    # a look-up's rows leave out the padding's output as they do its cotangent: predicted, it stays where it is
    # and outputs of fewer digits than the problem's would hide what moves: they are predicted, too
    digits = wide_type(layer.parameter.dtype)
    kept = known and all(_is_known(part.value, part, digits) for part in layer.parts)
    z = layer.of_all(lambda part: part.rows(part.output())) if shifted or kept else None
    after = None
    if transfer is layer.transfer and known and all(_is_known(part.after, part, digits) for part in layer.parts):
        after = layer.of_all(lambda part: part.rows(part.after))  # type: ignore[arg-type]
    rest = None
    if z is None or shifted:
        predicted = predict(LocalProblem(a, weight, bias, g))
        rest, z = (z - predicted, z) if z is not None else (None, predicted)
    if target is None:
        y = target_m(z, g, gamma, transfer, y=after)
        return LocalProblem(a, weight, bias, y, transfer, None, g, gamma, rest, pulls, ball, metric)
    y = target(z, g, transfer)
    return LocalProblem(a, weight, bias, y, transfer, rest=rest, pulls=pulls, ball=ball, metric=metric)


def _is_known(t: Tensor | None, part: Layer, digits: torch.dtype) -> bool:
    """Whether the forward pass kept a tensor, and no fewer digits of it, nor of the output behind it."""
    return t is not None and t.dtype is digits and (part.value is None or part.value.dtype is digits)


def refreshed(problem: LocalProblem, layer: Layer, now: Layer) -> LocalProblem:
    """The problem with the inputs `a` (and terms `rest`) of a later run, and the targets of the first.

    now: the layer in the later run. Raises Undefined for another number of rows.
    """
    a = now.join([part.input() for part in now.parts])
    rest = None
    if a.shape != problem.a.shape:
        raise Undefined(f"run again, the closure gave {layer.name} {len(a)} rows, and {len(problem.a)} at first")
    if problem.rest is not None:
        z = now.join([part.rows(part.output()) for part in now.parts])
        rest = z - predict(replace(problem, a=a, rest=None, g=None))
    same = torch.equal(a, problem.a) and (rest is None or torch.equal(rest, problem.rest))  # type: ignore[arg-type]
    return problem if same else replace(problem, a=a, rest=rest, g=None)
