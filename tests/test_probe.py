"""What all benchmarks share: turns, options, files, tables, pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import probe


def test_runs_take_turns_in_alternating_order() -> None:
    said: list[str] = []
    runs = {name: lambda name=name: said.append(name) for name in "abc"}
    assert set(probe.interleaved(runs, repeats=2, warm_up=1)) == set("abc")
    assert "".join(said) == "abc" + "abc" + "cba"
    assert probe.lower_quartile([4.0, 1.0, 3.0, 2.0]) == 2.0 and probe.lower_quartile([5.0]) == 5.0


def test_options_have_the_types_of_their_defaults(tmp_path: Path) -> None:
    made = probe.parser("benchmarks.data", "Of 5 % of all.", repeats=9, seeds=[0], lr=0.1, out=tmp_path, json=None)
    found = probe.parsed(made, [])
    assert vars(found) == {"repeats": 9, "seeds": [0], "lr": 0.1, "out": tmp_path, "json": None}
    found = probe.parsed(made, "--repeats 3 --seeds 1 2 --lr 1e-3 --out a --json b".split())
    assert vars(found) == {"repeats": 3, "seeds": [1, 2], "lr": 1e-3, "out": Path("a"), "json": Path("b")}
    assert made.format_help().startswith("usage: python -m ") and "Of 5 % of all." in made.format_help()


def test_a_result_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    probe.write(path, {"µ": [1, 2.5]})
    assert probe.read(path) == {"µ": [1, 2.5]} and "µ" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        probe.write(path, {"µ": float("nan")}, allow_nan=False)
    with pytest.raises(TypeError):
        probe.write(path, {"µ": object()})
    assert probe.read(path) == {"µ": [1, 2.5]} and list(path.parent.iterdir()) == [path]


def test_tables() -> None:
    assert probe.table(["a", "b"], [["x", 1], ["y", 2.5]]) == "| a | b |\n|---|---:|\n| x | 1 |\n| y | 2.5 |"
    assert probe.table(["a", "b"], [], numbers=False) == "| a | b |\n|---|---|"


@pytest.mark.parametrize("smooth", [False, True])
def test_a_picture_of_few_colours_is_the_picture(smooth: bool, tmp_path: Path) -> None:
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    figure = probe.figure(4, 3)
    axes = figure.subplots()
    for line in range(12):
        axes.plot([0, 1], [line, line**1.2], linewidth=3, alpha=0.5 + 0.04 * line)
    axes.imshow([[0, 1], [2, 3]], extent=(0, 1, 0, 10), aspect="auto", interpolation="bilinear")
    whole, few = tmp_path / "whole.png", tmp_path / "few.png"
    figure.savefig(whole)
    probe.save(figure, few, smooth)
    with image.open(whole) as one, image.open(few) as two:
        assert two.mode == "P" and one.size == two.size == (440, 330)
        one, two = (np.asarray(shown.convert("RGB"), dtype=float) for shown in (one, two))
    assert abs(one - two).max() < 32 and abs(one - two).mean() < 3 and (two[0, 0] == 255).all()
    assert few.stat().st_size < 0.6 * whole.stat().st_size
