"""A Kronecker-factored preconditioner: watched batches give factors, and factors precondition gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.coverage import prove
from layerwise.errors import BadInput, NoBackward, NonFinite
from layerwise.gradients import ParameterGradient
from layerwise.local.finite import first_bad_call
from layerwise.local.record import dense, is_finite
from layerwise.observe import observe
from layerwise.operators.kronecker import Kronecker
from layerwise.optim.factors import FORMS, Average, Inverse, average, invert, layout_of, load, merge, save
from layerwise.pull import alone
from layerwise.quantities import KFAC, KFLR
from layerwise.quantities.kronecker import KroneckerFactors
from layerwise.tape import Tape
from layerwise.uses import Use, named_parameters_of

__all__ = ["Preconditioner", "Watched", "bad_gradient"]

LARGEST_FACTOR = 2**13  # a factor of this size takes 256 MiB in float32, and its inverse as much


class _Covering(KroneckerFactors):
    """Factors of those parameters alone that have them, are asked for and are small enough."""

    lenient = True
    names: Collection[str] = ()
    largest = LARGEST_FACTOR

    def covers(self, gradient: ParameterGradient) -> bool:
        """Whether the parameter is asked for and its factors fit."""
        part = gradient.joined
        if part is None or part.rows is None or part.slot is None or gradient.name not in self.names:
            return False
        if part.slot.used.numel() < gradient.shape.numel():  # a slice of the parameter
            return False
        rows = part.rows
        inputs = 1 if rows.a is None or not rows.a.is_floating_point() else rows.size_in
        return max(inputs, rows.g.shape[-1]) <= self.largest


class _KFAC(_Covering, KFAC):
    pass


class _KFLR(_Covering, KFLR):
    pass


KINDS = ("kfac", "kflr")


@dataclass
class Watched:
    """What a watched batch gave: new factors (None where they are not due), and the first place that was not finite."""

    factors: Kronecker | None = None
    bad: str | None = None
    due: bool = False
    backward: Callable[[Tensor, Sequence[Tensor]], list[Tensor | None]] | None = None
    uses: list[Use] = field(default_factory=list)


class _Watch(observe):
    """An observation in which a loss that is not finite runs back as it would without."""

    _keeps_inputs = True  # to name the call that made a gradient overflow

    def __init__(self, model: Any, quantity: KroneckerFactors, watched: Watched, keep: bool) -> None:
        super().__init__(model, quantity)
        self._watched, self._keep = watched, keep

    def _on_backward(self, tape: Tape, total: Tensor, weight: Tensor | None, run: Callable[[], Any]) -> Any:
        with alone(total.device.type):
            finite = is_finite(total)
            if self._keep or not finite:
                self._watched.uses += prove(tape, total, weight).uses
            if not finite:
                self._watched.bad = first_bad_call(tape.uses) or "the loss"
        if not finite:
            return run()
        uses = list(tape.uses)
        try:
            return super()._on_backward(tape, total, weight, run)
        except NonFinite:  # a gradient; the observation has taken it out of `.grad`
            self._watched.bad = first_bad_call(self._watched.uses or uses) or "a gradient"
            return None

    def backward(self, loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of a loss that was computed here, none of them in `.grad`."""
        assert self._tape is not None
        found: list[Tensor | None] = [None for _ in inputs]

        def run() -> None:
            found[:] = torch.autograd.grad(loss, inputs, allow_unused=True)

        self._on_backward(self._tape, loss, None, run)
        return found


