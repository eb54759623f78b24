"""The benchmark data: contents against published counts, refusals, downloads from a local server."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import data, formats
from layerwise.errors import LayerwiseError

pooch = pytest.importorskip("pooch", reason="downloads need pooch, from layerwise[bench]")

IMAGES = ("mnist", "fashion_mnist", "cifar10")
needs_folder = pytest.mark.skipif(
    data._folder() is None, reason=f"{data.VARIABLE} is not set; the subsets are described for its folder"
)
loaded = lru_cache(maxsize=1)(data.load)


def counts(y: torch.Tensor) -> list[int]:
    return torch.bincount(y).tolist()


# Contents


@pytest.mark.data("mnist")
def test_mnist() -> None:
    mnist = loaded("mnist")
    assert mnist.x_train.shape == (60_000, 1, 28, 28) and mnist.x_test.shape == (10_000, 1, 28, 28)
    assert counts(mnist.y_train) == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert counts(mnist.y_test) == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist.y_train[:5].tolist() == [5, 0, 4, 1, 9]
    check_moments(mnist.x_train, [0.1307], [0.3081])
    assert not mnist.is_subset


@pytest.mark.data("fashion_mnist")
def test_fashion_mnist() -> None:
    fashion = loaded("fashion_mnist")
    assert fashion.x_train.shape == (60_000, 1, 28, 28) and fashion.x_test.shape == (10_000, 1, 28, 28)
    assert counts(fashion.y_train) == [6000] * 10 and counts(fashion.y_test) == [1000] * 10
    check_moments(fashion.x_train, [0.2860], [0.3530])
    assert not fashion.is_subset


@needs_folder
@pytest.mark.data("cifar10")
def test_cifar10_subset() -> None:
    cifar = loaded("cifar10")
    assert cifar.x_train.shape == (10_000, 3, 32, 32) and cifar.x_test.shape == (2_000, 3, 32, 32)
    assert counts(cifar.y_train) == [1000] * 10 and counts(cifar.y_test) == [200] * 10
    check_moments(cifar.x_train, [0.4918, 0.4830, 0.4478], [0.2475, 0.2439, 0.2622])  # per channel: red first
    assert cifar.classes[cifar.y_train[0]] == "dog"
    assert cifar.is_subset and "1,000 of 5,000" in cifar.subset


@needs_folder
@pytest.mark.data("higgs")
def test_higgs_subset() -> None:
    higgs = loaded("higgs")
    assert higgs.x_train.shape == (20_970, 28) and higgs.x_test.shape == (5_000, 28)
    assert counts(higgs.y_train) == [9_861, 11_109] and counts(higgs.y_test) == [2_315, 2_685]
    assert higgs.x_train.dtype == torch.float32 and higgs.x_train.isfinite().all()
    assert higgs.is_subset and "not the official test split" in higgs.subset


@pytest.mark.data("tinyshakespeare")
def test_tinyshakespeare() -> None:
    text = loaded("tinyshakespeare")
    assert len(text.classes) == 65 and text.x_train.max() == 64 and text.x_train.dtype == torch.int64
    assert len(text.x_train) == 1_003_853 and len(text.x_test) == 111_539  # less one of each 90 %, 10 %
    assert torch.equal(text.x_train[1:], text.y_train[:-1]) and torch.equal(text.x_test[1:], text.y_test[:-1])
    assert "".join(text.classes[i] for i in text.x_train[:14]) == "First Citizen:"
    assert not text.is_subset and text.flat() is text


def check_moments(x: torch.Tensor, mean: list[float], std: list[float]) -> None:
    """Per channel, to the four digits that are published."""
    assert x.dtype == torch.float32 and x.is_contiguous() and x.min() == 0 and x.max() == 1
    x = x.double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.tensor(mean).double(), atol=5e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.tensor(std).double(), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.data(name)) for name in data.NAMES])
def test_splits_fit_together(name: str) -> None:
    held = loaded(name)
    for x, y in ((held.x_train, held.y_train), (held.x_test, held.y_test)):
        assert len(x) == len(y) > 0 and y.dtype == torch.int64
        assert y.min() >= 0 and y.max() < len(held.classes)
    assert held.name == name and held.source
    flat = held.flat()
    assert flat.x_train.shape == (len(held.x_train), held.x_train[0].numel()) or name == "tinyshakespeare"
    assert torch.equal(flat.x_test.flatten(), held.x_test.flatten()) and flat.y_test is held.y_test


# Refusals


def test_unknown_name() -> None:
    for call in (data.load, data.available):
        with pytest.raises(ValueError, match="unknown data set 'mnits'; there are mnist, fashion_mnist"):
            call("mnits")


@pytest.mark.parametrize("name", data.NAMES)
def test_missing_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.VARIABLE, str(tmp_path / "nowhere"))
    assert not data.available(name)
    with pytest.raises(data.DataMissing, match="Set LAYERWISE_DATA") as caught:
        data.load(name)
    assert isinstance(caught.value, LayerwiseError) and isinstance(caught.value, FileNotFoundError)
    assert "nowhere" in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name", data.NAMES)
def test_file_with_another_checksum_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in data.SETS[name].folder.files:
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.path).write_bytes(b"something else")
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    assert data.available(name)  # the files are there; what they hold is seen when they are loaded
    with pytest.raises(data.DataCorrupt, match=hashlib.sha256(b"something else").hexdigest()):
        data.load(name)


@needs_folder
@pytest.mark.data("mnist")
def test_one_changed_byte_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data._folder()
    assert folder is not None
    for file in data.SETS["mnist"].folder.files:
        content = bytearray((folder / file.path).read_bytes())
        if "t10k-labels" in file.path:
            content[len(content) // 2] ^= 1
        (tmp_path / file.path).parent.mkdir(exist_ok=True)
        (tmp_path / file.path).write_bytes(content)
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    with pytest.raises(data.DataCorrupt, match="t10k-labels"):
        data.load("mnist")


# Formats


def idx_file(path: Path, x: np.ndarray) -> Path:
    head = bytes([0, 0, 8, x.ndim]) + np.array(x.shape, dtype=">u4").tobytes()
    path.write_bytes(gzip.compress(head + x.tobytes()))
    return path


def small_mnist(folder: Path) -> list[Path]:
    x, y = np.arange(3 * 28 * 28).reshape(3, 28, 28).astype(np.uint8), np.array([7, 0, 9], dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    return [idx_file(folder / str(i), part) for i, part in enumerate((x, y, x[:2], y[:2]))]


def test_idx(tmp_path: Path) -> None:
    read = formats.idx(small_mnist(tmp_path))
    assert read.y_train.tolist() == [7, 0, 9] and read.x_test.shape == (2, 1, 28, 28)
    assert torch.equal(read.x_train.flatten()[:256] * 255, torch.arange(256.0))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda content: content[:-1], "holds 2351 bytes"),
        (lambda content: content + b"\0", "holds 2353 bytes"),
        (lambda content: b"\0\0\x0d" + content[3:], "not like an idx file"),
        (lambda content: content[:3], "not like an idx file"),
        (lambda content: b"", "not like an idx file"),
    ],
)
def test_idx_of_another_form_is_refused(tmp_path: Path, change: Callable[[bytes], bytes], seen: str) -> None:
    paths = small_mnist(tmp_path)
    paths[0].write_bytes(gzip.compress(change(gzip.decompress(paths[0].read_bytes()))))
    with pytest.raises(data.DataCorrupt, match=seen):
        formats.idx(paths)


def test_idx_cut_short_is_refused(tmp_path: Path) -> None:
    paths = small_mnist(tmp_path)
    paths[0].write_bytes(paths[0].read_bytes()[:-20])
    with pytest.raises(data.DataCorrupt, match="not a whole gzip file"):
        formats.idx(paths)


def cifar_archive(path: Path, records: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in records.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_cifar10_binary(tmp_path: Path) -> None:
    image = np.arange(3072).astype(np.uint8)  # red plane first, each row by row
    records = {f"data_batch_{i}": bytes([i]) + image.tobytes() for i in (5, 1, 2, 3, 4)}
    records["test_batch"] = 2 * (b"\0" + image[::-1].tobytes())
    read = formats.cifar10_binary([cifar_archive(tmp_path / "c.tar.gz", records)])
    assert read.y_train.tolist() == [1, 2, 3, 4, 5] and read.y_test.tolist() == [0, 0]
    assert read.x_test.shape == (2, 3, 32, 32)
    expected = torch.tensor(image.reshape(3, 32, 32), dtype=torch.float32) / 255
    assert torch.equal(read.x_train[4], expected) and torch.equal(read.x_test[1], expected.flip(0, 1, 2))

    records["data_batch_3"] += b"\0"
    with pytest.raises(data.DataCorrupt, match="no multiple of 3073"):
        formats.cifar10_binary([cifar_archive(tmp_path / "c.tar.gz", records)])
    del records["data_batch_3"]
    with pytest.raises(data.DataCorrupt, match=r"holds no data_batch_3\.bin"):
        formats.cifar10_binary([cifar_archive(tmp_path / "c.tar.gz", records)])


def test_higgs_csv(tmp_path: Path, generator: torch.Generator) -> None:
    table = torch.randn(9, 29, generator=generator, dtype=torch.float64)
    table[:, 0] = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0, 1])
    path = tmp_path / "HIGGS.csv.gz"
    lines = "".join(",".join(f"{value:.18e}" for value in row) + "\n" for row in table.tolist())
    path.write_bytes(gzip.compress(lines.encode()))
    read = formats.higgs_csv([path], rows=(5, 3))
    assert read.y_train.tolist() == [1, 0, 0, 1, 1] and read.y_test.tolist() == [0, 1, 0]
    assert torch.equal(read.x_train, table[:5, 1:].float()) and torch.equal(read.x_test, table[5:8, 1:].float())
    with pytest.raises(data.DataCorrupt, match=r"shape \(9, 29\) instead of \(10, 29\)"):
        formats.higgs_csv([path], rows=(5, 5))
    path.write_bytes(gzip.compress(b"1,2\n3,x\n"))
    with pytest.raises(data.DataCorrupt, match="not a table of numbers"):
        formats.higgs_csv([path], rows=(1, 1))


def test_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x_train=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        formats.npz([path])


# Downloads


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """A web server on this machine: its address, what it serves by path, and the paths asked for."""
    held: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = held.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", held, asked
        http.shutdown()
        thread.join()


@pytest.fixture
def served_mnist(
    server: tuple[str, dict[str, bytes], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, bytes], list[str]]:
    """A small MNIST on the server, with LAYERWISE_DATA unset and an empty cache folder."""
    address, held, asked = server
    contents = [path.read_bytes() for path in small_mnist(tmp_path / "made")]
    files = []
    for i, content in enumerate(contents):
        held[f"/{i}.gz"] = content
        files.append(data._File(f"mnist/{i}.gz", hashlib.sha256(content).hexdigest(), f"{address}/{i}.gz"))
    entry = data.SETS["mnist"]
    download = entry.download._replace(files=tuple(files))
    monkeypatch.setitem(data.SETS, "mnist", entry._replace(download=download))
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv(data.VARIABLE, raising=False)
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "127.0.0.1")
    pooch.get_logger().setLevel("ERROR")
    return held, asked


def test_download_once(served_mnist: tuple[dict[str, bytes], list[str]]) -> None:
    _, asked = served_mnist
    assert not data.available("mnist")
    assert not asked, "available() must not download"
    first = data.load("mnist", flat=True)
    assert first.x_train.shape == (3, 784) and "http://127.0.0.1" in first.source
    assert len(asked) == 4
    assert data.available("mnist")
    assert torch.equal(data.load("mnist", flat=True).x_train, first.x_train)
    assert len(asked) == 4, "the second load must come from the cache"


def test_wrong_download_is_refused(served_mnist: tuple[dict[str, bytes], list[str]]) -> None:
    held, _ = served_mnist
    held["/2.gz"] += b"x"
    with pytest.raises(data.DataCorrupt, match=r"/2\.gz of the data set 'mnist'"):
        data.load("mnist")
    assert not data.available("mnist"), "a wrong file must not stay in the cache"


def test_failed_download(served_mnist: tuple[dict[str, bytes], list[str]]) -> None:
    held, _ = served_mnist
    held.clear()
    with pytest.raises(data.DataMissing, match=r"(?s)could not be downloaded .*Set LAYERWISE_DATA"):
        data.load("mnist")


def test_every_download_has_an_address_and_a_checksum() -> None:
    for entry in data.SETS.values():
        for file in entry.download.files:
            assert file.url.startswith("http") and len(bytes.fromhex(file.sha256)) == 32
        for file in entry.folder.files:
            assert len(bytes.fromhex(file.sha256)) == 32
