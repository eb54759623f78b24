"""What the stages of a pipeline send over the cuts between them, also where one of them fails on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.local.codes.code_step import code_type
from layerwise.ranks.group import Ranks

__all__ = ["Cuts", "Output"]

_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MOST_AXES = 8
_HEADER = 4 + 1 + _MOST_AXES  # coupling, sparsity, samples, type, number of axes, shape
_FAILED = -1.0  # in place of the number of axes


@dataclass(frozen=True)
class Output:
    """A stage's output, with the coupling μ and code penalty λ of its layer, and the batch size."""

    value: Tensor
    coupling: float
    sparsity: float
    samples: int


class Cuts:
    """The messages of one step over the cuts below and above a stage.

    Every stage receives the output from below, sends its own above, receives its code, and sends the code of what it
    received below. A stage that fails does what is missing of this with empty hands (`give_up`), so that its neighbours
    reach the agreement on the step, in which it tells them.
    """

    def __init__(self, stages: Ranks, device: torch.device) -> None:
        self._stages, self._device = stages, device
        self._below = stages.rank - 1 if stages.rank else None
        self._above = stages.rank + 1 if stages.rank + 1 < stages.size else None
        self._entry: tuple[list[int], torch.dtype] | None = None  # the shape of what came from below
        self._broken = self._received = self._sent = self._returned = False
        self._due: Tensor | None = None  # memory for a code that is on its way

    def receive_output(self) -> Output:
        """The output of the stage below. Raises RankFailed where that one has failed."""
        assert self._below is not None
        coupling, sparsity, samples, value = self._receive()
        if value is None:
            self.give_up()
            self._stages.any(False)  # it tells here what happened
            raise AssertionError("a stage that has failed says so at the next message")
        return Output(value, coupling, sparsity, int(samples))

    def exchange(self, out: Output) -> Tensor:
        """Send this stage's output above, and receive its code. Raises BadInput for a type or axes that do not pass."""
        value = out.value
        if value.dtype not in _TYPES or value.dim() > _MOST_AXES:
            raise BadInput(
                f"what passes between stages is floating-point with ≤ {_MOST_AXES} axes; got {value.dtype} with "
                f"{value.dim()}"
            )
        assert self._above is not None
        shape = [value.dim(), *value.shape, *[0] * (_MOST_AXES - value.dim())]
        header = [out.coupling, out.sparsity, float(out.samples), float(_TYPES.index(value.dtype)), *map(float, shape)]
        message = [torch.tensor(header, dtype=torch.float64, device=self._device), value.contiguous()]
        code = torch.empty(value.shape, dtype=code_type(value.dtype), device=value.device)
        self._sent, self._due = True, code
        self._stages.send(self._above, message)
        self._stages.receive(self._above, [code])
        self._due = None
        return code

    def send_code(self, code: Tensor) -> None:
        """Send the code of what came from below back to that stage."""
        assert self._below is not None
        code = code.contiguous()
        self._returned = True
        self._stages.send(self._below, [code])

    def give_up(self) -> None:
        """Do what is left of this step's messages, so that no neighbour waits; once."""
        if self._broken:
            return
        self._broken = True
        if self._below is not None and not self._received:
            self._receive()
        if self._above is not None and not self._sent:
            header = torch.zeros(_HEADER, dtype=torch.float64, device=self._device)
            header[4] = _FAILED
            self._stages.send(self._above, [header])
        if self._above is not None and self._due is not None:
            self._stages.receive(self._above, [self._due])
        if self._below is not None and self._entry is not None and not self._returned:
            shape, dtype = self._entry
            nothing = torch.full(shape, float("nan"), dtype=code_type(dtype), device=self._device)
            self._stages.send(self._below, [nothing])

    def _receive(self) -> tuple[float, float, float, Tensor | None]:
        """The numbers and the output from below; None for one of a stage that has failed."""
        assert self._below is not None
        if self._entry is None:
            header = torch.empty(_HEADER, dtype=torch.float64, device=self._device)
            self._stages.receive(self._below, [header])
            coupling, sparsity, samples, kind, axes, *shape = header.tolist()
            self._numbers = coupling, sparsity, samples
            if axes == _FAILED:
                self._received = True
                return *self._numbers, None
            self._entry = [int(n) for n in shape[: int(axes)]], _TYPES[int(kind)]
        value = torch.empty(self._entry[0], dtype=self._entry[1], device=self._device)
        self._received = True
        self._stages.receive(self._below, [value])
        return *self._numbers, value
