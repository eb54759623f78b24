"""The coupling μ between codes and the layers' outputs, and its growth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.errors import BadInput

__all__ = ["Coupling"]


@dataclass(frozen=True)
class Coupling:
    """μ of `(μ/B) ½ ‖c − W a‖²`, which after each minibatch becomes `min(most, μ·factor + add)`.

    Constant by default; additive with `add`, multiplicative with `factor`. Raises BadInput for settings that cannot be.
    """

    start: float
    add: float = 0.0
    factor: float = 1.0
    most: float = float("inf")

    def __post_init__(self) -> None:
        good = 0 < self.start < float("inf") and self.most >= self.start and self.factor >= 1
        if not (good and 0 <= self.add < float("inf") and self.factor < float("inf")):
            raise BadInput(f"a Coupling needs a finite start > 0, most ≥ start, factor ≥ 1 and add ≥ 0; got {self}")

    def numbers(self) -> dict[str, float]:
        """The settings of a parameter group."""
        return {"coupling": self.start, "coupling_add": self.add, "coupling_factor": self.factor,
                "coupling_most": self.most}  # fmt: skip

    @staticmethod
    def grown(group: Mapping[str, Any]) -> float:
        """μ of a parameter group after a minibatch."""
        mu, add, factor = group["coupling"], group["coupling_add"], group["coupling_factor"]
        return min(group["coupling_most"], mu * factor + add) if add or factor != 1 else mu

    @staticmethod
    def check(group: Mapping[str, Any]) -> None:
        """Raise BadInput for a group's settings that cannot be."""
        mu, add, factor, most = (group[key] for key in ("coupling", "coupling_add", "coupling_factor", "coupling_most"))
        if not (0 < mu < float("inf") and add >= 0 and factor >= 1 and most > 0):
            raise BadInput(
                f"AltMin needs a finite coupling > 0 that grows; got coupling={mu}, coupling_add={add}, "
                f"coupling_factor={factor}, coupling_most={most}"
            )
