"""A net whose neurons fire or do not: AltMin through sign activations, which have no derivative.

python examples/altmin_sign.py --rows 10000 --epochs 5
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
    parser.add_argument("--hidden", type=int, default=500)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    x, y, x_test, y_test = mnist(args.rows)
    h = args.hidden
    model = nn.Sequential(nn.Linear(784, h), lw.nn.Sign(), nn.Linear(h, h), lw.nn.Sign(), nn.Linear(h, 10))

    F.cross_entropy(model(x[:100]), y[:100]).backward()
    print("backprop's gradient below the signs:", float(model[0].weight.grad.norm()))
    model.zero_grad()

    trace = lw.optim.Trace(every=10)
    opt = lw.AltMin(model, coupling=0.02, steps=4, lr=1e-3, trace=trace)
    for epoch in range(args.epochs):
        for a, b in batches(x, y, size=200):
            loss = opt.step(lambda: F.cross_entropy(model(a), b))  # noqa: B023
        with torch.no_grad():
            accuracy = (model(x_test).argmax(1) == y_test).float().mean()
        print(f"epoch {epoch + 1}: last minibatch's loss {float(loss):.3f}, test accuracy {100 * accuracy:.1f} %")

    for name in ("0.weight", "2.weight", "4.weight"):
        print(f"  {name} has moved by {100 * trace.drift[name][-1]:.0f} % of its norm")
    return float(accuracy)


if __name__ == "__main__":
    main()
