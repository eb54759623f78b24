"""Scores against kronfluence's, where its conventions are these: no biases, sums over terms, the exact Fisher matrix.

kronfluence is of `requirements/ecosystem.txt`; without it, or what it imports, this module is skipped.
It draws labels; here each sequence stands once for each position and label, its loss times the root of the label's
probability, so that its factors are sums over all labels.
"""

from __future__ import annotations

import copy
import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_close
from test_attribution import Attention, double  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import layerwise as lw

pytest.importorskip("kronfluence.analyzer", reason="kronfluence is not installed (requirements/ecosystem.txt)")
analyzer = importlib.import_module("kronfluence.analyzer")
arguments = importlib.import_module("kronfluence.arguments")
Task: Any = importlib.import_module("kronfluence.task").Task

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

N, T, C = 3, 4, 5
LINEAR = ["qkv", "out", "head"]
# What its curvature lacks: each label counts as a sample (C); for K-FAC each position, too, in both factors.
FACTORS = {"ekfac": C, "diagonal": C, "kfac": T * C, "identity": 1}


def token_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class Language(Task):  # type: ignore[misc]
    """Losses are sums over a sequence; those of factors one term of each row."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(batch[0])
        if not sample:
            return token_loss(logits, batch[1]) * batch[1].numel()
        _, _, position, label = batch
        each = logits[torch.arange(len(logits)), position].log_softmax(-1).gather(1, label[:, None])
        return -(each * (each / 2).exp().detach()).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return LINEAR


def without_biases() -> Attention:
    model = Attention(C, T)
    model.qkv, model.out = nn.Linear(6, 18, bias=False), nn.Linear(6, 6, bias=False)
    return model


@pytest.mark.parametrize(
    ("strategy", "damping"), [(s, d) for s in FACTORS for d in (None, 0.02)[: 1 + (s != "identity")]]
)
def test_scores_are_those_of_kronfluence(strategy: str, damping: float | None, tmp_path: Path) -> None:
    model, task = without_biases(), Language()
    x, y = torch.randint(C, (N, T)), torch.randint(C, (N, T))
    asked = torch.randint(C, (2, T)), torch.randint(C, (2, T))
    rows, position, label = (part.flatten() for part in torch.meshgrid(*map(torch.arange, (N, T, C)), indexing="ij"))
    prepared = analyzer.prepare_model(copy.deepcopy(model), task)
    theirs = analyzer.Analyzer("beside", prepared, task, cpu=True, disable_tqdm=True, log_level=logging.ERROR,
                               output_dir=str(tmp_path))  # fmt: skip
    factors, scores = arguments.FactorArguments(strategy=strategy), arguments.ScoreArguments(damping_factor=damping)
    for options in (factors, scores):
        for name, value in vars(options).items():
            if value is torch.float32:
                setattr(options, name, torch.float64)
    theirs.fit_all_factors("f", TensorDataset(x[rows], y[rows], position, label), 8, factor_args=factors)
    theirs.compute_pairwise_scores("s", "f", TensorDataset(*asked), TensorDataset(x, y), 2, 2, score_args=scores)
    want = theirs.load_pairwise_scores("s")["all_modules"]
    own = "diag" if strategy == "diagonal" else strategy
    factor = FACTORS[strategy]
    influence = lw.attribution.Influence(
        model,
        token_loss,
        [f"{name}.weight" for name in LINEAR],
        own,
        None if damping is None else damping * factor,
        None,
    ).fit([(x, y)])
    assert_close(factor * influence.scores([asked], [(x, y)]), want)
    if strategy in ("ekfac", "identity"):
        theirs.compute_self_scores("own", "f", TensorDataset(x, y), 2, score_args=scores)
        mine = factor * influence.self_influence([(x, y)])
        assert_close(mine, theirs.load_self_scores("own")["all_modules"])
