"""Accelerators, shown on a pretend one: `device_checks.py` in a process of its own, where the device is registered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import device as device_check

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("file", "mark"),
    [*((name, "not slow") for name in ("checks", "page", "programs")),
     pytest.param("checks", "slow", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_pretend_device(file: str, mark: str) -> None:
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-m", mark, f"tests/device_{file}.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]


def test_the_check_of_a_device_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Cut after each finding, it keeps what it had."""
    found = []
    for _ in range(2):
        assert device_check.main(["--device", "cpu", "--seconds", "0", "--into", str(tmp_path)]) == 0
        found.append(json.loads((tmp_path / "device.json").read_text(encoding="utf-8"))["findings"])
    assert [len(findings) for findings in found] == [1, 2]
    assert found[0].items() <= found[1].items()
    assert all(cell["same"] >= 10 and not cell["differ"] for cell in found[1].values())
    assert "Not asked yet" in (tmp_path / "device.md").read_text(encoding="utf-8")


def test_the_page_of_a_device_is_made_anew_from_complete_findings(tmp_path: Path) -> None:
    device = device_check.device_of("cpu")
    findings = {name: {"same": 1, "differ": {}} if name.startswith("correct/") else 1.5
                for name, _ in device_check.tasks(device)}  # fmt: skip
    findings |= {"cost/mlp/8": {"gradient, s": 0.1, "SquaredNorm": 2.5}}
    known = {"device": device_check.described(device), "state": "Complete.", "findings": findings}
    (tmp_path / "device.json").write_text(json.dumps(known), encoding="utf-8")
    (tmp_path / "device.md").write_text("old", encoding="utf-8")
    assert device_check.main(["--device", "cpu", "--into", str(tmp_path)]) == 0
    page = (tmp_path / "device.md").read_text(encoding="utf-8")
    assert "| cost/mlp/8 SquaredNorm | 2.5 |" in page and "Complete." in page
    assert (tmp_path / "device.png").stat().st_size > 1000


def test_no_device_is_named() -> None:
    """The library asks torch for its accelerator; CUDA has no place of its own."""
    named = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "src").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"['\"]cuda|torch\.cuda\b", line)
    ]
    assert not named
