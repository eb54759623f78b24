"""Online alternating minimization: codes first, then every layer on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise import ops
from layerwise.coverage import Graph, prove
from layerwise.errors import BadInput
from layerwise.local.codes import CodeStep, sweep
from layerwise.local.problem import LocalProblem
from layerwise.local.record import Layer, Recorded, layers_of, problem_of
from layerwise.local.solvers import Workspace, local_steps
from layerwise.local.transfer import IDENTITY
from layerwise.ops.base import Call
from layerwise.optim.base import LayerLocal
from layerwise.replay import CodedModel

__all__ = ["AltMin"]

_DEFAULTS: dict[str, Any] = {
    "codes": "jacobi", "weights": "adam", "lr": 4e-3, "coupling": 0.03, "steps": 4, "rows": "auto",
    "betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.9,
}  # fmt: skip
_PRESETS: dict[str, dict[str, Any]] = {
    "published": {"codes": "sweep", "weights": "adam", "lr": 8e-3, "coupling": 3e-3, "steps": 1, "rows": "all"},
}


class AltMin(LayerLocal):
    """Give every layer a code, move the codes, then fit each layer to its code on its own.

    The objective of a minibatch of B samples relaxes the model at the output of every hidden layer:

        L + (μ/B) Σ_l ½ ‖c_l − W_l N_l(c)‖²

    codes="jacobi": `c = z − (B/μ) dL/dz` for all layers at once, from one backward pass; layers are fitted
    on the inputs they had. codes="sweep": from the output to the input, each code takes a few gradient steps on
    its own terms through one block only, with no global backward pass; layers are fitted on the moved codes.
    Then each hidden layer descends `(μ/B) ½ ‖c_l − W_l a_l‖²` and the output layer the loss, by T local steps of
    Adam or SGD, each on its own share of the rows. Batch-norm statistics stand still during code updates.
    Parameters without a code (scales, lone biases, tied or derived weights) take T steps along their gradient.

        opt = AltMin(model)
        loss = opt.step(lambda: F.cross_entropy(model(x), y))

    model, params: as for LocoProp. lr: of the local optimizer. coupling: μ, the same at every layer, in units
    of a sample's loss. steps: T. rows: rows for each local step, "auto" for R/T, or "all". weights: "adam" (betas,
    eps) or "sgd" (Nesterov momentum). code_step: how codes move in a sweep. reduction: what the loss does
    over the samples, "mean" (B = dim 0 of the batch) or "sum" (B = 1). preset: "published" for the released
    program's settings (sweep, five Nesterov steps of 0.3, μ 0.003, Adam 0.008).
    Raises BadInput, UncoveredUse, Undefined (a sweep through a forward that depends on the codes); NonFinite
    with `on_nonfinite="raise"` (default: skip the batch and count it).
    Source: Choromanska et al., "Beyond Backprop: Online Alternating Minimization with Auxiliary Variables" (2019).
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        params: Iterable[Any] | None = None,
        *,
        codes: Literal["jacobi", "sweep"] | None = None,
        weights: Literal["adam", "sgd"] | None = None,
        lr: float | None = None,
        coupling: float | None = None,
        steps: int | None = None,
        rows: int | Literal["auto", "all"] | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        momentum: float | None = None,
        code_step: CodeStep | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        preset: Literal["published"] | None = None,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        if preset is not None and preset not in _PRESETS:
            raise BadInput(f"AltMin knows the presets {', '.join(_PRESETS)}; got {preset!r}")
        if reduction not in ("mean", "sum"):
            raise BadInput(f'AltMin\'s reduction is "mean" or "sum"; got {reduction!r}')
        given = {"codes": codes, "weights": weights, "lr": lr, "coupling": coupling, "steps": steps, "rows": rows,
                 "betas": betas, "eps": eps, "momentum": momentum}  # fmt: skip
        chosen = {**_DEFAULTS, **(_PRESETS[preset] if preset else {})}
        chosen.update({k: v for k, v in given.items() if v is not None})
        self._codes = chosen.pop("codes")
        super().__init__(model, params, chosen, on_nonfinite)
        if self._codes not in ("jacobi", "sweep"):
            raise BadInput(f'AltMin\'s codes are "jacobi" or "sweep"; got {self._codes!r}')
        for group in self.param_groups:
            _check(group)
        self._code_step = code_step if code_step is not None else CodeStep()
        self._reduction = reduction
        self._workspace = Workspace()
        self._proofs: dict[Any, bool] = {}

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Run the closure, move codes and parameters, and return the loss before the step."""
        recorded = self._record(closure) if self._codes == "jacobi" else self._record_sweep(closure)
        if recorded is None or self._refuse_nonfinite(recorded.finite()):
            return self._loss if recorded is None else recorded.loss
        batch = self._batch(recorded.samples)
        problems = [(layer, self._problem(recorded, layer, batch)) for layer in recorded.layers]
        for layer, problem in problems:
            self._solve(recorded, layer, problem)
        for _, p, g, group in self._rest(recorded):
            self._along(p, g, group)
        return recorded.loss

    # -- what each layer is fitted to -------------------------------------------------------------------

    def _batch(self, samples: int) -> float:
        return float(samples) if self._reduction == "mean" else 1.0

    def _problem(self, recorded: Recorded, layer: Layer, batch: float) -> LocalProblem:
        """The local problem of a layer; its gradient times 1/γ is that of the relaxed objective.

        A hidden layer has γ = B/μ and the squared loss; the layer that makes a loss's logits has the loss itself,
        which is its matching loss with γ = 1/w for terms of one weight w.
        """
        if layer.likelihood is not None and not layer.transfer.stand_in:
            weight = layer.likelihood.uniform_weight()
            if weight:
                return problem_of(recorded, layer, 1 / weight, layer.transfer)
        return problem_of(recorded, layer, batch / self._group_of(recorded, layer)["coupling"], IDENTITY)

    def _solve(self, recorded: Recorded, layer: Layer, problem: LocalProblem) -> None:
        params = [recorded.tape.parameters[name] for name in layer.names]
        group = self._group_of(recorded, layer)
        rows: int | None = None if group["rows"] == "all" else group["rows"]
        if group["rows"] == "auto":
            rows = max(1, problem.a.shape[0] // group["steps"])
        local_steps(
            problem,
            self._local_optimizer(params, group),
            group["steps"],
            rows=rows,
            form="plain",
            schedule=_constant,
            scale=1 / problem.gamma,
            weight=params[0],
            bias=params[1] if len(params) > 1 else None,
            fold=layer.weight.fold,
            workspace=self._workspace,
        )

    def _along(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        """T steps along the gradient, for a parameter without a code."""
        optimizer = self._local_optimizer([p], group)
        before, p.grad = p.grad, g.detach()
        for _ in range(group["steps"]):
            optimizer.step()
        p.grad = before

    def _local_optimizer(self, params: list[Tensor], group: dict[str, Any]) -> torch.optim.Optimizer:
        """An optimizer of these parameters whose state is ours."""
        optimizer: torch.optim.Optimizer
        if group["weights"] == "adam":
            optimizer = torch.optim.Adam(params, group["lr"], group["betas"], group["eps"], foreach=False)
        else:
            nesterov = group["momentum"] > 0
            optimizer = torch.optim.SGD(params, group["lr"], group["momentum"], nesterov=nesterov, foreach=False)
        optimizer.state = self.state
        return optimizer

    # -- the sweep ----------------------------------------------------------------------------------------

    def _record_sweep(self, closure: Callable[[], Tensor] | None) -> Recorded | None:
        """Move the codes, and record the layers on them; None where the first run is not finite."""
        if closure is None:
            return self._record(None)
        coded = CodedModel(self._model, closure, self._proofs)
        self._loss = coded.loss.detach()
        if not bool(torch.isfinite(self._loss).all()):
            self._refuse_nonfinite("the loss")
            return None
        graph = prove(coded.tape, coded.loss, None, need_loss=False)
        layers = [layer for layer in layers_of(coded.tape, graph) if self._ours(layer)]
        batch = self._batch(_samples(coded))
        hidden = _hidden(coded, layers)
        coupling = self.param_groups[0]["coupling"]
        start = {i: coded.tape.predictions[i].detach() for i in hidden}
        codes = sweep(coded, start, coupling, batch, self._code_step)
        return _recorded_on_codes(coded, graph, layers, codes, coupling / batch)


def _samples(coded: CodedModel) -> int:
    first = coded.tape.first
    return first.shape[0] if first is not None and first.dim() else 1


def _hidden(coded: CodedModel, layers: list[Layer]) -> list[int]:
    """The uses that carry codes: the layers whose output another layer reads."""
    every = [layer.use.index for layer in layers]
    readers = coded.consumers(every)
    return [i for i in every if any(m in every for m in readers[i][0])]


def _recorded_on_codes(
    coded: CodedModel, graph: Graph, layers: list[Layer], codes: Mapping[int, Tensor], weight: float
) -> Recorded:
    """The layers with inputs made from the codes; cotangents and gradients are the relaxed objective's.

    weight: μ/B. Each layer's output depends on its own weights and the codes alone, so no cotangent crosses
    a block.
    """
    every = [layer.use.index for layer in layers]
    out = coded.piece(codes, every, True)
    assert out.loss is not None
    objective = out.loss
    for i, code in codes.items():
        objective = objective + weight / 2 * (code - out.predictions[i]).square().sum()
    inside = {name for layer in layers for name in layer.names}
    rest = {n: p for n, p in coded.tape.parameters.items() if n not in inside}
    found = torch.autograd.grad(objective, [*(out.predictions[i] for i in every), *rest.values()], allow_unused=True)
    moved = []
    for layer in layers:
        args, kwargs = out.calls[layer.use.index]
        parameters = {id(coded.tape.parameters[name]) for name in layer.names}
        call = Call(
            layer.use.call.func, _detached(args, parameters), _detached(kwargs, parameters), layer.use.call.out_shape
        )
        slots = ops.slots(call, [d.tensor for d in layer.use.used])
        bias = next((s for s in slots if s.bias), None)
        weight_slot = next(s for s in slots if not s.bias)
        value = out.predictions[layer.use.index].detach()
        moved.append(dataclasses.replace(layer, weight=weight_slot, bias=bias, value=value))
    cotangents = {i: g for i, g in zip(every, found, strict=False) if g is not None}
    moved = [layer for layer in moved if layer.use.index in cotangents]
    gradients = {n: g for n, g in zip(rest, found[len(every) :], strict=True) if g is not None}
    return Recorded(coded.loss.detach(), coded.tape, graph, moved, cotangents, gradients)


def _detached(value: Any, keep: set[int]) -> Any:
    if isinstance(value, Tensor):
        return value if id(value) in keep else value.detach()
    if isinstance(value, dict):
        return {k: _detached(v, keep) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(v, keep) for v in value)
    return value


def _constant(t: int, steps: int) -> float:
    return 1.0


def _check(group: dict[str, Any]) -> None:
    rows = group["rows"]
    ok_rows = rows in ("auto", "all") or (isinstance(rows, int) and rows >= 1)
    if not (group["lr"] >= 0 and group["coupling"] > 0 and group["steps"] >= 1 and ok_rows):
        raise BadInput(
            f"AltMin needs lr ≥ 0, coupling > 0, steps ≥ 1 and rows ≥ 1, 'all' or 'auto'; got lr={group['lr']}, "
            f"coupling={group['coupling']}, steps={group['steps']}, rows={rows!r}"
        )
    if group["weights"] not in ("adam", "sgd"):
        raise BadInput(f'AltMin\'s weights are updated by "adam" or "sgd"; got {group["weights"]!r}')
