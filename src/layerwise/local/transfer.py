"""Transfer functions and the convex losses that match them.

A monotone transfer function is the gradient of a convex potential, `f = ∇F`. The matching loss of a
layer with pre-activation `a` and target `y` is `F(a) − y·a`, whose gradient in `a` is `f(a) − y`: no
derivative of `f` appears. With the dual `F*` it becomes the non-negative gap
`F(a) + F*(y) − y·a`, zero exactly where `y = f(a)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.errors import BadInput

__all__ = [
    "ARCTAN", "ELU", "HARD_TANH", "IDENTITY", "RELU", "RELU_SQUARED", "SIGMOID", "SOFTMAX", "SOFTPLUS",
    "TANH", "Transfer", "elu", "find", "hard_tanh", "leaky_relu", "softplus", "squared",
]  # fmt: skip

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Transfer:
    """A transfer function `f = ∇F` with the potential, dual and range of its matching loss.

    Shapes: `f`, `potential` and `dual` act elementwise; with `joint=True` they act on the last axis
    `o` (softmax), and `potential` and `dual` drop it. `low`, `high`: the ends of the closed range.
    `monotone`: False where the named function is not (GELU, SiLU). `stand_in`: True where the
    squared loss of LocoProp-S replaces a matching loss that does not exist or is not tabulated; all
    the functions are then those of the identity, and only the name is the model's. `slope`: the largest
    slope of f. `made_by`: the name here and the arguments that make it again in another process.
    Source: Amid, Anil and Warmuth (2022), section 3.
    """

    name: str
    f: Map
    potential: Map
    dual: Map | None
    low: float = -math.inf
    high: float = math.inf
    f_: Map | None = None
    monotone: bool = True
    stand_in: bool = False
    joint: bool = False
    slope: float = 1.0
    made_by: tuple[str, tuple[Any, ...]] | None = field(default=None, init=False, compare=False, repr=False)

    def __reduce__(self) -> Any:
        """Pickles the functions of this module by name, others by their fields."""
        if self.made_by is not None:
            return _remade, self.made_by
        return Transfer, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    @property
    def is_squared(self) -> bool:
        """Whether the matching loss is the squared loss: the identity and the stand-ins."""
        return self.potential is _half_square

    def residual_(self, a: Tensor, y: Tensor) -> Tensor:
        """Overwrite `a` with `f(a) − y` and return it."""
        return torch.sub(self.f(a), y, out=a) if self.f_ is None else self.f_(a).sub_(y)

    def project(self, y: Tensor) -> Tensor:
        """The point of the closed range nearest to `y`; for softmax, of the simplex over the last axis."""
        if self.joint:
            return _project_simplex(y)
        return y if math.isinf(self.low) and math.isinf(self.high) else y.clamp(self.low, self.high)

    def matching(self, a: Tensor, y: Tensor) -> Tensor:
        """Matching loss without its constant, `F(a) − y·a`: elementwise, or `[...]` for joint ones."""
        product = y * a
        return self.potential(a) - (product.sum(-1) if self.joint else product)

    def gap(self, a: Tensor, y: Tensor) -> Tensor:
        """Fenchel-Young gap `F(a) + F*(y) − y·a ≥ 0`, 0 where `y = f(a)`; BadInput without a known F*."""
        if self.dual is None:
            raise BadInput(f"{self.name} has no tabulated dual F*: use bregman(a, b), which needs F alone")
        return self.matching(a, y) + self.dual(y)

    def bregman(self, a: Tensor, b: Tensor) -> Tensor:
        """Divergence `F(a) − F(b) − f(b)·(a − b) ≥ 0` of pre-activation `a` from pre-activation `b`."""
        product = self.f(b) * (a - b)
        return self.potential(a) - self.potential(b) - (product.sum(-1) if self.joint else product)


def _project_simplex(y: Tensor) -> Tensor:
    """Euclidean projection on the simplex: `max(y − τ, 0)` with τ such that it sums to one."""
    ordered = y.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, y.shape[-1] + 1, device=y.device, dtype=y.dtype)
    support = (ordered * count > excess).sum(-1, keepdim=True)
    return (y - excess.gather(-1, support - 1) / support).clamp_min(0)


def _within(y: Tensor, low: float, high: float, value: Tensor) -> Tensor:
    return torch.where((y >= low) & (y <= high), value, math.inf)


def _log1pexp(a: Tensor) -> Tensor:
    # Not F.softplus, which is linear beyond 20 and so is wrong by 2e-9 there.
    return torch.logaddexp(a, a.new_zeros(()))


def _half_square(a: Tensor) -> Tensor:
    return 0.5 * a.square()


def _log_cosh(a: Tensor) -> Tensor:
    m = a.abs()
    return m + torch.log1p(torch.exp(-2 * m)) - math.log(2)


def _tanh_dual(y: Tensor) -> Tensor:
    c = y.clamp(-1, 1)
    return _within(y, -1, 1, 0.5 * (torch.xlogy(1 + c, 1 + c) + torch.xlogy(1 - c, 1 - c)))


def _sigmoid_dual(y: Tensor) -> Tensor:
    c = y.clamp(0, 1)
    return _within(y, 0, 1, torch.xlogy(c, c) + torch.xlogy(1 - c, 1 - c))


def _softmax_dual(y: Tensor) -> Tensor:
    c = y.clamp_min(0)
    on_simplex = (y >= 0).all(-1) & ((y.sum(-1) - 1).abs() <= 16 * y.shape[-1] * torch.finfo(y.dtype).eps)
    return torch.where(on_simplex, torch.xlogy(c, c).sum(-1), math.inf)


def _arctan_potential(a: Tensor) -> Tensor:
    # log(1 + a²) = 2 log hypot(1, a): a² alone overflows.
    return a * a.atan() - torch.hypot(a, torch.ones_like(a)).log()


_BERNOULLI = ((0, 1.0), (1, 0.5), (2, 1 / 6), (4, -1 / 30), (6, 1 / 42), (8, -1 / 30), (10, 5 / 66),
              (12, -691 / 2730), (14, 7 / 6), (16, -3617 / 510))  # fmt: skip


def _softplus_potential(a: Tensor) -> Tensor:
    """`−Li₂(−eᵃ)`: Debye's series in `v = log(1 + e^−|a|) ≤ log 2`, and inversion for a > 0."""
    v = torch.log1p(torch.exp(-a.abs()))
    series = sum(b / math.factorial(n + 1) * v ** (n + 1) for n, b in _BERNOULLI)
    return torch.where(a > 0, math.pi**2 / 6 + 0.5 * a.square() - series, series)


