"""Typed errors: each names what was asked, what was seen, and what to do; and warnings."""

from __future__ import annotations

__all__ = [
    "AmbiguousSamples",
    "BadInput",
    "CutShort",
    "LayerwiseError",
    "LayerwiseWarning",
    "LeftOut",
    "LogDamaged",
    "NoBackward",
    "NonFinite",
    "Overshot",
    "RandomPass",
    "RankFailed",
    "RankLost",
    "Renamed",
    "SamplesMixed",
    "SlowPath",
    "SquaredInstead",
    "UncoveredUse",
    "Undefined",
    "UnknownLoss",
    "UnsupportedCall",
]


class LayerwiseError(Exception):
    """Base class of every error that layerwise raises on purpose."""


class BadInput(LayerwiseError, ValueError):
    """An argument or a batch cannot be used: wrong shape, empty, wrong device, out of range."""


class UncoveredUse(LayerwiseError):
    """A path from the loss to a parameter passes through no call that the tape recorded."""


class UnknownLoss(LayerwiseError):
    """The loss is not built from calls whose likelihood is known."""


class SamplesMixed(LayerwiseError):
    """No axis of a layer's output belongs to the samples: per-sample quantities are undefined."""


class AmbiguousSamples(LayerwiseError):
    """The batch cannot tell which of several axes carries the samples."""


class Undefined(LayerwiseError):
    """The quantity does not exist for this parameter, model or loss."""


class UnsupportedCall(LayerwiseError):
    """The model makes a call on parameters that layerwise does not decompose yet."""


class NonFinite(LayerwiseError, ArithmeticError):
    """A loss, cotangent or update holds NaN or infinity."""


class Overshot(NonFinite):
    """A finite step made a layer's own loss larger, as one batch of huge numbers can."""


class RankFailed(LayerwiseError, RuntimeError):
    """Another process of the group failed in the work that all of them share; its error is repeated."""


class RankLost(LayerwiseError, RuntimeError):
    """Another process of the group is gone, or gave no answer in time: what ranks do together cannot go on."""


class NoBackward(LayerwiseError, AttributeError):
    """A result was asked for before any backward pass produced it."""


class LayerwiseWarning(UserWarning):
    """Base class of every warning of layerwise: `warnings.simplefilter("ignore", LayerwiseWarning)` silences them."""


class Renamed(LayerwiseWarning, FutureWarning):
    """An argument, or one of its values, goes by another word now; the old one still works in this release."""


class SlowPath(LayerwiseWarning):
    """A result is exact, but a call without row form makes it slow; said once for each call and parameters."""


class SquaredInstead(LayerwiseWarning):
    """A layer's transfer function has no matching loss, so LocoProp-M takes the squared one; said once a function."""


class LeftOut(LayerwiseWarning):
    """A measure of `lw.monitor` does not exist for this model, loss or batch; said once for each, with the reason."""


class RandomPass(LayerwiseWarning):
    """The model draws random numbers, as dropout does: what `lw.attribution` computes is of one draw; said once."""


class CutShort(LayerwiseWarning):
    """A checkpoint cannot be read, as of a run that ended while it was written; an older one serves instead."""


class LogDamaged(LayerwiseWarning):
    """A log of `lw.monitor` could not be written (said once), or lines or runs of a file were left out in reading."""
