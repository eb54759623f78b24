"""Online alternating minimization: codes first, then every layer on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.graph.samples import said_count
from layerwise.local.codes.code_step import CodeStep
from layerwise.local.codes.coupling import Coupling
from layerwise.local.codes.gauss_newton import AssumedCodes, WrongCodes
from layerwise.local.layers.record import Recorded, record
from layerwise.local.regularizers import Regularizer
from layerwise.local.solvers.values import Solver
from layerwise.optim.deferred import Late
from layerwise.optim.keywords import Keywords, of_numbers, refuse_unknown
from layerwise.optim.layer_local.code_fit import CodeFitter, FittedToCodes
from layerwise.optim.layer_local.coding import (
    Coded,
    coded_layers,
    gauss_newton,
    hidden_uses,
    samples_of,
    sparse,
    swept,
    weight_gradients,
)
from layerwise.optim.layer_local.executors import Workers
from layerwise.optim.layer_local.owners import Execution, Parallel, executor_over
from layerwise.optim.layer_local.trace import Trace
from layerwise.optim.layer_local.updates import (
    CodeKind,
    CodeUpdate,
    Minibatch,
    WeightUpdate,
    check_group,
    with_coupling,
)
from layerwise.replay.coded import CodedModel
from layerwise.replay.state import Buffers
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import without_grad

__all__ = ["KEYWORDS", "AltMin", "AltMinWords"]

KEYWORDS = Keywords(
    {"code_update": CodeUpdate, "weight_update": WeightUpdate, "minibatch": Minibatch, "execution": Execution}
)


class AltMinWords(TypedDict, total=False):
    """`CodeUpdate`, `WeightUpdate`, `Minibatch` and `Execution`, or their fields as keywords."""

    code_update: CodeUpdate | None
    weight_update: WeightUpdate | None
    minibatch: Minibatch | None
    execution: Execution | None
    codes: CodeKind | None
    coupling: float | Coupling | None
    code_l1: float | None
    code_step: CodeStep | None
    multipliers: bool
    weights: Literal["adam", "sgd", "memory"] | Solver | None
    steps: int | None
    rows: int | Literal["auto", "all"] | None
    betas: tuple[float, float] | None
    eps: float | None
    momentum: float | None
    l1: float | None
    normalise: bool | None
    regularizer: Regularizer | Sequence[Regularizer] | None
    repeats: int
    schedule: Literal["together", "async"]
    staleness: int | None
    reduction: Literal["mean", "sum"]
    workers: Workers
    parallel: Parallel


class AltMin(FittedToCodes):
    """Give every layer a code, move the codes, then fit each layer to its code on its own.

    The objective of a minibatch of B samples relaxes the model at the output of every hidden layer:

        L + (1/B) Σ_l (μ ½ ‖c_l − W_l N_l(c)‖² + code_l1 ‖c_l‖₁) + l1 Σ_l ‖W_l‖₁

        opt = AltMin(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    Args:
        model: an nn.Module, or a mapping of names to tensors.
        params: as for any torch optimizer, with names (`model.named_parameters()` or groups of it); default all.
        lr: rate of the weight steps; a solver's update is multiplied by it.
        layers: settings by pattern on parameter or module names; the first match wins.
        trace: a `lw.optim.Trace` to fill.
        preset: "published" for the released program's settings, or a known algorithm (Recoveries' page).
        on_nonfinite: "skip" a batch with NaN or infinity and count it in `skipped`; "raise"; or "defer" (page Devices).
        code_update: a `CodeUpdate`, or its fields: codes, coupling, code_l1, code_step, multipliers.
        weight_update: a `WeightUpdate`, or its fields: weights, steps, rows, betas, eps, momentum, l1, normalise,
            regularizer.
        minibatch: a `Minibatch`, or its fields: repeats, schedule, staleness, reduction.
        execution: an `Execution`, or its fields: workers, parallel.

    More of each choice, and of parameters without a code: the AltMin page.
    Raises BadInput, UncoveredUse, Undefined (a sweep through a forward that depends on the codes), UnknownLoss and
    SamplesMixed (Gauss-Newton codes); NonFinite with `on_nonfinite="raise"`.
    Source: Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables" (2019).
    """

    @KEYWORDS.spelled_out(AltMinWords)
    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        lr: float | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        trace: Trace | None = None,
        preset: Literal["published", "mac", "predictive-coding"] | None = None,
        on_nonfinite: Literal["skip", "raise", "defer"] = "skip",
        **words: Unpack[AltMinWords],
    ) -> None:
        refuse_unknown(AltMin.__init__, words)
        codes, weights, minibatch, execution = KEYWORDS.values(words).values()
        names = list(named_parameters_of(model))
        self._fitter = fitter = CodeFitter(codes, weights, minibatch, names, lr, layers, trace, preset)
        self._proofs: dict[Any, bool] = {}
        said, numbers = fitter.said, fitter.updates.numbers
        super().__init__(model, params, fitter.defaults, on_nonfinite, executor_over(execution), said, numbers)
        fitter.refuse_idle(self.param_groups)

    _kind = "AltMin"

    @of_numbers
    def _check(self, group: Mapping[str, Any]) -> None:
        check_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group's coupling may be a `Coupling`, too. Settings by pattern make groups of their own."""
        super().add_param_group(with_coupling(param_group))

    # -- a step ------------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Callable[[], Tensor] | None = None, *, samples: int | Tensor | None = None
    ) -> Tensor:
        """Run the closure, move codes and weights, and return the loss before the step.

        samples: the number B in the minibatch, or a tensor with the sample number of each loss term, where the batch,
        the targets and the losses do not say it.
        """
        attempt = partial(self._attempt, samples=samples)
        with self._turn, self._shared():
            return self._repeated(partial(self._guarded, closure, attempt))

    def refit(self, closures: Iterable[Callable[[], Tensor]]) -> float:
        """Fit the layers that make a loss's logits alone, a step for each closure; returns the mean of the losses.

        For the end of a training: one pass over closures of many minibatches. μ, hidden layers and parameters without
        codes stand still; batch statistics advance, where the model is left in training. Raises BadInput where no
        layer makes a known loss's logits, or without closures.
        """
        with self._turn, self._shared():
            found = [self._guarded(closure, partial(self._attempt, refit=True)) for closure in closures]
        if not found:
            raise BadInput("refit needs at least one closure that returns a loss")
        return float(torch.stack(found).mean())

    def _attempt(
        self,
        closure: Callable[[], Tensor],
        buffers: Buffers,
        samples: int | Tensor | None = None,
        refit: bool = False,
    ) -> tuple[Tensor, str | Late | None]:
        """Record a run with codes, and fit the layers to them."""
        coded = self._record(closure, samples)
        return self._fit(coded, samples, buffers, refit)

    @without_grad
    def _fit(
        self, coded: Coded, samples: int | Tensor | None, buffers: Buffers, refit: bool
    ) -> tuple[Tensor, str | Late | None]:
        """Fit the layers to their codes; roll back where a solution is not finite."""
        fitter, fitting = self._fitter, self._fitting(coded.run, samples)
        run = fitting.run
        late = self._late(run, buffers, fitter.solvers(fitting), assumes=True)
        if coded.assumed is not None:
            if late is None or late.deferred:
                return self._fit(coded.settled(), samples, buffers, refit)
            coded.assumed.ask(late.verdict)
        where = self._unsafe(run, partial(fitter.gamma, fitting), buffers, late)
        if where is not None:
            return run.loss, where
        layers = [layer for layer in run.layers if not refit or layer.likelihood is not None]
        if refit and not layers:
            raise BadInput(
                "refit moves the layers whose outputs a known loss reads, and the closure's loss reads none of a layer "
                "that moves: return a loss such as F.cross_entropy(model(x), y), with the last layer trained"
            )

        def finish() -> None:
            self._averages = self._averages | fitting.means.after

        try:
            return run.loss, fitter.fit(fitting, coded, layers, self, self._executor, finish, refit, late)
        except WrongCodes:
            assert coded.assumed is not None
            exact = coded._replace(run=coded.assumed.exact(), assumed=None)
            return self._fit(exact, samples, buffers, refit)

    # -- codes -------------------------------------------------------------------------------------------------

    def _record(self, closure: Callable[[], Tensor], samples: int | Tensor | None) -> Coded:
        """A run of the closure with moved codes."""
        codes, gamma = self._fitter.codes, lambda run: partial(self._fitter.gamma, self._fitting(run, samples))
        assumed: AssumedCodes | None = None
        if codes == "sweep":
            return self._record_sweep(closure, samples)
        if codes == "gauss-newton":
            run, plain, assumed = gauss_newton(self._model, closure, self._ours, gamma, self._kinds, samples)
        else:
            run = plain = record(self._model, closure, self._ours, matrices=True, crosses=True, kinds=self._kinds)
        if any(group["code_l1"] for group in self.param_groups):
            fitting = self._fitting(run, samples)
            numbers = partial(self._fitter.gamma, fitting), partial(self._fitter.threshold, fitting)
            run, dense = sparse(run, *numbers), assumed
            if dense is not None:
                assumed = dense._replace(exact=lambda: sparse(dense.exact(), *numbers))
        return Coded(run, slopes=partial(weight_gradients, plain), assumed=assumed)

    def _record_sweep(self, closure: Callable[[], Tensor], samples: int | Tensor | None) -> Coded:
        """Move the codes from the output to the input, and record the layers on them."""
        coded = CodedModel(self._model, closure, self._proofs)
        layers = coded_layers(coded, self._ours, self._kinds)
        if layers is None:
            return Coded(Recorded(coded.loss.detach(), coded.tape, [], {}, {}))
        groups = {i: self._group_at[id(layer.parameter)] for i, layer in hidden_uses(coded, layers).items()}
        slopes: dict[str, Tensor] = {}
        if self._fitter.trace is not None and self._fitter.trace.due():
            params = {layer.name: layer.parameter for layer in layers}
            found = torch.autograd.grad(coded.loss, list(params.values()), retain_graph=True, allow_unused=True)
            slopes = {name: g for name, g in zip(params, found, strict=True) if g is not None}
        count = said_count(samples, "samples of AltMin.step")
        counted = samples_of(coded) if count is None else count
        terms = self._fitter.terms(groups, counted)
        run, codes = swept(coded, layers, terms, self._fitter.code_step, self._ours, counted)
        return Coded(run, codes, lambda: slopes)

    # -- state ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and pickle; the proofs of replays are made anew."""
        return {**super().__getstate__(), "_proofs": {}}
