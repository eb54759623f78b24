"""`Monitor`: measures of every k-th step of a training, logged through any callable."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, LayerwiseError, LeftOut, LogDamaged, NonFinite
from layerwise.monitor.measures import WHOLE, Measure, Step, default
from layerwise.monitor.records import Record
from layerwise.monitor.watch import Group, Watch
from layerwise.quantities import Quantity
from layerwise.replay.contexts import entered_anew
from layerwise.replay.state import seed_of
from layerwise.tape.uses import named_parameters_of

__all__ = ["Monitor"]


class Monitor:
    """Measure every k-th step of a training, and log it through a callable.

        history = lw.monitor.History()
        monitor = lw.monitor.Monitor(model, history, every=10)
        for x, y in loader:
            with monitor.step():
                loss = F.cross_entropy(model(x), y)
                opt.zero_grad(); loss.backward(); opt.step()

    For an optimizer that takes a closure, such as `lw.LocoProp` and `lw.AltMin`, pass the closure to the monitor too:
    `with monitor.step(closure): opt.step(closure)`. A measured step then runs the closure once more, before the
    optimizer, and restores gradients, floating-point and scalar buffers, and random states. Without it, the step's own
    backward passes are observed, all of them (gradient accumulation) until the parameters change.
    Other steps run as without a monitor. Parameters, `.grad` and torch's random numbers are the same as without it (up
    to rounding where attention or a recurrent layer is decomposed).

    model: as for `observe`. log: called as `log(step, record)`, record a flat dict {"step": 10, "loss": 0.7,
    "noise_scale": 31.0, "noise_scale/0.weight": 28.5, ...}. measures: default `measures.default()`. every: k; steps
    0, k, 2k, ... are measured. seed: of the random draws, with a new generator for each measure and step.

    A measure that the model, the loss or the batch does not allow is left out of the record instead of raising; the
    reason is logged once as "left_out/name", warned about (`LeftOut`), and kept in `left_out`. The measure is tried
    again at every measured step. Where the loss or a gradient is not finite, measures of the batch are NaN.
    Raises BadInput, also for a measured step without a backward pass.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        log: Callable[[int, Record], Any],
        *,
        measures: Sequence[Measure] | None = None,
        every: int = 10,
        seed: int = 0,
    ) -> None:
        self._measures = default() if measures is None else tuple(measures)
        wrong = [m for m in self._measures if not isinstance(m, Measure)]
        if wrong:
            raise BadInput(f"asked to measure {wrong[0]!r}; give measures such as lw.monitor.noise_scale()")
        names = [m.name for m in self._measures]
        if odd := [name for name in names if not name or "/" in name or name in ("step", "run", "left_out")]:
            raise BadInput(
                f"a measure's name begins its keys in the record, and cannot be {odd[0]!r}; give it a plain one"
            )
        if len(set(names)) < len(names):
            raise BadInput(f"two measures have one name, and would overwrite each other in the record: {names}")
        if not isinstance(every, int) or every < 1:
            raise BadInput(f"Monitor measures every k-th step, k a whole number of at least 1; got every={every!r}")
        if not callable(log):
            raise BadInput(f"Monitor logs through a callable log(step, record), got {log!r}")
        named_parameters_of(model)
        self._model, self._log, self._every, self._seed = model, log, every, seed
        self._apart = set(names)  # measures that failed or were not tried yet: each is observed alone
        self.left_out: dict[str, str] = {}
        self._said: set[tuple[str, type]] = set()
        self.steps = 0
        self._log_failed = False

    @property
    def due(self) -> bool:
        """Whether the next step is measured."""
        return self.steps % self._every == 0

    @entered_anew
    def step(self, closure: Callable[[], Tensor] | None = None) -> Iterator[None]:
        """Context around one training step: forward, backward and the optimizer's step."""
        if not self.due:
            yield
            self.steps += 1
            return
        groups = self._groups()
        watch = Watch(self._model, [[q for _, found in group for q in found] for group in groups])
        if closure is None:
            with watch:
                yield
        else:
            watch.run(closure)
            yield
        record = self._record(watch, groups)
        self.steps += 1
        try:
            self._log(int(record["step"]), record)
        except Exception as error:  # of whatever logger; training goes on
            if not self._log_failed:
                self._log_failed = True
                warnings.warn(
                    f"the log of step {record['step']} failed, and training goes on ({type(error).__name__}: {error}); "
                    "later failures are not told", LogDamaged, stacklevel=5,
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The number of steps so far, and which measures are observed alone."""
        return {"steps": self.steps, "apart": sorted(self._apart)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a saved state; with the same measures, the records are bitwise the same."""
        self.steps = int(state_dict["steps"])
        self._apart = {m.name for m in self._measures if m.name in state_dict["apart"]}

    # -- a step that is due -----------------------------------------------------------------------------------

    def _groups(self) -> list[list[tuple[Measure, list[Quantity]]]]:
        """Measures with their quantities for this step: one group that is observed together, and groups of one."""
        device = next((p.device for p in named_parameters_of(self._model).values()), torch.device("cpu"))
        seed = seed_of(self._seed, self.steps)  # needs no saved state, and a resumed run draws the same numbers
        made = [(m, list(m.quantities(torch.Generator(device).manual_seed(seed)))) for m in self._measures]
        asking = [(m, found) for m, found in made if found]
        together = [(m, found) for m, found in asking if m.name not in self._apart]
        return [[(m, found)] for m, found in asking if m.name in self._apart] + ([together] if together else [])

    def _record(self, watch: Watch, groups: list[list[tuple[Measure, list[Quantity]]]]) -> Record:
        if watch.loss is None and watch.refusal is None:
            raise BadInput(
                f"step {self.steps} is due, but no backward pass ran inside `with monitor.step()`; run loss.backward() "
                "there, or give the closure of an optimizer that takes one: with monitor.step(closure): "
                "opt.step(closure)"
            )
        loss = torch.tensor(float("nan")) if watch.loss is None else watch.loss
        step = Step(self.steps, loss, watch.gradient, watch.before, watch.after())
        where = {
            m.name: (group, found) for group, members in zip(watch.groups, groups, strict=True) for m, found in members
        }
        values: dict[str, Tensor | float] = {}
        reasons: Record = {}
        for measure in self._measures:
            group, quantities = where.get(measure.name, (None, []))
            try:
                if watch.refusal is not None:
                    raise watch.refusal
                found = _measured(measure, step, group, quantities)
                self._apart.discard(measure.name)
            except NonFinite:
                found = dict.fromkeys([*watch.before, WHOLE], float("nan"))
            except LayerwiseError as error:
                self._apart.add(measure.name)
                self._leave_out(measure.name, error, reasons)
                continue
            values |= {f"{measure.name}/{name}" if name else measure.name: v for name, v in found.items()}
        return {"step": self.steps, **_floats(values), **reasons}

    def _leave_out(self, name: str, error: LayerwiseError, reasons: Record) -> None:
        if (name, type(error)) in self._said:
            return
        self._said.add((name, type(error)))
        self.left_out[name] = reasons[f"left_out/{name}"] = f"{type(error).__name__}: {error}"
        warnings.warn(f"the monitor leaves out {name!r} at step {self.steps}: {error}", LeftOut, stacklevel=6)


def _measured(
    measure: Measure, step: Step, group: Group | None, quantities: Sequence[Quantity]
) -> Mapping[str, Tensor | float]:
    """A measure's numbers; raises the error that its quantities raised."""
    with torch.no_grad():
        if group is None:
            return measure.of(step)
        if group.refusal is not None:
            raise group.refusal
        assert group.seen is not None
        return measure.of(step, *(group.seen[q] for q in quantities))


def _floats(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The numbers as Python floats, with one transfer for each device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            kinds.setdefault((value.device, value.dtype), []).append(key)
    floats: dict[str, float] = {}
    for keys in kinds.values():
        floats |= zip(keys, torch.stack([values[key].detach().reshape(()) for key in keys]).tolist(), strict=True)  # type: ignore[union-attr]
    return {key: floats[key] if key in floats else float(value) for key, value in values.items()}
