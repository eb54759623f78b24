"""The poster's other statements, and what the defaults reach.

    python -m benchmarks.papers.altmin staleness       accuracy against staleness 0 to 8 of asynchronous layers
    python -m benchmarks.papers.altmin continual       accuracy on old tasks of a stream of permuted MNIST
    python -m benchmarks.papers.altmin initialization     Adam after 10, 50 or 100 minibatches of AM-Adam
    python -m benchmarks.papers.altmin depth           size of the updates by layer, sigmoid nets 2 to 30 deep
    python -m benchmarks.papers.altmin theory          log-log slope of the squared error under rates ∝ 1/t
    python -m benchmarks.papers.altmin defaults        what the untuned defaults reach at first, beside the aims
    python -m benchmarks.papers.altmin untuned         the untuned defaults beside tuned Adam on other images
    python -m benchmarks.papers.altmin all

Each writes benchmarks/results/altmin/<name>.json and .png and prints what was seen. `--small` takes seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch

from benchmarks import probe

from . import continual, defaults, depth, initialization, staleness, theory, untuned
from .common import rounded

DEMONSTRATIONS = {
    "staleness": staleness.DEMONSTRATION,
    "continual": continual.DEMONSTRATION,
    "initialization": initialization.DEMONSTRATION,
    "depth": depth.DEMONSTRATION,
    "theory": theory.DEMONSTRATION,
    "defaults": defaults.DEMONSTRATION,
    "untuned": untuned.DEMONSTRATION,
}
FOLDER = probe.RESULTS / "altmin"


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all was shown, 1 where the library lacks what a statement needs."""
    parser = probe.parser("benchmarks.papers.altmin", __doc__, threads=1, out=FOLDER)
    parser.add_argument("name", choices=[*DEMONSTRATIONS, "all"])
    parser.add_argument("--small", action="store_true", help="few rows and steps: shows that it runs, and nothing else")
    parser.add_argument("--draw", action="store_true", help="measure nothing: the pictures again, from the results")
    arguments = probe.parsed(parser, argv)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    lacking = 0
    for name in DEMONSTRATIONS if arguments.name == "all" else [arguments.name]:
        demonstration = DEMONSTRATIONS[name]
        if arguments.draw:
            demonstration.draw(probe.read(arguments.out / f"{name}.json"), arguments.out / f"{name}.png")
            continue
        result = demonstration.measure(arguments.small)
        if "unavailable" in result:
            print(f"{name}: not shown: {result['unavailable']}", flush=True)
            lacking = 1
            continue
        said = demonstration.sentence(result)
        kept = rounded({**result, "seen": said, "torch": torch.__version__})
        probe.write(arguments.out / f"{name}.json", kept)
        demonstration.draw(kept, arguments.out / f"{name}.png")
        print(f"{name}: {said}", flush=True)
    return lacking


if __name__ == "__main__":
    sys.exit(main())
