"""Pipeline-parallel alternating minimization: each process holds only its own layers, and sends no gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.distributed.cuts import Cuts, Output
from layerwise.errors import BadInput, RankLost
from layerwise.local.codes.code_step import sweep
from layerwise.local.layers.layer import Layer
from layerwise.local.layers.overflow import unsafe
from layerwise.local.layers.record import Recorded
from layerwise.optim.deferred import Late
from layerwise.optim.keywords import refuse_unknown
from layerwise.optim.layer_local.altmin import KEYWORDS, AltMin
from layerwise.optim.layer_local.choices import first_match
from layerwise.optim.layer_local.code_fit import CodeFitter, FittedToCodes
from layerwise.optim.layer_local.coding import Coded, coded_layers, hidden_uses, recorded_on_codes
from layerwise.optim.layer_local.executors import Executor, Facts, GradientJob, LayerJob, State, executor_of
from layerwise.optim.layer_local.owners import all_or_none, described
from layerwise.optim.layer_local.updates import check_group, with_coupling
from layerwise.ranks.group import Ranks
from layerwise.replay.coded import CodedModel
from layerwise.replay.program import ENTRY
from layerwise.replay.state import Buffers
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import is_finite

__all__ = ["Pipeline"]

_REFUSED = {"parallel": "ranks are stages here", "trace": "it compares with the gradient of the whole model",
            "multipliers": "they pass between stages"}  # fmt: skip


class Pipeline(FittedToCodes):
    """`AltMin(codes="sweep")` of a model in stages, one per rank in order; bitwise equal to a single process.

        stage = lw.distributed.split(model, world_size)[rank]
        opt = lw.distributed.Pipeline(stage, weights="adam")
        loss = opt.step(x, lambda out: F.cross_entropy(out, y))

    stage: this rank's part of the model, which takes one tensor; all but the last must end with the output of a trained
    layer. Parameter names must differ between stages; `split` and `Stage` keep those of the whole model.
    group: a process group, default all ranks. Other settings: AltMin's, the same on all ranks; patterns in `layers`
    refer to the whole model.

    In a step each stage receives the output of the stage before it and sends its own to the next. The code of a
    received output is updated on the receiving stage, whose block reads it, and is sent back. So activations pass
    forward and codes backward, each over one cut, and no backward pass spans stages. All stages agree whether to skip
    the batch, then update their own weights in parallel. A stage needs memory only for its own parameters, state and
    activations. `state_dict` and checkpoints hold a stage's part by name: `lw.distributed.save` combines them, and
    `load` works on another number of stages, or on a whole model with AltMin. schedule="async" is that of AltMin.

    Point-to-point messages of the group are used, not `torch.distributed.pipelining`, whose schedules send gradients of
    a global backward pass. A model that draws random numbers uses each stage's own generator, so results then differ
    from those of a single process.
    Raises BadInput, by name, where ranks disagree, for multipliers, a trace, other codes and `refit`; RankLost.
    LocoProp has no pipeline: its targets need dL/dz at every layer, which takes a global backward pass;
    `LocoProp(parallel=)` distributes its layer solves instead.
    """

    def __init__(
        self, stage: nn.Module | Mapping[str, Tensor], params: Iterable[Any] | None = None, *, group: Any = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        self._stages = group if isinstance(group, Ranks) else Ranks(group)
        refuse_unknown(AltMin.__init__, settings)
        self._stages.agree({key: described(value) for key, value in settings.items()})
        codes, weights, minibatch, execution = KEYWORDS.values(settings).values()
        refused = {"parallel": execution.parallel, "multipliers": codes.multipliers, "trace": settings.get("trace")}
        for key, why in _REFUSED.items():
            if refused[key]:
                raise BadInput(f"a Pipeline takes no {key}=: {why}")
        if codes.codes not in (None, "sweep"):
            raise BadInput(f'a Pipeline needs codes="sweep", which pass one block alone; got {codes.codes!r}')
        names, codes = list(named_parameters_of(stage)), replace(codes, codes="sweep")
        layers = self._patterns_here(settings.get("layers") or {}, names)
        on_nonfinite, lr, preset = settings.get("on_nonfinite", "skip"), settings.get("lr"), settings.get("preset")
        self._fitter = fitter = CodeFitter(codes, weights, minibatch, names, lr, layers, None, preset)
        self._turns = _Stages(self._stages, executor_of(execution.workers))
        self._proofs: dict[Any, bool] = {}
        super().__init__(stage, params, fitter.defaults, on_nonfinite, self._turns, {}, fitter.updates.numbers)
        fitter.refuse_idle(self.param_groups)

    @property
    def _first(self) -> bool:
        return self._stages.rank == 0

    @property
    def _last(self) -> bool:
        return self._stages.rank == self._stages.size - 1

    @property
    def _device(self) -> torch.device:
        found: torch.device = self.param_groups[0]["params"][0].device
        return found

    def _patterns_here(self, layers: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The patterns that match a parameter of this stage. Raises BadInput for a pattern that matches in no stage."""
        every: list[list[str]] = self._stages.gather(list(names))
        flat = [name for stage in every for name in stage]
        twice = sorted({name for name in flat if flat.count(name) > 1})
        if twice:
            raise BadInput(f"{', '.join(twice[:5])} are in two stages: names must differ, as those of `split` do")
        idle = [pattern for pattern in layers if not any(first_match((pattern,), name) for name in flat)]
        if idle:
            raise BadInput(f"no parameter of any stage matches {', '.join(map(repr, idle))}")
        return {k: v for k, v in layers.items() if any(first_match((k,), name) for name in names)}

    _kind = "AltMin"  # a stage's state is a part of the whole model's

    def _check(self, group: Mapping[str, Any]) -> None:
        check_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `AltMin.add_param_group`."""
        super().add_param_group(with_coupling(param_group))

    # -- a step ------------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, inputs: Tensor | None = None, loss: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Run one step: forward the batch, return codes, update this stage's weights; returns the loss before the step.

        inputs: the batch, needed by the first stage. loss: the function from the model's output to the loss, needed by
        the last stage. All ranks get the loss. Raises BadInput where one is missing.
        """
        with self._shared():
            cuts = [Cuts(self._stages, self._device)]

            def once() -> Tensor:
                self._turns.begin()
                loss_before = self._guarded(_no_closure, partial(self._attempt_on, _Batch(inputs, loss), cuts[0]))
                cuts[0] = Cuts(self._stages, self._device)
                return loss_before

            try:
                return self._repeated(once)
            except BaseException:
                if not self.was_made:
                    with suppress(RankLost):  # the error is why the step failed, also where a neighbour is gone
                        cuts[0].give_up()
                raise

    def refit(self, closures: Iterable[Any]) -> float:
        """Raises BadInput: stages cannot refit."""
        raise BadInput("refit moves the last stage alone: load its checkpoint into a whole model with AltMin")

    def _attempt_on(
        self, batch: _Batch, cuts: Cuts, closure: Any, buffers: Buffers
    ) -> tuple[Tensor, str | Late | None]:
        """Record the stage with all codes, and fit its layers; if one stage fails, all roll back."""
        fitting = self._fitting(self._record(batch, cuts))
        run = fitting.run
        where = self._agreed(run, unsafe(run, partial(self._fitter.gamma, fitting)) or buffers.spoiled())
        if where is not None:
            return run.loss, where

        def finish() -> None:
            self._averages = self._averages | fitting.means.after

        return run.loss, self._fitter.fit(fitting, Coded(run), run.layers, self, self._executor, finish)

    def _record(self, batch: _Batch, cuts: Cuts) -> Recorded:
        """Exchange outputs and codes with the neighbouring stages, and record this stage's layers on the codes."""
        if (self._first and batch.inputs is None) or (self._last and batch.loss is None):
            raise BadInput("the first stage's step takes the inputs, and the last one's the loss of the outputs")
        below = None if self._first else cuts.receive_output()
        entry = None if below is None else below.value
        outputs: list[Tensor] = []

        def closure(x: Tensor | None = batch.inputs) -> Tensor:
            out = self._model(x) if isinstance(self._model, nn.Module) else None
            if not isinstance(out, Tensor):
                raise BadInput("a stage is a module that gives one tensor")
            outputs.append(out)
            return batch.loss(out) if self._last and batch.loss is not None else (out * 0).sum()

        coded = CodedModel(self._model, closure, self._proofs, entry)
        samples = coded.samples if below is None else below.samples
        if coded.samples != samples:
            raise BadInput(f"dim 0 is the samples' at every cut; {samples} came in, and here are {coded.samples}")
        found = coded_layers(coded, self._ours, self._kinds)
        if found is not None and not found:
            raise BadInput(
                f"the stage of {', '.join(coded.tape.parameters)} has no layer whose outputs can be codes (a linear or "
                "convolution layer, say): cut the model elsewhere, so that each stage has one"
            )
        layers = found or []
        hidden = hidden_uses(coded, layers)
        given = {} if self._last else self._given(coded, layers, hidden, outputs[0], samples, cuts)
        if not layers or not all(map(is_finite, given.values())):
            if entry is not None:
                cuts.send_code(torch.full_like(entry, float("nan")))
            return Recorded(coded.loss.detach() * float("nan"), coded.tape, [], {}, {})
        groups = {i: self._group_at[id(layer.parameter)] for i, layer in hidden.items()}
        if below is not None:
            groups[ENTRY] = {"coupling": below.coupling, "code_l1": below.sparsity}
        terms = self._fitter.terms(groups, samples)
        start = {i: part.output() for layer in layers for part in layer.parts
                 if (i := part.use.index) in terms.coupling and i not in given}  # fmt: skip
        if entry is not None:
            start[ENTRY] = entry
        codes = sweep(coded, start, terms, self._fitter.code_step, given)
        if entry is not None:
            cuts.send_code(codes[ENTRY])
        return recorded_on_codes(coded, layers, codes, terms, self._ours, samples)

    def _given(
        self, coded: CodedModel, layers: Sequence[Layer], hidden: dict[int, Layer], out: Tensor, samples: int,
        cuts: Cuts,
    ) -> dict[int, Tensor]:  # fmt: skip
        """Send the output to the next stage, and receive its code; adds its layer to the `hidden` ones."""
        index = coded.use_behind(out)
        found = next((layer for layer in layers if index in {part.use.index for part in layer.parts}), None)
        if layers and (index is None or found is None):
            raise BadInput(
                f"the output of stage {self._stages.rank} must be that of a layer that moves: end the stage right "
                "after a linear or convolution layer, and begin the next one with the functions that follow it"
            )
        numbers = [0.0, 0.0]
        if index is not None and found is not None:
            hidden[index] = found
            group = self._group_at[id(found.parameter)]
            numbers = [float(group["coupling"]), float(group["code_l1"])]
        coupling, sparsity = numbers
        code = cuts.exchange(Output(out.detach(), coupling, sparsity, samples))
        return {-2 if index is None else index: code}


