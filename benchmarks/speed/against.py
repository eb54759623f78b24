"""The overhead table's cells beside an earlier revision: values compared, times interleaved in one process.

    python -m benchmarks.speed.against a4aeae2                        # the five nets, every quantity
    python -m benchmarks.speed.against HEAD~1 --nets mlp --quantities norms variance --repeats 30

The revision's `src/layerwise` is unpacked as a package of another name, so both run in this process, on the same model
and batch. A ratio of 1.03 says that a step takes 3 % more CPU time now than then.
"""

from __future__ import annotations

import importlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.probe import conditions, interleaved, parser, table, write
from benchmarks.speed.overhead.contenders import ours
from benchmarks.speed.overhead.measure import quiet
from benchmarks.speed.overhead.nets import NETS
from benchmarks.speed.overhead.quantities import ALL, QUANTITIES

COMMAND = "benchmarks.speed.against"
THEN = "layerwise_then"
ROOT = Path(__file__).resolve().parents[2]


def unpack(revision: str, folder: Path) -> None:
    """Write the library of a revision, and the programs that measured it, under names of their own."""
    command = ["git", "-C", str(ROOT), "archive", revision, "src/layerwise", "benchmarks"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files.getmembers():
            if not member.isfile() or not (stream := files.extractfile(member)):
                continue
            text = renamed(stream.read().decode(errors="replace"))
            if member.name.startswith("src/layerwise/"):
                place = folder / THEN / member.name.removeprefix("src/layerwise/")
            elif member.name.endswith("contenders/ours.py"):
                text = re.sub(r"from \.+(nets|base) import", of_overhead, text)
                place = folder / "ours_then.py"
            else:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)


def renamed(text: str) -> str:
    """A source file that imports the revision's library in place of the present one."""
    return re.sub(r"\blayerwise(?=[\s.\"'])", THEN, text)


def of_overhead(found: re.Match[str]) -> str:
    """The absolute form of a relative import of the programs."""
    package = "benchmarks.speed.overhead"
    return f"from {package}.nets import" if found[1] == "nets" else f"from {package}.contenders.base import"


def load(revision: str, folder: Path) -> ModuleType:
    """The programs of the revision."""
    unpack(revision, folder)
    sys.path.insert(0, str(folder))
    return importlib.import_module("ours_then")


def cell(net: str, quantity: str, then: ModuleType, repeats: int) -> dict[str, Any]:
    """The ratio of the two steps, and whether their values are the same to the bit."""
    row = QUANTITIES[quantity]
    problem = NETS[net].problem(row.exact)
    programs = {"then": then.program(quantity, problem), "now": ours.program(quantity, problem)}
    runs: dict[str, Callable[[], object]] = {name: program.run for name, program in programs.items()}
    values: dict[str, dict[str, Tensor]] = {}
    for name, program in programs.items():
        torch.manual_seed(0)
        result = program.run()
        if program.values is not None:
            values[name] = program.values(result)
    low = interleaved(runs, repeats)
    same = all(torch.equal(x, values["now"][k]) for k, x in values["then"].items()) if values else None
    return {"net": net, "quantity": quantity, "ratio": low["now"] / low["then"], "seconds": low["now"], "same": same}


def main() -> None:
    made = parser(COMMAND, __doc__ or "", nets=list(ALL), quantities=list(QUANTITIES), repeats=15, out=None)
    made.add_argument("revision", help="a commit, branch or tag of this repository")
    options = made.parse_args()
    quiet()
    found: list[dict[str, Any]] = []
    under = conditions(revision=options.revision, repeats=options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        then = load(options.revision, Path(folder))
        for quantity in options.quantities:
            for net in options.nets:
                if net in QUANTITIES[quantity].nets:
                    found.append(cell(net, quantity, then, options.repeats))
                    print("{quantity}, {net}: {ratio:.3f}, values same: {same}".format(**found[-1]), flush=True)
    ratios = [each["ratio"] for each in found]
    print(table(["quantity", *options.nets], grid(found, options.nets)))
    print(f"geometric mean {geometric_mean(ratios):.3f}, largest {max(ratios):.3f}")
    if options.out:
        write(options.out, {"conditions": under, "cells": found})


def grid(cells: list[dict[str, Any]], nets: list[str]) -> list[list[str]]:
    """A row for each quantity, a column for each net."""
    by_place = {(c["quantity"], c["net"]): f"{c['ratio']:.2f}" for c in cells}
    rows = dict.fromkeys(c["quantity"] for c in cells)
    return [[quantity, *(by_place.get((quantity, net), "") for net in nets)] for quantity in rows]


if __name__ == "__main__":
    main()
