"""A release: the wheel and the sdist hold the whole library, and work where nothing of the checkout is at hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import layerwise

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, without the checkout on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def built(source: Path, kind: str, folder: Path) -> Path:
    """The wheel or sdist of a source tree."""
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder, cwd=source)
    (found,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist alone, as an index would."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return built(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel; torch and the like are read where they are."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    interpreter = folder / "bin" / "python"
    site = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A path file of a path file is not read, so the checkout that is installed there is not at hand.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run(interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return interpreter


@pytest.mark.slow
def test_wheel_holds_all_files_of_the_library_and_no_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("layerwise/")}
    source = ROOT / "src"
    there = {p.relative_to(source).as_posix() for p in (source / "layerwise").rglob("*") if p.is_file()}
    assert packed == {name for name in there if "__pycache__" not in name}


@pytest.mark.slow
def test_wheel_says_its_version_and_what_it_needs(wheel: Path) -> None:
    assert f"-{layerwise.__version__}-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    needs = {line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE) if "extra ==" not in line}
    assert needs == set(PROJECT["dependencies"])


@pytest.mark.slow
def test_installed_wheel_is_not_the_checkout(python: Path, tmp_path: Path) -> None:
    place = run(python, "-c", "import layerwise; print(layerwise.__file__, layerwise.__version__)", cwd=tmp_path)
    assert str(ROOT) not in place and place.split()[-1] == layerwise.__version__


@pytest.mark.slow
def test_installed_wheel_runs_the_demo(python: Path, tmp_path: Path) -> None:
    run(python.with_name("layerwise"), "demo", "--epochs", "2", "--out", tmp_path / "out", cwd=tmp_path)
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"results.json", "curves.png", "layers.png"}


@pytest.mark.slow
def test_installed_wheel_runs_the_readme(python: Path, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL):
        run(python, "-W", "error", "-c", block, cwd=tmp_path)


def test_lock_pins_what_the_wheel_allows() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "requirements" / "lock.txt").read_text().splitlines() if "==" in line
    )
    (torch,) = (need for need in PROJECT["dependencies"] if need.startswith("torch"))
    least = tuple(map(int, torch.removeprefix("torch>=").split(".")))
    assert tuple(map(int, pinned["torch"].split(".")))[: len(least)] >= least
    assert f"torch=={pinned['torch']}" in (ROOT / "Makefile").read_text()


def test_changelog_has_a_section_of_this_version() -> None:
    assert f"## [{layerwise.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