class Preconditioner:
    """Turn gradients into approximate natural gradients, in front of any optimizer.

    For each parameter W with running averages B ⊗ A of its Kronecker factors: `.grad ← (B ⊗ A + λI)⁻¹ .grad`.

        pre = lw.optim.Preconditioner(model)
        with pre.watch():
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        pre.step(); opt.step()

    Factors are measured on steps 0, `update_factors_every`, 2 · `update_factors_every`, ...; other steps run the
    plain backward pass, without a tape. Inverses are computed on steps 0, `update_inverses_every`, ..., and at once
    for a parameter that has none yet.

    kind: "kfac" (factors from `samples` labels drawn from the model) or "kflr" (the exact root). damping: λ, in the
    units of the GGN of the loss as written; damping_form: "pi" (split between the factors by their traces),
    "factored" (split evenly) or "eigen" (exactly the formula). factor_decay: ρ of the running averages
    M_t = ρ M_{t-1} + (1-ρ) X_t, corrected by 1/(1 - ρ^t). sharing, joint: as for `lw.KFAC`. seed: of the drawn
    labels; torch's own generators are left alone.

    Parameters without factors keep their gradient: those that reach their uses derived (weight norm, LoRA), are
    used in several forms or by calls without row form, or whose factors would be larger than `largest_factor`;
    `describe()` lists them. A factor that cannot be inverted raises its own damping, and in the end is the identity:
    `describe()` and `counters` say so.
    A batch with NaN or infinity changes no factor and no counter but `skipped`: its gradients become None, which
    optimizers pass over, or NonFinite is raised with `on_nonfinite="raise"`.
    Raises BadInput; while watching, what `observe` raises.
    Source: Martens and Grosse (2015); Grosse and Martens (2016); Botev, Ritter and Barber (2017) for "kflr".
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        kind: Literal["kfac", "kflr"] = "kfac",
        *,
        damping: float = 1e-2,
        damping_form: Literal["pi", "factored", "eigen"] = "pi",
        factor_decay: float = 0.95,
        update_factors_every: int = 5,
        update_inverses_every: int = 20,
        samples: int = 1,
        sharing: Literal["expand", "reduce"] = "expand",
        joint: bool = True,
        largest_factor: int = LARGEST_FACTOR,
        seed: int = 0,
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        self.damping, self.factor_decay, self.damping_form = damping, factor_decay, damping_form
        self.update_factors_every, self.update_inverses_every = update_factors_every, update_inverses_every
        self._model, self._kind, self._largest, self._seed = model, kind, largest_factor, seed
        self._on_nonfinite = on_nonfinite
        self._options = {"sharing": sharing, "joint": joint} | ({} if kind == "kflr" else {"samples": samples})
        self._averages: dict[str, Average] = {}
        self._inverses: dict[str, Inverse] = {}
        self._watched: Watched | None = None
        self.steps = self.skipped = 0
        self.check()
        named_parameters_of(model)
        self._quantity(torch.Generator(), ())

    def check(self) -> None:
        """Raise BadInput for settings that cannot be."""
        if self._kind not in KINDS:
            raise BadInput(f"the kinds of factors are {', '.join(KINDS)}; got kind={self._kind!r}")
        if self.damping_form not in FORMS:
            raise BadInput(f"damping_form must be one of {', '.join(FORMS)}; got {self.damping_form!r}")
        if not (0 < self.damping < float("inf") and 0 <= self.factor_decay < 1):
            raise BadInput(
                f"a preconditioner needs a finite damping > 0 and factor_decay in [0, 1); got damping={self.damping}, "
                f"factor_decay={self.factor_decay}"
            )
        counts = {
            "update_factors_every": self.update_factors_every, "update_inverses_every": self.update_inverses_every,
            "largest_factor": self._largest,
        }  # fmt: skip
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise BadInput(f"{name} must be a whole number of at least 1, got {value!r}")
        if self._on_nonfinite not in ("skip", "raise"):
            raise BadInput(f'on_nonfinite must be "skip" or "raise", got {self._on_nonfinite!r}')

    # -- watching ------------------------------------------------------------------------------------------

    @contextmanager
    def watch(self, names: Collection[str] | None = None) -> Iterator[Watched]:
        """Measure the factors in the backward pass inside, where they are due; else do nothing at all.

        names: of the parameters to measure, default all that require grad. Several backward passes inside count
        as one loss, as in `observe`. Leaving by an exception forgets the batch.
        """
        self._watched = None
        watched = Watched(due=self.steps % self.update_factors_every == 0)
        if watched.due:
            named = named_parameters_of(self._model)
            device = next((p.device for p in named.values()), torch.device("cpu"))
            # a seed of its own for every step: nothing to save, and a resumed run draws the same labels
            generator = torch.Generator(device).manual_seed((self._seed << 32) + self.steps)
            quantity = self._quantity(generator, set(named) if names is None else names)
            watch = _Watch(self._model, quantity, watched, self._on_nonfinite == "raise")
            watched.backward = watch.backward
            try:
                with watch as seen:
                    yield watched
            finally:
                watched.backward = None
            if watched.bad is None:
                try:
                    watched.factors = seen[quantity]
                except NoBackward:
                    raise BadInput(
                        "this batch was watched to measure factors, but no backward pass ran; call loss.backward() "
                        "inside `with pre.watch()`"
                    ) from None
        else:
            yield watched
        self._watched = watched

    def _quantity(self, generator: torch.Generator, names: Collection[str]) -> KroneckerFactors:
        quantity: _Covering
        if self._kind == "kflr":
            quantity = _KFLR(**self._options)  # type: ignore[arg-type]
        else:
            quantity = _KFAC(generator=generator, **self._options)  # type: ignore[arg-type]
        quantity.names, quantity.largest = names, self._largest
        return quantity

    # -- a step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> bool:
        """Overwrite `.grad` with the preconditioned gradient; False where the batch was skipped."""
        watched, self._watched = self._watched, None
        if watched is None:
            raise BadInput("pre.step() comes after a backward pass inside `with pre.watch()`, once for each")
        self.check()
        named = {n: p for n, p in named_parameters_of(self._model).items() if p.requires_grad and p.grad is not None}
        grads = {name: dense(p.grad) for name, p in named.items() if p.grad is not None}
        where = self.unsafe(watched, grads, lambda name: self.damping)
        if where is not None:
            if self._on_nonfinite == "raise":
                raise NonFinite(f"{where} holds NaN or infinity, or overflows; the batch changed no factor")
            self.skipped += 1
            for p in named.values():
                p.grad = None
            return False
        self.advance(watched, lambda name: self.damping)
        for name, new in self.precondition(grads).items():
            grad = named[name].grad
            assert grad is not None
            if grad.is_sparse:
                named[name].grad = new
            else:
                grad.copy_(new)
        return True

    def unsafe(self, watched: Watched, grads: Mapping[str, Tensor], damping: Callable[[str], float]) -> str | None:
        """The first place of a batch that forbids a step, or None."""
        if watched.bad is not None:
            return watched.bad
        found = bad_gradient(grads, damping)
        if found is not None:
            return first_bad_call(watched.uses) or found
        blocks = {} if watched.factors is None else watched.factors.blocks
        factors = [(name, x) for name, block in blocks.items() for x in (block.A, block.B) if x is not None]
        # a norm may overflow where no entry does, but is read in a tenth of the time
        norms = torch._foreach_norm([x for _, x in factors]) if factors else []
        for (name, x), norm in zip(factors, norms, strict=True):
            if not math.isfinite(norm) and not is_finite(x):
                return first_bad_call(watched.uses) or f"a Kronecker factor of {name}"
        return None

    @torch.no_grad()
    def advance(self, watched: Watched, damping: Callable[[str], float]) -> None:
        """Take the factors of a batch that is safe, compute the inverses that are due, and count the step."""
        if watched.factors is not None:
            named = named_parameters_of(self._model)
            new = {}
            for name, block in watched.factors.blocks.items():
                layout = layout_of(block, named[name].shape)
                new[name] = average(self._averages.get(name), block, layout, self.factor_decay)
            self._averages = merge(self._averages, new)
            # an inverse outlives a new average of the same form only
            self._inverses = {
                n: inv for n, inv in self._inverses.items()
                if n in self._averages and (n not in new or new[n].batches > 1)
            }  # fmt: skip
        due = self.steps % self.update_inverses_every == 0
        for name, held in self._averages.items():
            if due or name not in self._inverses:
                self._inverses[name] = invert(name, held.block, damping(name), self.damping_form)
        self.steps += 1

    @torch.no_grad()
    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by parameter name, preconditioned with the present inverses; others come back as they are."""
        out = dict(grads)
        for name, inverse in self._inverses.items():
            block = inverse.block
            if block is None:
                continue
            mine = {n: grads[n] for n in (name, block.bias) if n is not None and n in grads}
            if not mine:
                continue
            like = block.like
            values = {n: g.to(like.dtype) for n, g in mine.items()}
            if name not in values:
                values[name] = like.new_zeros(block.shape)
            if block.bias is not None and block.bias not in values:
                values[block.bias] = like.new_zeros(block.size[0] * block.size[1])
            made = block.product(name, values)
            out |= {n: made[n].reshape(g.shape).to(g.dtype) for n, g in mine.items()}
        return out

    # -- what it holds -------------------------------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """Blocks whose present inverse needed more damping (`raised`), or is the identity (`identity`)."""
        held = self._inverses.values()
        identity = sum(inverse.block is None for inverse in held)
        return {"raised": sum(inverse.raised for inverse in held) - identity, "identity": identity}

    def describe(self) -> dict[str, str]:
        """How the gradient of each parameter is treated, by name."""
        said = {name: "plain gradient" for name, p in named_parameters_of(self._model).items() if p.requires_grad}
        for name, held in self._averages.items():
            inverse = self._inverses.get(name)
            text = f"{self._kind} {list(held.block.size)}"
            if inverse is not None and inverse.block is None:
                text = f"plain gradient ({text} could not be inverted)"
            elif inverse is not None and inverse.raised:
                text += ", damping raised"
            said[name] = text
            if held.block.bias is not None:
                said[held.block.bias] = f"in the block of {name}"
        return said

    def state_dict(self) -> dict[str, Any]:
        """Averages and inverses by parameter name, and counters: tensors, numbers and strings."""
        blocks = {name: save(held, self._inverses.get(name)) for name, held in self._averages.items()}
        return {"kind": self._kind, "steps": self.steps, "skipped": self.skipped, "blocks": blocks}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state; goes on bitwise where it stopped.

        Raises BadInput for factors of another kind, or of parameters that the model does not have.
        """
        self.check_state(state_dict)
        named = named_parameters_of(self._model)
        loaded = {name: load(state, named[name].device) for name, state in state_dict["blocks"].items()}
        self._averages = {name: held for name, (held, _) in loaded.items()}
        self._inverses = {name: inverse for name, (_, inverse) in loaded.items() if inverse is not None}
        self.steps, self.skipped, self._watched = state_dict["steps"], state_dict["skipped"], None

    def check_state(self, state_dict: Mapping[str, Any]) -> None:
        """Raise BadInput for a state that cannot be taken over."""
        named, blocks = named_parameters_of(self._model), state_dict["blocks"]
        if state_dict["kind"] != self._kind:
            raise BadInput(f"the saved factors are of kind {state_dict['kind']!r}, and ours {self._kind!r}")
        wrong = [n for n, s in blocks.items() if n not in named or tuple(named[n].shape) != tuple(s["shape"])]
        if wrong:
            raise BadInput(f"the saved factors of {', '.join(wrong[:5])} fit no parameter of the model")


def bad_gradient(grads: Mapping[str, Tensor], damping: Callable[[str], float]) -> str | None:
    """The first gradient whose norm under the largest preconditioner, `|g|² / λ`, is no number of its type."""
    if not grads:
        return None
    tensors = [g if g.dtype is torch.float64 else g.float() for g in grads.values()]
    device = tensors[0].device
    norms = torch.stack([n.to(device, torch.float64) for n in torch._foreach_norm(tensors)]).tolist()
    for name, g, norm in zip(grads, tensors, norms, strict=True):
        if not norm * norm / damping(name) < torch.finfo(g.dtype).max:
            return f"the gradient of {name}"
    return None
