"""Read by Benchopt before anything else: puts the repository's root on the path, so that `benchmarks` is found."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[3])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
