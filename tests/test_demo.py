"""The demo on a small budget: its files, its numbers, its errors."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the demo's extras are not installed")
pytest.importorskip("matplotlib", reason="the demo's extras are not installed")
pytest.importorskip("rich", reason="the demo's extras are not installed")

from rich.console import Console

from layerwise import __version__, cli, demo
from layerwise.demo import main, screen
from layerwise.demo import methods as table
from layerwise.demo import train as loops
from layerwise.demo.digits import SIZES, autoencoder, digits, reconstruction_loss

METHODS = ["LocoProp-M", "LocoProp-S", "AltMin (Adam)", "RMSProp", "Adam"]
EPOCHS = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main(["demo", "--out", str(out), "--epochs", str(EPOCHS), "--seed", "3"]) == 0
    (out / "said").write_text(said.getvalue(), encoding="utf-8")
    return out


def test_json_has_a_row_per_method_and_epoch(results: Path) -> None:
    held = json.loads((results / "results.json").read_text(encoding="utf-8"))
    assert set(held) == {"header", "rows"}
    assert sorted((row["method"], row["epoch"]) for row in held["rows"]) == sorted(
        (method, epoch) for method in METHODS for epoch in range(EPOCHS + 1)
    )
    for row in held["rows"]:
        assert set(row) == {"method", "epoch", "train_loss", "test_loss", "seconds"}
        assert math.isfinite(row["train_loss"]) and math.isfinite(row["test_loss"]) and row["seconds"] >= 0


def test_header_says_what_the_rows_depend_on(results: Path) -> None:
    head = json.loads((results / "results.json").read_text(encoding="utf-8"))["header"]
    assert head["versions"]["layerwise"] == __version__ and head["versions"]["torch"] == torch.__version__
    assert head["seed"] == 3 and head["epochs"] == EPOCHS and head["machine"]["threads"] >= 1
    assert not head["stopped_early"]
    assert set(head["step_time_relative_to_adam"]) == set(METHODS)
    assert head["step_time_relative_to_adam"]["Adam"] == 1
    assert all(ratio > 0 for ratio in head["step_time_relative_to_adam"].values())
    assert all(head["settings"][name] in head["trials"][name] for name in METHODS)


def test_all_methods_start_alike_and_learn(results: Path) -> None:
    rows = json.loads((results / "results.json").read_text(encoding="utf-8"))["rows"]
    start = {row["train_loss"] for row in rows if row["epoch"] == 0}
    assert len(start) == 1
    for row in rows:
        if row["epoch"] == EPOCHS:
            assert row["train_loss"] < 0.9 * max(start), row


@pytest.mark.parametrize("name", ["curves.png", "layers.png"])
def test_pictures_are_pictures(results: Path, name: str) -> None:
    content = (results / name).read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width >= 1200 and height >= 500 and len(content) > 20_000


def test_a_terminal_gets_a_bar_for_each_method() -> None:
    rows = [loops.Row("Adam", 1, 20.0, 21.0, 0.5), loops.Row("RMSProp", 1, None, None, 0.1, "Error: [/odd] text")]
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    assert list(screen.watched(rows, ["Adam", "RMSProp"], 2, console)) == rows
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Adam" in said and "20.000" in said and "1/2" in said and "Error: [/odd] text" in said


def losses(seed: int, names: list[str]) -> list[tuple[str, int, float | None]]:
    settings = {name: table.CHOSEN[name] for name in names}
    rows = loops.train(digits(seed), settings, seed=seed, epochs=1)
    return sorted((row.method, row.epoch, row.train_loss) for row in rows)


def test_a_seed_gives_the_same_losses_and_another_does_not() -> None:
    assert losses(5, METHODS) == losses(5, METHODS)
    assert losses(5, ["Adam"]) != losses(6, ["Adam"])


def test_what_a_method_does_depends_on_no_other() -> None:
    together = losses(5, METHODS)
    for name in METHODS:
        assert losses(5, [name]) == [row for row in together if row[0] == name]


def test_training_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(11)
    losses(5, METHODS)
    drawn = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(3))


def test_every_image_is_seen_once_an_epoch() -> None:
    x = torch.arange(1440.0)[:, None]
    batches = loops.minibatches(x, 0, 1)
    assert [len(batch) for batch in batches] == [loops.BATCH] * 12
    assert torch.equal(torch.cat(batches).sort(0).values, x)
    assert not torch.equal(torch.cat(batches), torch.cat(loops.minibatches(x, 0, 2)))


def test_problem_is_the_one_described() -> None:
    problem = digits(0)
    assert problem.x_train.shape == (1440, 64) and problem.x_test.shape == (357, 64)
    assert problem.x_train.min() == 0 and problem.x_train.max() == 1
    both = torch.cat([problem.x_train, problem.x_test])
    other = torch.cat([digits(1).x_train, digits(1).x_test])
    assert torch.equal(both.sum(1).sort().values, other.sum(1).sort().values)
    model = autoencoder(0)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert shapes == [(o, i) for i, o in pairwise(SIZES)]
    x = problem.x_train[:7].double()
    p = torch.sigmoid(model.double()(x))
    by_hand = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 7
    torch.testing.assert_close(reconstruction_loss(model, x), by_hand, rtol=1e-12, atol=0)


def test_the_floor_is_the_loss_of_a_perfect_model() -> None:
    problem = digits(0)
    x = problem.x_train.double().clamp(1e-12, 1 - 1e-12)
    sure = torch.nn.functional.binary_cross_entropy_with_logits  # logits that say exactly what each pixel is
    best = sure(torch.logit(x), problem.x_train.double(), reduction="sum") / len(x)
    assert problem.floor_train == pytest.approx(float(best), rel=1e-9)


class Fails(torch.optim.SGD):
    """Fails in its third step; or makes every weight infinite."""

    def __init__(self, model: torch.nn.Module, how: str) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.how, self.steps = how, 0

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        self.steps += 1
        if self.steps == 3 and self.how == "raise":
            raise RuntimeError("third step")
        if self.how == "diverge":
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.fill_(math.inf)


@pytest.mark.parametrize(("how", "says"), [("raise", "RuntimeError: third step"), ("diverge", "loss is nan")])
def test_a_method_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, how: str, says: str) -> None:
    monkeypatch.setitem(table.METHODS, "RMSProp", table.Method(lambda model: Fails(model, how)))
    settings: dict[str, table.Settings] = {"RMSProp": {}, "Adam": {"lr": 1e-3}}
    rows = list(loops.train(digits(0), settings, seed=0, epochs=2))
    failing = [row for row in rows if row.method == "RMSProp"]
    assert [row.epoch for row in failing] == [0, 1]
    assert says in (failing[-1].error or "") and failing[-1].train_loss is None
    assert len([row for row in rows if row.method == "Adam"]) == 3


def test_a_failure_is_told_and_the_rest_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(table.METHODS, "RMSProp", table.Method(lambda model: Fails(model, "raise")))
    monkeypatch.setattr(main, "CHOSEN", {"LocoProp-M": {}, "RMSProp": {}, "Adam": table.CHOSEN["Adam"]})
    assert cli.main(["demo", "--out", str(tmp_path), "--seconds-limit", "1e-6"]) == 1
    held = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert held["header"]["stopped_early"] and {row["epoch"] for row in held["rows"]} == {0, 1}
    assert {row["method"] for row in held["rows"] if "error" in row} == {"RMSProp"}
    assert held["header"]["step_time_relative_to_adam"]["RMSProp"] is None
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "layers.png").is_file()
    said = capsys.readouterr().out
    assert "RuntimeError: third step" in said and "--seconds-limit" in said


def test_seconds_limit_stops_all_after_the_same_epoch() -> None:
    settings = {name: table.CHOSEN[name] for name in METHODS}
    rows = loops.train(digits(0), settings, seed=0, epochs=9, seconds_limit=1e-6)
    assert sorted((row.method, row.epoch) for row in rows) == sorted((m, e) for m in METHODS for e in (0, 1))


def test_output_without_a_terminal_is_plain_and_short(results: Path) -> None:
    said = (results / "said").read_text(encoding="utf-8")
    assert "\x1b" not in said and "\r" not in said and len(said.splitlines()) < 40
    assert all(method in said for method in METHODS)
    assert said.rstrip().splitlines()[-1].startswith("wrote ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "command"),
        (["dema"], "dema"),
        (["demo", "--epochs", "0"], "at least 1"),
        (["demo", "--epochs", "many"], "whole number"),
        (["demo", "--seed", "-1"], "from 0"),
        (["demo", "--seconds-limit", "nan"], "positive"),
        (["demo", "--seconds-limit", "0"], "positive"),
        (["demo", "--bars"], "--bars"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    seen = capsys.readouterr()
    assert left.value.code == 2 and not seen.out
    assert says in seen.err and len(seen.err.splitlines()) == 1


def test_a_file_in_the_way_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "taken")]) == 2
    seen = capsys.readouterr()
    assert "taken" in seen.err and len(seen.err.splitlines()) == 1 and not seen.out


def test_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert cli.main(["demo", "--out", str(tmp_path / "new")]) == 2
    seen = capsys.readouterr()
    assert "matplotlib" in seen.err and "pip install 'layerwise[demo]'" in seen.err
    assert len(seen.err.splitlines()) == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flag", "pattern"),
    [("--version", rf"layerwise {re.escape(__version__)}\n"), ("--help", r"(?s)usage.*demo.*")],
)
def test_version_and_help(flag: str, pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([flag])
    assert left.value.code == 0 and re.fullmatch(pattern, capsys.readouterr().out)


def test_interrupted_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_importing_the_library_needs_no_extra() -> None:
    code = (
        "import sys, layerwise, layerwise.cli; "
        "print([m for m in ('sklearn', 'matplotlib', 'rich', 'pooch') if m in sys.modules])"
    )
    source = str(Path(demo.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {source!r}); {code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_baselines_get_at_least_as_many_trials_as_ours() -> None:
    assert set(table.METHODS) == set(table.TRIALS) == set(table.CHOSEN) == set(METHODS)
    counts = {method: len(table.TRIALS[method]) for method in METHODS}
    assert counts["Adam"] == counts["RMSProp"] == max(counts.values())
    assert all(table.CHOSEN[method] in table.TRIALS[method] for method in METHODS)


def test_chosen_settings_are_the_winners_of_the_kept_trials() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "tune_demo.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    assert held["epochs"] == demo.EPOCHS and 0 not in held["seeds"]
    for method in METHODS:
        trials = [line for line in held["trials"] if line["method"] == method]
        assert [line["settings"] for line in trials] == table.TRIALS[method]
        best = min(trials, key=lambda line: math.inf if line["train_loss"] is None else line["train_loss"])
        assert best["settings"] == table.CHOSEN[method]
