"""The comparison of costs: cells are resumed, missing libraries named, values compared, figures judged rightly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed.overhead import __main__ as command
from benchmarks.speed.overhead import bounds, contenders, measure, memory, report, taken_apart
from benchmarks.speed.overhead.contenders import Program
from benchmarks.speed.overhead.nets import NETS, Net
from benchmarks.speed.overhead.quantities import QUANTITIES


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MLP's place is taken by a tiny one, and thread settings and warnings are left alone."""
    net = Net("tiny", lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4)),
              lambda n: (torch.randn(n, 3), torch.randint(4, (n,))), 5)  # fmt: skip
    monkeypatch.setitem(NETS, "mlp", net)
    monkeypatch.setattr(command, "quiet", lambda: None)


def run(path: Path, *more: str) -> dict:
    command.main(["--models", "mlp", "--repeats", "1", "--no-memory", "--json", str(path), "--peers", "vmap", *more])
    return json.loads(path.read_text(encoding="utf-8"))


def test_values_agree_and_every_quantity_of_ours_is_measured(tmp_path: Path) -> None:
    cells = run(tmp_path / "o.json")["cells"]
    measured = {key.partition("/")[2] for key in cells}
    assert measured == {key for key, row in QUANTITIES.items() if "mlp" in row.nets}
    for quantity in ("per-sample gradient", "norms", "second moment", "variance", "pairwise dots"):
        theirs = cells[f"mlp/{quantity}"]["contenders"]["vmap"]
        assert theirs["values differ by"] < 1e-5 and theirs["ratio"] > 0
    work = cells["mlp/per-sample gradient"]["work"]
    assert work["plain multiply-adds"] == 5 * (2 * (3 * 2 + 2 * 4) + 2 * 4), "forward, weights, and the inner input"
    assert work["result bytes"] == 5 * (3 * 2 + 2 + 2 * 4 + 4) * 4
    assert cells["mlp/second moment"]["work"]["multiply-adds"] - work["plain multiply-adds"] == 5 * (3 * 2 + 2 * 4)
    assert set(cells["mlp/six reduced first-order"]["parts"]) >= {"SquaredNorm", "FisherDiag"}
    text = (tmp_path / "o.md").read_text(encoding="utf-8")
    assert "| mlp | norms |" in text and (tmp_path / "o.png").stat().st_size > 1000


def test_a_second_run_measures_only_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o.json"
    first = run(path, "--quantities", "norms")["cells"]["mlp/norms"]
    measured: list[str] = []
    real = measure.cell

    def counted(net: str, quantity: str, *rest: object) -> dict:
        measured.append(quantity)
        return real(net, quantity, *rest)

    monkeypatch.setattr(command, "cell", counted)
    cells = run(path, "--quantities", "norms", "variance")["cells"]
    assert measured == ["variance"] and cells["mlp/norms"] == first
    run(path, "--quantities", "norms", "--repeats", "2")
    assert measured == ["variance", "norms"], "more repeats were asked for than there are"
    run(path, "--quantities", "norms", "--fresh")
    assert measured == ["variance", "norms", "norms"]


def test_memory_is_measured_again_where_the_way_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "o.json", []
    before = run(path, "--quantities", "norms", "variance")

    def peaks(net: str, quantity: str, names: list[str]) -> dict[str, float]:
        asked.append((net, quantity, tuple(names)))
        return dict.fromkeys(["plain", *names], 1e6)

    monkeypatch.setattr(memory, "peaks", peaks)
    after = run(path, "--memory", "--quantities", "norms")
    assert asked == [("mlp", "norms", ("ours", "vmap"))] and after["header"] == before["header"]
    assert after["cells"]["mlp/variance"] == before["cells"]["mlp/variance"]
    changed = after["cells"]["mlp/norms"]
    assert changed["peak bytes"]["vmap"] == 1e6 and changed["memory"] == memory.METHOD
    assert changed["contenders"] == before["cells"]["mlp/norms"]["contenders"], "times stay"
    run(path, "--memory")
    assert [quantity for _, quantity, _ in asked] == ["norms", "variance"], "what was measured in this way stays"
    monkeypatch.setattr(memory, "METHOD", "another way")
    run(path, "--memory")
    assert len(asked) == 4


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    absent = contenders.CONTENDERS["opacus"]._replace(module="no_such_module")
    monkeypatch.setitem(contenders.CONTENDERS, "opacus", absent)
    found = run(tmp_path / "o.json", "--quantities", "norms", "--peers", "opacus")
    assert "missing" in found["cells"]["mlp/norms"]["contenders"]["opacus"]
    assert found["header"]["versions"]["opacus"] is None
    assert "Opacus is missing" in capsys.readouterr().out
    assert "Opacus missing: opacus is not installed" in (tmp_path / "o.md").read_text(encoding="utf-8")


