"""A classifier of digits whose layers each fit their own target: LocoProp.

python examples/locoprop_classifier.py --rows 10000 --epochs 5
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
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=500)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    x, y, x_test, y_test = mnist(args.rows)
    model = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10))
    # per="sample": γ counts against a sample's own loss, so it means the same at every batch size
    opt = lw.LocoProp(model, target=lw.local.GradientStep(gamma=1.0, per="sample"))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.epochs)

    for epoch in range(args.epochs):
        total = 0.0
        for a, b in batches(x, y, size=args.batch):
            loss = opt.step(lambda: F.cross_entropy(model(a), b))  # noqa: B023
            total += float(loss) * len(a)
        schedule.step()
        with torch.no_grad():
            accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        print(f"epoch {epoch + 1}: train loss {total / len(x):.3f}, test accuracy {100 * accuracy:.1f} %")

    for name, said in opt.describe().items():
        print(f"  {name}: {said}")
    return float(accuracy)


if __name__ == "__main__":
    main()
