"""How many samples a batch has: what its tensors, its targets and its losses say, to be proved by measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.graph.coverage import Graph
from layerwise.graph.own_loss import OwnLossGraph
from layerwise.graph.separable import loss_terms, read_together, sequences
from layerwise.losses import OwnCall
from layerwise.tape.origins import Moved, Origin, Source, ancestors, is_open, numbers, offsets_of, parents, sources
from layerwise.tape.uses import LossUse, Use

__all__ = [
    "candidates", "contradictory", "first_count", "hashed", "labelled", "named", "on_output", "origin_rows", "origins",
    "outside", "places", "read_as_one", "row_counts", "rows_by_source", "said_by_loss", "telling_target",
    "tensor_asked", "term_shape", "terms",
]  # fmt: skip


def origins(graph: Graph) -> list[Origin]:
    """Where the inputs of the uses and the targets of the losses come from, as far as that is known."""
    pairs = (*(use.origin for use in graph.uses), *(loss.target for loss in graph.losses))
    return [pair[0] for pair in pairs if pair is not None]


def places(entered: Iterable[Origin], found: Iterable[Origin], uses: Iterable[Use]) -> tuple[Any, ...]:
    """What decides, beside the sequence of calls, where the rows of data come from: indices, masks, sizes, batches."""
    known: dict[int, int] = {}
    numbers = tuple([known.setdefault(id(use.batch), len(known)) for use in uses])
    shapes = tuple([batch.shape for batch in {id(use.batch): use.batch for use in uses}.values()])
    of_each: dict[int, Any] = {}  # many uses read rows of one origin
    for origin in (all_origins := (*entered, *found)):
        if id(origin) not in of_each:
            of_each[id(origin)] = _values(origin, known)
    return numbers, shapes, tuple([of_each[id(origin)] for origin in all_origins])


def _values(origin: Origin, known: dict[int, int]) -> Any:
    """Everything that an origin's numbers depend on; known: the numbers of the tensors met so far."""
    if isinstance(origin, Source) or origin.own:  # of an own batch it does not matter which rows it has
        return origin.shape, known.setdefault(id(origin), len(known))
    kept = [hashed(x) for x in (*origin.args[1:], *origin.kwargs.values())]
    return (origin.func, origin.place, *kept, *(_values(parent, known) for parent in parents(origin)))


def hashed(argument: Any) -> Any:
    """An argument by value, as part of a key; floats may differ."""
    if isinstance(argument, (tuple, list)):
        return tuple(hashed(x) for x in argument)
    if isinstance(argument, Tensor):
        return argument.shape, hash(argument.detach().cpu().numpy().tobytes())
    return argument if isinstance(argument, (int, str)) else None


def first_count(graph: Graph) -> int | None:
    """Dim 0 of the batch that the first use's input was made from; None where there is no such batch."""
    return graph.batch.shape[0] if graph.batch is not None and graph.batch.dim() else None


def said_by_loss(graph: Graph) -> int | None:
    """The number of sequences, where every loss is one that is defined on a batch of these, on whatever axis."""
    if graph.known or not graph.own:
        return None
    counts = {sequences(OwnLossGraph(graph, own)) for own in graph.own}
    return counts.pop() if len(counts) == 1 else None


def terms(graph: Graph) -> list[int]:
    """The size of each loss's first axis of loss terms."""
    found = []
    for loss in graph.losses:
        axes = [a for a in range(loss.call.logits.dim()) if a != loss.call.class_axis]
        found.append(loss.call.logits.shape[axes[0]] if axes else 1)
    return found


def read_as_one(graph: Graph) -> list[list[int]]:
    """The losses, by number, those together that some term of the user's own loss reads together."""
    groups = [{i} for i in range(len(graph.losses))]
    first = len(graph.known)
    for own in graph.own:
        for read in read_together(OwnLossGraph(graph, own)):
            met = [group for group in groups if group & {first + i for i in read}]
            groups = [group for group in groups if group not in met] + ([set().union(*met)] if met else [])
        first += len(own.boundary)
    return sorted(sorted(group) for group in groups)


def contradictory(graph: Graph, losses: int) -> bool:
    """Whether the tensors that the uses read differ in what they say on the number of samples.

    So they do where the first of them is none that the model was called with, while others are; and where there are
    several, of several losses, which may be of samples of their own.
    """
    first = first_count(graph)
    if graph.uses and graph.uses[0].origin is not None and outside(graph, graph.uses[0].origin[0]):
        return True
    batches = {id(use.batch): use.batch for use in graph.uses}
    if any(b.dim() == 0 or b.shape[0] != first for b in batches.values()):
        return True
    if any(use.origin is not None and is_open(use.origin[0]) for use in graph.uses):
        return True  # the batch is what was written to some rows, which may be as many as it, or more
    made = (_of_batch(use.origin[0], use.batch.shape) for use in graph.uses if use.origin is not None)
    if len(batches) > 1:
        return losses > 1 or any(isinstance(origin, Moved) for origin in made)
    origin = next(made, None)
    return origin is not None and (_cuts_samples(origin) or _joins_rows(origin))


