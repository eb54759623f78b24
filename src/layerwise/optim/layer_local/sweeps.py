"""Layers solved in turn: each reads its inputs anew through the layers already moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import Undefined
from layerwise.graph.coverage import prove
from layerwise.local.layers.kinds import Kinds
from layerwise.local.layers.layer import Layer, layers_of
from layerwise.local.problem import LocalProblem, predict
from layerwise.replay.state import Buffers, RandomState
from layerwise.tape.tape import Tape

__all__ = ["Sweep"]


class Sweep:
    """Further runs of one step's closure, with the random numbers and the buffers of the first.

    random, before: the generators' states and the buffers before the first run. Targets stay those of the first run.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        closure: Callable[[], Tensor],
        ours: Callable[[Tensor], bool],
        random: RandomState,
        before: Buffers,
        kinds: Kinds | None = None,
    ) -> None:
        self._model, self._closure, self._ours = model, closure, ours
        self._random, self._before, self._kinds = random, before, kinds

    @torch.no_grad()
    def refreshed(self, problem: LocalProblem, layer: Layer) -> LocalProblem:
        """The problem with the inputs `a` (and terms `rest`) of the model as it stands; itself where they are the same.

        Raises Undefined where the closure does not come by the layer again.
        """
        now = self._again(layer)
        a = now.join([part.input() for part in now.parts])
        rest = None
        if problem.rest is not None:
            z = now.join([part.rows(part.output()) for part in now.parts])
            if a.shape == problem.a.shape:
                rest = z - predict(replace(problem, a=a, rest=None, g=None))
        if a.shape != problem.a.shape:
            raise Undefined(f"run again, the closure gave {layer.name} {len(a)} rows, and {len(problem.a)} at first")
        same = torch.equal(a, problem.a) and (rest is None or torch.equal(rest, problem.rest))  # type: ignore[arg-type]
        return problem if same else replace(problem, a=a, rest=rest, g=None)

    def _again(self, layer: Layer) -> Layer:
        """The layer in another run, without the backward pass that the closure may start."""
        after, later = Buffers(self._model), RandomState({layer.parameter.device})
        self._before.put_back()
        self._random.put_back()
        try:
            tape = Tape(self._model, self._skip, keep_outputs=True)
            with tape, torch.enable_grad():
                loss = self._closure()
            found = layers_of(tape, prove(tape, loss, None, need_loss=False), self._ours, kinds=self._kinds)
        finally:
            after.put_back()
            later.put_back()
        wanted = [part.use.index for part in layer.parts]
        for other in found:
            if other.names == layer.names and [part.use.index for part in other.parts] == wanted:
                return other
        raise Undefined(
            f"run again for order='output_to_input' or 'input_to_output', the closure made other calls with "
            f'{layer.name}: use order="together"'
        )

    @staticmethod
    def _skip(tape: Any, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        return None
