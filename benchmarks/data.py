"""Real data for the benchmarks: one `load(name)` for five data sets, checked and without pickle.

`LAYERWISE_DATA` names a folder that already holds the files (`mnist/`, `fashion_mnist/`, `cifar10/`,
`higgs/`, `tinyshakespeare/`); it is never written to, and what it lacks is not fetched behind its back. Where
the variable is not set, `pooch` downloads on first use into its cache folder. Every file is compared with its
SHA-256 either way.

The folder holds subsets of CIFAR-10 (10,000 + 2,000 images) and HIGGS (20,970 + 5,000 rows, some of them
rounded to 3 digits); the downloads give all of CIFAR-10, and other rows of HIGGS. Figures from the two cannot
be compared: `Dataset.subset` says which rows were loaded ("" for a whole data set) and belongs beside every
reported figure.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks import formats
from benchmarks.formats import DataCorrupt
from layerwise.errors import LayerwiseError

__all__ = ["NAMES", "DataCorrupt", "DataMissing", "Dataset", "available", "load"]

VARIABLE = "LAYERWISE_DATA"


class DataMissing(LayerwiseError, FileNotFoundError):
    """A data set is neither in the folder that LAYERWISE_DATA names nor can it be downloaded."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    x_train, x_test: images `[N,C,H,W]` float32 in [0, 1]; HIGGS `[N,28]` float32, as published, not
        normalised; text `[T]` int64, indices into `classes`.
    y_train, y_test: int64 `[N]`, the class; for text `[T]`, the character after the one in `x`.
    name, source: the data set, and where its files came from.
    subset: which rows of the published data set these are; "" for all of them.
    classes: the names of the classes in the order of their numbers; for text the characters.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    source: str
    subset: str
    classes: tuple[str, ...]

    @property
    def is_subset(self) -> bool:
        """Whether rows of the published data set are left out."""
        return bool(self.subset)

    def flat(self) -> Dataset:
        """The same data with each sample's input as one row, `[N, C·H·W]`; text is left as it is."""
        if self.x_train.dim() < 2:
            return self
        return replace(self, x_train=self.x_train.flatten(1), x_test=self.x_test.flatten(1))


class _File(NamedTuple):
    path: str  # below the folder
    sha256: str
    url: str = ""


class _Source(NamedTuple):
    files: tuple[_File, ...]
    read: Callable[[Sequence[Path]], formats.Arrays]
    subset: str = ""


class _Entry(NamedTuple):
    classes: tuple[str, ...]
    folder: _Source
    download: _Source


def load(name: str, *, flat: bool = False) -> Dataset:
    """Load the data set `name` (one of `NAMES`), downloading it only where LAYERWISE_DATA is not set.

    flat: give each sample's input as one row.
    Raises `DataMissing` where a file is not at hand and cannot be fetched, `DataCorrupt` where a file differs
    from its checksum, and `ValueError` for an unknown name.
    """
    entry, folder = _entry(name), _folder()
    if folder is None:
        source, origin = entry.download, ", ".join(file.url for file in entry.download.files)
        paths = _fetch(name, source.files)
    else:
        source, origin = entry.folder, ", ".join(f"${VARIABLE}/{file.path}" for file in entry.folder.files)
        paths = _find(name, folder, source.files)
    data = Dataset(name, *source.read(paths), source=origin, subset=source.subset, classes=entry.classes)
    return data.flat() if flat else data


def available(name: str) -> bool:
    """Whether `load(name)` finds its files without a download; looks for them only, and never downloads."""
    entry, folder = _entry(name), _folder()
    if folder is not None:
        return all((folder / file.path).is_file() for file in entry.folder.files)
    try:
        cache = cache_folder()
    except ImportError:
        return False
    return all((cache / file.path).is_file() for file in entry.download.files)


def cache_folder() -> Path:
    """The folder that downloads are kept in: pooch's own for this user and project."""
    import pooch

    return Path(pooch.os_cache("layerwise"))


def _entry(name: str) -> _Entry:
    if name not in SETS:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(SETS)}")
    return SETS[name]


def _folder() -> Path | None:
    value = os.environ.get(VARIABLE)
    return Path(value).expanduser() if value else None


