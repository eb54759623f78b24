"""The file formats of the data sets, read into tensors without pickle.

Every reader takes the paths of one data set's files and returns `Arrays`; a file that does not have its
format raises `DataCorrupt`. Checksums are compared before, in `benchmarks/data.py`.
"""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from layerwise.errors import LayerwiseError

__all__ = ["HIGGS_ROWS", "Arrays", "DataCorrupt", "cifar10_binary", "higgs_csv", "idx", "npz", "text"]

HIGGS_ROWS = (100_000, 20_000)  # training and test rows read from the start of the official file


class DataCorrupt(LayerwiseError, ValueError):
    """A data file differs from its published checksum or does not have its format."""


class Arrays(NamedTuple):
    """The two splits of a data set, as described in `benchmarks.data.Dataset`."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def _images(x: np.ndarray) -> Tensor:
    """Pixels 0-255 `[N,C,H,W]` as float32 in [0, 1]."""
    return torch.tensor(x, dtype=torch.float32).contiguous().div_(255)


def _labels(y: np.ndarray) -> Tensor:
    return torch.tensor(y, dtype=torch.int64)


def idx(paths: Sequence[Path]) -> Arrays:
    """Images and labels of the two splits, each a gzipped idx file."""
    x_train, y_train, x_test, y_test = map(_idx_array, paths)
    return Arrays(_images(x_train[:, None]), _labels(y_train), _images(x_test[:, None]), _labels(y_test))


def _idx_array(path: Path) -> np.ndarray:
    """One idx file of bytes: magic 0 0 8 d, then d big-endian sizes of 4 bytes, then the bytes in C order."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError) as error:
        raise DataCorrupt(f"{path} is not a whole gzip file: {error}") from error
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != b"\0\0\x08" or len(content) < start:
        raise DataCorrupt(f"{path} begins with {content[:8]!r}, not like an idx file of bytes (0 0 8)")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    if len(content) - start != np.prod(shape):
        raise DataCorrupt(f"{path} says shape {shape}, but holds {len(content) - start} bytes of data")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def npz(paths: Sequence[Path]) -> Arrays:
    """Arrays `x_train`, `y_train`, `x_test`, `y_test` of one npz file; bytes `[N,H,W,C]` are images."""
    with np.load(paths[0], allow_pickle=False) as held:

        def inputs(key: str) -> Tensor:
            x = held[key]
            return _images(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else torch.tensor(x, dtype=torch.float32)

        return Arrays(inputs("x_train"), _labels(held["y_train"]), inputs("x_test"), _labels(held["y_test"]))


def cifar10_binary(paths: Sequence[Path]) -> Arrays:
    """The official binary archive: records of one label byte and 3·32·32 pixels, channels first."""
    width = 1 + 3 * 32 * 32
    with tarfile.open(paths[0], "r:gz") as archive:

        def records(*names: str) -> tuple[Tensor, Tensor]:
            content = b""
            for name in names:
                try:
                    member = archive.extractfile(f"cifar-10-batches-bin/{name}.bin")
                except KeyError as error:
                    raise DataCorrupt(f"{paths[0]} holds no {name}.bin") from error
                content += member.read() if member is not None else b""
            if not content or len(content) % width:
                raise DataCorrupt(f"{paths[0]}: {len(content)} bytes in {names}, no multiple of {width}")
            rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, width)
            return _images(rows[:, 1:].reshape(-1, 3, 32, 32)), _labels(rows[:, 0])

        train = records(*(f"data_batch_{i}" for i in range(1, 6)))
        return Arrays(*train, *records("test_batch"))


def higgs_csv(paths: Sequence[Path], rows: tuple[int, int] = HIGGS_ROWS) -> Arrays:
    """The first `rows[0]` rows to train and the next `rows[1]` to test; the rest is not decompressed.

    Each line is the label (1 signal, 0 background) and 28 features. This is not the official test split
    (the last 500,000 of 11,000,000 rows), for which 7.5 GB would have to be decompressed.
    """
    train, test = rows
    with gzip.open(paths[0], "rt", encoding="ascii") as stream:
        try:
            table = np.loadtxt(stream, delimiter=",", max_rows=train + test, ndmin=2)
        except ValueError as error:
            raise DataCorrupt(f"{paths[0]} is not a table of numbers: {error}") from error
    if table.shape != (train + test, 29):
        raise DataCorrupt(f"{paths[0]}: a table of shape {table.shape} instead of {(train + test, 29)}")
    x, y = torch.tensor(table[:, 1:], dtype=torch.float32), _labels(table[:, 0])
    return Arrays(x[:train], y[:train], x[train:], y[train:])


def text(paths: Sequence[Path]) -> Arrays:
    """Characters as indices into their sorted set; the first 90 % train. `y` is `x` one character later."""
    with paths[0].open(encoding="ascii", newline="") as stream:
        characters = stream.read()
    index = {character: i for i, character in enumerate(sorted(set(characters)))}
    ids = torch.tensor([index[character] for character in characters])
    cut = len(ids) * 9 // 10
    return Arrays(ids[: cut - 1], ids[1:cut], ids[cut:-1], ids[cut + 1 :])
