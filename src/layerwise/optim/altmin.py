"""Online alternating minimization: codes first, then every layer on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise import ops
from layerwise.coverage import prove
from layerwise.errors import BadInput
from layerwise.local.codes import CodeStep, sweep
from layerwise.local.layers import Layer, layers_of
from layerwise.local.problem import LocalProblem
from layerwise.local.record import Recorded, dense, is_finite, problem_of, record
from layerwise.local.steps import constant, linear_steps, local_steps
from layerwise.local.transfer import IDENTITY
from layerwise.optim.base import LayerLocal, check_common
from layerwise.replay import CodedModel

__all__ = ["AltMin"]

_DEFAULTS: dict[str, Any] = {
    "codes": "jacobi", "weights": "adam", "lr": 4e-3, "coupling": 0.1, "steps": 2, "rows": "auto",
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
        if self._codes not in ("jacobi", "sweep"):
            raise BadInput(f'AltMin\'s codes are "jacobi" or "sweep"; got {self._codes!r}')
        self._code_step = code_step if code_step is not None else CodeStep()
        self._reduction = reduction
        self._proofs: dict[Any, bool] = {}
        super().__init__(model, params, chosen, on_nonfinite)

    def _check(self, group: Mapping[str, Any]) -> None:
        check_common("AltMin", group)
        if not 0 < group["coupling"] < float("inf"):
            raise BadInput(f"AltMin needs a finite coupling > 0; got coupling={group['coupling']}")
        if group["weights"] not in ("adam", "sgd"):
            raise BadInput(f'AltMin\'s weights are updated by "adam" or "sgd"; got {group["weights"]!r}')
        if not (all(0 <= b < 1 for b in group["betas"]) and group["eps"] >= 0 and 0 <= group["momentum"] < 1):
            raise BadInput(
                f"AltMin needs betas and momentum in [0, 1) and eps ≥ 0; got betas={group['betas']}, "
                f"momentum={group['momentum']}, eps={group['eps']}"
            )

    # -- what each layer is fitted to -------------------------------------------------------------------

    def _run(self, closure: Callable[[], Tensor]) -> Recorded:
        return (
            record(self._model, closure, self._ours, single=True)
            if self._codes == "jacobi"
            else self._run_sweep(closure)
        )

    def _batch(self, samples: int) -> float:
        return float(samples) if self._reduction == "mean" else 1.0

    def _gamma(self, recorded: Recorded, name: str) -> float:
        return self._batch(recorded.samples) / float(self._group_of(recorded, name)["coupling"])

    def _problem(self, recorded: Recorded, layer: Layer) -> LocalProblem:
        """The local problem of a layer; its gradient times 1/γ is that of the relaxed objective.

        A hidden layer has γ = B/μ and the squared loss; the layer that makes a loss's logits has the loss itself,
        which is its matching loss with γ = 1/w for terms of one weight w.
        """
        if layer.likelihood is not None and not layer.transfer.stand_in:
            weight = layer.likelihood.uniform_weight()
            if weight:
                return problem_of(recorded, layer, 1 / weight, layer.transfer)
        return problem_of(recorded, layer, self._gamma(recorded, layer.name), IDENTITY)

    def _fit(self, recorded: Recorded, layer: Layer) -> None:
        group, problem = self._group_of(recorded, layer.name), self._problem(recorded, layer)
        params = [recorded.tape.parameters[name] for name in layer.names]
        share = -(-problem.a.shape[0] // group["steps"])
        local_steps(
            problem,
            self._local_optimizer(params),
            group["steps"],
            rows={"auto": share, "all": None}.get(group["rows"], group["rows"]),
            form="plain",
            schedule=constant,
            scale=1 / problem.gamma,
            weight=params[0],
            bias=params[1] if len(params) > 1 else None,
            fold=layer.weight.fold,
            workspace=self._workspace,
        )

    def _along(self, p: Tensor, g: Tensor) -> None:
        """T steps along the gradient, for a parameter without a code."""
        linear_steps(p, g, self._local_optimizer([p]), self._group_at[id(p)]["steps"], schedule=constant)

    def _rates(self, group: Mapping[str, Any], owner: Tensor) -> tuple[Any, dict[str, Any]]:
        if group["weights"] == "adam":
            return torch.optim.Adam, {key: group[key] for key in ("lr", "betas", "eps")}
        momentum = group["momentum"]
        return torch.optim.SGD, {"lr": group["lr"], "momentum": momentum, "nesterov": momentum > 0}

    def _make(self, groups: list[dict[str, Any]], kind: Any) -> torch.optim.Optimizer:
        # torch's fused kernels read memory in order whatever the strides; the gradients come contiguous
        params = [p for group in groups for p in group["params"]]
        fused = all(p.device.type == "cpu" and p.is_contiguous() for p in params)
        optimizer: torch.optim.Optimizer = kind(groups, lr=0.0, fused=True) if fused else kind(groups, lr=0.0)
        return optimizer

    # -- the sweep ----------------------------------------------------------------------------------------

    def _run_sweep(self, closure: Callable[[], Tensor]) -> Recorded:
        """Move the codes, and record the layers on them."""
        coded = CodedModel(self._model, closure, self._proofs)
        graph = prove(coded.tape, coded.loss, None, need_loss=False)
        if not is_finite(coded.loss):
            return Recorded(coded.loss.detach(), coded.tape, [], {}, {})
        layers = layers_of(coded.tape, graph, self._ours, single=True)
        hidden = _hidden(coded, layers)
        coupling = {i: float(self._group_at[id(layer.weight.used)]["coupling"]) for i, layer in hidden.items()}
        batch = self._batch(coded.samples)
        start = {i: layer.output() for i, layer in hidden.items()}
        codes = sweep(coded, start, coupling, batch, self._code_step)
        return _recorded_on_codes(coded, layers, codes, {i: m / batch for i, m in coupling.items()}, self._ours)


def _recorded_on_codes(
    coded: CodedModel, layers: list[Layer], codes: Mapping[int, Tensor], weight: Mapping[int, float],
    ours: Callable[[Tensor], bool],
) -> Recorded:  # fmt: skip
    """The layers with inputs made from the codes; cotangents and gradients are the relaxed objective's.

    weight: μ/B of each code. A layer's output depends on its own weights and the codes alone, so no cotangent
    crosses a block.
    """
    every = [layer.use.index for layer in layers]
    out = coded.piece(codes, every, True)
    assert out.loss is not None
    objective = out.loss
    for i, code in codes.items():
        objective = objective + weight[i] / 2 * (code - out.predictions[i]).square().sum()
    inside = {name for layer in layers for name in layer.names}
    rest = {n: p for n, p in coded.tape.parameters.items() if n not in inside and ours(p)}
    found = torch.autograd.grad(objective, [*(out.predictions[i] for i in every), *rest.values()], allow_unused=True)
    moved = []
    for layer in layers:
        args, kwargs = out.calls[layer.use.index]
        parameters = {id(d.tensor) for d in layer.use.used}
        call = layer.use.call._replace(args=_detached(args, parameters), kwargs=_detached(kwargs, parameters))
        slots = ops.slots(call, [d.tensor for d in layer.use.used])
        bias = layer.bias and next(s for s in slots if s.bias)
        value = out.predictions[layer.use.index].detach()
        weight_slot = next(s for s in slots if not s.bias)
        moved.append(dataclasses.replace(layer, call=call, weight=weight_slot, bias=bias, value=value))
    cotangents = {i: g for i, g in zip(every, found, strict=False) if g is not None}
    moved = [layer for layer in moved if layer.use.index in cotangents]
    gradients = {n: dense(g) for n, g in zip(rest, found[len(every) :], strict=True) if g is not None}
    return Recorded(coded.loss.detach(), coded.tape, moved, cotangents, gradients)


def _hidden(coded: CodedModel, layers: list[Layer]) -> dict[int, Layer]:
    """The layers that carry codes, by use index: those whose output another layer reads."""
    every = {layer.use.index: layer for layer in layers}
    readers = coded.consumers(every)
    return {i: layer for i, layer in every.items() if any(m in every for m in readers[i][0])}


def _detached(value: Any, keep: set[int]) -> Any:
    if isinstance(value, Tensor):
        return value if id(value) in keep else value.detach()
    if isinstance(value, dict):
        return {k: _detached(v, keep) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(v, keep) for v in value)
    return value
