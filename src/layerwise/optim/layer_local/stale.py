"""Simulated asynchronous layers: each is fitted to data a bounded number of minibatches old."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem
from layerwise.optim.saved_state import is_count, is_number, non_finite, unlike

__all__ = ["Stale"]

LayerData = dict[str, Any]


class Stale:
    """Inputs and codes of the last minibatches, by layer.

    At step t a layer gets the data of step t − d, with d drawn evenly from 0 to `most` by its name and t alone, so that
    runs repeat and resume bitwise. Weights are always the present ones. Memory grows with `most`.
    """

    def __init__(self, most: int) -> None:
        if not isinstance(most, int) or most < 0:
            raise BadInput(f"staleness is a whole number of minibatches ≥ 0; got {most!r}")
        self._most = most
        self._steps = 0
        self._history: deque[dict[str, LayerData]] = deque(maxlen=most + 1)
        self._old: dict[str, dict[str, LayerData]] = {}  # earlier minibatches that layers of the last step were given
        self._blamed: list[str] = []

    def delay(self, name: str, step: int) -> int:
        """The age d of a layer's data at a step, in minibatches."""
        return random.Random(f"{name} at {step}").randint(0, self._most)

    def exchange(self, problems: Mapping[str, LocalProblem]) -> dict[str, LocalProblem]:
        """Store the problems of a step, and return the ones that its layers are fitted to."""
        self._history.append({
            name: {"a": p.a.clone(), "target": p.target.clone(), "rest": None if p.rest is None else p.rest.clone(),
                   "gamma": p.gamma}
            for name, p in problems.items()
        })  # fmt: skip
        found = {}
        self._old, self._blamed = {}, []
        for name, problem in problems.items():
            back = min(self.delay(name, self._steps), len(self._history) - 1)
            old = self._history[-1 - back].get(name) if back else None
            if old is not None:
                self._old[name] = self._history[-1 - back]
                # g gives the first local gradient only at the weights that made it
                problem = replace(problem, **_in_dtype(old, problem.target.dtype), g=None)
            found[name] = problem
        self._steps += 1
        return found

    def blame(self, names: Iterable[str]) -> None:
        """Say which layers of the last step were not solved or overshot: an earlier minibatch that did it is let go.

        Else every step that is given it would be skipped, and as a skipped step puts back what there was, for ever.
        """
        self._blamed = [name for name in names if name in self._old]

    def held(self) -> tuple[Any, ...]:
        """What a step changes, for `hold`."""
        return self._steps, deque(self._history, maxlen=self._most + 1)

    def hold(self, held: tuple[Any, ...]) -> None:
        """Go back to before the steps that were rolled back, but for what is blamed."""
        self._steps, self._history = held
        for name in self._blamed:
            self._old[name].pop(name, None)

    def state(self) -> dict[str, Any]:
        """For `state_dict`."""
        return {"steps": self._steps, "heard": list(self._history), "layers": list(map(list, self._history))}

    def differences(self, state: Any, params: Mapping[str, Tensor]) -> list[str]:
        """What of a saved state does not fit."""
        what = "the minibatches of stale layers"
        if not isinstance(state, Mapping):
            return [f"{what} are a {type(state).__name__}, not a dict"]
        if wrong := unlike(what, state, {"steps": is_count, "heard": _are_minibatches}):
            return wrong
        heard = [list(one) for one in state["heard"]]
        said = state.get("layers", heard)  # of a stage of a pipeline, or of the whole model of which this is one
        lost = any(name in params and name not in one for all_, one in zip(said, heard, strict=False) for name in all_)
        if lost or len(said) != len(heard):
            return [f"{what} are of the layers {heard}, and were saved of {said}: the list was cut"]
        found = []
        for name, data in (item for heard in state["heard"] for item in heard.items()):
            if name in params:
                wrong = unlike(f"a minibatch of {name}", data, _of_weight(params[name], data))
                found += wrong or non_finite(f"a minibatch of {name}", data)
            else:
                found.append(f"there are minibatches of {name}, which the model does not have")
        return found

    def restore(self, state: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """From `state_dict`, on the devices of the parameters.

        Minibatches that are older than this staleness, which no layer is ever given, are let go.
        """
        self._steps = state["steps"]
        self._history = deque(
            (
                {name: {k: v.to(params[name].device, copy=True) if isinstance(v, torch.Tensor) else v
                        for k, v in heard.items()} for name, heard in step.items()}
                for step in state["heard"]
            ),
            maxlen=self._most + 1,
        )  # fmt: skip


def _in_dtype(data: LayerData, dtype: torch.dtype) -> LayerData:
    """A layer's data in the type of its present ones: the model was converted since, or kept half precision then."""
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in data.items()}


def _are_minibatches(value: Any) -> bool:
    """Whether a saved value is a list of dicts of dicts."""
    return isinstance(value, list | tuple) and all(
        isinstance(heard, Mapping) and all(isinstance(data, Mapping) for data in heard.values()) for heard in value
    )


def _of_weight(weight: Tensor, data: Mapping[str, Any]) -> dict[str, Callable[[Any], bool]]:
    """What must hold of a layer's data: inputs `[R,K,I]`, targets `[R,K,O]` and the rest like them, γ > 0."""

    def rows(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()

    def target(value: Any) -> bool:
        a = data.get("a")
        if not (rows(value) and isinstance(a, Tensor) and rows(a) and a.shape[:2] == value.shape[:2]):
            return False
        return a.shape[1] * a.shape[2] * int(value.shape[2]) == weight.numel()

    return {
        "a": rows,
        "target": target,
        "rest": lambda value: value is None or (target(value) and value.shape == data["target"].shape),
        "gamma": lambda value: is_number(value) and value > 0,
    }
