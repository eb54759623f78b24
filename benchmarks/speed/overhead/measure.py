"""One cell: the values of all contenders compared, then their times, interleaved."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.probe import interleaved
from layerwise.errors import LayerwiseError

from . import bounds
from .contenders import CONTENDERS, Program, Unsupported, missing, ours
from .nets import NETS, Problem
from .quantities import QUANTITIES

__all__ = ["cell", "program_of", "quiet"]

SLOW = 10.0  # seconds of one round of all contenders, from which on fewer repeats are taken
FEWER = 5
FLOOR = 1e-3  # of the largest value: parameters whose true values are zero hold rounding alone


def cell(net: str, quantity: str, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Ratios to the plain gradient, coverage and agreement of every contender, and what the others said instead."""
    row = QUANTITIES[quantity]
    problem = NETS[net].problem(row.exact)
    found: dict[str, dict[str, Any]] = {}
    programs: dict[str, Program] = {}
    reference: dict[str, Tensor] | None = None
    for name in names:
        program, found[name], values = _first(name, quantity, problem)
        if program is None:
            continue
        programs[name] = program
        if row.deterministic and values is not None:
            if name == "ours":
                reference = values
            elif reference is not None and (other := _other_shape(reference, values)):
                found[name] = {"fails": other}
                del programs[name]
            elif reference is not None:
                found[name]["values differ by"] = difference(reference, values)
    parts = ours.parts(quantity, problem)
    runs: dict[str, Callable[[], object]] = {"plain": problem.step}
    runs |= {name: program.run for name, program in programs.items()}
    runs |= {f"part {name}": program.run for name, program in parts.items()}
    start = time.process_time()
    for run in runs.values():  # warms up as well
        run()
    slow = time.process_time() - start > SLOW
    count = min(repeats, FEWER) if slow else repeats
    low = interleaved(runs, count, warm_up=0 if slow else 1)
    plain = low.pop("plain")
    for name in programs:
        found[name]["ratio"] = low[name] / plain
    return {
        "batch": len(problem.x),
        "plain seconds": plain,
        "repeats": count,
        "contenders": found,
        **({"work": _work(problem, programs["ours"])} if "ours" in programs else {}),
        **({"parts": {name: low[f"part {name}"] / plain for name in parts}} if parts else {}),
    }


def _work(problem: Problem, program: Program) -> dict[str, float]:
    """What a step of ours cannot do without."""
    size = bounds.results(program.run())
    return {
        "plain multiply-adds": bounds.multiply_adds(problem.step),
        "multiply-adds": bounds.multiply_adds(program.run),
        "result bytes": size,
        "writing results": bounds.writing(size),
    }


def _first(
    name: str, quantity: str, problem: Problem
) -> tuple[Program | None, dict[str, Any], dict[str, Tensor] | None]:
    """The program of a contender, what is known before it is timed, and its values, where it can be run."""
    if missing(name):
        return None, {"missing": f"{CONTENDERS[name].distribution} is not installed"}, None
    try:
        program = CONTENDERS[name].program(quantity, problem)
        result = program.run()
        known = list(dict(problem.model.named_parameters()))
        covered = known if program.covers is None else program.covers(result)
        values = None if program.values is None else {k: v.detach().clone() for k, v in program.values(result).items()}
    except Unsupported as reason:
        return None, {"unsupported": str(reason)}, None
    except Exception as error:
        if name == "ours" and not isinstance(error, LayerwiseError):  # a refusal is an answer
            raise
        return None, {"fails": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}, None
    left_out = [k for k in known if k not in covered]
    return program, ({"leaves out": left_out} if left_out else {}), values


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the parameter's largest value, over what both have."""
    both = [k for k in theirs if k in ours]
    largest = max(float(v.abs().max()) for v in ours.values())
    scales = {k: max(float(ours[k].abs().max()), FLOOR * largest) for k in both}
    return max(float((theirs[k] - ours[k]).abs().max()) / scales[k] for k in both)


def _other_shape(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    """What a library says it computed where that is no value of the parameter at all."""
    for name in ours.keys() & theirs.keys():
        if ours[name].shape != theirs[name].shape:
            return f"gives {name} the shape {tuple(theirs[name].shape)}, not {tuple(ours[name].shape)}"
    return None


def quiet() -> None:
    """One thread, and no warnings: the setting of all measurements."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def program_of(net: str, quantity: str, name: str, batch: int | None = None) -> Callable[[], object]:
    """The step of one contender, or the plain one, for a process that measures its memory."""
    problem = NETS[net].problem(QUANTITIES[quantity].exact, batch)
    return problem.step if name == "plain" else CONTENDERS[name].program(quantity, problem).run
