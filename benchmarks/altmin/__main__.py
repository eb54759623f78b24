"""The poster's other statements, and what the defaults reach.

    python -m benchmarks.altmin staleness          accuracy against staleness 0 to 8 of asynchronous layers
    python -m benchmarks.altmin continual          accuracy on old tasks of a stream of permuted MNIST
    python -m benchmarks.altmin initialization     Adam after 10, 50 or 100 minibatches of AM-Adam
    python -m benchmarks.altmin depth              size of the updates by layer, sigmoid nets 2 to 30 deep
    python -m benchmarks.altmin theory             log-log slope of the squared error under rates ∝ 1/t
    python -m benchmarks.altmin defaults           what the defaults reach untuned in the first epochs, beside the aims
    python -m benchmarks.altmin all

Each writes benchmarks/results/altmin/<name>.json and .png and prints what was seen. `--small` takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import continual, defaults, depth, initialization, staleness, theory
from .common import save

DEMONSTRATIONS = {
    "staleness": staleness.DEMONSTRATION,
    "continual": continual.DEMONSTRATION,
    "initialization": initialization.DEMONSTRATION,
    "depth": depth.DEMONSTRATION,
    "theory": theory.DEMONSTRATION,
    "defaults": defaults.DEMONSTRATION,
}
FOLDER = Path("benchmarks/results/altmin")


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all was shown, 1 where the library lacks what a statement needs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.altmin", description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=[*DEMONSTRATIONS, "all"])
    parser.add_argument("--small", action="store_true", help="few rows and steps: shows that it runs, and nothing else")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="measure nothing: the pictures again, from the results")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    arguments = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    lacking = 0
    for name in DEMONSTRATIONS if arguments.name == "all" else [arguments.name]:
        demonstration = DEMONSTRATIONS[name]
        if arguments.draw:
            held = json.loads((arguments.out / f"{name}.json").read_text(encoding="utf-8"))
            demonstration.draw(held, arguments.out / f"{name}.png")
            continue
        result = demonstration.measure(arguments.small)
        if "unavailable" in result:
            print(f"{name}: not shown: {result['unavailable']}", flush=True)
            lacking = 1
            continue
        said = demonstration.sentence(result)
        kept = save({**result, "seen": said, "torch": torch.__version__}, arguments.out / f"{name}.json")
        demonstration.draw(kept, arguments.out / f"{name}.png")
        print(f"{name}: {said}", flush=True)
    return lacking


if __name__ == "__main__":
    sys.exit(main())
