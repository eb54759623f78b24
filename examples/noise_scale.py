"""Is the batch too small? The gradient noise scale while a convolution net trains, as numbers and as a page.

python examples/noise_scale.py --rows 10000 --epochs 3 --page noise.html
"""

import argparse

import torch
from data import batches, mnist
from torch import nn
from torch.nn import functional as F

import layerwise as lw


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between measurements")
    parser.add_argument("--page", default="noise.html")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    x, y, *_ = mnist(args.rows)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    history = lw.monitor.History()
    monitor = lw.monitor.Monitor(model, history, every=args.every)
    for _ in range(args.epochs):
        for a, b in batches(x, y, size=args.batch):
            with monitor.step():
                opt.zero_grad()
                F.cross_entropy(model(a), b).backward()
                opt.step()

    print(history.table())
    recorded = [record["noise_scale"] for record in history.records]
    for name, part in (("first", recorded[: len(recorded) // 4]), ("last", recorded[-len(recorded) // 4 :])):
        middle = sorted(part)[len(part) // 2]
        advice = "a larger batch pays" if middle > 2 * args.batch else "a larger batch hardly pays"
        print(f"{name} quarter of the run: noise scale {middle:.0f} samples at a batch of {args.batch}: {advice}")
    history.html(args.page, title="Gradient noise of a small net")
    print(f"{args.page} shows all measures, by parameter")
    return history


if __name__ == "__main__":
    main()