def test_differences_are_relative_and_rounding_of_zeros_is_none() -> None:
    ours = {"a": torch.tensor([1.0, 100.0]), "b": torch.tensor([1e-9])}
    assert measure.difference(ours, {"a": torch.tensor([2.0, 100.0])}) == pytest.approx(0.01)
    assert measure.difference(ours, {"b": torch.tensor([2e-9])}) < 1e-6
    assert measure.difference(ours, {"a": ours["a"] * 2, "b": ours["b"]}) == pytest.approx(1)


def test_values_of_another_shape_are_said_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def positions_as_samples(quantity: str, problem: object) -> Program:
        return Program(lambda: {"0.bias": torch.zeros(9, 2)}, lambda result: result)

    other = contenders.CONTENDERS["asdl"]._replace(module=None, program=positions_as_samples)
    monkeypatch.setitem(contenders.CONTENDERS, "asdl", other)
    found = run(tmp_path / "o.json", "--quantities", "per-sample gradient", "--peers", "asdl")
    said = found["cells"]["mlp/per-sample gradient"]["contenders"]["asdl"]
    assert said == {"fails": "gives 0.bias the shape (9, 2), not (5, 2)"}


def test_the_gradient_as_a_sum_of_rows_is_a_contender(tmp_path: Path) -> None:
    cells = run(tmp_path / "o.json", "--quantities", "second moment", "pairwise dots", "--peers", "rows")["cells"]
    assert cells["mlp/second moment"]["contenders"]["rows"]["ratio"] > 0
    assert cells["mlp/second moment"]["contenders"]["rows"]["values differ by"] < 1e-5
    assert "unsupported" in cells["mlp/pairwise dots"]["contenders"]["rows"]


def test_judgements() -> None:
    def cell(**ratios: float) -> dict:
        return {"contenders": {name: {"ratio": ratio} for name, ratio in ratios.items()}}

    assert report.slower(cell(ours=1.5, backpack=1.3)) and not report.slower(cell(ours=1.5, backpack=1.4))
    assert report.share(cell(ours=1.5, backpack=3.0)) == pytest.approx(0.25)
    assert not report.slower(cell(ours=1.5, rows=1.35, vmap=1.3)), "the faster of our two ways counts"
    assert report.best_peer(cell(ours=1.5, rows=1.1, vmap=1.3)) == ("vmap", 1.3), "and neither is a peer"
    partial = cell(ours=1.5, vmap=1.1)
    partial["contenders"]["vmap"]["leaves out"] = ["bias"]
    assert report.best_peer(partial) is None and not report.slower(partial)


@pytest.mark.skipif(not memory.available(), reason="no high-water mark that can be reset")
def test_peak_memory_sees_what_is_held() -> None:
    net = NETS["3c3d"]
    rows = 4 * net.batch * sum(p.numel() for p in net.make().parameters())
    found = memory.peaks("3c3d", "per-sample gradient", ["ours"])
    assert 50e6 < found["plain"] < rows < found["ours"] < 1.1 * (found["plain"] + rows)
    again = memory.peaks("3c3d", "norms", ["ours"])
    assert again["plain"] == pytest.approx(found["plain"], rel=0.02)
    assert again["ours"] < 1.1 * found["plain"], "norms need no rows"


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"stride": 2, "padding": 1}], ids=str)
def test_multiply_adds_of_a_convolution(options: dict[str, int]) -> None:
    """Of the convolution and of each of its two gradients, as loops over its outputs count them."""
    x, w = torch.randn(3, 4, 9, 9, requires_grad=True), torch.randn(6, 4 // options.get("groups", 1), 3, 3)
    y = F.conv2d(x, w.requires_grad_(), **options)
    count = y.numel() * w[0].numel()
    assert bounds.multiply_adds(lambda: F.conv2d(x, w, **options)) == count
    assert bounds.multiply_adds(lambda: torch.autograd.grad(y, [x, w], torch.ones_like(y))) == 2 * count


def test_a_step_taken_apart_is_its_calls() -> None:
    a, b, c = torch.randn(3, 4), torch.randn(4, 5), torch.eye(6)

    def run() -> None:
        (a @ b).add_(1)
        torch.cholesky_inverse(torch.linalg.cholesky(c))

    found = taken_apart.taken_apart(run)
    products, factors = found["products"], found["Cholesky factors, inverses"]
    assert (products.calls, products.multiply_adds, products.bytes) == (1, 3 * 4 * 5, 4 * (3 * 4 + 4 * 5 + 3 * 5))
    assert (factors.calls, factors.multiply_adds) == (2, 6**3 // 6 + 6**3 // 3)
    assert found["all"].calls == sum(cost.calls for kind, cost in found.items() if kind != "all") >= 4


def test_the_objects_that_a_run_makes_are_counted() -> None:
    made: list[list[int]] = []
    assert 7000 <= taken_apart.tracked(lambda: made.extend([i] for i in range(7700))) <= 8400
    assert taken_apart.tracked(lambda: None) == 0
