"""A stream of minibatches, each seen once, in constant memory; interrupted and gone on with, to the bit.

python examples/altmin_stream.py --minibatches 50 --state stream.pt     (and again, to go on)
"""

import argparse
from pathlib import Path

import torch
from data import mnist
from torch import nn
from torch.nn import functional as F

import layerwise as lw


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minibatches", type=int, default=50, help="how many this call takes")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--state", type=Path, default=Path("stream.pt"))
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    # running moments of inputs and codes: A = Σ aaᵀ stays [785, 785], however long the stream
    opt = lw.AltMin(model, weights=lw.local.Memory(forget=0.05))
    seen = 0
    if args.state.exists():
        saved = torch.load(args.state, weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        seen = saved["seen"]
        print(f"going on after {seen} minibatches")

    x, y, x_test, y_test = mnist(60_000)
    for number in range(seen, seen + args.minibatches):
        rows = torch.arange(number * args.batch, (number + 1) * args.batch) % len(x)
        loss = opt.step(lambda: F.cross_entropy(model(x[rows]), y[rows]))  # noqa: B023
    seen += args.minibatches
    torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "seen": seen}, args.state)

    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
    held = sum(t.numel() for state in opt.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    print(f"{seen} minibatches: loss {float(loss):.3f}, test accuracy {100 * accuracy:.1f} %")
    print(f"{held:,} numbers of state, as after the first minibatch; saved to {args.state}")
    return model


if __name__ == "__main__":
    main()