IDENTITY = Transfer("identity", lambda a: a, _half_square, _half_square, f_=lambda a: a)
TANH = Transfer("tanh", torch.tanh, _log_cosh, _tanh_dual, -1.0, 1.0, torch.tanh_)
SIGMOID = Transfer(
    "sigmoid", torch.sigmoid, _log1pexp, _sigmoid_dual, 0.0, 1.0, torch.sigmoid_, slope=0.25,
)  # fmt: skip
RELU = Transfer(
    "relu", torch.relu, lambda a: _half_square(a.clamp_min(0)),
    lambda y: _within(y, 0, math.inf, _half_square(y)), 0.0, f_=torch.relu_,
)  # fmt: skip
SOFTMAX = Transfer(
    "softmax", lambda a: a.softmax(-1), lambda a: a.logsumexp(-1), _softmax_dual, 0.0, 1.0, joint=True, slope=0.5,
)  # fmt: skip
ARCTAN = Transfer(
    "arctan", torch.atan, _arctan_potential,
    lambda y: _within(y, -math.pi / 2, math.pi / 2, -y.cos().log()), -math.pi / 2, math.pi / 2, torch.atan_,
)  # fmt: skip
RELU_SQUARED = Transfer(
    "relu_squared", lambda a: a.clamp_min(0).square(), lambda a: a.clamp_min(0) ** 3 / 3,
    lambda y: _within(y, 0, math.inf, y.clamp_min(0) ** 1.5 * (2 / 3)), 0.0, slope=math.inf,
)  # fmt: skip


