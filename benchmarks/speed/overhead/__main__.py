"""The command line: `python -m benchmarks.speed.overhead --help`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import probe

from . import __doc__ as description
from . import memory, report
from .contenders import CONTENDERS, missing
from .measure import cell, quiet
from .nets import NETS
from .quantities import QUANTITIES
from .store import Store

INSTALL = "pip install --no-deps -r requirements/peers.txt"
RESULTS = probe.RESULTS / "overhead.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet; write results, table and chart."""
    options = _options(arguments)
    store = Store(options.json, options.fresh)
    names = ["ours", *(p for p in options.peers if p != "ours")]
    for name in names:
        if missing(name):
            print(f"{CONTENDERS[name].label} is missing: {INSTALL}", flush=True)
    if options.memory:
        _memory_again(store, options.models, options.quantities)
    elif not options.report:
        quiet()
        with_memory = not options.no_memory and memory.available()
        for net in options.models:
            for quantity in options.quantities:
                if net in QUANTITIES[quantity].nets and not store.done(net, quantity, names, options.repeats):
                    _measure(store, net, quantity, names, options.repeats, with_memory)
    if not store.cells:
        print("nothing was measured", file=sys.stderr)
        return 2
    stale = store.stale()
    if stale:
        print(f"measured with other code or versions: {', '.join(stale)}", flush=True)
    text = report.table(store.cells)
    print(text)
    options.json.with_suffix(".md").write_text(text, encoding="utf-8")
    report.chart(store.cells, options.json.with_suffix(".png"))
    return 0


def _measure(store: Store, net: str, quantity: str, names: list[str], repeats: int, with_memory: bool) -> None:
    start = time.monotonic()
    found = cell(net, quantity, names, repeats)
    if with_memory:
        found |= _peaks(store, net, quantity, found)
    store.add(net, quantity, found, repeats)
    shown = "  ".join(f"{n} {e['ratio']:.2f}" for n, e in found["contenders"].items() if "ratio" in e)
    print(f"{net:12}{quantity:26}{time.monotonic() - start:6.0f} s  {shown}", flush=True)


def _peaks(store: Store, net: str, quantity: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    """The peaks of all contenders that ran and can run here, how they were measured and with which code."""
    ran = [n for n, entry in cell["contenders"].items() if "ratio" in entry and not missing(n)]
    return {"peak bytes": memory.peaks(net, quantity, ran), "memory": memory.METHOD, "memory stamp": store.stamp}


def _memory_again(store: Store, nets: Sequence[str], quantities: Sequence[str]) -> None:
    """Peaks of the cells there are, where they were measured in another way or with other code; times stay."""
    for key, held in list(store.cells.items()):
        net, _, quantity = key.partition("/")
        same = (held.get("memory"), held.get("memory stamp")) == (memory.METHOD, store.stamp)
        if net in nets and quantity in quantities and not same:
            store.replace(net, quantity, {**held, **_peaks(store, net, quantity, held)})
            shown = "  ".join(f"{n} {b / 1e6:.1f}" for n, b in store.cells[key]["peak bytes"].items())
            print(f"{net:12}{quantity:26}MB  {shown}", flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = probe.parser("benchmarks.speed.overhead", description or "")
    parser.add_argument("--models", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--quantities", nargs="+", choices=list(QUANTITIES), default=list(QUANTITIES))
    parser.add_argument("--peers", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=15, help="of every contender (at least 15 to report)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="results; the table and the chart lie beside them")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--memory", action="store_true", help="peaks of memory alone, of what was timed before")
    parser.add_argument("--report", action="store_true", help="measure nothing: write the table and the chart again")
    return probe.parsed(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