def outside(graph: Graph, origin: Origin) -> bool:
    """Whether data was made of no tensor that the model was called with, while it was called with some."""
    if any(origin is x for call in graph.calls for x in call):
        return False
    entered = {source for x in graph.entered for source in sources(x)}
    return bool(entered) and not entered & ancestors(origin)


def _of_batch(origin: Origin, shape: torch.Size) -> Origin:
    """The origin of the batch of a given shape that data was made from."""
    while isinstance(origin, Moved) and origin.shape != shape and not isinstance(origin.args[0], list):
        origin = origin.args[0]
    return origin


def _joins_rows(origin: Origin) -> bool:
    """Whether a row of a batch that was put together holds several rows of what it was put together from."""
    if isinstance(origin, Source) or not isinstance(origin.args[0], list) or not origin.shape:
        return False
    found = _numbered(origin)
    if found is None or not found.numel() or found.shape[0] != origin.shape[0]:
        return False
    flat = found.reshape(len(found), -1)
    return not bool((flat == flat[:, :1]).all())


def _cuts_samples(origin: Origin) -> bool:
    """Whether several rows of a batch come from one row of what it was made of."""
    if isinstance(origin, Source) or not origin.shape or isinstance(origin.args[0], list):
        return False
    rows = _row_of(origin, origin.shape)
    return rows is not None and len(rows.unique()) < origin.shape[0]


def _row_of(origin: Origin, shape: torch.Size) -> Tensor | None:
    """The row of the source that each leading index of the data comes from, over all sources; None where it is open.

    The rows of several sources are numbered one after another.
    """
    found = _numbered(origin)
    if found is None or found.dim() == 0 or not shape or found.shape[0] != shape[0]:
        return None
    flat = found.reshape(len(found), -1)
    return flat[:, 0] if flat.numel() and bool((flat == flat[:, :1]).all()) else None


def _numbered(origin: Origin) -> Tensor | None:
    """The row of its source for each element of the data, those of several sources numbered one after another."""
    offsets: dict[Origin, int] = {}
    total = 0
    for source in sources(origin):
        offsets[source] = total
        total += source.shape[0] if source.shape else 1
    return numbers(origin, offsets)


def origin_rows(origin: Origin, shape: torch.Size, offsets: Mapping[Origin, int]) -> Tensor | None:
    """The row of its source for each element of the data, of size 1 along the axes where it does not vary.

    None where it is open.
    """
    found = numbers(origin, offsets)
    if found is None:
        return None
    if not found.numel():
        return found.new_zeros(shape[:1] + (1,) * (len(shape) - 1))
    keep = 0
    flat = found
    for axis in reversed(range(found.dim())):
        one = flat.narrow(axis, 0, 1)
        if not bool((flat == one).all()):
            keep = axis + 1
            break
        flat = one
    if found.shape[:keep] != shape[:keep]:
        return None
    lead = found.reshape(*found.shape[:keep], -1)[..., 0]
    return lead.reshape(*lead.shape, *(1,) * (len(shape) - keep))


def rows_by_source(made: tuple[Origin, torch.Size] | None) -> Iterator[tuple[Origin, Tensor]]:
    """Each tensor that some data was made of, with the number of its row for each element of the data."""
    if made is None:
        return
    for source in sources(made[0]):
        rows = origin_rows(*made, offsets_of(source, made[0]))
        if rows is not None:
            yield source, rows


def candidates(graph: Graph, apart: Iterable[int]) -> tuple[list[int], list[int]]:
    """The numbers of samples that the batches, targets and losses allow: those that two of them say, and others.

    Among the first only one can be true; the others are in order, the likeliest first.
    apart: how many terms all losses have if some are of samples of their own.
    """
    entered, read, labels, lead = _said(graph).values()
    rows = list(dict.fromkeys([*entered, *read]))
    alike = lead[:1] if len(set(lead)) == 1 else []
    one = [] if not entered and any(x > 1 for x in (*labels, *alike)) else rows[:1]
    rows = [x for x in rows if x > 1] or one  # a tensor of one row beside others is a constant
    first = [x for x in alike if x in rows] or [x for x in labels if x in rows]
    first = first or [*rows, *(x for x in alike if x in labels)]
    rest = [*rows, *_whole_batch(graph), sum(rows), *labels, *alike, *apart, *_own_terms(graph)]
    return list(dict.fromkeys(first)), [x for x in dict.fromkeys(rest) if x > 1 and x not in first]


def labelled(graph: Graph) -> list[int]:
    """The numbers of rows of the losses' targets."""
    return row_counts([loss.target[0] for loss in graph.losses if loss.target is not None])


def telling_target(graph: Graph, loss: LossUse) -> tuple[Origin, torch.Size] | None:
    """Where the rows of a loss's target come from, and its shape, if they tell samples.

    None where the target is a constant, of equal rows, that other losses were given too.
    """
    if loss.target is None or isinstance(loss.call, OwnCall):
        return None
    mine = set(sources(loss.target[0]))
    others = [other.target for other in graph.known if other is not loss and other.target is not None]
    target = loss.call.target
    shared = target.dim() and len(target) > 1 and any(not mine.isdisjoint(sources(made[0])) for made in others)
    return None if shared and bool((target == target[:1]).all()) else loss.target