def _remade(name: str, args: tuple[Any, ...]) -> Transfer:
    """A transfer function of this module by name, for unpickling."""
    found = globals()[name]
    return found if isinstance(found, Transfer) else found(*args)


def _named(transfer: Transfer, name: str, *args: Any) -> Transfer:
    """The transfer function with its name in this module, for pickling; a `replace` of it loses the name."""
    object.__setattr__(transfer, "made_by", (name, args))
    return transfer


for _name in ("IDENTITY", "TANH", "SIGMOID", "RELU", "SOFTMAX", "ARCTAN", "RELU_SQUARED"):
    _named(globals()[_name], _name)


def leaky_relu(alpha: float = 0.01) -> Transfer:
    """Leaky ReLU, `F = ½a²` above zero and `½αa²` below; α ≥ 0, not monotone for α < 0."""
    if alpha == 0:
        return RELU
    if alpha < 0:
        return squared(f"leaky_relu({alpha:g})", monotone=False)

    def scaled(factor: float) -> Map:
        return lambda x: torch.where(x > 0, _half_square(x), factor * _half_square(x))

    made = Transfer(
        f"leaky_relu({alpha:g})", lambda a: F.leaky_relu(a, alpha), scaled(alpha), scaled(1 / alpha),
        f_=lambda a: F.leaky_relu_(a, alpha), slope=max(1.0, alpha),
    )  # fmt: skip
    return _named(made, "leaky_relu", alpha)


def hard_tanh(low: float = -1.0, high: float = 1.0) -> Transfer:
    """Clamp to [low, high]: `F = c·a − ½c²` with `c = f(a)` (Huber's loss for ±1), `F* = ½y²` in range."""

    def potential(a: Tensor) -> Tensor:
        c = a.clamp(low, high)
        return c * (a - 0.5 * c)

    name = "hard_tanh" if (low, high) == (-1, 1) else f"hard_tanh({low:g},{high:g})"
    made = Transfer(
        name, lambda a: a.clamp(low, high), potential, lambda y: _within(y, low, high, _half_square(y)),
        low, high, lambda a: a.clamp_(low, high),
    )  # fmt: skip
    return _named(made, "hard_tanh", low, high)


def elu(alpha: float = 1.0) -> Transfer:
    """ELU, `F = ½a²` above zero and `α(eᵃ − 1 − a)` below; a stand-in for α ≤ 0."""
    name = "elu" if alpha == 1 else f"elu({alpha:g})"
    if alpha <= 0:
        return squared(name, monotone=alpha == 0)

    def potential(a: Tensor) -> Tensor:
        n = a.clamp_max(0)
        return torch.where(a > 0, _half_square(a), alpha * (torch.expm1(n) - n))

    def dual(y: Tensor) -> Tensor:
        n = (y / alpha).clamp(-1, 0)
        below = alpha * (torch.xlogy(1 + n, 1 + n) - n)
        return _within(y, -alpha, math.inf, torch.where(y > 0, _half_square(y), below))

    made = Transfer(
        name, lambda a: F.elu(a, alpha), potential, dual, -alpha, f_=lambda a: F.elu_(a, alpha), slope=max(1.0, alpha)
    )
    return _named(made, "elu", alpha)


def softplus(beta: float = 1.0) -> Transfer:
    """Softplus, `f = log(1 + e^βa)/β` and `F = −Li₂(−e^βa)/β²`; β > 0; the dual is not elementary."""
    name = "softplus" if beta == 1 else f"softplus({beta:g})"
    potential: Map = lambda a: _softplus_potential(beta * a) / beta**2  # noqa: E731
    return _named(Transfer(name, lambda a: _log1pexp(beta * a) / beta, potential, None, 0.0), "softplus", beta)


def squared(name: str, monotone: bool = True) -> Transfer:
    """A stand-in with the identity's losses, for functions without a (tabulated) matching loss."""
    return _named(replace(IDENTITY, name=name, monotone=monotone, stand_in=True), "squared", name, monotone)


