"""Peak memory of one step above idle, each in a process of its own.

The process is forked from a clean server that has imported the libraries. A step on two samples loads what is loaded
late; then the problem is made (idle), one step taken, free memory given back to the system, the kernel's high-water
mark of resident memory reset (`/proc/self/clear_refs`), and the step taken that counts. Gradients, results and what a
library keeps between steps count as above idle. Blocks from 128 KiB on are mapped one by one: glibc otherwise raises
that bound while it runs, and holes in its heap count for tens of MB in one process and not in the next. Linux only:
elsewhere there are no such figures.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["METHOD", "available", "peak", "peaks"]

METHOD = (
    "VmHWM of the second step (reset by /proc/self/clear_refs) less VmRSS before the first, in a forked process that "
    "maps blocks from 128 KiB on one by one"
)
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_LIMIT = 300  # seconds for one process
_M_MMAP_THRESHOLD, _MAPPED = -3, 128 * 1024  # of glibc's mallopt; bytes


def available() -> bool:
    """Whether the kernel keeps a high-water mark that can be reset."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return "VmHWM" in _STATUS.read_text(encoding="ascii")


def peaks(net: str, quantity: str, names: Sequence[str]) -> dict[str, float]:
    """Bytes above idle by contender, and of the plain gradient; those that fail are left out."""
    each = {name: partial(_program, net, quantity, name) for name in ("plain", *names)}
    found = {name: peak(make, repeats=2) for name, make in each.items()}
    return {name: bytes for name, bytes in found.items() if bytes is not None}


def _program(net: str, quantity: str, name: str, small: bool) -> Callable[[], object]:
    from .measure import program_of

    return program_of(net, quantity, name, batch=2) if small else program_of(net, quantity, name)


def peak(make: Callable[[bool], Callable[[], object]], repeats: int, limit: float = _LIMIT) -> float | None:
    """Bytes above idle of the last of some runs; None where it fails, or takes more seconds than the limit.

    make: a function that can be pickled; makes a small problem that loads what is loaded late, or the problem.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.speed.overhead.measure"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_probe, args=(make, repeats, there))
    process.start()
    there.close()
    found: float | None = None
    if here.poll(limit):
        with suppress(EOFError):  # it was killed, or its library failed
            found = here.recv()
    process.kill()
    process.join()
    return found


def _probe(make: Callable[[bool], Callable[[], object]], repeats: int, answer: Any) -> None:
    from .measure import quiet

    quiet()
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED)
    _free_after(make(True))
    run = make(False)
    idle = _read("VmRSS")
    for _ in range(repeats - 1):
        _free_after(run)
    _CLEAR.write_text("5", encoding="ascii")
    kept = run()
    answer.send(_read("VmHWM") - idle)
    del kept


def _free_after(run: Callable[[], object]) -> None:
    """Run, and give back to the system what is free then."""
    run()
    del run
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _read(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024
