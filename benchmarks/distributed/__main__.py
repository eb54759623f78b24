"""`python -m benchmarks.distributed NAME [options]`: run one of the modules beside this one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m benchmarks.distributed {{{','.join(names)}}} [options]")
    importlib.import_module(f"benchmarks.distributed.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
