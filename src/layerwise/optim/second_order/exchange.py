"""`RankExchange`: all-reduced sums of curvature, owners of blocks, and broadcasts of inverses or updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.operators.kronecker import EigenBlock
from layerwise.optim.second_order.averages import (
    Average,
    Block,
    Inverse,
    eigenbasis,
    fields_of,
    inversion_cost,
    names_of,
    product_cost,
    with_fields,
)
from layerwise.optim.second_order.data_parallel import (
    DataParallel,
    Report,
    facts_with_values,
    gather_reports,
    ranks_of,
    weights_of,
)
from layerwise.optim.second_order.watched_batch import Watched
from layerwise.ranks.ownership import assigned
from layerwise.ranks.sums import TensorSpec, summed
from layerwise.tape.uses import named_parameters_of

__all__ = ["JoinedBatch", "RankCost", "RankExchange", "block_owners"]

_LOSS = ""  # beside the names of parameters


@dataclass(frozen=True)
class RankCost:
    """What the curvature costs one rank.

    blocks: those that it owns. factor_bytes, inverse_bytes: of all averages and inverses that it holds.
    inversion_flops: `Σ K (I³ + O³)` of its own blocks, each time inverses are due. step_flops: `Σ 2 K O I (O + I)` of
    the blocks that it multiplies a gradient by, every step.
    """

    rank: int
    blocks: tuple[str, ...]
    factor_bytes: int
    inverse_bytes: int
    inversion_flops: int
    step_flops: int


@dataclass(frozen=True)
class JoinedBatch:
    """The whole batch over all ranks: gradients by name and loss, or the reason `where` to skip the step."""

    where: str | None
    gradients: dict[str, Tensor]
    loss: Tensor | None = None


class RankExchange:
    """Communication between the preconditioners of all ranks; with one rank there is none.

    owners: the rank that inverts each block. A block that only another rank holds is on the meta device here.
    With several ranks all methods but `holds`, `held` and `costs` are collectives.
    """

    def __init__(self, parallel: DataParallel | None, model: nn.Module | Mapping[str, Tensor]) -> None:
        self.ranks = ranks_of(parallel, model)
        self.settings = parallel or DataParallel()
        self.size, self.rank = self.ranks.size, self.ranks.rank
        self.owners: dict[str, int] = {}
        self._model = model

    @property
    def owners_only(self) -> bool:
        """Whether only the owner of a block holds it (share="updates")."""
        return self.size > 1 and self.settings.share == "updates"

    def check_kind(self, kind: str) -> None:
        """Raise BadInput for curvature that the ranks cannot measure together."""
        if self.size > 1 and kind == "kfra":
            raise BadInput(
                'kind="kfra" averages over one batch from layer to layer, so the factors of several ranks do not join '
                'to those of all; use kind="kfac" or "kflr"'
            )
        if self.owners_only and kind == "ekfac":
            raise BadInput(
                'kind="ekfac" measures in an eigenbasis, which every rank needs; use DataParallel(share="inverses"), '
                'or kind="kfac"'
            )

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Raise BadInput on all ranks, by name, where their models or settings differ."""
        if self.size > 1:
            ours = {key: getattr(self.settings, key) for key in ("share", "gradients", "reduction")}
            self.ranks.agree(facts_with_values(self._model, {**ours, **settings}))

    # -- one batch -----------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Report an error to the other ranks, which wait for this one."""
        self.ranks.tell(error)

    def anywhere(self, where: str | None) -> str | None:
        """The first reason of any rank not to make a step; after it all ranks make it, or none."""
        return where if self.size == 1 else self.ranks.first(where)

    def join(
        self, watched: Watched, grads: Mapping[str, Tensor], where: str | None, named: Mapping[str, Tensor],
        loss: Tensor | None = None,
    ) -> JoinedBatch:  # fmt: skip
        """All-reduce gradients, loss and measured sums of curvature to those of the whole batch.

        named: the parameters in the model's order. Raises on all ranks where their batches cannot be joined.
        """
        if self.size == 1:
            return JoinedBatch(where, dict(grads), loss)
        averaged = self.settings.says_averaged(self._model, watched.in_grad)
        reports = gather_reports(self.ranks, _report(self._model, watched, grads, where, averaged))
        for rank, its in enumerate(reports):
            if its.where is not None:
                return JoinedBatch(f"rank {rank}: {its.where}", dict(grads), loss)
        self.settings.check_gradients(reports)
        weights = weights_of(reports, self.settings.reduction)
        watched.weight = weight = weights[self.rank]
        names = [name for name in named if any(name in its.names for its in reports)]
        full = {name: grads[name] if name in grads else torch.zeros_like(named[name]) for name in names}
        linear = ({} if averaged else full) | ({} if loss is None else {_LOSS: loss})
        joint = self.total(linear, weight)
        joint_loss = joint.pop(_LOSS, None)
        watched.found = [found.all_reduced(self.ranks, weight) for found in watched.found]
        watched.left = set().union(*(its.left for its in reports)) if watched.left is not None else None
        return JoinedBatch(None, _from_average(full, weights) if averaged else joint, joint_loss)

    def total(self, values: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
        """Values linear in the loss, summed over ranks with the weights of their losses."""
        if self.size == 1:
            return dict(values)
        return dict(zip(values, self.ranks.sum([v * weight for v in values.values()]), strict=True))

    def added(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over ranks."""
        return summed(self.ranks, tensors)

    # -- blocks and their owners -----------------------------------------------------------------------------

    def assign(self, blocks: Mapping[str, Block]) -> None:
        """Assign owners to new blocks, and forget blocks that are gone."""
        self.owners = block_owners(blocks, self.size, self.owners)

    def holds(self, key: str) -> bool:
        """Whether this rank holds the values of a block."""
        return not self.owners_only or self.owners[key] == self.rank

    def held(self, key: str, block: Block) -> Block:
        """The block, or on the meta device where another rank holds it."""
        return block if self.holds(key) else _shapes(block)

    def hold(self, key: str, held: Average, inverse: Inverse | None) -> tuple[Average, Inverse | None]:
        """A loaded average and inverse, or on the meta device where another rank holds them."""
        if inverse is not None and inverse.block is not None:
            inverse = inverse._replace(block=self.held(key, inverse.block))
        return held._replace(block=self.held(key, held.block)), inverse

    def inverts(self, key: str, block: Block) -> bool:
        """Whether this rank inverts a block: the owner does, and each holder where the inverse is elementwise."""
        return self.owners[key] == self.rank or (not self.owners_only and isinstance(block, EigenBlock))

    def eigenbases(self, blocks: Mapping[str, Any]) -> dict[str, EigenBlock | None]:
        """The eigenbases of Kronecker blocks, each computed by its owner and broadcast; None where there is none."""
        made = {key: eigenbasis(key, block) for key, block in blocks.items() if self.owners[key] == self.rank}
        if self.size == 1 or not blocks:
            return made
        messages = self._gathered({key: _BlockMessage.of(basis) for key, basis in made.items()})
        found: dict[str, Any] = {key: messages[key].block(blocks[key], made.get(key)) for key in blocks}
        self._send({key: basis for key, basis in found.items() if basis is not None})
        return found

    def inverses(
        self, blocks: Mapping[str, Block], made: Mapping[str, Inverse], last: Mapping[str, Inverse]
    ) -> dict[str, Inverse]:
        """The new inverses of some blocks: those made here, and those broadcast by other owners.

        last: the inverses before, which an owner may have kept.
        """
        wanted = [key for key, block in blocks.items() if self.owners_only or not isinstance(block, EigenBlock)]
        if self.size == 1 or not wanted:
            return dict(made)
        mine = {key: made[key] for key in wanted if self.owners[key] == self.rank}
        messages = self._gathered({key: _BlockMessage.of(its.block, its.raised, its.kept) for key, its in mine.items()})
        found = dict(made)
        for key in wanted:
            its, before = messages[key], last.get(key)
            if its.kept:
                assert before is not None
                found[key] = before._replace(kept=True)
            else:
                here = made[key].block if key in mine else None
                found[key] = Inverse(its.block(blocks[key], here, not self.holds(key)), its.raised)
        if not self.owners_only:
            new = {key: found[key] for key in wanted if not found[key].kept}
            self._send({key: inverse.block for key, inverse in new.items() if inverse.block is not None})
        return {key: found[key] for key in blocks}

    def updates(self, averages: Mapping[str, Average], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Preconditioned gradients by name, broadcast by the owners of their blocks; without a block unchanged."""
        if not self.owners_only:
            return found
        owner_of = {name: self.owners[key] for key, held in averages.items() for name in names_of(key, held)}
        out = {name: d.contiguous() if owner_of.get(name, self.rank) == self.rank else torch.empty_like(
            d, memory_format=torch.contiguous_format) for name, d in found.items()}  # fmt: skip
        self.ranks.broadcast_owned([(owner_of[name], [d]) for name, d in out.items() if name in owner_of])
        return out

    def _gathered(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of all ranks' mappings, in one."""
        return {key: its for one in self.ranks.gather(dict(mine)) for key, its in one.items()}

    def _send(self, blocks: Mapping[str, Block]) -> None:
        """Broadcast blocks from their owners, in place."""
        self.ranks.broadcast_owned([(self.owners[key], _all(block)) for key, block in blocks.items()])

    # -- state and report ------------------------------------------------------------------------------------

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of all blocks, on the CPU: those that other ranks hold are fetched."""
        if not self.owners_only:
            return dict(state)
        every = self._gathered({key: _on_cpu(its) for key, its in state.items() if self.holds(key)})
        return {key: every[key] for key in state}

    def costs(self, averages: Mapping[str, Average], inverses: Mapping[str, Inverse]) -> list[RankCost]:
        """The cost of its blocks to each rank."""
        found = []
        for rank in range(self.size):
            own = [key for key in averages if self.owners[key] == rank]
            here = own if self.owners_only else list(averages)
            held = [averages[key] for key in here]
            kept = [its.block for key in here if (its := inverses.get(key)) is not None and its.block is not None]
            factors = [t for one in held for block in (one.block, one.eigen) if block is not None for t in _all(block)]
            others = {id(t) for t in factors}
            found.append(RankCost(
                rank, tuple(own), _bytes(factors),
                _bytes([t for block in kept for t in _all(block) if id(t) not in others]),
                sum(inversion_cost(averages[key].block) for key in own), sum(map(product_cost, kept)),
            ))  # fmt: skip
        return found


class _BlockMessage(NamedTuple):
    """An owner's header of a block: the shapes of its fields (None: no block), and the flags of an inverse."""

    fields: dict[str, TensorSpec | None] | None
    raised: bool = False
    kept: bool = False

    @staticmethod
    def of(block: Block | None, raised: bool = False, kept: bool = False) -> _BlockMessage:
        if block is None or kept:
            return _BlockMessage(None, raised, kept)
        fields = fields_of(block).items()
        return _BlockMessage({key: None if t is None else TensorSpec.of(t) for key, t in fields}, raised)

    def block(self, like: Block, made: Block | None, shapes_only: bool = False) -> Block | None:
        """The block in contiguous memory: the one made here, or an empty one to receive into."""
        if self.fields is None:
            return None
        if made is not None:
            return with_fields(made, {k: None if t is None else t.contiguous() for k, t in fields_of(made).items()})
        device = "meta" if shapes_only else like.like.device
        empty = {k: s and torch.empty(s.shape, dtype=s.dtype, device=device) for k, s in self.fields.items()}
        return with_fields(like, empty)


def block_owners(blocks: Mapping[str, Block], size: int, owners: Mapping[str, int]) -> dict[str, int]:
    """The owners of blocks among `size` ranks, by what their inversion costs; earlier owners keep theirs.

    Slices of one parameter stay together, since they act on one gradient.
    Source: Osawa et al. (2019) and Pauloski et al. (2021), "KAISA", section 3, for K-FAC's factors.
    """
    names, work = {key: block.parameter or key for key, block in blocks.items()}, dict[str, float]()
    for key in sorted(blocks, key=names.__getitem__):
        work[names[key]] = work.get(names[key], 0) + inversion_cost(blocks[key])
    owner_of = assigned(work, size, {names[key]: rank for key, rank in owners.items() if key in blocks})
    return {key: owner_of[name] for key, name in names.items()}


def _report(
    model: nn.Module | Mapping[str, Tensor], watched: Watched, grads: Mapping[str, Tensor], where: str | None,
    averaged: bool,
) -> Report:  # fmt: skip
    if where is not None:
        return Report(where=where, averaged=averaged)
    norms = torch.stack([n.double() for n in torch._foreach_norm(list(grads.values()))]).tolist() if grads else []
    return Report(
        batch=watched.batch.read(), by_hand=watched.by_hand, averaged=averaged, names=tuple(grads),
        norms=tuple(norms), left=tuple(sorted(watched.left or ())),
        frozen=tuple(name for name, p in named_parameters_of(model).items() if not p.requires_grad),
        measured=tuple((f"{found.kind} of {name}", text) for found in watched.found
                       for name, text in found.described().items()),
    )  # fmt: skip


def _from_average(grads: dict[str, Tensor], weights: Sequence[float]) -> dict[str, Tensor]:
    """The gradients of the whole batch from the mean over ranks. Raises BadInput where ranks have unequal weights."""
    if max(weights) - min(weights) > 1e-9 * max(weights):
        raise BadInput(
            "the ranks' gradients are averaged (by DistributedDataParallel), which is the gradient of the whole "
            f"batch only where all ranks count alike; they count {', '.join(f'{w:.4g}' for w in weights)}. Give every "
            "rank as many loss terms (drop_last=True), or use the plain model, whose gradients are weighed here"
        )
    factor = len(weights) * weights[0]
    return grads if abs(factor - 1) <= 1e-9 else {name: g * factor for name, g in grads.items()}


def _shapes(block: Block) -> Block:
    return with_fields(block, {key: None if t is None else t.to("meta") for key, t in fields_of(block).items()})


def _on_cpu(state: Any) -> Any:
    """A state with its tensors on the CPU."""
    if isinstance(state, Mapping):
        return {key: _on_cpu(value) for key, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else state


def _all(block: Block) -> list[Tensor]:
    return [t for t in fields_of(block).values() if t is not None]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
