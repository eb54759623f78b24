"""All blocks of a preconditioner: running averages with their inverses, as an immutable value."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.operators.kronecker import EigenBlock
from layerwise.operators.products_together import products_together, side_by_side
from layerwise.optim.saved_state import is_count, non_finite, unlike
from layerwise.optim.second_order.averages import (
    Asked,
    Average,
    Block,
    Inverse,
    Measured,
    average,
    invert,
    invert_together,
    load,
    merge,
    rebased,
    save,
    with_moments,
)
from layerwise.optim.second_order.exchange import RankExchange
from layerwise.optim.second_order.measured import KINDS
from layerwise.optim.second_order.settings import described
from layerwise.tensors import Verdict, wide_type, without_grad

__all__ = ["Blocks", "misfits"]


@dataclass(frozen=True)
class Blocks:
    """Running averages, their inverses and their kinds of curvature, by block: a parameter, or a slice `w[0]` of one.

    Never written in place: a batch gives a new value, so that the old one can be restored.
    """

    averages: dict[str, Average] = field(default_factory=dict)
    inverses: dict[str, Inverse] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def bases(self) -> dict[str, EigenBlock]:
        """The eigenbases of the running second moments, by block."""
        return {name: held.eigen for name, held in self.averages.items() if held.eigen is not None}

    def of_parameters(self, names: Container[str]) -> Blocks:
        """Only the blocks of parameters with these names."""
        kept = [key for key, held in self.averages.items() if (held.block.parameter or key) in names]
        inverses = {key: self.inverses[key] for key in kept if key in self.inverses}
        return Blocks({key: self.averages[key] for key in kept}, inverses, {key: self.kinds[key] for key in kept})

    # -- a batch -------------------------------------------------------------------------------------------

    def averaged(
        self, blocks: Mapping[str, Measured], kinds: Mapping[str, str], decay: float, exchange: RankExchange,
        verdict: Verdict | None = None,
    ) -> Blocks:  # fmt: skip
        """The averages updated with the blocks of a batch; a block that changed its form loses its inverse.

        verdict: on the batch; read where the host is to wait anyhow.
        """
        present = {name: held.block for name, held in self.averages.items()}
        exchange.assign({**present, **{name: measured.block for name, measured in blocks.items()}})
        new = {
            name: average(self.averages.get(name), exchange.held(name, measured.block), decay)
            for name, measured in blocks.items()
        }
        averages = merge(self.averages, new | _moments(blocks, new, decay, exchange, verdict))
        inverses = {
            name: inverse for name, inverse in self.inverses.items()
            if name in averages and (name not in new or new[name].batches > 1)
        }  # fmt: skip
        return Blocks(averages, inverses, {name: kinds.get(name) or self.kinds[name] for name in averages})

    def inverted(
        self, new: Mapping[str, Measured], due: bool, damping: Callable[[str], float], form: str,
        exchange: RankExchange, verdict: Verdict | None = None,
    ) -> Blocks:  # fmt: skip
        """New inverses: of all blocks if `due`, with new eigenbases; else of those without, and of instant kinds.

        damping: λ of a parameter's name. form: of the kinds that leave it to the user. verdict: as for `averaged`; it
        takes what it costs no wait to assume, and raises WrongAssumption where that is not so.
        """
        averages, inverses = dict(self.averages), dict(self.inverses)
        old = {n: held.block for n, held in averages.items() if due and held.eigen is not None and held.batches > 1}
        for name, basis in _eigenbases(old, exchange, verdict).items():
            if basis is not None:
                averages[name] = rebased(averages[name], basis)
        wanted = {
            name: held.block if held.eigen is None else held.eigen
            for name, held in averages.items()
            if due or name not in inverses or (KINDS[self.kinds[name]].instant and name in new)
        }
        asked = {
            name: Asked(block, damping(block.parameter or name), KINDS[self.kinds[name]].form or form)
            for name, block in wanted.items() if exchange.inverts(name, block)
        }  # fmt: skip
        # on the CPU launches cost little, and a batch is a copy
        made = invert_together({n: each for n, each in asked.items() if each.block.like.device.type != "cpu"}, verdict)
        rest = asked.keys() - made.keys()
        if rest and verdict is not None:
            verdict.read()
        for name in (name for name in asked if name in rest):
            made[name] = invert(name, *asked[name], inverses.get(name))
        inverses |= exchange.inverses(wanted, made, inverses)
        if asked:
            laid = side_by_side({name: its.block for name, its in inverses.items() if its.block is not None})
            inverses |= {name: inverses[name]._replace(block=block) for name, block in laid.items()}
        return replace(self, averages=averages, inverses=inverses)

    @without_grad
    def precondition(self, grads: Mapping[str, Tensor], exchange: RankExchange) -> dict[str, Tensor]:
        """Gradients by parameter name, multiplied by the inverses; those without an inverse unchanged."""
        out = dict(grads)
        held: dict[str, Block] = {}
        mine: dict[str, dict[str, Tensor]] = {}
        for key, inverse in self.inverses.items():
            block = inverse.block
            if block is None or not exchange.holds(key):
                continue
            if own := {n: grads[n] for n in (block.parameter or key, block.bias) if n is not None and n in grads}:
                held[key], mine[key] = block, own
        values = {key: _values(block.parameter or key, block, mine[key]) for key, block in held.items()}
        whole: dict[str, Tensor] = {}
        for key, made in products_together(held, values).items():
            block, name = held[key], held[key].parameter
            if name is not None and block.layout is not None:  # a slice: the rest of the gradient is unchanged
                if name not in whole:
                    whole[name] = values[key][name].clone(memory_format=torch.contiguous_format)
                block.layout.write(whole[name], made.pop(name))
            whole |= made
        out |= {n: made.reshape(grads[n].shape).to(grads[n].dtype) for n, made in whole.items() if n in grads}
        return exchange.updates(self.averages, out)

    # -- what it says --------------------------------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """Blocks whose inverse needed more damping (`raised`), is an older one (`kept`) or the `identity`."""
        held = self.inverses.values()
        return {
            "raised": sum(inverse.raised and inverse.block is not None and not inverse.kept for inverse in held),
            "kept": sum(inverse.kept for inverse in held),
            "identity": sum(inverse.block is None for inverse in held),
        }

    def describe(self, names: Sequence[str], draws: int | None) -> dict[str, str]:
        """How the gradient of each parameter is treated, by name. draws: of the curvature."""
        said: dict[str, str] = {}
        for key, held in self.averages.items():
            inverse, name = self.inverses.get(key), held.block.parameter or key
            text = described(self.kinds[key], draws)
            text += "" if held.block.form == "diagonal" else f" {list(held.block.size)}"
            if inverse is not None and inverse.block is None:
                text = f"plain gradient ({text} could not be inverted)"
            elif inverse is not None and inverse.kept:
                text += ", an earlier inverse"
            elif inverse is not None and inverse.raised:
                text += ", damping raised"
            said[name] = f"{said[name]}; {text}" if name in said else text
            if held.block.bias is not None:
                said[held.block.bias] = f"in the block of {name}"
        return {name: said.get(name, "plain gradient") for name in names}

    # -- state ---------------------------------------------------------------------------------------------

    def state(self, exchange: RankExchange) -> dict[str, Any]:
        """The state by block, as tensors, numbers and strings; with several ranks a collective that gives the whole."""
        return exchange.whole({
            name: {**save(held, self.inverses.get(name)), "kind": self.kinds[name]}
            for name, held in self.averages.items()
        })  # fmt: skip

    @staticmethod
    def of(state: Mapping[str, Any], named: Mapping[str, Tensor], exchange: RankExchange) -> Blocks:
        """Blocks from what `state` gave, copied to the parameters' devices."""
        loaded = {name: load(its, named[its["parameter"] or name].device) for name, its in state.items()}
        exchange.owners = {}
        exchange.assign({name: held.block for name, (held, _) in loaded.items()})
        loaded = {name: exchange.hold(name, *its) for name, its in loaded.items()}
        return Blocks(
            {name: held for name, (held, _) in loaded.items()},
            {name: inverse for name, (_, inverse) in loaded.items() if inverse is not None},
            {name: its["kind"] for name, its in state.items()},
        )