def _find(name: str, folder: Path, files: Sequence[_File]) -> list[Path]:
    paths = [folder / file.path for file in files]
    for path in paths:
        if not path.is_file():
            raise DataMissing(
                f"the data set {name!r} was looked for in {folder}, which {VARIABLE} names, but there is no "
                f"{path.relative_to(folder)}. Set {VARIABLE} to a folder that holds it, or unset {VARIABLE} "
                "to download the data set on first use."
            )
    for path, file in zip(paths, files, strict=True):
        with path.open("rb") as stream:
            seen = hashlib.file_digest(stream, "sha256").hexdigest()
        if seen != file.sha256:
            raise DataCorrupt(
                f"{path} of the data set {name!r} has SHA-256 {seen}, but {file.sha256} was expected. "
                f"Replace the file, or unset {VARIABLE} to download the data set."
            )
    return paths


def _fetch(name: str, files: Sequence[_File]) -> list[Path]:
    try:
        import pooch
    except ImportError as error:
        raise DataMissing(
            f"the data set {name!r} would have to be downloaded, which needs pooch: "
            f"pip install 'layerwise[bench]', or set {VARIABLE} to a folder that holds the data set."
        ) from error
    cache = pooch.create(
        path=cache_folder(),
        base_url="",
        registry={file.path: f"sha256:{file.sha256}" for file in files},
        urls={file.path: file.url for file in files},
    )
    paths = []
    for file in files:
        try:
            paths.append(Path(cache.fetch(file.path)))
        except OSError as error:  # no network or host, refused, disk full; the errors of requests are OSErrors
            raise DataMissing(
                f"the data set {name!r} could not be downloaded from {file.url} ({error}). "
                f"Set {VARIABLE} to a folder that holds it, or try again with a network."
            ) from error
        except ValueError as error:  # pooch keeps no file whose hash differs
            raise DataCorrupt(
                f"{file.url} of the data set {name!r} does not have SHA-256 {file.sha256}: {error}"
            ) from error
    return paths


def _idx(name: str, host: str, sums: Sequence[str]) -> _Source:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    names = (f"{part}-ubyte.gz" for part in parts)
    files = (_File(f"{name}/{file}", sha, f"{host}/{file}") for file, sha in zip(names, sums, strict=True))
    return _Source(tuple(files), formats.idx)


def _one(
    read: Callable[[Sequence[Path]], formats.Arrays], path: str, sha256: str, url: str = "", subset: str = ""
) -> _Source:
    return _Source((_File(path, sha256, url),), read, subset)


_MNIST = _idx(
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)
_FASHION_MNIST = _idx(
    "fashion_mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",  # the authors' bucket; it has no https
    (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
)
_CIFAR10_SUBSET = _one(
    formats.npz,
    "cifar10/cifar10_subset.npz",
    "05a533667248041747d96edcab17dcecafcafb623663e41dd96d557422fa50e9",
    subset="1,000 of 5,000 training and 200 of 1,000 test images a class, in an order of their own",
)
_CIFAR10 = _one(
    formats.cifar10_binary,
    "cifar10/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
)
_HIGGS_SUBSET = _one(
    formats.npz,
    "higgs/higgs_subset.npz",
    "d268a43f9a59a92b6979da63cf2738b9a2b030cc5f51801fd6c04ff26110670b",
    subset="20,970 training and 5,000 test rows of 11,000,000, 9,993 training rows rounded to 3 digits, "
    "the rounded ones last; not the official test split",
)
_HIGGS = _one(
    formats.higgs_csv,
    "higgs/HIGGS.csv.gz",
    "ea302c18164d4e3d916a1e2e83a9a8d07069fa6ebc7771e4c0540d54e593b698",
    "https://archive.ics.uci.edu/ml/machine-learning-databases/00280/HIGGS.csv.gz",
    subset="the first {:,} of 11,000,000 rows to train and the next {:,} to test; not the official test split".format(
        *formats.HIGGS_ROWS
    ),
)
_TINYSHAKESPEARE = _one(
    formats.text,
    "tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
)

_CLOTHES = "T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot"
_OBJECTS = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
_CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

SETS: dict[str, _Entry] = {
    "mnist": _Entry(tuple("0123456789"), _MNIST, _MNIST),
    "fashion_mnist": _Entry(tuple(_CLOTHES.split(",")), _FASHION_MNIST, _FASHION_MNIST),
    "cifar10": _Entry(tuple(_OBJECTS.split(",")), _CIFAR10_SUBSET, _CIFAR10),
    "higgs": _Entry(("background", "signal"), _HIGGS_SUBSET, _HIGGS),
    "tinyshakespeare": _Entry(tuple(_CHARACTERS), _TINYSHAKESPEARE, _TINYSHAKESPEARE),
}
NAMES = tuple(SETS)
