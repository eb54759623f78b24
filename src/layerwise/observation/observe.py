"""`observe`: many quantities from the user's own backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.gradient.compiled import Backend, inductor
from layerwise.observation.backward_pass import PassSettings
from layerwise.observation.engine import Observation
from layerwise.observation.seen import Seen
from layerwise.quantities.base import Quantity
from layerwise.tape.tape import Tape

__all__ = ["observe"]


class observe:
    """Compute quantities in the user's ordinary `loss.backward()`.

        with observe(model, Variance(), DiagGGN()) as seen:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        seen.variance["conv1.weight"]

    `.grad` is what it would have been. Results are keyed by parameter name. Several backward passes in one
    context give the quantities of the sum of their losses as written, whose gradient `.grad` is: (mean / K) K times.

    model: an nn.Module, or a mapping of names to tensors for a functional model. samples: the number of
    samples N, or a tensor with the sample number of each loss term; by default what the batch, the targets and the
    losses say. scale: "loss" (g_n sum to `.grad`) or "sample" (N g_n for a mean).
    dtype: of the sums and results of all quantities, torch.float32 or torch.float64; by default each parameter's own
    (under autocast too), and float32 for parameters in half precision, whose type overflows at 65,504 or drops small
    terms. The cotangents come in the types of the graph, second derivatives are taken in them, and means are read off
    `.grad`, which keeps its type.
    grad: "autograd": `.grad` is to the bit what it would have been. "rows": where a quantity forms the per-sample
    gradients of a weight with positions (`PerSampleGrad`, `SecondMoment`, `Variance`; norms and sketches where no other
    form is cheaper), `.grad` is their sum, equal up to rounding, and autograd leaves its own product out. Hooks on
    parameters run as always, after the rest of the pass. Where that cannot be (`inputs`, `create_graph`,
    torch.distributed, other modes, derived weights), autograd's.
    on_nonfinite: "raise" looks for NaN and infinity in the loss, the gradient and the loss's curvature, and for class
    indices out of range, before `backward` returns; an accelerator waits for that once. "defer" waits for nothing:
    `.grad` is then what torch makes of such a batch, and every result raises when it is read, so that none is wrong.
    What a quantity decides by numbers (whether targets are ignored) it takes as in the last batch of that layout, and
    refuses others when a result is read. None: "raise" on the CPU, which has nothing to wait for; elsewhere "defer",
    with one wait for such decisions.
    parameters: names of parameters or of modules that hold them, or patterns with * and ?, as `layers=` of the
    optimizers takes them; only their quantities are computed, and only their gradients are in `seen.grad`. None: all.
    compile: True: what quantities compute of a parameter's rows is one graph, compiled by inductor at its first layout
    (seconds each, and a C++ compiler for the CPU or Triton for a GPU) and kept with the model; or a backend, a function
    as `torch.compile(backend=)` takes it, the same one in each `observe`. Values are equal up to rounding. What is no
    graph of rows is computed as always: windows of convolutions, gathered rows, embeddings on the CPU, Kronecker
    factors, quantities that hold tensors. A quantity of your own must compute from the rows and its plain attributes
    alone. docs/devices.md says where it pays.
    Raises UncoveredUse, UnknownLoss, SamplesMixed, Undefined, NonFinite, BadInput; then nothing was changed, but for
    what "defer" says.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        *quantities: Quantity,
        samples: int | Tensor | None = None,
        scale: str = "loss",
        dtype: torch.dtype | None = None,
        on_nonfinite: Literal["raise", "defer"] | None = None,
        parameters: str | Sequence[str] | None = None,
        grad: str = "autograd",
        compile: bool | Backend = False,
    ) -> None:
        if on_nonfinite not in ("raise", "defer", None):
            raise BadInput(f'on_nonfinite must be "raise", "defer" or None, got {on_nonfinite!r}')
        defer = None if on_nonfinite is None else on_nonfinite == "defer"
        if not (isinstance(compile, bool) or callable(compile)):
            raise BadInput(f"compile must be a bool, or a backend as torch.compile takes it, got {compile!r}")
        backend = inductor if compile is True else compile or None
        settings = PassSettings(samples, scale, dtype, defer=defer, parameters=parameters, grad=grad, backend=backend)
        self._observation = Observation(model, quantities, settings)

    def __enter__(self) -> Seen:
        try:
            return Seen(self._observation.__enter__())
        except BadInput:  # active already
            raise
        except BaseException as error:  # an interrupt, after which `with` does not call `__exit__`
            self._observation.stop(type(error), error, error.__traceback__)
            raise

    def __exit__(self, *exc: Any) -> None:
        try:
            self._observation.__exit__(*exc)
        except BaseException:  # an interrupt
            self._observation.__exit__(*exc)
            raise

    def through(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> tuple[Any, Seen]:
        """Observe one backward pass through what an ended tape recorded: the result of `run`, and what was seen.

        run: starts the pass from `total` (times `weight`). For interfaces that record in their own way.
        """
        seen = Seen(self._observation.restart())
        return self._observation.run(tape, total, weight, run), seen
