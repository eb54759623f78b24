"""Asynchronous layers, simulated: each is fitted to what it last heard, a bounded number of minibatches ago."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.problem import LocalProblem

__all__ = ["Stale"]

Heard = dict[str, Any]


class Stale:
    """Inputs and codes of the last minibatches, by layer, and how old those are that a layer gets.

    At step t a layer gets what was recorded at step t − d, with d drawn evenly from 0 to `most`: by its name and t
    alone, so that runs repeat and go on where they stopped. Weights are always the present ones. Inputs and codes are
    copied; memory grows with `most`, not with the number of samples.
    """

    def __init__(self, most: int) -> None:
        if not isinstance(most, int) or most < 0:
            raise BadInput(f"staleness is a whole number of minibatches ≥ 0; got {most!r}")
        self._most = most
        self._steps = 0
        self._heard: deque[dict[str, Heard]] = deque(maxlen=most + 1)

    def delay(self, name: str, step: int) -> int:
        """How many minibatches old the data of a layer are at a step."""
        return random.Random(f"{name} at {step}").randint(0, self._most)

    def exchange(self, problems: Mapping[str, LocalProblem]) -> dict[str, LocalProblem]:
        """Take in the problems of a step, and give what each layer is to be fitted to now."""
        self._heard.append({
            name: {"a": p.a.clone(), "target": p.target.clone(), "rest": None if p.rest is None else p.rest.clone(),
                   "gamma": p.gamma}
            for name, p in problems.items()
        })  # fmt: skip
        found = {}
        for name, problem in problems.items():
            back = min(self.delay(name, self._steps), len(self._heard) - 1)
            old = self._heard[-1 - back].get(name) if back else None
            # the first step's shortcut, g in place of a product, holds at the weights that made it
            found[name] = problem if old is None else replace(problem, **old, g=None)
        self._steps += 1
        return found

    def forget(self) -> None:
        """Take back the last step, which changed nothing."""
        self._heard.pop()
        self._steps -= 1

    def state(self) -> dict[str, Any]:
        """For `state_dict`."""
        return {"steps": self._steps, "heard": list(self._heard)}

    def restore(self, state: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """From `state_dict`, on the devices of the parameters."""
        self._steps = state["steps"]
        self._heard = deque(
            (
                {name: {k: v.to(params[name].device, copy=True) if isinstance(v, torch.Tensor) else v
                        for k, v in heard.items()} for name, heard in step.items()}
                for step in state["heard"]
            ),
            maxlen=self._most + 1,
        )  # fmt: skip
