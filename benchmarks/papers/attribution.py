"""Do scores predict retrained models? The linear datamodeling score of attribution methods, on ten digits.

    python -m benchmarks.papers.attribution [--subsets 20] [--seeds 0 1] [--samples 1000] [--queries 50]

A tanh network 196-32-10 on MNIST at 14 x 14 pixels, trained with Adam and weight decay. For each of some random halves
of the training data, and each seed, one more network is trained on the half alone. The linear datamodeling score of
a method is, for each query, the rank correlation over the halves between the query's loss (the mean over the seeds'
networks) and minus the sum of the method's scores of the half's samples; its mean over the queries is in the table,
with its standard error. Scores are means over networks trained on all data, one for each seed:

    ekfac, kfac, diag     `lw.attribution.Influence` with this curvature, labels summed over
    tracin                inner products of gradients, summed over checkpoints with their rates
    identity              the same of the last checkpoint alone
    similarity            cosine of the last hidden layers
    random                normal numbers

The figure beside the file shows the table. The file holds each network's losses when it is trained, so that a run that
was stopped goes on where it was. How well the index finds the best samples stands beside it: its recall of the ten best
of the exact scores, by rank.
Source: Park et al. (2023), "TRAK", section 2.3 (the score); Pruthi et al. (2020) (TracIn).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw
from benchmarks import probe
from benchmarks.data import load

CURVATURES = ("ekfac", "kfac", "diag", "identity")
RANKS = (4, 8, 16)
BATCH, EPOCHS, RATE, DECAY, CHECKPOINTS = 50, 20, 3e-3, 1e-3, 4

Batches = list[tuple[Tensor, Tensor]]


def digits(samples: int, queries: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST at 14 x 14 pixels: training and query images as rows, `[N, 196]`, with their digits."""
    data = load("mnist", flat=True)
    x, queried = (
        F.avg_pool2d(rows.view(-1, 1, 28, 28), 2).flatten(1) for rows in (data.x_train[:samples], data.x_test[:queries])
    )
    return x, data.y_train[:samples], queried, data.y_test[:queries]


def network(seed: int) -> nn.Sequential:
    """The network before training."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(196, 32), nn.Tanh(), nn.Linear(32, 10))


def trained(x: Tensor, y: Tensor, seed: int) -> list[nn.Sequential]:
    """The network after equal parts of its training; the last one is done."""
    model, kept = network(seed), []
    opt = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            opt.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
        if (epoch + 1) % (EPOCHS // CHECKPOINTS) == 0:
            copy = network(seed)
            copy.load_state_dict(model.state_dict())
            kept.append(copy)
    return kept


def halves(samples: int, count: int) -> list[Tensor]:
    """The numbers of the samples in each random half."""
    generator = torch.Generator().manual_seed(2023)
    return [torch.randperm(samples, generator=generator)[: samples // 2] for _ in range(count)]


def retrained(body: dict[str, Any], path: Path, data: tuple[Tensor, ...], halves_: Sequence[Tensor]) -> Tensor:
    """The queries' losses after training on each half, `[halves, queries]`, the mean over seeds."""
    x, y, queries, labels = data
    for number, rows in enumerate(halves_):
        for seed in body["settings"]["seeds"]:
            key = f"half {number}, seed {seed}"
            if key not in body["losses"]:
                model = trained(x[rows], y[rows], seed)[-1]
                with torch.no_grad():
                    losses = F.cross_entropy(model(queries), labels, reduction="none")
                body["losses"][key] = [round(v, 6) for v in losses.tolist()]
                probe.write(path, body, indent=None)
    seeds = body["settings"]["seeds"]
    each = [[body["losses"][f"half {n}, seed {s}"] for s in seeds] for n in range(len(halves_))]
    return torch.tensor(each).mean(1)


