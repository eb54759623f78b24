"""Where records of a run go: memory, JSON lines, TensorBoard, and a page that stands by itself."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.errors import BadInput, LogDamaged
from layerwise.monitor import History, JSONLines, TensorBoard, read
from layerwise.monitor.axes import Axis, axis_for, linear_ticks, log_ticks, number
from layerwise.monitor.page import TITLES, page
from layerwise.monitor.series import Curve, by_measure, thinned

NAN, INF = math.nan, math.inf
ODD = "block<0>.\"q&a\".'weight'"


def same(a: Any, b: Any) -> bool:
    """Equality under which NaN is itself."""
    return repr(a) == repr(b)


def records(count: int = 5) -> list[dict[str, Any]]:
    first = {
        "step": 0,
        "loss": 2.5,
        "noise_scale": INF,
        "noise_scale/0.weight": NAN,
        "left_out/curvature": "Undefined: x",
    }
    return [first, *({"step": 10 * i, "loss": 2.5 / (i + 1), "noise_scale/0.weight": 3.0 * i} for i in range(1, count))]


# -- memory and files -----------------------------------------------------------------------------------------


def test_history_gives_series_rows_and_a_table() -> None:
    history = History(records(3))
    assert len(history) == 3 and history.names == ["loss", "noise_scale", "noise_scale/0.weight"]
    assert history.series("loss") == ([0, 10, 20], [2.5, 1.25, 2.5 / 3])
    assert history.series("noise_scale") == ([0], [INF])
    assert history.left_out == {"curvature": "Undefined: x"}
    assert history.rows()[3:5] == [
        {"step": 10, "measure": "loss", "parameter": "", "value": 1.25},
        {"step": 10, "measure": "noise_scale", "parameter": "0.weight", "value": 3.0},
    ]
    assert history.table().splitlines() == ["step    loss  noise_scale", "   0     2.5          inf",
                                            "  10    1.25             ", "  20  0.8333             "]  # fmt: skip
    assert history.table(["noise_scale/0.weight"]).split()[-1] == "6"
    with pytest.raises(BadInput, match=r"noise_scale/0\.weight"):
        history.series("curvature")


def test_history_goes_back_with_a_resumed_run() -> None:
    history = History(records(5))
    history(20, {"step": 20, "loss": 7.0})
    assert [r["step"] for r in history.records] == [0, 10, 20] and history.records[-1] == {"step": 20, "loss": 7.0}


def test_json_lines_come_back_as_they_were(tmp_path: Path) -> None:
    history, path = History(records()), tmp_path / "run.jsonl"
    history.write(path)
    assert same(read(path).records, history.records)
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("use", [JSONLines, read, History().write, History().html])
def test_what_is_no_regular_file_is_refused(use: Callable[[Any], Any], tmp_path: Path) -> None:
    """A device, which may have no end, a pipe, a folder, and an open file in place of a path."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe, str(pipe)):
        with pytest.raises(BadInput, match="no regular file"):
            use(path)
    if use in (JSONLines, read):  # which change nothing there
        with pytest.raises(BadInput, match="no regular file"):
            use(os.devnull)
    with (tmp_path / "log").open("w") as file, pytest.raises(BadInput, match=r"path of a file.*TextIOWrapper"):
        use(file)
    assert sorted(its.name for its in tmp_path.iterdir()) == ["log", "pipe"]


def test_json_lines_go_on_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "run.jsonl"
    log = JSONLines(path)
    for record in records():
        log(record["step"], record)
    whole = path.read_bytes()
    for cut in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):  # killed while it wrote
        path.write_bytes(whole[:cut])
        assert [r["step"] for r in read(path).records] == [0, 10, 20, 30]
        resumed = JSONLines(path)
        for record in records()[2:]:  # from a checkpoint at step 20
            resumed(record["step"], record)
        assert same(read(path).records, records())
        assert path.read_bytes().endswith(b"}\n") and len(path.read_bytes().splitlines()) == 7


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"loss": 1}', '{"step": "x"}', '{"step": 1, "loss": "much"}', '{"step": 1e999}', "\xff", "[" * 5000],
)
def test_a_broken_line_is_named_and_skipped(line: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 1.0}\n' + line.encode("latin-1") + b'\n{"step": 1}\n')
    with pytest.warns(LogDamaged, match="skipped 1 lines of .*line 2"):
        assert [r["step"] for r in read(path).records] == [0, 1]
    path.write_bytes(line.encode("latin-1") + b"\n")
    with pytest.warns(LogDamaged), pytest.raises(BadInput, match="line 1"):
        read(path)


