"""Settings of the second-order optimizers: which curvature, how often it is measured, and the keywords for both."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, TypeVar, get_args

from layerwise.errors import BadInput, Renamed
from layerwise.optim.keywords import Keywords, refuse_unknown
from layerwise.optim.saved_state import is_count, is_number, present
from layerwise.optim.second_order.data_parallel import DataParallel

__all__ = [
    "DIAGONALS", "FACTORS", "KEYWORDS", "KIND", "OF_DIAGONALS", "SAVED", "Curvature", "DiagonalWords", "Kind",
    "KroneckerWords", "Schedule", "ValueWords", "described", "field_of", "in_present_words", "is_due", "present_state",
    "spelled_out",
]  # fmt: skip

Kind = Literal["kfac", "kflr", "kfra", "ekfac", "foof", "diag-ggn", "diag-hessian"]
Sharing = Literal["expand", "reduce"]
Rows = Literal["real", "all"]
DIAGONALS = ("diag-ggn", "diag-hessian")
FACTORS = tuple(kind for kind in get_args(Kind) if kind not in DIAGONALS)
_BY_KIND: Any = "by kind"

F = TypeVar("F", bound=Callable[..., None])


@dataclass(frozen=True)
class Curvature:
    """Which curvature to measure, for `lw.optim.KFAC`, `DiagNewton` and `Preconditioner`.

    kind: of the blocks, by the name of the quantity that measures them: `lw.KFAC`, ..., `lw.DiagGGN`, `lw.DiagHessian`.
    draws: labels (or signs) drawn for each sample; None: a diagonal is exact. Default: None for a diagonal, else 1.
    sharing: of the positions of a sample, as for `lw.KFAC`.
    joint: whether a weight and its bias have one block.
    rows: of which A is the mean, "real" or "all" (padding too), as for `lw.KFAC`.
    largest: the size of the largest factor (2¹³ takes 256 MiB in float32, and its inverse as much).
    Raises BadInput.
    """

    kind: Kind = "kfac"
    draws: int | None = _BY_KIND
    sharing: Sharing = "expand"
    joint: bool = True
    largest: int = 2**13
    rows: Rows = "real"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise BadInput(f"the kinds of curvature are {', '.join(get_args(Kind))}; got kind={self.kind!r}")
        if self.draws is _BY_KIND:
            object.__setattr__(self, "draws", None if self.kind in DIAGONALS else 1)
        if self.sharing == "reduce" and self.kind not in ("kfac", "kflr", "kfra", "foof"):
            raise BadInput(f'sharing="reduce" is for kfac, kflr, kfra and foof; got kind={self.kind!r}')
        if self.rows not in get_args(Rows):
            raise BadInput(f'rows must be "real" or "all"; got rows={self.rows!r}')
        _check_counts(largest_factor=self.largest)
        if self.draws is not None or self.kind not in DIAGONALS:
            _check_counts(draws=self.draws)


@dataclass(frozen=True)
class Schedule:
    """How often curvature is measured and inverted, and how long it is remembered.

    factors: steps from one measured batch to the next. inverses: steps from one inversion to the next.
    decay: ρ of the running averages M_t = ρ M_{t-1} + (1-ρ) X_t, corrected by 1/(1 - ρ^t).
    In the first period steps 1, 2, 4, 8, ... are due too. Raises BadInput.
    """

    factors: int = 5
    inverses: int = 20
    decay: float = 0.95

    def __post_init__(self) -> None:
        _check_counts(update_factors_every=self.factors, update_inverses_every=self.inverses)
        if not 0 <= self.decay < 1:
            raise BadInput(f"a preconditioner needs factor_decay in [0, 1); got factor_decay={self.decay}")


def is_due(step: int, every: int) -> bool:
    """Whether step 0, 1, 2, ... is a multiple of the period, or in the first period a power of two."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise BadInput(f"{name} must be a whole number of at least 1, got {value!r}")


def field_of(value: str, name: str) -> Any:
    """The field of a value that an object holds, to read and to write."""

    def write(self: Any, new: Any) -> None:
        setattr(self, value, replace(getattr(self, value), **{name: new}))

    return property(lambda self: getattr(getattr(self, value), name), write)


# -- keywords for the fields of the values ------------------------------------------------------------------------

KEYWORDS = Keywords(
    {"curvature": Curvature, "schedule": Schedule},
    {"largest": "largest_factor", "decay": "factor_decay", "factors": "update_factors_every",
     "inverses": "update_inverses_every"},
)  # fmt: skip
OF_DIAGONALS = {"decay": "factor_decay", "update_every": "update_factors_every"}  # DiagNewton's own keywords


class ValueWords(TypedDict, total=False):
    """`Curvature` and `Schedule`, or their fields but the kind as keywords. samples: the old word for draws."""

    curvature: Curvature | None
    schedule: Schedule | None
    draws: int | None
    sharing: Sharing
    joint: bool
    largest_factor: int
    rows: Rows
    factor_decay: float
    update_factors_every: int
    update_inverses_every: int
    samples: int