HARD_TANH, ELU, SOFTPLUS = hard_tanh(), elu(), softplus()
Get = Callable[[int, str, Any], Any]  # an option of a call: its position (0 is the input), name, default


def _clamp(low: Any, high: Any) -> Transfer | None:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return RELU if (low, high) == (0, math.inf) else hard_tanh(low, high) if low < high else None


def _find_softplus(get: Get) -> Transfer:
    beta, threshold = float(get(1, "beta", 1)), float(get(2, "threshold", 20))
    return softplus(beta) if beta > 0 and threshold >= 16 else squared("softplus")  # below, the function visibly jumps


def _find_softmax(get: Get, axis: int) -> Transfer:
    z, dim = get(0, "input", None), get(1, "dim", None)
    rank = z.dim() if isinstance(z, Tensor) else 0
    if dim is None:  # the deprecated implicit choice of F.softmax
        dim = 0 if rank in (0, 1, 3) else 1
    same = dim == axis or (rank > 0 and dim % rank == axis % rank)
    return SOFTMAX if same else squared(f"softmax(dim={dim})")


# Names of the calls (as they stand in torch, torch.Tensor, torch.special, F and torch._C._nn; the in-place
# twin `name_` is added), and how options and feature axis give the transfer function.
_FINDERS: dict[str, Callable[[Get, int], Transfer | None]] = {
    "tanh": lambda get, axis: TANH,
    "sigmoid expit": lambda get, axis: SIGMOID,
    "relu": lambda get, axis: RELU,
    "relu6": lambda get, axis: hard_tanh(0.0, 6.0),
    "atan arctan": lambda get, axis: ARCTAN,
    "leaky_relu": lambda get, axis: leaky_relu(float(get(1, "negative_slope", 0.01))),
    "hardtanh": lambda get, axis: _clamp(get(1, "min_val", -1.0), get(2, "max_val", 1.0)),
    "clamp clip": lambda get, axis: _clamp(get(1, "min", None), get(2, "max", None)),
    "clamp_min": lambda get, axis: _clamp(get(1, "min", None), None),
    "clamp_max": lambda get, axis: _clamp(None, get(1, "max", None)),
    "elu": lambda get, axis: elu(float(get(1, "alpha", 1.0))),
    "softplus": lambda get, axis: _find_softplus(get),
    "softmax": _find_softmax,
}
_NOT_MONOTONE = "gelu silu mish hardswish sin cos threshold hardshrink rrelu"
_NO_ENTRY = "selu celu prelu hardsigmoid softsign logsigmoid log_sigmoid tanhshrink softshrink log_softmax"


def _by_call() -> dict[Any, Callable[[Get, int], Transfer | None]]:
    def stand_in(name: str, monotone: bool) -> Callable[[Get, int], Transfer]:
        return lambda get, axis: squared(name, monotone)

    finders = dict(_FINDERS)
    finders |= {name: stand_in(name, False) for name in _NOT_MONOTONE.split()}
    finders |= {name: stand_in(name, True) for name in _NO_ENTRY.split()}
    twins = [(name + twin, found) for key, found in finders.items() for name in key.split() for twin in ("", "_")]
    homes = (torch, Tensor, torch.special, F, torch._C._nn)
    return {getattr(home, name): found for name, found in twins for home in homes if hasattr(home, name)}


_BY_CALL = _by_call()


def find(
    func: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None,
    axis: int = -1,
) -> Transfer | None:  # fmt: skip
    """The transfer function that a torch call, as a `TorchFunctionMode` sees it, applies to its input.

    In-place forms and methods are included; softmax counts where it runs over the feature axis
    `axis` of the input. GELU, SiLU and other activations without a matching loss give a stand-in with
    `stand_in=True`: the squared loss under their name. A call that is no activation gives None.
    """
    named, finder = kwargs or {}, _BY_CALL.get(func, lambda get, axis: None)
    return finder(lambda at, name, default: args[at] if len(args) > at else named.get(name, default), axis)