def named(graph: Graph, counts: Iterable[int]) -> str:
    """Numbers of samples in words, each with what says it."""
    said = _said(graph)
    found = {n: [name for name, numbers in said.items() if n in numbers] for n in sorted(counts)}
    return " and ".join(f"{n} ({', '.join(names)})" if names else str(n) for n, names in found.items())


def _said(graph: Graph) -> dict[str, list[int]]:
    """The numbers of samples that each kind of tensor says, by its name."""
    return {
        "rows that the model was called with": row_counts([origin for origin in graph.entered if origin.shape]),
        "rows that the layers read": row_counts([u.origin[0] for u in graph.uses if u.origin is not None]),
        "rows of the targets": labelled(graph),
        "terms of the loss": terms(graph),
    }


def _whole_batch(graph: Graph) -> list[int]:
    """Dim 0 of the first use's batch, where that is no piece of another tensor."""
    use = graph.uses[0] if graph.uses else None
    if use is None or use.made_from is None or isinstance(_of_batch(use.made_from, use.batch.shape), Moved):
        return []
    return list(use.batch.shape[:1])


def _own_terms(graph: Graph) -> list[int]:
    """The sizes of the first axes of the terms that the user's own losses add up."""
    return [int(shape[0]) for shape in _own_shapes(graph) if len(shape)]


def _own_shapes(graph: Graph) -> list[torch.Size]:
    """The shapes of the terms that the user's own losses add up."""
    return [
        torch.Size(node._input_metadata[output].shape)
        for own in graph.own
        for probe in loss_terms(OwnLossGraph(graph, own))
        for node, output in probe.edges
    ]


def term_shape(loss: LossUse) -> torch.Size:
    """The shape of a loss's terms: the logits' without the axis of classes."""
    return torch.Size(size for a, size in enumerate(loss.call.logits.shape) if a != loss.call.class_axis)


def tensor_asked(graph: Graph) -> str:
    """The tensor that `samples=` takes, in words: its shape, where the losses say it."""
    tensor = "an integer tensor with the sample number of each loss term"
    known = [term_shape(loss) for loss in graph.known]
    try:
        shapes = list(dict.fromkeys([*known, *_own_shapes(graph)]))
    except LayerwiseError:
        return tensor
    total = sum(shape.numel() for shape in known)
    each = f"({total},): those of {', '.join(str(tuple(x)) for x in known)} one after another"
    if len(shapes) == 1:
        several = "" if graph.own or len(known) < 2 else f", the same for all losses, or {each}"
        return f"{tensor}, of shape {tuple(shapes[0])}{several}" if shapes[0] else tensor
    if graph.own or not shapes:
        return f"{tensor}, or of each row of the batch"
    return f"{tensor}, of shape {each}"


def row_counts(found: Iterable[Origin]) -> list[int]:
    """For each source of some data, how many of its rows were used; all of them where a mask chose among them."""
    used: dict[Origin, set[int]] = {}
    masked: set[Origin] = set()
    for origin in found:
        for source in sources(origin):
            rows = numbers(origin, offsets_of(source, origin))
            every = set(range(source.shape[0] if source.shape else 1))
            used.setdefault(source, set()).update(every if rows is None else _occurring(rows))
            if _by_mask(origin):
                masked.add(source)
    return [source.shape[0] if source in masked and source.shape else len(rows) for source, rows in used.items()]


def _occurring(rows: Tensor) -> list[int]:
    """The numbers from 0 on that occur; an axis along which a tensor is expanded is read once."""
    once = rows[tuple(slice(0, 1 if step == 0 else None) for step in rows.stride())]
    found: list[int] = torch.bincount(once[once >= 0]).nonzero()[:, 0].tolist()
    return found


def _by_mask(origin: Origin) -> bool:
    """Whether a mask chose elements on the way to some data."""
    if isinstance(origin, Source):
        return False
    chosen = (*origin.args[1:], *origin.kwargs.values())
    return any(_is_mask(x) for x in chosen) or any(_by_mask(parent) for parent in parents(origin))


def _is_mask(argument: Any) -> bool:
    if isinstance(argument, (tuple, list)):
        return any(_is_mask(x) for x in argument)
    return isinstance(argument, Tensor) and argument.dtype == torch.bool


def on_output(rows: Tensor, use: Use) -> Tensor | None:
    """Numbers of a use's input rows as numbers of its output's."""
    shape = use.call.out_shape
    lead = [size for size in rows.shape if size != 1]
    keep = max((a + 1 for a, size in enumerate(rows.shape) if size != 1), default=0)
    if not lead:
        return rows.reshape([1] * len(shape))
    if keep > len(shape) or any(a not in (1, b) for a, b in zip(rows.shape[:keep], shape[:keep], strict=True)):
        return None
    return rows.reshape(*rows.shape[:keep], *[1] * (len(shape) - keep))