class _Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> _Full:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        return int(self.file.write(data[: self.room]))


@pytest.mark.parametrize("room", [0, 1, 17])
def test_a_full_disk_costs_its_records_alone(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    log, plain = JSONLines(path), Path.open
    model = nn.Linear(2, 1)
    monitor = lw.monitor.Monitor(model, log, measures=[lw.monitor.loss()], every=1)

    def step() -> None:
        with monitor.step():
            model(torch.ones(3, 2)).square().mean().backward()

    step()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda p, mode="r", *a, **k: (
            _Full(plain(p, mode, *a, **k), room) if mode == "ab" else plain(p, mode, *a, **k)))  # fmt: skip
        with pytest.warns(LogDamaged, match="the log of step 1 failed"):
            step()
        step()  # said once
    step()
    assert monitor.steps == 4 and [r["step"] for r in read(path).records] == [0, 3]


def test_runs_on_one_file_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    one, two = JSONLines(path), JSONLines(path)
    for step in range(5):  # at the same time
        one(step, {"loss": 1.0})
        two(step, {"loss": 2.0})
    with pytest.warns(LogDamaged, match=r"2 runs \(1, 2\)"):
        assert read(path).series("loss") == (list(range(5)), [2.0] * 5)
    assert read(path, run=1).series("loss") == (list(range(5)), [1.0] * 5)
    three = JSONLines(path)
    for step in range(3, 7):  # from a checkpoint of the second
        three(step, {"loss": 3.0})
    with pytest.warns(LogDamaged, match=r"2 runs \(1, 3\)"):
        assert read(path).series("loss") == (list(range(7)), [2.0] * 3 + [3.0] * 4)
    assert len(read(path, run=1)) == 5 and read(path, run=1).names == ["loss"]
    with pytest.raises(BadInput, match="holds the runs 1, 2, 3"):
        read(path, run=4)


