"""A quantity of a whole data set, batch by batch, with its sums on disk after each, so that a kill loses one batch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.attribution.files import read, refuse_others, write
from layerwise.attribution.passes import Chosen, given
from layerwise.errors import BadInput
from layerwise.observation.results import Results
from layerwise.observation.union import Batch, Values, check_pooled, union_of, weighed
from layerwise.quantities.base import Context, Quantity
from layerwise.ranks.group import Ranks, digest_of, values_digest
from layerwise.ranks.sums import all_reduced, tensors_of
from layerwise.replay.state import seed_of

__all__ = ["estimated", "resumable"]


def resumable(
    chosen: Chosen,
    loss_fn: Any,
    loader: Iterable[Any],
    quantity: Quantity,
    seed: int,
    folder: str | Path | None,
    settings: Mapping[str, Any],
    progress: bool = False,
) -> Any:
    """The result of a quantity of the pooled loss of all batches, as of `accumulate`, in one pass or two.

    Draws of each batch are seeded by its number, so that a resumed result has the bits of one that ran through.
    folder: where the sums are; None: nowhere. settings: what a resumed fit must have in common with the killed one.
    progress: show a bar for each pass.
    Raises BadInput for a folder of other settings or of other batches, an empty loader, or one that gives its batches
    once.
    """
    first = quantity.first_pass()
    if isinstance(loader, Iterator) and (first is not None or folder is not None):
        raise BadInput(
            f"asked to fit over an iterator ({type(loader).__name__}), which gives its batches once; two passes, and a "
            "fit that resumes, need a list or a DataLoader that gives the same batches each time"
        )
    result: Any = None
    sums: _Sums | None = None
    ranks = Ranks()
    place = None if folder is None else Path(folder) / (f"rank{ranks.rank}" if ranks.size > 1 else "")
    for number, asked in enumerate([quantity] if first is None else [first, quantity]):
        if number:
            asked, result, sums = quantity.second_pass(result), None, None  # the factors are in its basis
            asked.broadcast(ranks)
        sums = _Sums(asked, place, f"sums{number}", settings)
        generator = getattr(asked.cotangent, "generator", None)
        done = sums.count
        for i, batch in enumerate(given(loader, "fit's loader", f"fit, pass {number + 1}" if progress else None)):
            sums.read(batch)
            if i >= done:
                if generator is not None:
                    generator.manual_seed(seed_of(seed, i * ranks.size + ranks.rank))
                sums.add(chosen.observed(loss_fn, batch, asked))
        for batch in loader if not sums.known else ():  # all were done before: one of them says what is where
            sums.know(chosen.observed(loss_fn, batch, asked).values_of(0))
            if sums.known:
                break
        result = sums.finish(ranks)
    return result


def estimated(chosen: Chosen, loss_fn: Any, loader: Iterable[Any], quantity: Quantity) -> tuple[float, int]:
    """Seconds of a fit over a loader that tells its length, and bytes that its folder holds, from its first batch."""
    if not isinstance(loader, Sized) or not len(loader):
        raise BadInput(f"asked how long a fit takes, but {type(loader).__name__} does not tell how many batches it has")
    first, start = quantity.first_pass(), time.perf_counter()
    values = chosen.observed(loss_fn, next(iter(loader)), first or quantity).values_of(0)
    seconds = (time.perf_counter() - start) * len(loader)
    size = sum(t.nbytes for value in values.values() for v in value for t in tensors_of(v))
    if first is None:
        return seconds, size
    weights = dict(chosen.model.named_parameters())  # a second moment of each comes with the second pass
    return 2 * seconds, size + sum(weights[name].nbytes for name in values)


class _Sums:
    """A quantity's values, weighted by the terms of each batch and added up; on disk as tensors by number.

    The layouts that the tensors belong to are not on disk: the next batch tells them, or one of the first over again.
    """

    def __init__(self, quantity: Quantity, folder: str | Path | None, name: str, settings: Mapping[str, Any]) -> None:
        self._quantity, self._folder, self._name, self._settings = quantity, folder, name, dict(settings)
        self._values: Values = {}
        self._saved: dict[str, Tensor] = {}
        self.count, self._batch = 0, Batch(0, None)
        self._read, self._then, self._digest = 0, "", ""  # batches of this run; digests of those read, saved and now
        found = None if folder is None else read(folder, name)
        if found is not None:
            self._saved, facts = found
            refuse_others(f"the fit in {folder}", facts["settings"], self._settings, "Take another folder")
            self.count, self._then = facts["batches"], facts["digest"]
            terms = facts["terms"]
            self._batch = Batch(facts["samples"], None if terms is None else tuple(terms))

    @property
    def known(self) -> bool:
        """Whether all that was saved has its place."""
        return not self._saved

    def read(self, batch: Any) -> None:
        """Note the next batch; raises BadInput where the batches that were done before are not those read again."""
        if self._folder is None:
            return
        self._read += 1
        self._digest = digest_of({"": self._digest} | _digests(batch))
        if self._read == self.count and self._digest != self._then:
            raise BadInput(
                f"{self._folder} holds a fit whose batches ({self.count}) are not the first ones now; give the same in "
                "the same order (no shuffling), or take another folder"
            )

    def know(self, values: Values) -> None:
        """Put the saved tensors in the place of those of a batch, as far as it has them."""
        for name, value in values.items():
            each = [tensors_of(v) for v in value]
            keys = [[f"{i}/{k}/{name}" for k in range(len(ts))] for i, ts in enumerate(each)]
            if keys and keys[0] and keys[0][0] in self._saved:
                self._values[name] = tuple(
                    _replaced(v, [self._saved.pop(key).to(t) for key, t in zip(ks, ts, strict=True)])
                    for v, ks, ts in zip(value, keys, each, strict=True)
                )

    def add(self, results: Results) -> None:
        """Add the values of one batch, and save."""
        batch = results.batch.read()
        if self.count:
            check_pooled(self._batch, batch, [self._quantity], "loss")
        self.know(results.values_of(0))
        for name, value in results.values_of(0).items():
            new = weighed(value, self._quantity.powers, float(batch.weight))
            new = tuple(_replaced(v, [t.contiguous() for t in tensors_of(v)]) for v in new)  # as they are saved
            old = self._values.get(name)
            self._values[name] = new if old is None else tuple(a + b for a, b in zip(old, new, strict=True))
        self._batch = batch if not self.count else self._batch + batch
        self.count += 1
        if self._folder is not None:
            named = {
                f"{i}/{k}/{name}": t
                for name, value in self._values.items()
                for i, v in enumerate(value)
                for k, t in enumerate(tensors_of(v))
            }
            facts = {"settings": self._settings, "batches": self.count, "samples": self._batch.samples,
                     "terms": self._batch.terms, "digest": self._digest}  # fmt: skip
            write(self._folder, self._name, named | self._saved, facts)

    def finish(self, ranks: Ranks) -> Any:
        """The quantity's result, of the batches of all ranks."""
        if self._folder is not None and self._read < self.count:
            raise BadInput(
                f"{self._folder} holds a fit of more batches ({self.count}) than the loader gave ({self._read}); give "
                "the same, or take another folder"
            )
        if self._saved:
            raise BadInput(f"the batches do not use {sorted({k.split('/', 2)[2] for k in self._saved})}, as before")
        union, values = self._batch, self._values
        self._values = {}
        if ranks.size > 1:
            union = union_of([(1, batch) for batch in ranks.gather(union)], [self._quantity], "loss")
            ranks.agree({"the parameters that the batches use": sorted(values)})
            flat = iter(all_reduced(ranks, [v for name in sorted(values) for v in values[name]]))
            values = {name: tuple(next(flat) for _ in values[name]) for name in sorted(values)}
        for name in list(values):  # one by one, for a factor is as large as its layer
            values[name] = weighed(values.pop(name), self._quantity.powers, 1 / float(union.weight))
        return self._quantity.finish(values, union.union("loss", pooled=True), Context({}))


def _digests(batch: Any, place: str = "batch") -> dict[str, str]:
    """Texts that differ where the tensors do, of nested tuples, lists and mappings, by place."""
    if isinstance(batch, Tensor):
        return {place: f"{batch.dtype} {tuple(batch.shape)} {values_digest(batch)}"}
    each = batch.items() if isinstance(batch, Mapping) else enumerate(batch) if isinstance(batch, (tuple, list)) else ()
    return {key: text for name, part in each for key, text in _digests(part, f"{place}/{name}").items()}


def _replaced(value: Any, tensors: list[Tensor]) -> Any:
    return tensors[0] if isinstance(value, Tensor) else value.replaced(tensors)