def _values(name: str, block: Block, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that a block acts on, in its type; zero for one that is not there."""
    like = block.like
    values = {n: g.to(like.dtype) for n, g in grads.items()}
    if name not in values:
        values[name] = like.new_zeros(block.shape)
    if block.bias is not None and block.bias not in values:
        values[block.bias] = like.new_zeros(block.size[0] * block.size[1])
    return values


def _moments(
    blocks: Mapping[str, Measured], new: Mapping[str, Average], decay: float, exchange: RankExchange,
    verdict: Verdict | None,
) -> dict[str, Average]:  # fmt: skip
    """The averages with second moments, updated with a batch's; only blocks with an eigenbasis have them."""
    held = {name: new[name] for name, measured in blocks.items() if measured.moments is not None}
    bases: dict[str, EigenBlock | None] = {name: its.eigen for name, its in held.items()}
    bases |= _eigenbases({name: its.block for name, its in held.items() if its.eigen is None}, exchange, verdict)
    known = {name: basis for name, basis in bases.items() if basis is not None}
    moments = exchange.added([_in(blocks[name], basis) for name, basis in known.items()])
    return {
        name: with_moments(held[name], basis, its, decay)
        for (name, basis), its in zip(known.items(), moments, strict=True)
    }


def _eigenbases(
    blocks: Mapping[str, Block], exchange: RankExchange, verdict: Verdict | None
) -> dict[str, EigenBlock | None]:
    """As of the ranks; the host waits for each, so the verdict on what they are made of is read before."""
    if blocks and verdict is not None:
        verdict.read()
    found = exchange.eigenbases(blocks)
    laid = side_by_side({name: basis for name, basis in found.items() if basis is not None})
    return {name: laid.get(name) for name in found}


def _in(measured: Measured, basis: EigenBlock) -> Tensor:
    assert measured.moments is not None
    return measured.moments(basis)


def misfits(state: Any, named: Mapping[str, Tensor]) -> list[str]:
    """What of saved blocks does not fit the parameters."""
    if not isinstance(state, Mapping):
        return [f"the saved blocks are a {type(state).__name__}, not a dict"]
    found = []
    for key, its in state.items():
        if not isinstance(its, Mapping):
            found.append(f"the saved factors of {key} are a {type(its).__name__}, not a dict")
        else:
            found += unlike(f"the block of {key}", its, _SAVED) or _misfit(key, its, named)
    return found


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_count, value))


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_part(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


_SAVED: dict[str, Callable[[Any], bool]] = {
    "kind": lambda value: isinstance(value, str) and value in KINDS,
    "bias": _is_name, "parameter": _is_name, "form": lambda value: isinstance(value, str),
    "batches": is_count, "shape": _are_sizes, "size": lambda value: _are_sizes(value) and len(value) == 3,
    "index": lambda value: value is None or (isinstance(value, Tensor) and value.dtype == torch.int64),
    "axes": lambda value: value is None or (_are_sizes(value) and sorted(value) == [0, 1, 2]),
    "inverse": _is_part, "eigen": _is_part,
}  # fmt: skip
_INVERSE: dict[str, Callable[[Any], bool]] = {key: lambda value: isinstance(value, bool) for key in ("raised", "kept")}
_FACTORS, _EIGEN = {"A", "B"}, {"basis_in", "basis_out", "spectrum"}


def _misfit(key: str, state: Mapping[str, Any], named: Mapping[str, Tensor]) -> list[str]:
    """What of one saved block does not fit its parameter, and the bias in it."""
    p, bias = named.get(state["parameter"] or key), state["bias"]
    if p is None or tuple(p.shape) != tuple(state["shape"]) or not _lies_in(p, state):
        return [f"the saved factors of {key} fit no parameter of the model"]
    groups, size_out, size_in = state["size"]
    size_in += bias is not None
    if bias is not None and (bias not in named or named[bias].numel() != groups * size_out):
        return [f"the saved factors of {key} have the bias {bias}, which the model does not have in that shape"]
    wanted = wide_type(p.dtype)
    sources = {"average": state, "inverse": state["inverse"], "eigenbasis": state["eigen"]}
    for what, source in ((what, source) for what, source in sources.items() if source is not None):
        if what == "inverse" and (wrong := unlike(f"the inverse of {key}", source, _INVERSE)):
            return wrong
        have = source.keys() & (_FACTORS | _EIGEN)
        if have not in ([_FACTORS, _EIGEN, set()] if what == "inverse" else [_FACTORS, _EIGEN]):
            return [f"the {what} of {key} has {', '.join(sorted(have)) or 'no factors'}, which is no form of a block"]
        shapes = {"A": size_in, "B": size_out, "basis_in": size_in, "basis_out": size_out}
        for name in sorted(have):
            t = source[name]
            if t is None and (name.startswith("basis") or (name == "A" and size_in == 1)):
                continue
            diagonal, whole = (groups, shapes.get(name)), (groups, size_out, size_in)
            fits = [diagonal, (*diagonal, shapes[name])] if name in shapes else [whole]
            if not isinstance(t, Tensor) or tuple(t.shape) not in fits or t.dtype != wanted:
                seen = f"shape {tuple(t.shape)}, {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
                return [f"the {what} of {key} has {name} of {seen}; here its matrix is {state['size']}, {wanted}"]
        if bad := non_finite(f"the {what} of {key}", {name: source[name] for name in have}):
            return bad
    return []


def _lies_in(p: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a saved layout is one of a parameter's elements: all of them in some order, or those at an index."""
    size, index, axes = tuple(state["size"]), state["index"], state["axes"]
    if index is None:
        return axes is not None and math.prod(size) == p.numel()
    return tuple(index.shape) == size and (index.numel() == 0 or 0 <= int(index.min()) <= int(index.max()) < p.numel())
