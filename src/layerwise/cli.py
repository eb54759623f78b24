"""The command line: `layerwise demo`, `layerwise --version`, `layerwise --help`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__
from .demo import EPOCHS, SECONDS_LIMIT, run
from .errors import LayerwiseError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """An error is one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**31 - 1}, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


_seed.__name__ = _count.__name__ = "whole number"  # argparse names the type in "invalid ... value"
_seconds.__name__ = "number"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="layerwise", description="Layer-wise quantities and layer-local training for PyTorch.")
    parser.add_argument("--version", action="version", version=f"layerwise {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train a small autoencoder with five methods side by side",
        description="Train a small autoencoder on scikit-learn's digits with LocoProp-M, LocoProp-S, AltMin, "
        "RMSProp and Adam side by side; print a table, write results.json, curves.png and layers.png. "
        "Needs no download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results, made if missing")
    demo.add_argument("--seed", type=_seed, default=0, help="of the split, the initial weights and the minibatches")
    demo.add_argument("--epochs", type=_count, default=EPOCHS, help="passes over the training images")
    demo.add_argument(
        "--seconds-limit",
        type=_seconds,
        default=SECONDS_LIMIT,
        help="begin no further epoch after so many seconds",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0 all went well, 1 a method failed (the rest is there), 2 wrong use, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        complete = run(
            arguments.out, seed=arguments.seed, epochs=arguments.epochs, seconds_limit=arguments.seconds_limit
        )
    except LayerwiseError as error:
        print(f"layerwise demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("layerwise demo: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
