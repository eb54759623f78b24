"""What came of a random program of `random_kinds`: every value that came is that of brute force, every error typed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import oracle
import torch
from random_kinds import Kind
from random_nets import TORCHS_OWN
from torch import Tensor

import layerwise as lw
from layerwise import errors

__all__ = ["Verdict", "WrongValue", "verdict"]

Named = dict[str, Tensor]


class WrongValue(AssertionError):
    """A value that is not that of brute force."""


class Verdict:
    """What came of each quantity: "exact", "no answer" (torch has none), or the text of a refusal."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self.why = ""  # torch's own error

    @property
    def word(self) -> str:
        """Of the whole program: "exact", "in part" where some are refused, "refused", "no answer"."""
        found = {"refused" if word not in ("exact", "no answer") else word for word in self.parts.values()}
        if found <= {"exact", "no answer"}:
            return "exact" if "exact" in found else "no answer"
        return "in part" if "exact" in found else "refused"

    @property
    def refusals(self) -> dict[str, str]:
        """The texts of refusals by quantity."""
        return {name: word for name, word in self.parts.items() if word not in ("exact", "no answer")}


def verdict(program: Kind) -> Verdict:
    """Compare every quantity of a program with brute force.

    Raises: WrongValue where one differs; an error that is no LayerwiseError where torch itself runs the program.
    """
    found = Verdict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        params = oracle.parameters(program.model)
        try:
            loss = program.loss()
            torch.autograd.grad(loss, list(params.values()), allow_unused=True)
            if not bool(torch.isfinite(loss)):
                raise RuntimeError("the loss is not finite")
        except TORCHS_OWN as error:
            found.parts["all"] = "no answer"
            found.why = str(error)
            return found
        with program.plain():
            used = oracle.used_names(params, lambda: program.terms().sum())
        for name, (ask, want) in _questions(program, {n: params[n] for n in params if n in used}, params).items():
            found.parts[name] = _asked(name, ask, want, program)
    return found


Question = tuple[Callable[[], Named], Callable[[], Named]]


def _questions(program: Kind, named: Named, every: Named) -> dict[str, Question]:
    """By name: what the library says, and brute force."""
    real = {name: p for name, p in named.items() if not p.is_complex()}
    whole = not any(p.is_complex() for p in every.values())
    loss_of = lambda z: program.ends.terms(z).sum()  # noqa: E731
    total = lambda: program.terms().sum()  # noqa: E731
    grads = lambda: oracle.per_sample_grad(named, program.terms)  # noqa: E731

    def observed(quantity: lw.Quantity) -> Callable[[], Named]:
        def ask() -> Named:
            with lw.observe(program.model, quantity) as seen:
                program.loss().backward()
            return dict(seen[quantity])

        return ask

    def only_real(ask: Callable[[], Named]) -> Callable[[], Named]:
        return lambda: {name: value for name, value in ask().items() if name in real}

    found: dict[str, Question] = {
        "PerSampleGrad": (observed(lw.PerSampleGrad()), grads),
        "SecondMoment": (observed(lw.SecondMoment()), lambda: _moments(grads())),
        "Variance": (observed(lw.Variance()), lambda: _variance(grads())),
        "DiagGGN": (only_real(observed(lw.DiagGGN())), lambda: oracle.diag_ggn(real, program.logits, loss_of)),
        "DiagHessian": (only_real(observed(lw.DiagHessian())), lambda: oracle.diag_hessian(real, total)),
    }
    if whole:
        found["Hessian"] = (
            lambda: {"matrix": lw.Hessian(program.model, program.loss).to_dense()},
            lambda: {"matrix": oracle.hessian(every, total)},
        )
        found["GGN"] = (
            lambda: {"matrix": lw.GGN(program.model, program.loss).to_dense()},
            lambda: {"matrix": oracle.ggn(every, program.logits, loss_of)},
        )
    return found


def _moments(grads: Named) -> Named:
    return {name: g.abs().square().sum(0) for name, g in grads.items()}


def _variance(grads: Named) -> Named:
    if all(not g.is_complex() for g in grads.values()):
        return oracle.variance(grads)
    return {name: g.abs().square().mean(0) - g.mean(0).abs().square() for name, g in grads.items()}


def _asked(name: str, ask: Callable[[], Named], want: Callable[[], Named], program: Kind) -> str:
    params = list(program.model.parameters())
    for p in params:
        p.grad = None
    try:
        with program.hooked():
            got = ask()
    except errors.LayerwiseError as error:
        return f"{type(error).__name__}: {error}"
    except TORCHS_OWN:
        with program.plain(), _quiet() as failed:
            want()
        if failed:
            return "no answer"
        raise
    with program.plain(), _quiet() as failed:
        true = want()
    if failed:
        return "no answer"
    _compare(name, got, true)
    return "exact"


@contextmanager
def _quiet() -> Iterator[list[Exception]]:
    """Keeps torch's own error, if there was one."""
    found: list[Exception] = []
    try:
        yield found
    except TORCHS_OWN as error:
        found.append(error)


def _compare(name: str, got: Named, want: Named) -> None:
    """Relative to the largest value of all parameters: a bias before a norm is 0 in truth, noise in fact."""
    missing = [key for key in want if key not in got and bool(want[key].any())]  # else no path leads there
    more = [key for key in got if key not in want and bool(got[key].any())]
    if missing or more:
        raise WrongValue(f"{name} has no {missing}, and has {more}")
    peak = max((float(v.abs().max()) for v in want.values() if v.numel()), default=0.0)
    for key, value in ((key, want[key]) for key in got if key in want):
        if got[key].shape != value.shape:
            raise WrongValue(f"{name} of {key} has shape {tuple(got[key].shape)}, not {tuple(value.shape)}")
        error = float((got[key] - value).abs().max()) if value.numel() else 0.0
        if not error <= 1e-10 * max(peak, 1e-4):
            raise WrongValue(f"{name} of {key} is off by {error:.1e} of {peak:.1e}: {got[key].flatten()[:4].tolist()}")
