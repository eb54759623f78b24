"""The examples run from the command line, are short, and do what they say, on small made-up data."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(
    path.stem for path in FOLDER.glob("*.py") if path.stem != "data" and not path.stem.endswith("_from_scratch")
)
MOST_LINES = 60


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: Any) -> dict[str, Any]:
    """As `python examples/script.py arguments`, where no data set is at hand."""
    monkeypatch.delenv("LAYERWISE_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "data", raising=False)
    try:
        return runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    finally:
        sys.modules.pop("data", None)


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_there_are_seven() -> None:
    """`restart` is run, and killed, in test_distributed_faults; the methods from scratch in test_from_scratch."""
    assert SCRIPTS == [
        "altmin_sign", "altmin_stream", "data_attribution", "kfac_char_gpt", "locoprop_classifier", "noise_scale",
        "restart",
    ]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_they_are_short(script: str) -> None:
    assert len((FOLDER / f"{script}.py").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_locoprop_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "locoprop_classifier", "--rows", 1000, "--epochs", 2, "--batch", 100)
    said = capsys.readouterr().out
    assert "made-up data" in said
    losses, accuracies = numbers(r"loss ([\d.]+)", said), numbers(r"accuracy ([\d.]+)", said)
    assert losses[1] < losses[0] / 2 and accuracies[-1] > 90
    assert "2.weight: matching loss of tanh" in said


def test_altmin_learns_through_signs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "altmin_sign", "--rows", 1000, "--epochs", 2, "--hidden", 50)
    said = capsys.readouterr().out
    assert "below the signs: 0.0" in said
    assert numbers(r"accuracy ([\d.]+)", said)[-1] > 90
    assert min(numbers(r"moved by (\d+) %", said)) > 1


def test_kfac_comes_before_adamw(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "kfac_char_gpt", "--steps", 40)
    with_kfac = numbers(r"loss ([\d.]+)", capsys.readouterr().out)
    assert with_kfac[1] < with_kfac[0] < 3
    run(monkeypatch, "kfac_char_gpt", "--steps", 20, "--plain")
    plain = numbers(r"loss ([\d.]+)", capsys.readouterr().out)
    assert plain[0] != with_kfac[0]  # the same seed: what differs is the preconditioner


def test_the_noise_scale_has_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "noise.html"
    run(monkeypatch, "noise_scale", "--rows", 800, "--epochs", 1, "--batch", 50, "--every", 4, "--page", page)
    said = capsys.readouterr().out
    assert len(numbers(r"noise scale (\d+) samples at a batch of 50", said)) == 2
    assert "noise_scale" in page.read_text(encoding="utf-8")


def test_the_stream_goes_on_bitwise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run(monkeypatch, "altmin_stream", "--minibatches", 6, "--state", whole)
    for count in (2, 4):
        run(monkeypatch, "altmin_stream", "--minibatches", count, "--state", parts)
    said = capsys.readouterr().out
    assert "going on after 2 minibatches" in said and len(set(re.findall(r"([\d,]+) numbers of state", said))) == 1
    a, b = (torch.load(path, weights_only=True) for path in (whole, parts))
    assert a["seen"] == b["seen"] == 6
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_attribution_writes_a_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page, sentence = tmp_path / "page.html", "<b>the text & a"
    run(monkeypatch, "data_attribution", "--steps", 5, "--passages", 40, "--page", page, "--sentence", sentence)
    html = page.read_text(encoding="utf-8")
    assert html.count("<span") == 10 * 32 and "&lt;b&gt;the text &amp; a" in html
    assert set(re.findall(r"</?(\w+)", html)) == {"meta", "title", "h1", "p", "code", "span"}
    scores = numbers(r"<p>([-\d.]+)", html)
    assert scores == sorted(scores, reverse=True) and scores[0] > 0
    assert "the best of 40 passages" in capsys.readouterr().out