def _no_closure() -> Tensor:
    raise BadInput("a stage takes inputs and a loss, not a closure")


@dataclass(frozen=True)
class _Batch:
    inputs: Tensor | None
    loss: Callable[[Tensor], Tensor] | None


class _Stages(Executor):
    """An executor for stages: each solves its own layers, and all commit or roll back together."""

    def __init__(self, ranks: Ranks, home: Executor) -> None:
        self._ranks, self._home, self._steps = ranks, home, 0

    def begin(self) -> None:
        """Count a step, for error messages."""
        self._steps += 1
        self._ranks.doing = f"step {self._steps} of this run"

    def fail(self, error: BaseException) -> None:
        """Tell the other stages."""
        self._ranks.tell(error)

    def run(self, jobs: Sequence[LayerJob], rest: Sequence[GradientJob], state: State) -> None:
        """Solve the stage's jobs; an error of one stage is raised on all."""
        all_or_none(self._ranks, lambda: self._home.run(jobs, rest, state))

    def agreed(
        self, where: str | None, loss: Tensor, facts: Callable[[], Facts], tensors: Callable[[], Mapping[str, Tensor]]
    ) -> str | None:
        """The first reason in any stage to skip the step, or None; broadcasts the last stage's loss into `loss`."""
        value = loss.detach().double().reshape(())
        self._ranks.send_from(self._ranks.size - 1, [value])
        loss.data = value.to(loss.dtype).reshape(loss.shape)
        return self.anywhere(where)

    def anywhere(self, where: str | None) -> str | None:
        """The first non-finite tensor after the step in any stage, or None."""
        return self._ranks.first(where)
