"""Checkpoints from which a run resumes, on the same or another number of processes.

Uses `torch.distributed.checkpoint`: each rank writes its own tensors under parameter names, and reads what it needs.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerwise.distributed.documents import (
    document,
    flat,
    nested,
    put_into_model,
    put_into_optimizer,
    restore_random,
    template,
)
from layerwise.errors import BadInput, CutShort
from layerwise.ranks.group import Ranks
from layerwise.tape.uses import named_parameters_of

__all__ = ["Loaded", "load", "save"]

Model = nn.Module | Mapping[str, Tensor]


class Loaded(NamedTuple):
    """The result of `load`: the number of finished steps (0: no checkpoint was found), and `extra`."""

    step: int
    extra: Any = None


def save(
    folder: str | os.PathLike[str],
    step: int,
    model: Model,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Any = None,
    keep: int = 2,
    group: Any = None,
) -> Path:
    """Write a checkpoint: model, optimizer, random states of all ranks, the step, and `extra`; returns its folder.

        start = lw.distributed.load("run", model, opt)
        for step in range(start.step, 1000):
            opt.step(closure)
            if (step + 1) % 100 == 0:
                lw.distributed.save("run", step + 1, model, opt)

    Everything is stored under parameter names, so that another number of ranks, or one process, can load it. Each rank
    writes its own part: shards (DTensors), the local optimizers of the layers that it owns, its stage of a model.
    A collective: all ranks of the group call it, with a folder that all can access. A checkpoint gets its final name
    only when complete, so an interrupted `save` leaves the previous one intact. keep: how many of the newest to keep.
    extra: further state of the run, picklable and the same on all ranks (that of a scheduler or a sampler).
    Raises BadInput for an invalid step or number to keep, RankLost where a rank is gone.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save as write

    if not (isinstance(step, int) and step >= 0 and isinstance(keep, int) and keep >= 1):
        raise BadInput(f"save needs a whole step ≥ 0 and keep ≥ 1; got step={step!r}, keep={keep!r}")
    ranks = Ranks(group)
    ranks.doing = f"saving step {step}"
    final = Path(folder) / f"step-{step:09d}"
    part = final.with_name(f".{final.name}.part")
    if ranks.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    ranks.gather(None)
    content = flat(document(model, optimizer, step, extra, ranks.rank))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    alone = not (dist.is_available() and dist.is_initialized())
    with _no_single_process_warning():
        write(content, checkpoint_id=part, planner=planner, process_group=group, no_dist=alone)
    ranks.gather(None)
    if ranks.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        _sync(final.parent)
        for old in _found(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    ranks.gather(None)
    return final


def load(
    folder: str | os.PathLike[str], model: Model, optimizer: torch.optim.Optimizer | None = None, *, group: Any = None
) -> Loaded:
    """Resume from the newest checkpoint of a folder that all ranks can read; returns `Loaded(0)` if there is none.

    Restores model, optimizer and random states. If there are more ranks than at the time of saving, additional ranks
    get the random states that all ranks had in common, or else keep their own. An unreadable checkpoint is skipped with
    a `CutShort` warning. Raises BadInput where none can be read, or for a checkpoint of another model.
    """
    ranks = Ranks(group)
    ranks.doing = "loading a checkpoint"
    paths = ranks.gather([str(path) for path in _found(folder)])[0]
    for path in paths:
        content, why = _read(Path(path), model, optimizer)
        whys = [said for said in ranks.gather(why) if said is not None]
        if content is None or whys:
            warnings.warn(f"the checkpoint {path} cannot be read ({whys[0]}); the one before is", CutShort, 2)
            continue
        put_into_model(model, content["model"])
        if optimizer is not None:
            put_into_optimizer(optimizer, model, content.get("optimizer"))
        restore_random(content["random"], ranks.rank)
        return Loaded(content["step"], content["extra"][0])
    if paths:
        raise BadInput(f"none of the {len(paths)} checkpoints in {os.fspath(folder)} can be read")
    return Loaded(0)


def _found(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders of complete checkpoints, the newest first."""
    return sorted(Path(folder).glob("step-*"), reverse=True)


def _read(
    path: Path, model: Model, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Any] | None, str | None]:
    """This rank's part of a checkpoint and None, or None and the reason why it cannot be read."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as read

    try:
        reader = FileSystemReader(path)
        known = reader.read_metadata().state_dict_metadata
        sizes = {
            key: (tuple(entry.size), entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
            for key, entry in known.items()
        }
        wanted = template(sizes, model, _names(model))
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _no_single_process_warning():
            read(wanted, storage_reader=reader, planner=planner, no_dist=True)
    except BadInput:
        raise
    except (Exception, CheckpointException) as error:
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return nested(wanted), None


def _names(model: Model) -> Iterable[str]:
    return named_parameters_of(model)


@contextmanager
def _no_single_process_warning() -> Iterator[None]:
    """Silence torch's warning about loading in a single process: each rank reads for itself on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _sync(folder: Path) -> None:
    """Flush a folder to disk, so that a rename inside survives a power cut, where the system supports it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