class KroneckerWords(ValueWords, total=False):
    """What `lw.optim.KFAC` hands on to its preconditioner."""

    kind: Kind
    damping: float
    damping_form: Literal["pi", "factored", "eigen"]
    seed: int
    on_nonfinite: Literal["skip", "raise", "defer"]
    parallel: DataParallel | None


class DiagonalWords(TypedDict, total=False):
    """What `lw.optim.DiagNewton` hands on to its preconditioner. samples, curvature's strings: old words."""

    curvature: Curvature | str | None
    schedule: Schedule | None
    kind: Kind
    draws: int | None
    decay: float
    update_every: int
    damping: float
    seed: int
    on_nonfinite: Literal["skip", "raise", "defer"]
    parallel: DataParallel | None
    samples: int


def spelled_out(words: type, like: Callable[..., Any] | None = None, **defaults: Any) -> Callable[[F], F]:
    """The decorator of `Keywords`; defaults are those of the values, of `like`, or given here."""
    known = {} if like is None else {name: p.default for name, p in inspect.signature(like).parameters.items()}
    known |= {word: KEYWORDS.defaults[name] for word, name in OF_DIAGONALS.items()} | defaults
    return KEYWORDS.spelled_out(words, ["samples"], **known)


# -- old words ------------------------------------------------------------------------------------------------------


_OLD = {  # whose values: kinds with the names of today, and whether they are drawn
    "kind": {"diag-ggn-mc": ("diag-ggn", True), "diag-hessian-mc": ("diag-hessian", True)},
    "curvature": {  # of DiagNewton
        "ggn": ("diag-ggn", False), "ggn-mc": ("diag-ggn", True),
        "hessian": ("diag-hessian", False), "hessian-mc": ("diag-hessian", True),
    },
}  # fmt: skip


def in_present_words(
    init: Callable[..., None], words: Mapping[str, Any], kinds: Sequence[str] | None = None
) -> dict[str, Any]:
    """The keywords of a constructor without those of older releases, which are translated with a warning.

    Raises TypeError for a keyword that it does not have, and BadInput for a kind that is none of `kinds`.
    """
    owner = init.__qualname__.split(".")[0]
    refuse_unknown(init, words.keys() - {"samples"})
    now = {word: value for word, value in words.items() if value is not None or word not in ("curvature", "schedule")}
    old = {word: now.pop(word) for word in _OLD if isinstance(now.get(word), str) and now[word] in _OLD[word]}
    samples = {"samples": now.pop("samples")} if "samples" in now else {}
    for word, value in old.items():
        now["kind"], drawn = _OLD[word][value]
        now["draws"] = samples.get("samples", 1) if drawn else None
    old |= samples
    if samples and (owner == "DiagNewton" or now.get("kind") not in DIAGONALS):  # those of a preconditioner were exact
        now.setdefault("draws", samples["samples"])
    if old:
        new = {word: value for word, value in now.items() if word in ("kind", "draws")}
        warnings.warn(
            f"{owner}({_written(old)}) is {owner}({_written(new)}) now: samples are those of the batch, and kinds have "
            "the names of the quantities. The next release takes the old words no more", Renamed, stacklevel=3,
        )  # fmt: skip
    kind = now["curvature"].kind if isinstance(now.get("curvature"), Curvature) else now.get("kind")
    if kinds is not None and kind is not None and kind not in kinds:
        raise BadInput(f"{owner}'s kinds are {', '.join(kinds)}; got kind={kind!r}")
    return now


def _written(words: Mapping[str, Any]) -> str:
    return ", ".join(f"{word}={value!r}" for word, value in words.items())


KIND = "Preconditioner"  # the name in saved states
SAVED: dict[str, Callable[[Any], bool]] = {  # of these numbers, whether a value is one
    "damping": lambda value: is_number(value) and value > 0,
    "draws": lambda value: value is None or (is_count(value) and value > 0),
    "steps": is_count,
    "skipped": is_count,
    "left": lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
}


def present_state(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a preconditioner in present words; in older ones a kind ends in "-mc" where a diagonal is drawn.

    Raises BadInput for one that is not a preconditioner's, or lacks keys.
    """
    state = present(saved, KIND, ("kind", "damping", "steps", "skipped", "left", "blocks"))
    blocks = state["blocks"]
    if isinstance(blocks, Mapping):
        blocks = {name: _renamed(its) if isinstance(its, Mapping) else its for name, its in blocks.items()}
    draws = state.get("draws", None if state["kind"] in DIAGONALS else 1)
    return {**_renamed(state), "draws": draws, "blocks": blocks}


def _renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value).removesuffix("-mc") if key == "kind" else value for key, value in state.items()}


def described(kind: str, draws: int | None) -> str:
    """A kind, and for a diagonal how many draws it is made of; without, it is exact."""
    return kind if draws is None or kind not in DIAGONALS else f"{kind} (draws={draws})"
