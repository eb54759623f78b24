"""Data of the examples: MNIST and tinyshakespeare from the folder in LAYERWISE_DATA, else small made-up ones."""

import gzip
import os
from pathlib import Path

import numpy as np
import torch

FOLDER = os.environ.get("LAYERWISE_DATA")


def _missing(what):
    print(f"{what} is not at hand (set LAYERWISE_DATA to a folder with it): this run uses made-up data")


def mnist(rows):
    """Images as rows [N, 784] in [0, 1] and digits, for training (at most so many) and for testing."""
    folder = Path(FOLDER, "mnist") if FOLDER else None
    if folder is None or not folder.is_dir():
        _missing("MNIST")
        g, rows = torch.Generator().manual_seed(0), min(rows, 5000)
        y = torch.randint(10, (rows + 500,), generator=g)
        x = (torch.rand(10, 784, generator=g)[y] + 0.5 * torch.randn(len(y), 784, generator=g)).clamp(0, 1)
        return x[:rows], y[:rows], x[rows:], y[rows:]
    found = []
    for part in ("train", "t10k"):
        for kind, skip in (("images-idx3", 16), ("labels-idx1", 8)):
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz") as stream:
                found.append(torch.from_numpy(np.frombuffer(stream.read(), np.uint8, offset=skip).copy()))
    x, y, x_test, y_test = found
    as_rows = lambda images: images.view(-1, 784).float() / 255
    return as_rows(x)[:rows], y[:rows].long(), as_rows(x_test), y_test.long()


def text():
    """A text as character numbers [T], and its characters."""
    file = Path(FOLDER, "tinyshakespeare", "input.txt") if FOLDER else None
    if file is None or not file.is_file():
        _missing("tinyshakespeare")
        words = "what is done is done and what was said was said no more of this tonight good sir".split()
        g = torch.Generator().manual_seed(0)
        said = " ".join(words[i] for i in torch.randint(len(words), (4000,), generator=g))
    else:
        said = file.read_text()
    characters = sorted(set(said))
    number = {c: i for i, c in enumerate(characters)}
    return torch.tensor([number[c] for c in said]), characters


def batches(*tensors, size):
    """Minibatches in a new order."""
    for index in torch.randperm(len(tensors[0])).split(size):
        yield tuple(t[index] for t in tensors)
