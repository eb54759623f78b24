"""`DataParallel`: one batch in parts, a part for each rank; and the reports that ranks exchange before a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from layerwise.errors import BadInput, Undefined
from layerwise.observation.union import Batch, in_proportion
from layerwise.optim.second_order.watched_batch import NO_BATCH
from layerwise.ranks.group import Ranks, facts_of, first_difference, values_digest
from layerwise.ranks.trainers import is_sharded
from layerwise.tape.uses import named_parameters_of

__all__ = ["DataParallel", "Report", "facts_with_values", "gather_reports", "ranks_of", "weights_of"]


@dataclass(frozen=True)
class DataParallel:
    """Each rank runs its own part of the batch; curvature, gradients and steps are those of all parts together.

        opt = lw.optim.KFAC(model, parallel=lw.optim.DataParallel())
        loss = opt.step(lambda: F.cross_entropy(model(x), y))  # x, y: this rank's part; loss: that of the whole batch

    A mean loss of rank r over T_r terms weighs T_r / Σ T, so parts may differ in size; sum losses add. The blocks of
    curvature are divided among the ranks, the most expensive first, to the rank with the least work; each rank
    inverts its own. All ranks hold the same parameters, bitwise.

    group: a process group, default all processes. share: "inverses": every rank holds all averages and inverses, and
    new inverses are broadcast when they change; "updates": the owner alone holds a block, and preconditioned gradients
    are broadcast every step, so memory falls with the number of ranks (not for "ekfac", which measures in an
    eigenbasis that every rank needs).
    gradients: "local": in `.grad` is the gradient of this rank's part; "averaged": the mean over ranks, as
    DistributedDataParallel leaves it, which is that of a mean loss only where all parts have as many terms (otherwise
    BadInput); "auto": averaged for a model that is wrapped so, where `.grad` was read, else local, and BadInput
    where the gradients of the ranks contradict that: all equal for "local", different for "averaged".
    reduction: "auto": as the loss calls say; "mean" (over the samples) or "sum" for losses that are reduced by hand,
    and for sums that are scaled or added to something, which "auto" refuses.
    Source: Osawa et al. (2019), "Large-scale distributed second-order optimization using Kronecker-factored approximate
    curvature", section 5; Pauloski et al. (2021), "KAISA", section 3, for the choice in `share`.
    """

    group: Any = None
    share: Literal["inverses", "updates"] = "inverses"
    gradients: Literal["auto", "local", "averaged"] = "auto"
    reduction: Literal["auto", "mean", "sum"] = "auto"

    def __post_init__(self) -> None:
        choices = {
            "share": ("inverses", "updates"), "gradients": ("auto", "local", "averaged"),
            "reduction": ("auto", "mean", "sum"),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise BadInput(f"DataParallel's {name} is one of {', '.join(known)}; got {getattr(self, name)!r}")

    def says_averaged(self, model: Any, in_grad: bool) -> bool:
        """Whether a rank's gradients are the mean over ranks. in_grad: whether they were read from `.grad`."""
        if self.gradients == "auto":
            return in_grad and isinstance(model, DistributedDataParallel)
        return in_grad and self.gradients == "averaged"

    def check_gradients(self, reports: Sequence[Report]) -> None:
        """Raise BadInput on all ranks where averaged gradients differ, or (with "auto") local ones are all equal."""
        norms, said = [report.norms for report in reports], {report.averaged for report in reports}
        if len(said) > 1:
            raise BadInput(
                "some ranks read their gradients from .grad, others made them here: all closures must call backward, "
                "or none"
            )
        averaged, same = said.pop(), len(set(norms)) == 1
        if averaged and not same:
            raise BadInput(
                "the gradients in .grad are taken for the ranks' mean (the model is a DistributedDataParallel, or "
                'gradients="averaged"), but they differ between ranks: run the forward pass through the wrapper and '
                'outside of no_sync(), and clip no rank on its own, or say DataParallel(gradients="local")'
            )
        if not averaged and self.gradients == "auto" and same and any(norms[0]):
            raise BadInput(
                "the gradients of all ranks are the same: either they have been averaged already (give the model as "
                'its DistributedDataParallel wrapper, or say DataParallel(gradients="averaged")), or every rank runs '
                'the same batch (use a DistributedSampler, or say gradients="local" if that is meant)'
            )


def ranks_of(parallel: DataParallel | None, model: Any) -> Ranks:
    """The ranks of the settings. Raises BadInput for a wrapped model without settings, and for sharded parameters."""
    sharded = [name for name, p in named_parameters_of(model).items() if is_sharded(p)]
    if sharded:
        raise BadInput(
            f"{sharded[0]} is a DTensor, of which a rank holds a part, and its factors need the whole gradient; use "
            'the plain model or DistributedDataParallel, with share="updates" where memory is short'
        )
    if parallel is None:
        if isinstance(model, DistributedDataParallel) and Ranks(model.process_group).size > 1:
            raise BadInput(
                "the model is a DistributedDataParallel over several ranks, whose own factors would drive their "
                "parameters apart; pass parallel=lw.optim.DataParallel()"
            )
        return Ranks.alone()
    if not isinstance(parallel, DataParallel):
        raise BadInput(f"parallel must be None or lw.optim.DataParallel(...), got {parallel!r}")
    return Ranks(parallel.group)