@pytest.mark.parametrize("write", [History.write, History.html])
def test_a_file_is_written_whole_or_not(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    write(History(records()), path)
    before = path.read_bytes()

    def full(p: Path, text: str, *a: Any, **k: Any) -> None:
        p.write_bytes(text.encode()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write(History(records()[:2]), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# -- TensorBoard --------------------------------------------------------------------------------------------------


class Writer:
    def __init__(self) -> None:
        self.said: list[tuple[str, str, Any, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.said.append(("scalar", name, value, step))

    def add_text(self, name: str, value: str, step: int) -> None:
        self.said.append(("text", name, value, step))


def test_tensorboard_gets_numbers_and_reasons() -> None:
    log = TensorBoard(writer := Writer())
    for record in records(2):
        log(record["step"], record)
    assert [said[1] for said in writer.said] == [
        "loss", "noise_scale", "noise_scale/0.weight", "left_out/curvature", "loss", "noise_scale/0.weight",
    ]  # fmt: skip
    assert writer.said[0] == ("scalar", "loss", 2.5, 0) and writer.said[-1] == (
        "scalar",
        "noise_scale/0.weight",
        3.0,
        10,
    )
    assert writer.said[3] == ("text", "left_out/curvature", "Undefined: x", 0)


@pytest.mark.filterwarnings("ignore")  # of tensorboard itself
def test_tensorboard_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `monitor` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoard(tmp_path)
    for record in records():
        log(record["step"], record)
    log.writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "noise_scale", "noise_scale/0.weight"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (10 * i, pytest.approx(2.5 / (i + 1))) for i in range(5)
    ]
    assert math.isnan(events.Scalars("noise_scale/0.weight")[0].value)
    assert "left_out/curvature/text_summary" in events.Tags()["tensors"]


def test_a_folder_without_tensorboard_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match=r"layerwise\[monitor\]"):
        TensorBoard(tmp_path)


# -- axes and curves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (0.0125, "0.0125"), (1250.0, "1,250"), (99999.0, "99,999"), (3.2e-7, "3.2e−7"),
     (1e-5, "1e−5"), (-2.5, "−2.5"), (2e6, "2e6"), (NAN, "NaN"), (INF, "∞"), (-INF, "−∞"), (0.1 + 0.2, "0.3")],
)  # fmt: skip
def test_numbers_are_written_as_a_person_would(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.013, 0.0131), (-1, 1), (1e-9, 2e-9), (0, 29990), (-5e5, 7e8), (0, 2), (3, 3.0000001)]
)
def test_linear_ticks_are_few_even_and_on_the_axis(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    room = 1e-9 * (high - low)
    assert 2 <= len(ticks) <= 9 and all(low - room <= t <= high + room for t in ticks)
    gaps = [b - a for a, b in pairwise(ticks)]
    assert max(gaps) - min(gaps) < 1e-6 * max(gaps)
    assert number(gaps[0], 6).replace(",", "").strip("0.")[:1] in set("125")


@pytest.mark.parametrize(("low", "high"), [(0.01, 1), (1, 50), (1e-9, 1e9), (0.4, 0.41), (3e-5, 2.0)])
def test_log_ticks_are_few_and_on_the_axis(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 9 and all(low <= t <= high for t in ticks) and ticks == sorted(set(ticks))


def test_axes_are_logarithmic_where_positive_values_spread() -> None:
    assert axis_for([1, 50], 0, 1).log and not axis_for([1, 15], 0, 1).log
    assert not axis_for([-1, 1, 50], 0, 1).log and not axis_for([1, 50], 0, 1, linear=True).log
    assert not axis_for([0, 0, 1, 50], 0, 1).log and axis_for([0, *[1.0, 50.0] * 10], 0, 1).log
    wide = axis_for([1e-300, 1.0, 2.0], 0, 1)
    assert wide.log and wide.shows(2.0) and not wide.shows(1e-300) and not wide.shows(NAN)
    for values in ([], [3.0], [0.0], [-2.0, -2.0], [1e308, -1e308]):
        axis = axis_for(values, 10, 20)
        assert axis.high > axis.low and all(10 <= axis.at(v) <= 20 for v in values)
    axis = Axis(1, 100, True, 200, 0)
    assert axis.at(1) == 200 and axis.at(10) == pytest.approx(100) and axis.at(100) == 0


def test_thinned_curves_keep_their_extremes_and_gaps() -> None:
    values = [math.sin(i / 50) for i in range(10_000)]
    values[1234], values[4321], values[777], values[778] = 50.0, -50.0, NAN, INF
    curve = Curve(tuple(range(10_000)), tuple(values))
    thin = thinned(curve, 300)
    assert len(thin.steps) <= 302 and list(thin.steps) == sorted(set(thin.steps))
    assert {50.0, -50.0} <= set(thin.values) and any(math.isnan(v) for v in thin.values)
    assert thin.steps[0] == 0 and thin.steps[-1] == 9999
    assert all(same(values[s], v) for s, v in zip(thin.steps, thin.values, strict=True))
    assert thinned(curve, 10_000) is curve


def test_numbers_are_grouped_by_measure() -> None:
    found = by_measure(records(3))
    assert set(found) == {"loss", "noise_scale"} and set(found["noise_scale"]) == {"", "0.weight"}
    assert found["loss"][""] == Curve((0, 10, 20), (2.5, 1.25, 2.5 / 3))


# -- the page -----------------------------------------------------------------------------------------------------

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Elements and text; complains of what is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.measure = ""
        self.curves: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), f"an attribute twice in <{tag}>"
        self.elements.append((tag, given))
        if tag == "figure":
            self.measure = given["data-measure"]
        if "curve" in given.get("class", "").split():
            self.curves.setdefault(self.measure, []).append(given["data-name"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> where {self.open[-1:]} is open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def many(layers: int, steps: int = 12) -> list[dict[str, Any]]:
    """Every measure that has a title and one of a user's, with what no axis shows here and there."""
    odd = {3: NAN, 5: INF, 7: -INF, 9: 0.0}
    found = []
    for i in range(steps):
        record: dict[str, Any] = {"step": 7 * i, **dict.fromkeys(TITLES, 1.0 + i), "my <own>": -float(i)}
        for measure in ("noise_scale", "curvature", "update_size", "update_cosine"):
            for j in range(layers):
                record[f"{measure}/{ODD}{j}"] = odd.get(i + j, 10.0 ** (i % 12 - j % 7))
        found.append(record)
    return found


@pytest.mark.parametrize("layers", [0, 1, 3, 100])
def test_page_is_well_formed_and_shows_every_series(layers: int) -> None:
    held = many(layers)
    seen = Page(page(held, "A <run> & more"))
    assert set(seen.curves) == {*TITLES, "my <own>"}
    names = {f"{ODD}{j}" for j in range(layers)}
    for measure in ("noise_scale", "curvature", "update_size", "update_cosine"):
        assert sorted(seen.curves[measure]) == sorted({"", *names})
    assert all(seen.curves[name] == [""] for name in ("loss", "my <own>"))
    text = "".join(seen.text)
    assert text.count("A <run> & more") == 2 and all(name in text for name in names)
    assert all(title.title in text and title.unit in text for title in TITLES.values())
    chips = [given["data-name"] for tag, given in seen.elements if tag == "button"]
    assert chips == [f"{ODD}{j}" for j in range(layers)]


def test_page_fetches_nothing() -> None:
    text = page(many(3))
    assert "http" not in text and "//" not in re.sub(r"://|</", "", text)
    seen = Page(text)
    assert not [(tag, given) for tag, given in seen.elements if {"src", "href", "srcset", "xlink:href"} & given.keys()]
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in seen.elements}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", text)


def test_names_and_reasons_are_escaped() -> None:
    evil = "<script>alert(1)</script>\" onload='x' &amp;"
    held = [{"step": 0, "loss": 1.0, f"{evil}/{evil}": 2.0, f"left_out/{evil}": f"Undefined: {evil}"}]
    held[0] = {k.replace("</script>", "<b>"): v for k, v in held[0].items()}  # a slash would end a measure's name
    seen = Page(page(held, evil))
    assert [tag for tag, _ in seen.elements].count("script") == 1
    assert not any("onload" in given for _, given in seen.elements)
    assert evil in "".join(seen.text)


def numbers_in(path: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", path)]


@pytest.mark.parametrize("layers", [1, 100])
def test_every_drawn_coordinate_is_inside_the_chart(layers: int) -> None:
    seen = Page(page(many(layers)))
    lines = [given["d"] for tag, given in seen.elements if given.get("class") in ("line", "dot")]
    assert lines and not re.search("nan|inf", "".join(lines))
    for d in lines:
        for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", d):
            assert 0 <= float(x) <= 460 and 0 <= float(y) <= 270


def test_values_that_no_axis_shows_are_marked_and_break_the_line() -> None:
    values = [1.0, NAN, 2.0, INF, 3.0, 4.0, -INF]
    seen = Page(text := page([{"step": i, "loss": v} for i, v in enumerate(values)]))
    marks = [given["class"] for _, given in seen.elements if given.get("class", "").startswith("mark")]
    assert marks == ["mark nan", "mark above", "mark below"]
    (line,) = [given["d"] for _, given in seen.elements if given.get("class") == "line"]
    (dots,) = [given["d"] for _, given in seen.elements if given.get("class") == "dot"]
    assert line.count("M") == 1 and line.count("L") == 1 and dots.count("M") == 2
    assert "Of 7 values: 1 not a number (×), 1 infinite (▲), some below the axis (▼)" in text


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0, 1e-320, 1.7e308, -1.7e308, 1])
def test_a_run_of_one_record_has_a_page(value: float) -> None:
    assert "1 record, step 3, 1 parameter" in "".join(Page(page([{"step": 3, "loss": value, "x/a": value}])).text)


def test_a_run_without_a_record_has_none() -> None:
    with pytest.raises(BadInput, match="without a record"):
        page([])


def test_tables_hold_the_numbers() -> None:
    text = "".join(Page(page(many(2, steps=500))).text)
    assert "Whole model by step, 168 of 500 records" in text
    last = Page(
        page([{"step": 0, "loss": 0.123, "noise_scale/w": 45.6}, {"step": 10, "loss": 0.0789, "noise_scale/w": INF}])
    )
    cells = [t for t in last.text if t.strip()]
    assert {"0.123", "0.0789", "∞"} <= set(cells) and "45.6" not in cells


def test_history_writes_the_page(tmp_path: Path) -> None:
    History(many(2)).html(tmp_path / "run.html", title="Mine")
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == page(History(many(2)).records, "Mine")
