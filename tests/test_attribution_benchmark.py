"""The linear datamodeling score, and a run that goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import probe
from benchmarks.papers import attribution
from benchmarks.speed import attribution as speed


def test_the_score_is_the_rank_correlation_of_sums_with_losses() -> None:
    torch.manual_seed(0)
    scores, halves = torch.randn(3, 12), attribution.halves(12, 8)
    sums = torch.stack([scores[:, rows].sum(1) for rows in halves])
    assert all(len(set(rows.tolist())) == 6 for rows in halves)
    assert attribution.datamodeling(scores, (-sums).exp(), halves)[0] == pytest.approx(1)
    assert attribution.datamodeling(scores, sums, halves)[0] == pytest.approx(-1)
    losses = torch.randn(8, 3)
    want = 0.0
    for q in range(3):
        a = [sorted((-sums[:, q]).tolist()).index(v) for v in (-sums[:, q]).tolist()]
        b = [sorted(losses[:, q].tolist()).index(v) for v in losses[:, q].tolist()]
        want += (1 - 6 * sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) / (8 * 63)) / 3
    assert attribution.datamodeling(scores, losses, halves)[0] == pytest.approx(want)


def test_the_speed_benchmark_runs_its_arms_and_its_index_on_a_small_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.NETS, "gpt-2m", speed.NETS["tiny"])
    monkeypatch.setattr(speed, "PEERS", {})
    runs = speed.ours(speed.subject("tiny", 8, 16))
    runs["fit"]()
    assert runs["scores"]().shape == runs["products"]().shape == (speed.QUERIES, 8)
    found = speed.index(50)
    assert found["samples"] == 50 and found["numbers a row"] == 4 * 16 and found["query, ms"] > 0


def test_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(44, 196), torch.arange(44) % 10
    monkeypatch.setattr(attribution, "digits", lambda samples, queries: (x[:40], y[:40], x[40:], y[40:]))
    monkeypatch.setattr(attribution, "EPOCHS", 4)
    monkeypatch.setattr(attribution, "RANKS", (2,))
    calls = []
    kept = attribution.trained

    def counted(x: Any, y: Any, seed: int, stop: list[int] = [4]) -> Any:  # noqa: B006
        calls.append(len(x))
        stop[0] -= 1
        if not stop[0]:
            raise KeyboardInterrupt
        return kept(x, y, seed)

    monkeypatch.setattr(attribution, "trained", counted)
    out = tmp_path / "scores.json"
    options = ["--subsets", "3", "--seeds", "0", "1", "--samples", "40", "--queries", "4", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        attribution.main(options)
    assert len(probe.read(out)["losses"]) == 3
    calls.clear()
    assert attribution.main(options) == 0
    assert calls == [20, 20, 20, 40, 40]  # three that were left, and one of all data for each seed
    assert "| tracin |" in capsys.readouterr().out
    assert set(probe.read(out)["scores"]) == {*attribution.CURVATURES, "tracin", "similarity", "random"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="other settings"):
        attribution.main(["--subsets", "2", "--out", str(out)])
