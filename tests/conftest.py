"""What every test runs under: one seed, few threads, no trace left behind, and few skips."""

from __future__ import annotations

import ctypes
import gc
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks import data

SEED = int(os.environ.get("LAYERWISE_SEED", "0"))
MOST_SKIPPED = 0.05  # of the whole suite; a suite of fewer than FULL_SUITE tests was selected by hand
FULL_SUITE = 300
M_ARENA_MAX = -8  # of the C library's mallopt
# Files of half a minute or more: a process that came to one last would run on alone.
LONGEST = ("test_matrix", "test_optimizers", "test_trusted_steps", "test_newton", "test_devices")

# Without LAYERWISE_SEED two runs try the same examples; with it, hypothesis takes its own --hypothesis-seed.
settings.register_profile(
    "layerwise",
    deadline=None,
    derandomize="LAYERWISE_SEED" not in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("layerwise")

# One thread: sums come out in the same order every time, and small tensors are faster.
torch.set_num_threads(1)

seed_every_device = torch.manual_seed


def seed_what_is_there(seed: int) -> torch.Generator:
    """`torch.manual_seed`, which formats the stack for each kind of accelerator, there or not: 1 ms a call."""
    if torch.accelerator.is_available():  # asked anew each time: a test may register a device
        return seed_every_device(seed)
    return torch.default_generator.manual_seed(seed)


torch.manual_seed = torch.random.manual_seed = seed_what_is_there


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support", action="store_true", help="write docs/support.md from what the tests find")


def pytest_report_header() -> str:
    return f"LAYERWISE_SEED={SEED}, torch {torch.__version__}, {torch.get_num_threads()} thread"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes that run the tests side by side must give a test the same name, and start the longest files first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    for item in items:
        for mark in item.iter_markers("thinned"):
            if _place(item) % mark.args[0]:
                item.add_marker(pytest.mark.slow)
    if changing := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"these tests have an address in their names; give them an id: {changing}")


def _place(item: pytest.Item) -> int:
    """The number of the diagonal that a case lies on; each test counts from another one."""
    return sum(map(ord, item.originalname)) + sum(item.callspec.indices.values())  # type: ignore[attr-defined]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("data"):
        if not data.available(mark.args[0]):
            pytest.skip(f"the data set {mark.args[0]!r} is not at hand: set {data.VARIABLE} to a folder with it")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    ran = {kind: len(reporter.stats.get(kind, ())) for kind in ("passed", "failed", "skipped")} if reporter else {}
    skipped, total = ran.get("skipped", 0), sum(ran.values())
    if total >= FULL_SUITE and skipped > MOST_SKIPPED * total:
        print(f"\n{skipped} of {total} tests were skipped; at most 5 % may be.")  # noqa: T201
        session.exitstatus = exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def seed() -> int:
    """The run's seed: LAYERWISE_SEED, or 0."""
    return SEED


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of the test's own."""
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def one_arena() -> None:
    """For tests of resident memory: the C library opens arenas as it likes, each with megabytes that no step frees."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_ARENA_MAX, 1)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default for the test, as the exact comparisons need."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """What is there before a file's first test is no one's leak: the collector need not go through it every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Seed the global generators before each test; afterwards no mode and no changed global may be left."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    modes = torch.overrides._get_current_function_mode_stack()
    assert not modes, f"the test left torch function modes active: {modes}"
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before
