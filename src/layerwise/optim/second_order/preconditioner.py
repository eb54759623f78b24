"""`Preconditioner`: measures blocks of curvature on watched batches, and multiplies gradients by their inverses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput, NonFinite
from layerwise.optim.deferred import check_on_nonfinite, completed
from layerwise.optim.recording import Recording, Turn, resumed, withhold
from layerwise.optim.saved_state import cut, refuse, stamped, unlike
from layerwise.optim.second_order import settings
from layerwise.optim.second_order.averages import FORMS
from layerwise.optim.second_order.blocks import Blocks, misfits
from layerwise.optim.second_order.data_parallel import DataParallel
from layerwise.optim.second_order.exchange import JoinedBatch, RankCost, RankExchange
from layerwise.optim.second_order.measured import KINDS, CurvatureKind, Request
from layerwise.optim.second_order.settings import KEYWORDS, ValueWords, field_of, in_present_words, is_due, spelled_out
from layerwise.optim.second_order.trust import ask_safe, unsafe
from layerwise.optim.second_order.watched_batch import CurvatureWatch, Watched, WatchedBatch
from layerwise.quantities.base import Quantity
from layerwise.replay.autocast import NO_AUTOCAST, autocast_as
from layerwise.replay.contexts import entered_anew
from layerwise.replay.state import seed_of
from layerwise.tape.uses import named_parameters_of
from layerwise.tensors import Verdict, WrongAssumption, dense, without_grad

__all__ = ["Preconditioner"]


class Preconditioner:
    """Turn gradients into approximate natural gradients, in front of any optimizer.

    For each parameter W, with C a running average of its block of curvature, `.grad ← (C + λI)⁻¹ .grad`.

        pre = lw.optim.Preconditioner(model)
        with pre.watch():
            loss = F.cross_entropy(model(x), y)
            loss.backward()
        pre.step(); opt.step()

    More on every argument, and on parameters without factors: the page Second-order training of the docs.

    Args:
        model: an nn.Module, or a mapping of names to tensors.
        kind: C. "kfac" (default): factors B ⊗ A from drawn labels; "kflr": from the exact root; "kfra": by recursion.
            "ekfac": second moments in the eigenbasis of K-FAC's factors; "foof": I ⊗ A.
            "diag-ggn", "diag-hessian": the GGN's diagonal, the absolute value of the Hessian's.
        draws: labels (or signs) drawn for each sample; default 1, and None, which is exact, for the diagonals.
        damping: λ, in the units of the GGN of the loss as written (foof: of A).
        damping_form: of kfac, kflr, kfra: "pi", split by the factors' traces; "factored", evenly; "eigen", exact.
        factor_decay: ρ of the running averages M_t = ρ M_{t-1} + (1-ρ) X_t, corrected by 1/(1 - ρ^t).
            A batch that sends a parameter no real row (an expert that nothing is routed to) has no mean over rows, and
            leaves its averages and t as they are; the gradient of one that never had a row is unchanged.
        update_factors_every: steps from one measured batch to the next; diagonals are inverted as often.
        update_inverses_every: steps from one inversion of Kronecker factors to the next.
        sharing, joint, rows: as for `lw.KFAC`.
        largest_factor: a parameter with a larger factor has the diagonal of the GGN from the draws in its place.
        seed: of the draws; torch's own generators are left alone.
        on_nonfinite: of a batch with NaN or infinity: "skip" and count it, gradients None; or "raise" NonFinite;
            "defer", of `KFAC` and `DiagNewton` alone: as "skip", with the verdict left on the device (page Devices).
        parallel: a `DataParallel`, for several processes.
        curvature, schedule: the values `Curvature` and `Schedule`, in place of the keywords for their fields.

    `describe()` and `counters` tell what each parameter has, and which blocks could not be inverted.
    Raises BadInput; while watching, what `observe` raises.
    Source: Martens and Grosse (2015); Grosse and Martens (2016); Botev, Ritter and Barber (2017) for "kflr", "kfra";
    George et al. (2018) for "ekfac"; Benzing (2022) for "foof"; Dangel et al. (2020) for "diag-ggn"; Liu et al. (2023)
    for draws squared as one; Yao et al. (2021) for draws of "diag-hessian".
    """

    factor_decay = field_of("schedule", "decay")
    update_factors_every = field_of("schedule", "factors")
    update_inverses_every = field_of("schedule", "inverses")

    @spelled_out(ValueWords)
    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        kind: settings.Kind | None = None,
        *,
        damping: float = 1e-2,
        damping_form: Literal["pi", "factored", "eigen"] = "pi",
        seed: int = 0,
        on_nonfinite: Literal["skip", "raise", "defer"] = "skip",
        parallel: DataParallel | None = None,
        **words: Unpack[ValueWords],
    ) -> None:
        given = {**words} if kind is None else {**words, "kind": kind}
        values = KEYWORDS.values(in_present_words(Preconditioner.__init__, given))
        self.curvature, self.schedule = values["curvature"], values["schedule"]
        self.damping, self.damping_form = damping, damping_form
        self.model, self.on_nonfinite, self._seed = model, on_nonfinite, seed
        self.blocks = Blocks()
        self._asked: frozenset[Any] | None = None  # the parameters of the last measured batch; None: not known
        self._left: frozenset[str] | None = None  # parameters without factors; None: not known yet
        self._had_empty = False  # whether a batch sent a parameter no row, which is asked about from then on
        self._recording: Recording | None = None
        self._turn = Turn()  # one step at a time, in whatever thread
        self.steps = self.skipped = 0
        self.check()
        named_parameters_of(model)
        self._quantities(Request((), torch.Generator(), self.curvature), False)
        self.exchange = RankExchange(parallel, model)
        self.exchange.check_kind(self.curvature.kind)
        self.agree({
            "damping": damping, "damping_form": damping_form, "seed": seed, "on_nonfinite": on_nonfinite,
            **KEYWORDS.of(values),
        })  # fmt: skip

    @property
    def _kind(self) -> CurvatureKind:
        return KINDS[self.curvature.kind]

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Raise BadInput on all ranks, by name, where their models or settings differ; a collective."""
        self.exchange.agree(settings)

    def check(self) -> None:
        """Raise BadInput for settings that cannot be."""
        if self.damping_form not in FORMS:
            raise BadInput(f"damping_form must be one of {', '.join(FORMS)}; got {self.damping_form!r}")
        if not (isinstance(self.damping, int | float) and 0 < self.damping < float("inf")):
            raise BadInput(f"a preconditioner needs a finite damping > 0; got damping={self.damping!r}")
        check_on_nonfinite(self.on_nonfinite)

    # -- watching ------------------------------------------------------------------------------------------

    @entered_anew
    def watch(self, names: Collection[str] | None = None, *, samples: int | Tensor | None = None) -> Iterator[Watched]:
        """Measure the curvature in the backward pass inside, on steps where it is due.

        names: of the parameters to measure, default all that require grad. samples: of each pass, as for `observe`.
        Several backward passes count as the sum of their losses, as in `observe`: those of one context, and of several
        before a step, as long as `.grad` holds the gradients of the first. A gradient scaler's factor is left out. An
        exception drops what was recorded in the context; where a backward pass in it has written to `.grad` before,
        `step` raises BadInput.
        """
        if self.on_nonfinite == "defer":
            raise BadInput(
                "a Preconditioner has another optimizer behind it, which would take the gradients of a bad batch: with "
                'on_nonfinite="defer" the steps of KFAC and DiagNewton alone are judged late; use "skip" or "raise"'
            )
        recording = resumed("Preconditioner", self._recording, named_parameters_of(self.model).values())
        self._recording = recording or Recording(self.new_batch(names), self.model)
        with self._recording.running(samples) as watched:
            yield watched

    def new_batch(self, names: Collection[str] | None = None, needs_pass: bool = True) -> WatchedBatch:
        """A context that measures a batch, or counts its passes, for `watch`. needs_pass: as for `WatchedBatch`."""
        watched = Watched(due=is_due(self.steps, self.update_factors_every))
        exchanges = self.exchange.size > 1  # the ranks' terms are counted at every step
        request = self._request_for(names, watched) if watched.due else None
        asked: Callable[[bool], dict[str, Quantity]] | None = (lambda whole: {}) if exchanges else None
        if request is not None:
            asked = partial(self._quantities, request)
        watch = CurvatureWatch(self.model, asked, watched, self.on_nonfinite == "raise")
        watched.left = None if request is None else request.left
        return WatchedBatch(watch, not exchanges, self.exchange.fail, needs_pass)

    def _request_for(self, names: Collection[str] | None, watched: Watched) -> Request:
        named = named_parameters_of(self.model)
        device = next((p.device for p in named.values()), torch.device("cpu"))
        # one seed a step needs no saved generator, and a resumed run draws the same labels
        seed = seed_of(self._seed, self.steps)
        if self.exchange.rank and not self._kind.common:
            seed = seed_of(seed, self.exchange.rank)
        generator = torch.Generator(device).manual_seed(seed)
        asked = set(named) if names is None else names
        watched.asked = frozenset((name, named[name].dtype) for name in asked if named[name].requires_grad)
        # frozen, thawed or converted since, a parameter has another block, which the present basis does not fit
        bases = self.blocks.bases if self._asked in (None, watched.asked) else {}
        late = device.type != "cpu" and not self._had_empty
        return Request(asked, generator, self.curvature, bases, late=late)

    def _quantities(self, request: Request, whole: bool) -> dict[str, Quantity]:
        """The quantities by kind; whole: the batch mixes its samples, for which a kind may have none."""
        kind, rest = self._kind, self._kind.rest
        if whole and rest is None and not (kind.whole and self.curvature.draws):
            return {}
        request = replace(request, whole=whole)
        asked: dict[str, Quantity] = {self.curvature.kind: kind.measure(request)}
        if rest is not None and (self._left is None or self._left):
            asked[rest] = KINDS[rest].measure(request, unfit=True)
        return asked

    # -- a step --------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Overwrite `.grad` with the preconditioned gradient; False where the batch was skipped. Threads take turns."""
        with self._turn, autocast_as(NO_AUTOCAST):
            grads = torch.is_grad_enabled()
            try:
                return self._step()
            except BaseException as error:
                torch._C._set_grad_enabled(grads)
                self.exchange.fail(error)
                raise

    def _damping_of(self, name: str) -> float:
        return self.damping

    @without_grad
    def _step(self) -> bool:
        recording = self._recording
        if recording is not None:
            recording.recorder.whole.check()
        if recording is None or recording.open or not recording.recorder.watched.passes:
            raise BadInput("pre.step() comes after a backward pass inside `with pre.watch()`, once for each")
        self._recording = None
        self.check()
        watched, damping_of = recording.recorder.watched, self._damping_of
        named = {n: p for n, p in named_parameters_of(self.model).items() if p.requires_grad}
        own = {name: dense(p.grad) for name, p in named.items() if p.grad is not None}
        good = own and watched.bad is None and watched.suspect is None
        if good and self.exchange.size == 1 and next(iter(own.values())).device.type != "cpu":
            with suppress(WrongAssumption):  # else the step is made again, and each is read
                return self._turned(watched, own, named, Verdict())
        joint = self.join(watched, own, unsafe(watched, own, damping_of), named, damping_of)
        if joint.where is not None:
            return self._refused(joint.where, watched, named)
        if not joint.gradients:
            raise BadInput("pre.step() turns the gradients in .grad, and there are none: were they zeroed before?")
        return self._turned(watched, joint.gradients, named, None)

    def _refused(self, where: str, watched: Watched, named: Mapping[str, Tensor]) -> bool:
        if self.on_nonfinite == "raise":
            raise NonFinite(f"{where} holds NaN or infinity, or overflows; the batch changed no factor")
        self.skipped += 1
        withhold(named.values(), watched.left_in_grad)
        return False

    def _turned(
        self, watched: Watched, grads: Mapping[str, Tensor], named: Mapping[str, Tensor], verdict: Verdict | None
    ) -> bool:
        """Move to the next step with a batch. verdict: takes what has not been judged before, or None."""
        before, decided = self.snapshot(), False
        try:
            if verdict is not None:
                ask_safe(verdict, watched, watched.loss, grads, self._damping_of)
            try:
                self.advance(watched, self._damping_of, verdict)
                found = self.precondition(grads)
                if verdict is not None:
                    verdict.read()
            except NonFinite as error:
                if verdict is None:
                    raise
                self.restore(before)
                return self._refused(str(error), watched, named)
            written = {name: g for name in found if (g := named[name].grad) is not None and not g.is_sparse}
            self.exchange.anywhere(None)

            def commit() -> None:
                nonlocal decided
                decided = True
                _write(named, found, written)

            completed(commit)
        except BaseException:
            if not decided:
                self.restore(before)
            raise
        return True

    def join(
        self, watched: Watched, grads: Mapping[str, Tensor], where: str | None, named: Mapping[str, Tensor],
        damping: Callable[[str], float], loss: Tensor | None = None,
    ) -> JoinedBatch:  # fmt: skip
        """The whole batch over all ranks, or the reason of one of them to skip the step; a collective.

        named: the parameters that may have a gradient.
        """
        joint = self.exchange.join(watched, grads, where, named, loss)
        if joint.where is None and self.exchange.size > 1:
            watched.finish()
            joint = replace(joint, where=unsafe(watched, joint.gradients, damping))
        return joint

    def total(self, watched: Watched, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values linear in the loss, from this rank's batch to the whole batch over ranks; a collective."""
        return self.exchange.total(values, watched.weight)

    @without_grad
    def advance(self, watched: Watched, damping: Callable[[str], float], verdict: Verdict | None = None) -> None:
        """Update the averages with a batch, compute the inverses that are due, and count the step.

        verdict: on the batch, read after; it then raises WrongAssumption where the step is to be made again without
        one. It is read here where inverses wait anyhow. None: all is waited for.
        """
        if verdict is not None:
            watched.assume_rows(verdict)
        elif watched.drop_empty():
            self._had_empty = True
        blocks, new = self.blocks, watched.blocks
        if watched.due:
            if self._asked not in (None, watched.asked):  # some may be gone
                blocks = blocks.of_parameters(named_parameters_of(self.model))
            blocks = blocks.averaged(new, watched.kinds, self.factor_decay, self.exchange, verdict)
            self._left, self._asked = frozenset(watched.left or ()), watched.asked
        self.blocks = blocks.inverted(new, self.inverts_next, damping, self.damping_form, self.exchange, verdict)
        self.steps += 1

    @property
    def inverts_next(self) -> bool:
        """Whether the next step computes inverses."""
        return is_due(self.steps, self.update_inverses_every)

    def precondition(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by parameter name, multiplied by the present inverses; those without one unchanged."""
        return self.blocks.precondition(grads, self.exchange)

    # -- what it holds -------------------------------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """Blocks whose present inverse needed more damping (`raised`), is an older one (`kept`) or the `identity`."""
        return self.blocks.counters

    def describe(self) -> dict[str, str]:
        """How the gradient of each parameter is treated, by name."""
        names = [n for n, p in named_parameters_of(self.model).items() if p.requires_grad]
        return self.blocks.describe(names, self.curvature.draws)

    def costs(self) -> list[RankCost]:
        """The cost of the curvature to each rank: blocks that it owns, memory, operations."""
        return self.exchange.costs(self.blocks.averages, self.blocks.inverses)

    def snapshot(self) -> tuple[Any, ...]:
        """The state that steps change, for `restore`."""
        return self.blocks, self._left, self.steps, self.exchange.owners, self.damping, self.skipped, self._asked

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to a snapshot."""
        self.blocks, self._left, self.steps, self.exchange.owners, self.damping, self.skipped, self._asked = state
        self._recording = None

    def state_dict(self) -> dict[str, Any]:
        """Averages and inverses by parameter name, and counters: tensors, numbers and strings.

        The same on any number of ranks; with `DataParallel(share="updates")` a collective, which gathers all blocks on
        every rank's CPU.
        """
        left, blocks = None if self._left is None else sorted(self._left), self.blocks.state(self.exchange)
        saved = {
            "kind": self.curvature.kind, "draws": self.curvature.draws, "damping": self.damping, "steps": self.steps,
            "skipped": self.skipped, "left": left, "blocks": blocks,
        }  # fmt: skip
        return stamped(saved, settings.KIND, blocks)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a saved state, λ with it; goes on bitwise where it stopped.

        Raises BadInput, with the first differences, for a state that does not fit: of another kind of curvature, other
        parameters, shapes or types, or with NaN. Nothing is changed then.
        """
        refuse(self.differences(state_dict), settings.KIND)
        self.restore(self.prepared(state_dict))

    def differences(self, state_dict: Mapping[str, Any]) -> list[str]:
        """What of a saved state does not fit. Raises BadInput for one that is not a preconditioner's, or lacks keys."""
        state, ours = settings.present_state(state_dict), self.curvature
        theirs = settings.described(state["kind"], state["draws"])
        if (state["kind"], state["draws"] is None) != (ours.kind, ours.draws is None):
            mine = settings.described(ours.kind, ours.draws)
            draws = f", with draws={state['draws']!r} and {ours.draws!r}" if theirs == mine else ""
            return [f"in the preconditioner, the saved factors are of kind {theirs!r}, and ours {mine!r}{draws}"]
        found = unlike("the preconditioner", state, settings.SAVED) + misfits(
            state["blocks"], named_parameters_of(self.model)
        )
        return found or cut("block", state, state["blocks"])

    def prepared(self, state_dict: Mapping[str, Any]) -> tuple[Any, ...]:
        """What `restore` takes, from a saved state that fits."""
        state, owners = settings.present_state(state_dict), self.exchange.owners
        try:
            blocks = Blocks.of(state["blocks"], named_parameters_of(self.model), self.exchange)
        finally:
            its, self.exchange.owners = self.exchange.owners, owners
        left = None if state["left"] is None else frozenset(state["left"])
        return blocks, left, state["steps"], its, state["damping"], state["skipped"], None

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy` and pickle, without a batch that was watched and not yet stepped on."""
        return {**vars(self), "_recording": None}


def _write(named: Mapping[str, Tensor], found: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> None:
    """Put gradients in `.grad`. written: tensors there, which are overwritten."""
    if written:
        torch._foreach_copy_(list(written.values()), [found[name] for name in written])
    for name in found.keys() - written.keys():
        named[name].grad = found[name]
