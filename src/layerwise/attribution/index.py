"""`GradientIndex`: projected gradients of all training samples on disk, and queries by one matrix product."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from layerwise.attribution.files import flushed, read, refuse_others, replaced, write
from layerwise.attribution.influence import Best, Influence, Measure
from layerwise.attribution.inverse import ProjectedSolved
from layerwise.attribution.passes import given
from layerwise.errors import BadInput
from layerwise.quantities.base import positive
from layerwise.quantities.inner_products import Projections
from layerwise.rows.project import signs

__all__ = ["GradientIndex"]

_ROWS, _SCALES, _COUNT, _FACTS = "rows.float16", "scales.float32", "samples.txt", "index"
_CHUNK = 2**26  # bytes of the index in memory at once


class GradientIndex:
    """The gradients of training samples, each layer's projected from both sides, memory-mapped on disk in float16.

    row[n] = (L g_n R^T of each parameter), with g_n as the matrix `[first axis, rest]`, L `[P,·]` and R `[Q,·]` of at
    most `rank` rows (a vector's of rank²), from inputs and cotangents apart: no gradient is formed. A search gives

        score[q, n] ~ sum over parameters of <L v_q R^T, L g_n R^T>,  v_q = (G + λ I)⁻¹ g_q,

    the inner products that `Influence.scores` has exactly, from one product with the index in chunks.

    influence: fitted (or loaded); its model, loss and parameters are the index's. folder: where the index is.
    rank: sides of up to this length are kept whole. seed: of the signs.
    projection: "eigen", the rank leading eigenvectors of either Kronecker factor, where the curvature has a basis
    (LoGra's PCA start), else random; "random": signs / sqrt(rank), unbiased, with an error of about |v| |g| / rank.
    Size on disk: 2 · numbers(row) bytes a sample (`row_size`), and 4 for its scale.
    Raises BadInput, also for a folder that holds an index of another model or of other settings.
    Source: Choe et al. (2024), "What is your data worth to GPT?" (LoGra), section 3; Park et al. (2023), TRAK.
    """

    def __init__(
        self, influence: Influence, folder: str | Path, rank: int = 16, projection: str = "eigen", seed: int = 0
    ) -> None:
        positive("GradientIndex's rank", rank, none=False)
        if projection not in ("eigen", "random"):
            raise BadInput(f'projection must be "eigen" or "random", got {projection!r}')
        self._influence, self._folder = influence, Path(folder)
        self._weights = influence.weights()
        settings = influence.settings(self._weights)
        shapes = settings["shapes"]
        self._settings = settings | {"rank": rank, "projection": projection, "signs": seed}
        found = read(self._folder, _FACTS)
        if found is None:
            self._sides = {name: self._side(name, shape, rank, projection, seed) for name, shape in shapes.items()}
            self._count = 0
            tensors = {f"{name}/left": left for name, (left, _) in self._sides.items()}
            tensors |= {f"{name}/right": right for name, (_, right) in self._sides.items()}
            write(self._folder, _FACTS, tensors, {"settings": self._settings})
        else:
            tensors, facts = found
            refuse_others(f"the index in {folder}", facts["settings"], self._settings, "Take another folder")
            self._sides = {name: (tensors[f"{name}/left"], tensors[f"{name}/right"]) for name in shapes}
            self._count = self._trimmed()

    def __len__(self) -> int:
        return self._count

    @property
    def row_size(self) -> int:
        """The numbers of each sample's row."""
        return sum(len(left) * len(right) for left, right in self._sides.values())

    def append(self, loader: Iterable[Any], skip: int = 0, progress: bool = False) -> Self:
        """Add the samples of all batches, in one pass over them; each batch is on disk before the next begins.

        skip: how many samples the loader begins with that are in the index already (`len(index)`, after a kill): whole
        batches of them are not computed again; BadInput where that number ends inside a batch, or behind the last one.
        progress: show a bar.
        """
        quantity = Projections(self._sides)
        self._check_weights()
        if skip < 0:
            raise BadInput(f"asked to skip {skip} samples; give len(index), or 0")
        for batch in given(loader, "append's loader", "index" if progress else None):
            if skip > 0:
                skip -= _size_of(batch)
                if skip < 0:
                    raise BadInput(f"the samples to skip end {-skip} before the end of a batch; skip whole batches")
                continue
            self._add(self._flat(self._influence.observed(batch, quantity)))
        if skip > 0:
            raise BadInput(f"the loader ended {skip} samples before the end of those to skip; it is not the index's")
        return self

    def _check_weights(self) -> None:
        if not self._weights.are_the_same():
            raise BadInput("the weights were written or frozen after the index was opened; make a new index of them")

    def _flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """`[N, row_size]` of the parameters' values, zero for those that a batch does not use."""
        like = next(iter(values.values()))
        columns = [
            values[name] if name in values else like.new_zeros(len(like), len(left) * len(right))
            for name, (left, right) in self._sides.items()
        ]
        return torch.cat(columns, 1)

    def _add(self, rows: Tensor) -> None:
        largest = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny).float().cpu()
        scaled = (rows.cpu().float() / largest[:, None]).half()
        for name, values in ((_ROWS, scaled), (_SCALES, largest)):
            with (self._folder / name).open("ab") as stream:
                stream.write(values.numpy().tobytes())
            flushed(self._folder / name)
        self._count += len(rows)
        replaced(self._folder / _COUNT, str(self._count))

    def _trimmed(self) -> int:
        """How many samples count, after what lies behind them on disk, of a run that was killed, is cut off."""
        path = self._folder / _COUNT
        text = path.read_text(encoding="utf-8") if path.exists() else "0"
        if not text.isdecimal():
            raise BadInput(f"{path} holds no number of samples, but {text!r}; build the index again")
        for name, each in ((_ROWS, 2 * self.row_size), (_SCALES, 4)):
            path, size = self._folder / name, int(text) * each
            seen = path.stat().st_size if path.exists() else 0
            if seen < size:
                raise BadInput(f"{path} has {seen} bytes, {text} samples need {size}; it is damaged: build again")
            if seen > size:
                os.truncate(path, size)
        return int(text)

    def _side(self, name: str, shape: Sequence[int], rank: int, projection: str, seed: int) -> tuple[Tensor, Tensor]:
        """L and R of a parameter."""
        r, c = (shape[0] if shape else 1), int(np.prod(shape[1:]))
        like = torch.empty(0, dtype=torch.get_default_dtype())
        most = rank if min(r, c) > 1 else rank**2  # of a vector as many numbers as of a matrix
        if projection == "eigen" and (basis := _eigenbasis(self._influence, name, r, c)) is not None:
            return basis.left[:most].to(like), basis.right[:most].to(like)
        random = signs(name, (r, c) if len(shape) > 1 else (r,), most, seed, like)
        left, right = (
            torch.eye(n) if n <= most else vectors / most**0.5 for n, vectors in zip((r, c), random, strict=True)
        )
        return left.to(like), right.to(like)

    @cached_property
    def _eigenvalues(self) -> dict[str, Tensor]:
        """Those of the damped inverse along both sides, `[P,Q]`, of parameters whose sides are eigenvectors."""
        found = {}
        for name, (left, right) in self._sides.items():
            if self._settings["projection"] == "eigen":
                basis = _eigenbasis(self._influence, name, left.shape[1], right.shape[1])
                if basis is not None:
                    found[name] = basis.inverse[: len(left), : len(right)]
        return found

    def search(self, queries: Iterable[Any], k: int, measure: Measure | None = None) -> tuple[Tensor, Tensor]:
        """The k largest approximate scores of each query and the numbers of their samples, `[Q, k]` both.

        queries, measure: as for `Influence.scores`. Raises BadInput for more than the index holds.
        """
        positive("search's k", k, none=False)
        best = Best(k)
        for part in self._products(queries, measure):
            best.add(part)
        return best.result()

    def scores(self, queries: Iterable[Any], measure: Measure | None = None) -> Tensor:
        """The approximate scores of all samples in the index, `[Q, N]`."""
        return torch.cat(list(self._products(queries, measure)), 1)

    def recall(
        self, queries: Iterable[Any], train_loader: Iterable[Any], k: int, measure: Measure | None = None
    ) -> float:
        """The share of the k best of the exact scores that are among the k best of the index, over all queries.

        train_loader: the samples of the index, in their order; BadInput where it has more or fewer.
        """
        queries = list(queries)
        found = self.search(queries, k, measure)[1]
        scores = self._influence.scores(queries, train_loader, measure=measure)
        if scores.shape[1] != self._count:
            raise BadInput(f"train_loader gave {scores.shape[1]} samples, the index holds {self._count}; give the same")
        exact = scores.topk(k, 1).indices
        return float((exact[:, :, None] == found[:, None, :]).any(2).double().mean())

    def _products(self, queries: Iterable[Any], measure: Measure | None) -> Iterable[Tensor]:
        """`[Q, n]` for one chunk of the index after the other."""
        if not self._count:
            raise BadInput("the index is empty; append(loader) first")
        self._check_weights()
        quantity = ProjectedSolved(self._influence.inverse, self._sides, self._eigenvalues)
        found = (self._influence.observed(batch, quantity, measure) for batch in given(queries, "queries"))
        q = torch.cat([self._flat(values) for values in found]).float().cpu()
        rows = np.memmap(self._folder / _ROWS, np.float16, "r", shape=(self._count, self.row_size))
        scales = torch.from_numpy(np.fromfile(self._folder / _SCALES, np.float32, self._count))
        step = max(1, _CHUNK // (4 * self.row_size))
        for low in range(0, self._count, step):
            chunk = torch.from_numpy(np.array(rows[low : low + step])).float()
            yield (q @ chunk.T) * scales[low : low + step]


class _Eigenbasis(NamedTuple):
    """The eigenvectors of both sides of a parameter as rows, the most curvature first; (G + λ I)⁻¹ along them."""

    left: Tensor
    right: Tensor
    inverse: Tensor


def _eigenbasis(influence: Influence, name: str, r: int, c: int) -> _Eigenbasis | None:
    """Of a parameter that has one block in a Kronecker eigenbasis; else None."""
    blocks = [] if influence.curvature is None else [
        block for key, block in influence.curvature.blocks.items() if (block.parameter or key) == name
    ]  # fmt: skip
    if len(blocks) != 1 or len(blocks[0].spectrum) != 1:
        return None
    (block,), numbers = blocks, torch.arange(r * c).reshape(r, c)
    if block.basis_in is None or block.basis_out is None:
        return None
    rows, columns = (block.spectrum[0].sum(axis).argsort(descending=True) for axis in (1, 0))
    left, right = block.basis_out[0].T[rows], block.basis_in[0].T[columns]
    inverse = influence.inverse.spectrum(name)[0][rows][:, columns]
    place = block.matrix(numbers.reshape(block.shape))[0]
    if torch.equal(place, numbers):
        return _Eigenbasis(left, right, inverse)
    return _Eigenbasis(right, left, inverse.T) if torch.equal(place.T, numbers) else None


def _size_of(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(batch)
