"""Base of all optimizers of the library: named parameters, one closure a step, refusal of NaN, state by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, LayerwiseError, NonFinite, Overshot
from layerwise.optim.deferred import Late, Overshoot, Skips, check_on_nonfinite, completed
from layerwise.optim.group_settings import GroupSettings
from layerwise.optim.parameter_forms import ParameterForms
from layerwise.optim.recording import Recorder, Recording, Samples, Turn, resumed
from layerwise.optim.saved_state import (
    Fit,
    by_name,
    copied,
    cut,
    in_order,
    is_count,
    lacking,
    misfits,
    present,
    refuse,
    stamped,
)  # fmt: skip
from layerwise.replay.autocast import only_inside
from layerwise.replay.contexts import entered_anew
from layerwise.replay.state import Buffers, RandomState
from layerwise.tape.binding import refuse_replaced
from layerwise.tape.modes import active, end_after
from layerwise.tape.uses import named_parameters_of

__all__ = ["Attempt", "Closure", "NamedOptimizer", "refuse_unreached"]

# What torch keeps on an optimizer beside its state: hooks, and the marks of a scheduler on `step`.
_OF_TORCH = frozenset(("step", "_step_count", "_opt_called", "_zero_grad_profile_name"))
_OF_TORCH_DEFAULTS = frozenset(("differentiable",))  # which torch adds to a loaded or copied optimizer

Closure = Callable[[], Tensor]
Attempt = Callable[[Any, Buffers], tuple[Tensor, str | Late | None]]  # of a closure, or of what was recorded


def refuse_unreached(reached: Collection[Any]) -> None:
    """Raise BadInput where a step would move nothing. reached: what a finite loss depends on, of what is to move."""
    if not reached:
        raise BadInput(
            "the loss depends on none of the parameters that this step moves: was it detached, computed under no_grad, "
            "by another model, or through frozen layers alone?"
        )


class NamedOptimizer(torch.optim.Optimizer):
    """Base of optimizers that know their parameters by name and move them from one run of a closure.

    A batch with NaN or infinity changes no parameter, no state and no buffer: it is counted in `skipped`, or raises
    NonFinite with `on_nonfinite="raise"`. With "defer" the verdict stays on the device wherever the host would wait for
    it alone: what the step writes is chosen there, and `skipped` and `why_skipped` read it. Whatever raises in a step
    leaves parameters, buffers, state and torch's random generators as they were.
    """

    _kind: str  # the name in saved states, which classes derived from this one share

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None,
        defaults: dict[str, Any],
        on_nonfinite: str,
    ) -> None:
        check_on_nonfinite(on_nonfinite)
        named = named_parameters_of(model)
        given = [p for p in named.values() if p.requires_grad] if params is None else list(params)
        if not given:
            raise BadInput(f"{type(self).__name__} got a model without a parameter that requires grad")
        self._model = model
        self._on_nonfinite = on_nonfinite
        self._group_at, self._group_settings = dict[int, dict[str, Any]](), GroupSettings()
        self.all_parameters = params is None  # whether parameters that no group has are an error
        self._forms = ParameterForms(type(self).__name__)
        self._recording: Recording | None = None
        self._skips = Skips()
        self._turn = Turn()  # one step at a time, in whatever thread
        self.was_made = False  # whether the present step, or the last one, is whole: an error then takes nothing back
        super().__init__(given, defaults)

    # -- what was skipped --------------------------------------------------------------------------------

    @property
    def skipped(self) -> int:
        """The number of batches that changed nothing; with `on_nonfinite="defer"` the host waits for it."""
        return self._skips.count()

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._skips = Skips()
        self._skips.known = count

    def why_skipped(self) -> str | None:
        """What was not finite in the last step, or went too far, in words; None where it was taken.

        With `on_nonfinite="defer"` the host waits for it.
        """
        return self._skips.reason()

    # -- what a method implements ------------------------------------------------------------------------

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raise BadInput for settings that cannot be."""
        raise NotImplementedError

    def _attempt(self, closure: Closure, buffers: Buffers, samples: Samples = None) -> tuple[Tensor, str | Late | None]:
        """Run the closure and move the parameters; returns the loss before the step, and None.

        A step that must not be taken moves nothing, and its reason is returned in place of None; one whose verdict is
        left on the device has chosen there what it wrote, and returns the verdict. `was_made` is set as soon as
        everything has moved.
        buffers: a snapshot from before the run. samples: as for `step`.
        """
        raise NotImplementedError

    def _recorder(self) -> Recorder:
        """A recorder of passes that somebody else runs, for `watch`. Raises BadInput where a step runs the model."""
        raise BadInput(
            f"{type(self).__name__} runs the model again in a step, with codes in place of its activations, which the "
            "passes of a trainer cannot give: call step(closure)"
        )

    def _attempt_recorded(self, recorder: Any, buffers: Buffers) -> tuple[Tensor, str | Late | None]:
        """As `_attempt`, from passes that were recorded."""
        raise NotImplementedError

    def complete(self, commit: Callable[[], None]) -> None:
        """`completed`, for a decided step: it is made as soon as its commit begins, and not before."""

        def made() -> None:
            self.was_made = True
            commit()

        completed(made)

    def _tell(self, error: BaseException) -> None:
        """Tell the other processes that take part in a step that this one has failed."""

    # -- a step --------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Closure | None = None, *, samples: Samples = None
    ) -> Tensor:
        """Run the closure, move every parameter, and return the loss before the step.

        After, or at the end of, a `watch()`: move from what that recorded, and return the sum of its losses; a closure
        is run only where the context is still open.
        samples: the number N of each of the closure's batches, or a tensor with the sample number of each loss term,
        where the batch, the targets and the losses do not say it. `watch(samples=)` says it of recorded passes.
        Threads that step one optimizer take turns, each with its own closure.
        """
        with self._turn, self._shared():
            recording = self._recording
            if recording is not None and (recording.open or closure is None):
                recording.recorder.whole.check(", or call step(closure)")
            try:
                if recording is not None and recording.open:
                    if closure is not None:
                        with torch.enable_grad():
                            closure()
                    recording.stop()
                elif closure is not None:
                    recording = None
            finally:
                self._recording = None
            if recording is None:
                return self._guarded(closure, partial(self._attempt, samples=samples))
            if samples is not None:
                raise BadInput(
                    f"{type(self).__name__}.step got samples= for passes that are recorded; say it of them, "
                    "`with opt.watch(samples=...)`"
                )
            return self._guarded(recording.recorder, self._attempt_recorded, recording.buffers)

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """Around what all processes do together: an error before it is done is one on all of them."""
        self.was_made = False
        try:
            yield
        except BaseException as error:
            if not self.was_made:
                self._tell(error)
            raise

    @entered_anew
    def watch(self, *, samples: Samples = None) -> Iterator[None]:
        """Record forward and backward passes that somebody else runs, for a `step()` without a closure.

            with opt.watch():
                loss = F.cross_entropy(model(x), y)
                loss.backward()
            opt.step()

        The context holds the forward pass too, and may hold the step, which then ends the record. Several backward
        passes count as the sum of their losses: those of one context, and of several before a step, as long as `.grad`
        holds the gradients of the first. A gradient scaler's factor is left out. An exception drops what was recorded
        in the context; where a backward pass in it has written to `.grad` before, `step` raises BadInput.
        samples: of each backward pass in the context, as for `step`.
        Raises BadInput where a step needs to run the model itself (AltMin), and in an open context.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        self._group_at = {id(p): group for group in self.param_groups for p in group["params"]}
        recording = resumed(type(self).__name__, self._recording, params)
        with self._shared():
            self._recording = recording or Recording(self._recorder(), self._model, Buffers(self._model))
            with self._recording.running(samples):
                yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's; what was recorded of the backward passes so far is dropped with their gradients."""
        super().zero_grad(set_to_none)
        if self._recording is not None:
            self._recording.forget_passes()
            if not self._recording.open:
                self._recording = None

    def _guarded(self, closure: Any, attempt: Attempt, buffers: Buffers | None = None) -> Tensor:
        """Attempt a step and return the loss; roll back where it is skipped or raises. buffers: from before its run."""
        if closure is None:
            watches = type(self)._recorder is not NamedOptimizer._recorder
            other = ", or a backward pass `with opt.watch()` before it" if watches else ""
            raise BadInput(
                f"{type(self).__name__}.step needs a closure that runs the model and returns the loss{other}: "
                "opt.step(lambda: F.cross_entropy(model(x), y))"
            )
        self.was_made = False
        for number, group in self._group_settings.changed(self.param_groups):
            if missing := lacking(f"parameter group {number}", group, self._required()):
                raise BadInput(f"{type(self).__name__}'s {missing[0]}: that was deleted from opt.param_groups; set it")
            self._check(group)
        self._group_at = {id(p): group for group in self.param_groups for p in group["params"]}
        random = RandomState({p.device for group in self.param_groups for p in group["params"]}, ("torch",))
        buffers, modes = Buffers(self._model) if buffers is None else buffers, active()
        grads = torch.is_grad_enabled()
        try:
            loss, where = only_inside(closure, lambda its: attempt(its, buffers))
            if isinstance(where, Late):
                self._skips.left(where)
                return loss
            if isinstance(where, Overshoot) and self._on_nonfinite == "raise":
                raise Overshot(
                    f"{where}: the batch changed no parameter. Look for huge numbers in the batch, lower lr, or leave "
                    'on_nonfinite="skip" to pass over such batches'
                )
            if where is not None and self._on_nonfinite == "raise":
                raise NonFinite(
                    f"{where} holds NaN or infinity, or overflows; the batch changed no parameter. Look at the batch, "
                    'or leave on_nonfinite="skip" to pass over such batches'
                )
            if where is None:
                self._skips.took()
            else:
                buffers.put_back()
                self._skips.skipped(where)
        except BaseException as error:
            end_after(modes)
            torch._C._set_grad_enabled(grads)
            if not self.was_made:
                buffers.put_back()
                random.put_back()
            if isinstance(error, Exception):  # perhaps because of parameters that were replaced
                named = named_parameters_of(self._model)
                self._check_parameters({name: p for name, p in named.items() if p.requires_grad})
            raise
        return loss

    def _ours(self, p: Tensor) -> bool:
        """Whether a parameter is in one of this optimizer's groups."""
        return id(p) in self._group_at

    def _check_parameters(self, named: Mapping[str, Tensor]) -> None:
        """Raise BadInput where the parameters are no longer those that the optimizer was made for.

        named: the model's parameters that require grad.
        """
        strange = [name for name, p in named.items() if not self._ours(p)]
        if len(named) - len(strange) < self._trainable():
            known = {id(p) for p in named.values()}
            gone = [name for group in self.param_groups
                    for name, p in zip(group["param_names"], group["params"], strict=True)
                    if p.requires_grad and id(p) not in known]  # fmt: skip
            refuse_replaced(
                gone, f"since this {type(self).__name__} was made; make a new optimizer for the changed model"
            )
        if strange and self.all_parameters:
            raise BadInput(
                f"{', '.join(strange[:5])} require grad, and were frozen or absent when this {type(self).__name__} was "
                'made: call opt.add_param_group({"params": [...]}) with them, or freeze them'
            )

    def _trainable(self) -> int:
        """The number of parameters in the groups that require grad."""
        return sum(p.requires_grad for group in self.param_groups for p in group["params"])

    # -- groups and state ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; parameters must be the model's, and are known by their names in it.

        Raises BadInput for a parameter that the model does not have, and for settings that cannot be.
        """
        names = {id(p): name for name, p in named_parameters_of(self._model).items()}
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        strangers = sum(id(p) not in names for p in tensors)
        if strangers:
            raise BadInput(
                f"{type(self).__name__} got {strangers} parameters that are not the model's: make the optimizer with "
                "the model that holds them, or leave them out"
            )
        if (wrong := next((p for p in tensors if p.is_complex()), None)) is not None:
            raise BadInput(
                f"{type(self).__name__} moves real parameters, but {names[id(wrong)]!r} is complex; hold its parts as "
                "one real parameter [..., 2] and call torch.view_as_complex on it in the forward, or freeze it"
            )
        group = {**self.defaults, **param_group, "params": [(names[id(p)], p) for p in tensors]}
        self._check(group)
        super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the optimizer's name, the version of the form, parameter names, and the skipped batches."""
        saved = self._content()
        return stamped(saved, self._kind, self._held(saved))

    def _content(self) -> dict[str, Any]:
        return {**super().state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, parameters by name; goes on bitwise where it stopped.

        Raises BadInput, with the first differences, for a state that does not fit: of another optimizer, other
        parameters, shapes or types, with settings that cannot be, NaN, or cut. Nothing is changed then.
        """
        saved = present(state_dict, self._kind, self._saved_keys, ("skipped",))
        saved = {**saved, "param_groups": in_order(saved["param_groups"], self.param_groups)}
        refuse(self._differences(saved), self._kind)
        self._take(saved)

    _saved_keys: tuple[str, ...] = ("state", "param_groups", "skipped")

    def _required(self) -> set[str]:
        return self.defaults.keys() - _OF_TORCH_DEFAULTS

    def _differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What of a saved state does not fit."""
        found, groups, required = [], saved["param_groups"], self._required()
        for number, group in enumerate(groups):
            try:
                if not (wrong := lacking(f"parameter group {number}", group, required)):
                    self._check(group)
                found += wrong
            except (LayerwiseError, TypeError) as error:
                found.append(f"in parameter group {number}, {error}")
        if found:
            return found
        found += [] if is_count(saved.get("skipped", 0)) else [f"skipped is {saved['skipped']!r}"]
        if not isinstance(saved["state"], Mapping):
            return [*found, f"the state by parameter is a {type(saved['state']).__name__}, not a dict"]
        state = dict(saved["state"])
        for theirs, ours in zip(groups, self.param_groups, strict=True):
            for number, p, name in zip(theirs["params"], ours["params"], ours["param_names"], strict=True):
                if (own := state.pop(number, {})) != {}:
                    found += misfits(name, own, list(self._fits(p, name, groups)))
        found += [f"there is state of parameter number {key!r}, which no group has" for key in state]
        return found or cut("state", saved, self._held(saved))

    def _held(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """What a saved state holds, by parameter name: these entries are named in it."""
        return by_name(saved)

    def _fits(self, p: Tensor, name: str, groups: Sequence[Mapping[str, Any]]) -> Iterator[Fit]:
        """The forms that a parameter's state may have. groups: the saved ones."""
        raise NotImplementedError

    def _take(self, saved: Mapping[str, Any]) -> None:
        """Take over a state that fits."""
        super().load_state_dict({"state": copied(saved["state"]), "param_groups": saved["param_groups"]})
        self.skipped = saved.get("skipped", 0)
        self._forms = ParameterForms(type(self).__name__, self.state)

    # -- copies --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and pickle, which leave out hooks and schedulers, as torch's optimizers do."""
        own = {k: v for k, v in vars(self).items() if k not in _OF_TORCH and not k.startswith("_optimizer_")}
        return {**own, "_group_at": {}, "_group_settings": GroupSettings(), "_recording": None}