def scores(models: Sequence[nn.Sequential], data: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
    """Each method's scores `[queries, samples]`, from the checkpoints of one training."""
    x, y, queries, labels = data
    asked: Batches = [(queries, labels)]
    loader: Batches = list(zip(x.split(200), y.split(200), strict=True))
    last = models[-1]
    found = {}
    for curvature in CURVATURES:
        influence = lw.attribution.Influence(last, F.cross_entropy, curvature=curvature, draws=None).fit(loader)
        found[curvature] = influence.scores(asked, loader)
    products = [
        lw.attribution.Influence(model, F.cross_entropy, curvature="identity").scores(asked, loader) for model in models
    ]
    found["tracin"] = RATE * torch.stack(products).sum(0)
    with torch.no_grad():
        found["similarity"] = F.normalize(last[:2](queries)) @ F.normalize(last[:2](x)).T
    found["random"] = torch.randn(len(queries), len(x), generator=torch.Generator().manual_seed(seed))
    return found


def datamodeling(scores_: Tensor, losses: Tensor, halves_: Sequence[Tensor]) -> tuple[float, float]:
    """The linear datamodeling score, mean over queries, and its standard error; losses `[halves, queries]`."""
    predicted = torch.stack([-scores_[:, rows].sum(1) for rows in halves_])
    each = torch.stack([
        torch.corrcoef(torch.stack([ranks(p), ranks(a)]))[0, 1] for p, a in zip(predicted.T, losses.T, strict=True)
    ])  # fmt: skip
    return float(each.mean()), float(each.std() / len(each) ** 0.5)


def ranks(values: Tensor) -> Tensor:
    """The rank of each value; values are taken to differ."""
    return values.argsort().argsort().double()


def recalls(model: nn.Module, data: tuple[Tensor, ...]) -> dict[str, float]:
    """The recall of the ten best by an index of each rank."""
    x, y, queries, labels = data
    loader: Batches = list(zip(x.split(200), y.split(200), strict=True))
    influence = lw.attribution.Influence(model, F.cross_entropy, draws=None).fit(loader)
    found = {}
    for projection in ("eigen", "random"):
        for rank in RANKS:
            with tempfile.TemporaryDirectory() as folder:
                index = lw.attribution.GradientIndex(influence, folder, rank, projection).append(loader)
                found[f"{projection}, rank {rank}"] = round(index.recall([(queries, labels)], loader, 10), 3)
    return found


def draw(path: Path, body: dict[str, Any]) -> None:
    """The score of each method, with its standard error."""
    methods = list(body["scores"])[::-1]
    means, errors = zip(*(body["scores"][m] for m in methods), strict=True)
    figure = probe.figure(7, 2.8)
    axes = figure.subplots()
    axes.barh(methods, means, xerr=errors, color="#3b6ea5", ecolor="#333333", height=0.65)
    axes.set(xlabel="linear datamodeling score (mean over queries, ± its standard error)", xlim=(-0.06, 1))
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    probe.save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, and print the table."""
    arguments = probe.parsed(
        probe.parser("benchmarks.papers.attribution", __doc__, subsets=20, seeds=[0, 1], samples=1000, queries=50,
                     out=probe.RESULTS / "attribution.json"),
        argv,
    )  # fmt: skip
    settings = {"subsets": arguments.subsets, "seeds": arguments.seeds, "samples": arguments.samples,
                "queries": arguments.queries}  # fmt: skip
    body: dict[str, Any] = probe.read(arguments.out) if arguments.out.exists() else {"settings": settings, "losses": {}}
    if body["settings"] != settings:
        sys.exit(f"{arguments.out} holds a run of other settings: {body['settings']}; name another file by --out")
    data = digits(arguments.samples, arguments.queries)
    parts = halves(arguments.samples, arguments.subsets)
    losses = retrained(body, arguments.out, data, parts)
    runs = [trained(*data[:2], seed) for seed in arguments.seeds]
    each = [scores(models, data, seed) for models, seed in zip(runs, arguments.seeds, strict=True)]
    body["scores"] = {}
    for method in each[0]:
        mean, error = datamodeling(torch.stack([found[method] for found in each]).mean(0), losses, parts)
        body["scores"][method] = [round(mean, 4), round(error, 4)]
    body["recall of the ten best"] = recalls(runs[0][-1], data)
    probe.write(arguments.out, body, indent=None)
    draw(arguments.out.with_suffix(".png"), body)
    print(probe.table(["method", "linear datamodeling score", "±"], [[m, *v] for m, v in body["scores"].items()]))
    print(probe.table(["index", "recall of the ten best"], body["recall of the ten best"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
