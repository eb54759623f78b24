"""The index of projected gradients: against projections of all gradients by loops, exact scores, and kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_close
from test_attribution import SUBJECTS, double, is_mean, language, mlp, own  # noqa: F401

import layerwise as lw
from layerwise.attribution import GradientIndex, Influence
from layerwise.attribution import index as index_module
from layerwise.attribution.files import read
from layerwise.attribution.inverse import ProjectedSolved
from layerwise.errors import BadInput


def fitted(subject: Any, curvature: str = "ekfac") -> tuple[Influence, Any, Any, Any, Any]:
    model, loss, train, queries = subject()
    return Influence(model, loss, curvature=curvature, draws=None).fit(train), model, loss, train, queries


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("projection", ["eigen", "random"])
def test_rows_are_projections_of_all_gradients(subject: Any, projection: str, tmp_path: Path) -> None:
    influence, model, loss, train, queries = fitted(subject)
    index = GradientIndex(influence, tmp_path, rank=2, projection=projection).append(train)
    g = own(model, loss, train, is_mean(loss))
    v = {name: found for name, (found,) in influence.directions(queries).items()}
    want = torch.zeros(len(next(iter(v.values()))), len(index))
    size = 0
    sides, _ = read(tmp_path, "index")  # type: ignore[misc]
    for name, gradients in g.items():
        left, right = sides[f"{name}/left"], sides[f"{name}/right"]
        assert len(left) * len(right) <= 4
        flat = [x.reshape(len(x), left.shape[1], right.shape[1]) for x in (gradients, v[name])]
        rows = [torch.stack([left @ matrix @ right.T for matrix in x]).flatten(1) for x in flat]
        want += rows[1] @ rows[0].T
        size += rows[0].shape[1]
        if projection == "random" and left.shape[0] < left.shape[1]:
            assert_close(left.abs(), torch.full_like(left, len(left) ** -0.5))  # so that E L^T L is the identity
    assert index.row_size == size and len(index) == len(next(iter(g.values())))
    found = index.scores(queries)
    assert float((found - want).abs().max() / want.abs().max()) < 2e-3  # the rows are in float16
    values, numbers = index.search(queries, 3)
    assert_close(values, found.topk(3, 1).values)
    assert_close(found.gather(1, numbers), values)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diag"])
def test_a_query_along_eigenvectors_is_the_projection_of_its_solution(
    subject: Any, curvature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence, _, _, train, queries = fitted(subject, curvature)
    GradientIndex(influence, tmp_path, rank=2).append(train)
    sides, _ = read(tmp_path, "index")  # type: ignore[misc]
    sides = {name: (sides[f"{name}/left"], sides[f"{name}/right"]) for name in influence.names}
    asked: list[ProjectedSolved] = []
    monkeypatch.setattr(
        index_module, "ProjectedSolved", lambda *given: asked.append(ProjectedSolved(*given)) or asked[-1]
    )
    GradientIndex(influence, tmp_path, rank=2).search(queries, 2)
    (quantity,) = asked
    solved, along = influence.directions(queries), 0
    for name, value in influence.observed(queries[0], quantity).items():
        (v,), (left, right) = solved[name], sides[name]
        want = left @ v.reshape(len(v), left.shape[1], right.shape[1]) @ right.T
        assert_close(value, want[: len(value)].flatten(1))
        along += name in quantity.eigenvalues
    assert along == 0 if curvature == "diag" else along > 0


@pytest.mark.parametrize("subject", SUBJECTS)
def test_sides_that_are_kept_whole_give_the_exact_scores(subject: Any, tmp_path: Path) -> None:
    influence, _, _, train, queries = fitted(subject)
    index = GradientIndex(influence, tmp_path, rank=50).append(train)
    exact = influence.scores(queries, train)
    assert float((index.scores(queries) - exact).abs().max() / exact.abs().max()) < 1e-3
    assert index.recall(queries, train, 2) == 1
    with pytest.raises(BadInput, match=r"train_loader gave \d+ samples, the index holds \d+"):
        index.recall(queries, train[:1], 2)


def test_eigenvectors_are_orthonormal_and_keep_the_leading_curvature(tmp_path: Path) -> None:
    influence, *_ = fitted(language)
    GradientIndex(influence, tmp_path, rank=2)
    sides, _ = read(tmp_path, "index")  # type: ignore[misc]
    block = influence.curvature.to_dense("out.weight").reshape(6, 6, 6, 6)  # type: ignore[union-attr]
    outputs = torch.einsum("oipi->op", block)
    left = sides["out.weight/left"]
    assert_close(left @ left.T, torch.eye(2))
    assert_close((left @ outputs @ left.T).diagonal(), torch.linalg.eigvalsh(outputs).flip(0)[:2])


def test_an_index_grows_and_a_kill_loses_one_batch(tmp_path: Path) -> None:
    influence, _, _, train, queries = fitted(language)
    whole = GradientIndex(influence, tmp_path / "whole", 2).append(train)
    GradientIndex(influence, tmp_path / "parts", 2).append(train[:1])
    with (tmp_path / "parts" / "rows.float16").open("ab") as stream:
        stream.write(b"half a row")  # of the batch that was being written
    again = GradientIndex(influence, tmp_path / "parts", 2)
    assert len(again) == 3
    again.append(train, skip=len(again))
    assert torch.equal(again.scores(queries), whole.scores(queries))
    with pytest.raises(BadInput, match="skip whole batches"):
        again.append(train, skip=1)
    with pytest.raises(BadInput, match="ended 2 samples before"):
        again.append(train, skip=9)
    with pytest.raises(BadInput, match="asked to skip -1"):
        again.append(train, skip=-1)


def test_wrong_use_of_an_index_is_said(tmp_path: Path) -> None:
    influence, _, _, train, queries = fitted(mlp)
    index = GradientIndex(influence, tmp_path, 2)
    with pytest.raises(BadInput, match="empty"):
        index.search(queries, 1)
    with pytest.raises(BadInput, match="differs in rank"):
        GradientIndex(influence, tmp_path, 3)
    index.append(train)
    with pytest.raises(BadInput, match="of 10 samples"):
        index.search(queries, 11)
    rows = tmp_path / "rows.float16"
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(BadInput, match="damaged"):
        GradientIndex(influence, tmp_path, 2)
    (tmp_path / "samples.txt").write_text("many")
    with pytest.raises(BadInput, match="no number of samples"):
        GradientIndex(influence, tmp_path, 2)
    with pytest.raises(BadInput, match="projection must be"):
        GradientIndex(influence, tmp_path / "new", 2, "none")
    with pytest.raises(BadInput, match="rank"):
        GradientIndex(influence, tmp_path / "new", 0)
    assert lw.attribution.GradientIndex is GradientIndex
