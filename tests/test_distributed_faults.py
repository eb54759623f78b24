"""Lost processes and checkpoints: a run goes on from the last complete one, with the bits of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import ranks, said_by_the_survivor
from test_distributed_local import METHODS, Settings, batch, made, same
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import layerwise as lw
from layerwise.errors import BadInput, CutShort, RankLost
from layerwise.ranks.group import Ranks

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "restart.py"


def optimizer_of(method: str, net: nn.Module, parallel: bool, settings: Settings) -> Any:
    if method == "adam":
        return torch.optim.Adam(net.parameters(), lr=1e-2)
    if method == "kfac":
        return lw.optim.KFAC(net)
    return METHODS[method](net, parallel=parallel or None, **settings)


def steps(net: nn.Module, opt: Any, first: int, last: int) -> None:
    for t in range(first, last):
        x, y = batch("dense", torch.float64, t)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(net(F.dropout(x, 0.3)), y)
            if isinstance(opt, torch.optim.Adam):
                loss.backward()
            return loss

        opt.step(closure)


def life(
    rank: int, folder: str, last: int, method: str, settings: Settings, parallel: bool = True
) -> tuple[int, dict[str, Any]]:
    """Go on from a folder until a step; where it started, and where it ended."""
    net = made("dense", torch.float64)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    opt = optimizer_of(method, net, parallel, settings)
    torch.manual_seed(3)
    start = lw.distributed.load(folder, net, opt)
    steps(net, opt, start.step, last)
    if start.step < last:
        lw.distributed.save(folder, last, net, opt, extra={"seen": last})
    return start.step, {"model": dict(net.state_dict()), "opt": opt.state_dict(), "random": torch.get_rng_state()}


CASES: dict[str, tuple[str, Settings]] = {
    "locoprop": ("locoprop", {"lr": 1e-3, "regularizer": lw.local.Elastic(1.0, 0.9), "layers": {"0": {"lr": 1e-4}}}),
    "memory": ("altmin", {"weights": "memory", "codes": "jacobi", "coupling": lw.local.Coupling(0.5, add=0.1)}),
    "async": ("altmin", {"schedule": "async"}),
    "kfac": ("kfac", {}),
    "adam": ("adam", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_bitwise(name: str, tmp_path: Path) -> None:
    method, settings = CASES[name]
    _, wanted = life(0, str(tmp_path / "whole"), 5, method, settings, False)
    assert life(0, str(tmp_path / "cut"), 3, method, settings, False)[0] == 0
    start, found = life(0, str(tmp_path / "cut"), 5, method, settings, False)
    assert start == 3 and same(found, wanted)


@pytest.mark.parametrize("name", ["locoprop", "memory"])
def test_a_run_goes_on_over_another_number_of_ranks_bitwise(name: str, tmp_path: Path) -> None:
    method, settings = CASES[name]
    _, wanted = life(0, str(tmp_path / "whole"), 6, method, settings, False)
    folder = str(tmp_path / "cut")
    life(0, folder, 2, method, settings, False)
    assert [start for start, _ in ranks(2)(life, folder, 4, method, settings)] == [2, 2]
    start, found = life(0, folder, 6, method, settings, False)
    assert start == 4 and same(found, wanted)


@pytest.mark.slow
def test_two_ranks_go_on_where_four_stopped_bitwise(tmp_path: Path) -> None:
    method, settings = CASES["memory"]
    _, wanted = life(0, str(tmp_path / "whole"), 4, method, settings, False)
    ranks(4)(life, str(tmp_path / "cut"), 2, method, settings)
    for start, found in ranks(2)(life, str(tmp_path / "cut"), 4, method, settings):
        assert start == 2 and same(found, wanted)


# Checkpoints ------------------------------------------------------------------------------------------------------


def small(folder: Path, last: int = 3) -> tuple[nn.Module, Any]:
    net = nn.Linear(2, 2)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(1, last + 1):
        with torch.no_grad():
            net.weight.fill_(step)
        lw.distributed.save(folder, step, net, opt, extra=[step])
    return net, opt


def test_the_newest_stay(tmp_path: Path) -> None:
    net, opt = small(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000003"]
    assert lw.distributed.load(tmp_path, net, opt) == (3, [3])
    lw.distributed.save(tmp_path, 3, net, opt, extra="again", keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]
    assert lw.distributed.load(tmp_path, net, opt).extra == "again"


@pytest.mark.parametrize("damage", ["part", "metadata", "tensors", "empty"])
def test_a_checkpoint_cut_short_falls_back_to_the_one_before(damage: str, tmp_path: Path) -> None:
    net, opt = small(tmp_path)
    newest = tmp_path / "step-000000003"
    if damage == "part":  # killed before it was complete
        newest.rename(tmp_path / ".step-000000003.part")
    else:
        for path in list(newest.iterdir()):
            if damage == "empty":
                path.unlink()
            elif (path.name == ".metadata") == (damage == "metadata"):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with torch.no_grad():
        net.weight.zero_()
    if damage == "part":
        assert lw.distributed.load(tmp_path, net, opt) == (2, [2])
    else:
        with pytest.warns(CutShort, match="step-000000003"):
            assert lw.distributed.load(tmp_path, net, opt) == (2, [2])
    assert bool((net.weight == 2).all())
    lw.distributed.save(tmp_path, 3, net, opt, extra=[4])
    assert lw.distributed.load(tmp_path, net, opt) == (3, [4])


def test_none_that_can_be_read_is_an_error_and_none_at_all_is_step_0(tmp_path: Path) -> None:
    net, opt = small(tmp_path, 1)
    assert lw.distributed.load(tmp_path / "nowhere", net, opt) == (0, None)
    (tmp_path / "step-000000001" / ".metadata").unlink()
    with pytest.warns(CutShort), pytest.raises(BadInput, match="none of the 1"):
        lw.distributed.load(tmp_path, net, opt)


def test_another_model_is_refused_by_name_and_stays(tmp_path: Path) -> None:
    small(tmp_path, 1)
    for other, name in ((nn.Linear(2, 3), "weight"), (nn.Sequential(nn.Linear(2, 2)), r"0\.weight")):
        before = {n: t.clone() for n, t in other.state_dict().items()}
        with pytest.raises(BadInput, match=name):
            lw.distributed.load(tmp_path, other)
        assert same(dict(other.state_dict()), before)
    net = nn.Linear(2, 2)
    lw.distributed.save(tmp_path, 2, net)
    with pytest.raises(BadInput, match="without an optimizer"):
        lw.distributed.load(tmp_path, net, torch.optim.SGD(net.parameters()))
    with pytest.raises(BadInput, match="step"):
        lw.distributed.save(tmp_path, -1, net)


def test_a_functional_model_is_saved_under_its_names(tmp_path: Path) -> None:
    params = {"w": torch.randn(3, requires_grad=True)}
    lw.distributed.save(tmp_path, 1, params)
    wanted = params["w"].detach().clone()
    with torch.no_grad():
        params["w"].zero_()
    assert lw.distributed.load(tmp_path, params).step == 1 and torch.equal(params["w"], wanted)


def draws(rank: int, folder: str, alike: bool, save: bool) -> tuple[float, float]:
    torch.manual_seed(1 if alike else rank)
    net = nn.Linear(1, 1)
    if save:
        lw.distributed.save(folder, 1, net)
    else:
        torch.manual_seed(100 + rank)
        lw.distributed.load(folder, net)
    return float(torch.rand(())), rank


@pytest.mark.parametrize("alike", [True, False])
def test_random_numbers_go_on_rank_by_rank(alike: bool, tmp_path: Path) -> None:
    wanted = ranks(2)(draws, str(tmp_path / "two"), alike, True)
    assert ranks(2)(draws, str(tmp_path / "two"), alike, False) == wanted
    first = draws(0, str(tmp_path / "one"), alike, True)[0]
    found = [value for value, _ in ranks(2)(draws, str(tmp_path / "one"), alike, False)]
    assert found == [first, first]  # one rank's are what all had in common


def sizes(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 100))
    opt = lw.LocoProp(net, parallel=True)
    x = torch.ones(4, 100)
    opt.step(lambda: net(x).square().mean())
    lw.distributed.save(folder, 1, net, opt)


def test_every_rank_writes_what_it_holds_once(tmp_path: Path) -> None:
    ranks(2)(sizes, str(tmp_path))
    written = [path.stat().st_size for path in (tmp_path / "step-000000001").glob("*.distcp")]
    numbers = 3 * 4 * (100 * 100 + 100) * 2  # weights and two kinds of state, float32
    assert len(written) == 2 and numbers < sum(written) < 1.5 * numbers
    assert min(written) > 2 * 4 * 100 * 100  # the state of the layers it owns


def sharded(rank: int, folder: str, last: int) -> tuple[int, dict[str, Tensor]]:
    """FSDP2, with Adam: every rank holds and writes its shards."""
    mesh = init_device_mesh("cpu", (2,))
    net = made("dense", torch.float64)
    fully_shard(net, mesh=mesh)
    opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    start = lw.distributed.load(folder, net, opt).step
    for t in range(start, last):
        x, y = batch("dense", torch.float64, t)
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
    lw.distributed.save(folder, last, net, opt)
    return start, {n: p.full_tensor() for n, p in net.state_dict().items()}


def test_shards_are_joined_and_cut_anew(tmp_path: Path) -> None:
    assert [start for start, _ in ranks(2)(sharded, str(tmp_path), 2)] == [0, 0]
    net = made("dense", torch.float64)
    opt = torch.optim.Adam(net.parameters(), lr=1.0)
    assert lw.distributed.load(tmp_path, net, opt).step == 2
    found = ranks(2)(sharded, str(tmp_path), 3)
    x, y = batch("dense", torch.float64, 2)
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()
    for start, whole in found:
        assert start == 2
        for n, p in net.named_parameters():
            assert torch.allclose(whole[n], p, rtol=1e-12, atol=1e-14)


# Lost processes ---------------------------------------------------------------------------------------------------


def killed(rank: int) -> str:
    net = made("dense", torch.float64)
    opt = lw.LocoProp(net, parallel=True)
    for t in range(4):
        x, y = batch("dense", torch.float64, t)
        if rank == 1 and t == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
        except RankLost as error:
            return str(error)
    return "went on"


def test_a_killed_rank_ends_the_others_with_a_clear_message() -> None:
    ok, said = said_by_the_survivor(killed)
    assert ok and "rank 0 of 2" in said and "step 3" in said and "was killed" in said and "--max-restarts" in said


def test_an_ordinary_runtime_error_stays_one() -> None:
    with pytest.raises(RuntimeError, match="shape") as found, Ranks()._delivery():  # type: ignore[attr-defined]
        raise RuntimeError("a wrong shape")
    assert not isinstance(found.value, RankLost)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_run_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    def launch(folder: str, *words: str) -> str:
        python = [sys.executable, *words]
        outside = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1",
                   "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # fmt: skip
        command = [*python, str(EXAMPLE), "--folder", str(tmp_path / folder), "--steps", "12", "--every", "4"]
        command += ["--kill", "9"] if words else []
        done = subprocess.run(command, capture_output=True, text=True, env=outside, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    # one restart is asked for; the others are for gloo's threads, which may abort a process that has ended its work
    said = launch("cut", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    assert "started from 8" in said
    # torchrun sees the killed process first and stops the other, or that one has ended with its own words by then
    assert "exitcode: -9" in said or ("RankLost" in said and "step 10" in said)
    assert "started from 0" in launch("whole")
    found = []
    for folder in ("cut", "whole"):
        net = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 64), nn.Tanh(),
                            nn.Linear(64, 4))  # fmt: skip
        opt = lw.LocoProp(net)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lw.distributed.load(tmp_path / folder, net, opt).step == 12
        found.append({"model": dict(net.state_dict()), "opt": opt.state_dict()})
    assert same(*found)
