"""Tensors and facts in a folder: a file of tensors, and a JSON file beside it that is replaced last, in one step."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput

__all__ = ["flushed", "read", "refuse_others", "replaced", "write"]

_FORMAT = 2


def refuse_others(what: str, held: Mapping[str, Any], asked: Mapping[str, Any], then: str) -> None:
    """Raise BadInput, with what differs, where settings that were saved are not those asked for now.

    what: has the settings; then: what to do.
    """
    other = [key for key in {**held, **asked} if held.get(key) != asked.get(key)]
    if other:
        shown = [f"{key}: {_without(held.get(key), asked.get(key))}, now {_without(asked.get(key), held.get(key))}"
                 for key in other]  # fmt: skip
        raise BadInput(f"{what} differs in {'; '.join(shown)}. {then}")


def _without(value: Any, other: Any) -> str:
    """A value in a few words; of a mapping, the entries that another one lacks."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        value = {key: each for key, each in value.items() if other.get(key) != each}
    return reprlib.repr(value)


def write(folder: str | Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Save tensors and facts as `name`, in place of what was saved before.

    The tensors are in safetensors where that is installed, else as torch saves them, in a file named by its SHA-256,
    which the JSON file holds too. A reader, or a kill at any moment, finds the old state or the new one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safe = importlib.util.find_spec("safetensors") is not None
    held = _apart(tensors)
    part = folder / f"{name}.part"
    if safe:
        importlib.import_module("safetensors.torch").save_file(held, part)
    else:
        torch.save(held, part)
    digest = _sha256(part)
    file = folder / f"{name}-{digest[:16]}.{'safetensors' if safe else 'pt'}"
    flushed(part)
    os.replace(part, file)
    versions = {"format": _FORMAT, "torch": torch.__version__}
    document = {"versions": versions, "file": file.name, "sha256": digest, "facts": dict(facts)}
    replaced(folder / f"{name}.json", json.dumps(document, indent=1))
    for old in folder.glob(f"{name}-*"):
        if old != file:
            old.unlink(missing_ok=True)


def read(folder: str | Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write` saved as `name`, or None where nothing was; no pickled code is run.

    Raises BadInput for a file that is damaged, missing, of another format, or outside the folder.
    """
    said = Path(folder) / f"{name}.json"
    if not said.exists():
        return None
    try:
        document = json.loads(said.read_text(encoding="utf-8"))
        version, digest = document["versions"]["format"], document["sha256"]
        file, facts = Path(folder) / Path(document["file"]).name, document["facts"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{said} is no record of saved attribution ({error!r}); save again") from None
    if version != _FORMAT:
        raise BadInput(f"{said} has the format {version}, this version reads {_FORMAT}; save again with this version")
    if not file.exists() or _sha256(file) != digest:
        raise BadInput(f"{file} is missing, or its checksum is not the one in {said.name}; it is damaged: save again")
    if file.suffix == ".safetensors":
        if importlib.util.find_spec("safetensors") is None:
            raise BadInput(
                f"{file} needs the package safetensors: install `layerwise[attribution]`, or save without it"
            )
        return importlib.import_module("safetensors.torch").load_file(file), facts
    return torch.load(file, weights_only=True), facts


def replaced(path: Path, text: str) -> None:
    """Write a text file in one step: whoever reads it finds the old text or the new."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    flushed(part)
    os.replace(part, path)


def flushed(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own, of which a file would otherwise hold what others have."""
    held, seen = {}, set()
    for key, given in tensors.items():
        t = given.detach().cpu().contiguous()
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != t.nbytes:
            t = t.clone()
        seen.add(storage.data_ptr())
        held[key] = t
    return held


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
