"""How many samples a batch has: what its tensors, its targets and its losses say, to be proved by measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from layerwise.graph.coverage import Graph
from layerwise.graph.own_loss import OwnLossGraph
from layerwise.graph.separable import loss_terms
from layerwise.tape.origins import Moved, Origin, Source, numbers, sources

__all__ = ["candidates", "contradictory", "first_count", "origin_rows", "row_of", "terms"]


def first_count(graph: Graph) -> int | None:
    """Dim 0 of the batch that the first use's input was made from; None where there is no such batch."""
    return graph.batch.shape[0] if graph.batch is not None and graph.batch.dim() else None


def terms(graph: Graph) -> list[int]:
    """The size of each loss's first axis of loss terms."""
    found = []
    for loss in graph.losses:
        axes = [a for a in range(loss.call.logits.dim()) if a != loss.call.class_axis]
        found.append(loss.call.logits.shape[axes[0]] if axes else 1)
    return found


def contradictory(graph: Graph) -> bool:
    """Whether the tensors that the uses read differ in what they say on the number of samples."""
    first = first_count(graph)
    batches = {id(use.batch): use.batch for use in graph.uses}
    if any(b.dim() == 0 or b.shape[0] != first for b in batches.values()):
        return True
    made = [_of_batch(use.origin[0], use.batch.shape) for use in graph.uses if use.origin is not None]
    if len(batches) > 1:
        return any(isinstance(origin, Moved) for origin in made)
    return any(_cuts_samples(origin) for origin in made[:1])


def _of_batch(origin: Origin, shape: torch.Size) -> Origin:
    """The origin of the batch of a given shape that data was made from."""
    while isinstance(origin, Moved) and origin.shape != shape and not isinstance(origin.args[0], list):
        origin = origin.args[0]
    return origin


def _cuts_samples(origin: Origin) -> bool:
    """Whether several rows of a batch come from one row of what it was made of."""
    if isinstance(origin, Source) or not origin.shape or isinstance(origin.args[0], list):
        return False
    rows = row_of(origin, origin.shape)
    return rows is not None and len(rows.unique()) < origin.shape[0]


def row_of(origin: Origin, shape: torch.Size) -> Tensor | None:
    """The row of the source that each leading index of the data comes from, over all sources; None where it is open.

    The rows of several sources are numbered one after another.
    """
    offsets: dict[Origin, int] = {}
    total = 0
    for source in sources(origin):
        offsets[source] = total
        total += source.shape[0] if source.shape else 1
    found = numbers(origin, offsets)
    if found is None or found.dim() == 0 or not shape or found.shape[0] != shape[0]:
        return None
    flat = found.reshape(len(found), -1)
    return flat[:, 0] if flat.numel() and bool((flat == flat[:, :1]).all()) else None


def origin_rows(origin: Origin, shape: torch.Size, offsets: Mapping[Origin, int]) -> Tensor | None:
    """The row of its source for each element of the data, of size 1 along the axes where it does not vary.

    None where it is open.
    """
    found = numbers(origin, offsets)
    if found is None:
        return None
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
    lead = found.reshape(*found.shape[:keep], -1)[..., 0] if found.numel() else found.new_zeros(found.shape[:keep])
    return lead.reshape(*lead.shape, *(1,) * (len(shape) - keep))


def candidates(graph: Graph) -> list[int]:
    """The numbers of samples that the losses, the targets and the batches allow, the likeliest first."""
    rows = _distinct_rows(use.origin for use in graph.uses)
    labels = _distinct_rows(loss.target for loss in graph.losses)
    lead = terms(graph)
    same = set(lead)
    first = first_count(graph)
    found = [x for x in lead if len(same) == 1 and x in rows]
    found += [x for x in labels if x in rows]
    found += rows
    found += [x for x in lead if len(same) == 1 and x in labels]
    found += [] if first is None else [first]
    found += [sum(rows), *labels, *(lead if len(same) == 1 else ()), sum(lead), *_own_terms(graph)]
    found = list(dict.fromkeys(x for x in found if x > 0))
    return [x for x in found if x > 1] or found


def _own_terms(graph: Graph) -> list[int]:
    """The sizes of the first axes of the terms that the user's own losses add up."""
    shapes = [
        node._input_metadata[output].shape
        for own in graph.own
        for probe in loss_terms(OwnLossGraph(graph, own))
        for node, output in probe.edges
    ]
    return [int(shape[0]) for shape in shapes if len(shape)]


def _distinct_rows(origins: Iterable[tuple[Origin, torch.Size] | None]) -> list[int]:
    """For each source of some data, how many of its rows were used."""
    used: dict[Origin, set[int]] = {}
    for pair in origins:
        if pair is None:
            continue
        for source in sources(pair[0]):
            offsets = dict.fromkeys(sources(pair[0]), -(2**40)) | {source: 0}
            found = numbers(pair[0], offsets)
            rows = set(range(source.shape[0] if source.shape else 1))
            if found is not None:
                rows = set(found[found >= 0].unique().tolist())
            used.setdefault(source, set()).update(rows)
    return [len(rows) for rows in used.values()]