def facts_with_values(model: nn.Module | Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What all ranks must agree on: each parameter with its values, their order, and the settings."""
    named = named_parameters_of(model)
    facts: dict[str, Any] = {
        f"parameter {name}": (*fact, f"values {values_digest(named[name])[:12]}")
        for name, fact in facts_of(named).items()
    }
    return facts | {"the order of the parameters": list(named)} | dict(settings)


# -- what a rank says of its part ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What a rank sends to the others before a step.

    where: the reason to skip the step. by_hand: the differentiated value is not that of a
    loss call. averaged: its gradients are the mean over ranks. names, norms: of its gradients. measured: the shapes of
    the sums of curvature, by kind and name. left: parameters without factors. frozen: those that are frozen.
    """

    where: str | None = None
    batch: Batch = NO_BATCH
    by_hand: bool = False
    averaged: bool = False
    names: tuple[str, ...] = ()
    norms: tuple[float, ...] = ()
    measured: tuple[tuple[str, str], ...] = ()
    left: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


def gather_reports(ranks: Ranks, report: Report) -> list[Report]:
    """The reports of all ranks. Raises Undefined by `_check_measured`."""
    reports: list[Report] = ranks.gather(report)
    if all(its.where is None for its in reports):
        _check_measured(reports)
    return reports


def _check_measured(reports: Sequence[Report]) -> None:
    if len({its.measured for its in reports}) == 1:
        return
    found = first_difference([dict(its.measured) for its in reports], "nothing")
    if found is not None:
        raise Undefined(
            f"asked for the curvature of the ranks' batches together, but the {found[0]} has no sum over them: "
            f"{_why_no_sum(reports, *found)}"
        )


def _why_no_sum(reports: Sequence[Report], what: str, said: str) -> str:
    """Why the ranks do not measure the same of a parameter, and what to do. said: what each of them holds."""
    name = what.partition(" of ")[2]
    without = [rank for rank, its in enumerate(reports) if what not in dict(its.measured)]
    if frozen := [rank for rank in without if name in reports[rank].frozen]:
        return f"{name} is frozen on {_ranks(frozen)}; freeze it on all ranks, or on none"
    if left := [rank for rank in without if name in reports[rank].left]:
        return f"{name} has no factors on {_ranks(left)}; every rank must use it in the same calls"
    if without:
        return f"the batch of {_ranks(without)} does not use {name}; every rank's batch must use every parameter"
    return f"{name} is used as different matrices ({said}); every rank must use it as the same ones"


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def weights_of(reports: Sequence[Report], reduction: str) -> list[float]:
    """The weight of each rank's loss in that of the whole batch.

    Means weigh by their terms, or with reduction="mean" by their samples, over those of all ranks; sums by 1. Raises
    BadInput where reductions are unknown or differ, or several losses have terms out of proportion.
    """
    if reduction == "mean":
        return _shares([float(its.batch.samples) for its in reports])
    if reduction == "sum":
        return [1.0] * len(reports)
    unknown = next((its.batch.unknown_reduction for its in reports if its.batch.unknown_reduction is not None), None)
    if unknown is not None:
        raise BadInput(
            f"asked to join the batches of several ranks, but whether {unknown} is a mean or a sum is not said; mark "
            'it: lw.as_loss(fn, reduction="mean") or "sum", or say DataParallel(reduction=...)'
        )
    terms = [its.batch.terms for its in reports]
    if all(its is None for its in terms):
        if any(its.by_hand for its in reports):
            raise BadInput(
                "asked to join the losses of several ranks, but what is differentiated is a sum that is scaled, added "
                "to something or reduced by hand, so whether it is a mean over the batch cannot be told; say "
                'DataParallel(reduction="mean") or "sum", or use a loss with reduction="mean"'
            )
        return [1.0] * len(reports)
    first = [its[0] for its in terms if its]
    if len(first) < len(terms) or not all(in_proportion(one, terms[0]) for one in terms):
        raise BadInput(
            f"the losses of the ranks' batches have no union: their means run over {', '.join(map(str, terms))} terms "
            "(None: a sum); all ranks must use the same losses, means or sums throughout, in equal proportion"
        )
    return _shares(first)


def _shares(counts: Sequence[float | Tensor]) -> list[float]:
    numbers = list(map(float, counts))
    return [count / sum(numbers) for count in numbers]
