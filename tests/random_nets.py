"""Small random programs, one family of layers each: shapes, sample counts from 0, dtypes, frozen parameters, losses.

Some of them plain torch cannot run (a kernel larger than its input, an empty batch under a mean): `Program.runs`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo.parts import Apply, Mean, leaf

__all__ = ["FAMILIES", "TORCHS_OWN", "Program", "programs"]

TORCHS_OWN = (RuntimeError, ValueError, AssertionError, IndexError)  # of programs that plain torch refuses too

Made = tuple[nn.Module, Any]  # a model from inputs to [N, o], and its inputs but for N: shapes, or token counts


@dataclass
class Program:
    """A drawn model with its batch and its loss, a function of the model's output, the target and the reduction.

    samples: what the user says as `samples=`.
    """

    model: nn.Module
    x: tuple[Tensor, ...]
    y: Tensor
    call: Callable[[Tensor, Tensor, str], Tensor]
    reduction: str
    factor: float
    description: str
    samples: int | Tensor | None = None

    def __repr__(self) -> str:
        shapes = [tuple(x.shape) for x in self.x]
        return f"{self.description}, {shapes}, {self.reduction}, {self.factor}, {self.model}"

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.x[0])

    @property
    def single(self) -> bool:
        """Whether it computes in float32."""
        return next(self.model.parameters()).dtype == torch.float32

    def in_double(self) -> Self:
        """The same program in float64."""
        x, y = (tuple(t.double() if t.is_floating_point() else t for t in ts) for ts in (self.x, (self.y,)))
        return replace(self, model=deepcopy(self.model).double(), x=x, y=y[0])

    def logits(self) -> Tensor:
        """What the loss receives."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that uneven padding copies the input
            return self.model(*self.x)

    def loss_of(self, z: Tensor) -> Tensor:
        """The loss as its user writes it."""
        value = self.call(z, self.y, self.reduction)
        return self.factor * (value.sum() if self.reduction == "none" else value)

    def loss(self) -> Tensor:
        """The same from the inputs."""
        return self.loss_of(self.logits())

    def terms(self) -> Tensor:
        """Each sample's term: its own loss, over the number by which the mean divides."""
        z = self.logits()
        terms = torch.stack([self.call(z[n : n + 1], self.y[n : n + 1], "sum") for n in range(self.n)])
        return self.factor * terms * (self._share() if self.reduction == "mean" else 1)

    def _share(self) -> Tensor | float:
        """One over the number by which the mean divides, from the gradients of mean and sum."""
        z = self.logits().detach().requires_grad_()
        mean, total = (torch.autograd.grad(self.call(z, self.y, r), z)[0] for r in ("mean", "sum"))
        return (mean * total).sum() / total.square().sum() if total.any() else 1.0

    def runs(self) -> bool:
        """Whether plain torch computes a finite loss that depends on some parameter."""
        try:
            loss = self.loss()
            if not loss.requires_grad or not bool(torch.isfinite(loss)):
                return False
            torch.autograd.grad(loss, [p for p in self.model.parameters() if p.requires_grad], allow_unused=True)
        except TORCHS_OWN:
            return False
        return True


# Layers -----------------------------------------------------------------------------------------


def _linear(draw: Callable, i: int, o: int) -> Made:
    lead = draw(st.sampled_from([(), (2,), (3, 1)]))
    h = draw(st.integers(1, 4))
    layers = [nn.Linear(i, h, bias=draw(st.booleans())), nn.Tanh(), nn.Linear(h, o, bias=draw(st.booleans()))]
    return nn.Sequential(*layers, *([Mean(*range(1, 1 + len(lead)))] if lead else [])), [(*lead, i)]


def _time_first(draw: Callable, i: int, o: int) -> Made:
    """Time first inside, any number of steps and of layers that read it so."""
    t, h = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    mixing = torch.randn(t, t).tril()

    def forward(m: Any, x: Tensor) -> Tensor:
        z = torch.einsum("st,tnh->snh", mixing.to(x.dtype), m.inner(x.transpose(0, 1)).tanh())
        return m.head(z).mean(0)

    return Apply(forward, inner=nn.Linear(i, h), head=nn.Linear(h, o, bias=draw(st.booleans()))), [(t, i)]


def _spatial(draw: Callable, dims: int) -> list[int]:
    return [draw(st.integers(1, 5 if dims < 3 else 3)) for _ in range(dims)]


def _conv(draw: Callable, i: int, o: int) -> Made:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.integers(0, 3)) == 0
    first = getattr(nn, f"Conv{dims}d")(
        i * groups, 2 * groups, draw(st.integers(1, 3)), stride=1 if same else draw(st.integers(1, 2)),
        padding=draw(st.sampled_from(["same", "valid"])) if same else draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)), groups=groups, bias=draw(st.booleans()), padding_mode=mode,
    )  # fmt: skip
    second = getattr(nn, f"Conv{dims}d")(2 * groups, o, 1)
    model = nn.Sequential(first, nn.ReLU(inplace=draw(st.booleans())), second, Mean(*range(2, 2 + dims)))
    return model, [(i * groups, *_spatial(draw, dims))]


def _transposed(draw: Callable, i: int, o: int) -> Made:
    dims, groups, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    first = getattr(nn, f"ConvTranspose{dims}d")(
        i * groups, 2 * groups, draw(st.integers(1, 3)), stride=stride, padding=draw(st.integers(0, 2)),
        output_padding=draw(st.integers(0, 1)), dilation=draw(st.integers(1, 2)), groups=groups,
        bias=draw(st.booleans()),
    )  # fmt: skip
    second = getattr(nn, f"ConvTranspose{dims}d")(2 * groups, o, 1)
    model = nn.Sequential(first, nn.Tanh(), second, Mean(*range(2, 2 + dims)))
    return model, [(i * groups, *_spatial(draw, dims))]


def _norm(draw: Callable, i: int, o: int) -> Made:
    kind = draw(st.sampled_from(["layer", "group", "instance", "rms", "batch"]))
    # a norm of one number is 0 in truth and rounding noise in fact
    size = [draw(st.integers(2, 3)) for _ in range(draw(st.integers(1, 2)))]
    c, one = 2 * i, len(size) == 1
    layer = {
        "layer": lambda: nn.LayerNorm(size, bias=draw(st.booleans())),
        "group": lambda: nn.GroupNorm(draw(st.sampled_from([1, 2, c])), c),
        "instance": lambda: (nn.InstanceNorm1d if one else nn.InstanceNorm2d)(
            c, affine=True, track_running_stats=draw(st.booleans())
        ),
        "rms": lambda: nn.RMSNorm(size[-1]),
        "batch": lambda: (nn.BatchNorm1d if one else nn.BatchNorm2d)(c),
    }[kind]()
    conv = nn.Conv1d if one else nn.Conv2d
    return nn.Sequential(conv(i, c, 1), layer, nn.Tanh(), conv(c, o, 1), Mean(*range(2, 2 + len(size)))), [(i, *size)]


def _embedding(draw: Callable, i: int, o: int) -> Made:
    lead = draw(st.sampled_from([(), (1,), (3,)]))
    padding, h = draw(st.sampled_from([None, 0, -1])), draw(st.integers(1, 4))
    pooled = [Mean(1)] if lead else []
    return nn.Sequential(nn.Embedding(4, h, padding_idx=padding), *pooled, nn.Tanh(), nn.Linear(h, o)), [
        ("tokens", *lead)
    ]


def _bag(draw: Callable, i: int, o: int) -> Made:
    t, h, mode = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from(["sum", "mean"]))
    padding = draw(st.sampled_from([None, 0, 3]))
    return nn.Sequential(nn.EmbeddingBag(4, h, mode=mode, padding_idx=padding), nn.Tanh(), nn.Linear(h, o)), [
        ("tokens", t)
    ]


def _recurrent(draw: Callable, i: int, o: int) -> Made:
    kind = draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))
    h, both, first = draw(st.integers(1, 2)), draw(st.booleans()), draw(st.booleans())
    cell = kind(i, h, draw(st.integers(1, 2)), bias=draw(st.booleans()), bidirectional=both, batch_first=first)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.cell(x)[0].mean(1) if first else m.cell(x.transpose(0, 1))[0].mean(0))

    return Apply(forward, cell=cell, head=nn.Linear((1 + both) * h, o)), [(draw(st.integers(1, 3)), i)]


def _attention(draw: Callable, i: int, o: int) -> Made:
    heads, first = draw(st.integers(1, 2)), draw(st.booleans())
    attend = nn.MultiheadAttention(2 * heads, heads, bias=draw(st.booleans()), batch_first=first)
    weights = draw(st.booleans())

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.inner(x) if first else m.inner(x).transpose(0, 1)
        return m.head(m.attend(h, h, h, need_weights=weights)[0].mean(1 if first else 0))

    t = draw(st.integers(1, 3))
    return Apply(forward, inner=nn.Linear(i, 2 * heads), attend=attend, head=nn.Linear(2 * heads, o)), [(t, i)]


def _bare(draw: Callable, i: int, o: int) -> Made:
    kind, t = draw(st.sampled_from(["bilinear", "prelu", "scale", "token", "table"])), draw(st.integers(1, 3))
    if kind == "bilinear":
        j = draw(st.integers(1, 3))
        mix = nn.Bilinear(i, j, 3, bias=draw(st.booleans()))
        return Apply(lambda m, a, b: m.head(m.mix(a, b).tanh()), mix=mix, head=nn.Linear(3, o)), [(i,), (j,)]
    if kind == "prelu":
        count = draw(st.sampled_from([1, 3]))
        return nn.Sequential(nn.Conv1d(i, 3, 1), nn.PReLU(count), nn.Conv1d(3, o, 1), Mean(-1)), [(i, t)]
    forward = {
        "scale": lambda m, x: m.head((m.p * m.inner(x)).tanh() + m.shift).mean(1),
        "token": lambda m, x: m.head(torch.cat([m.token.expand(len(x), -1, -1), m.inner(x)], 1).tanh()).mean(1),
        "table": lambda m, x: m.head((m.inner(x) + m.table).tanh()).mean(1),
    }[kind]
    shapes = {
        "scale": {"p": (3,), "shift": (1,)},
        "token": {"token": (1, 1, 3)},
        "table": {"table": (t, 3)},
    }
    parts = {name: leaf(*shape) for name, shape in shapes[kind].items()}
    return Apply(forward, inner=nn.Linear(i, 3), head=nn.Linear(3, o), **parts), [(t, i)]


def _tied(draw: Callable, i: int, o: int) -> Made:
    """A weight used as it is, transposed, and once more after the mean over the positions."""
    inner = nn.Linear(i, 3, bias=draw(st.booleans()))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.linear(m.inner(x).tanh(), m.inner.weight.t())
        return m.head(m.inner(h.mean(1)).tanh())

    return Apply(forward, inner=inner, head=nn.Linear(3, o)), [(draw(st.integers(1, 3)), i)]


FAMILIES: dict[str, Callable[[Callable, int, int], Made]] = {
    "linear": _linear, "time_first": _time_first, "conv": _conv, "transposed": _transposed, "norm": _norm,
    "embedding": _embedding, "bag": _bag, "recurrent": _recurrent, "attention": _attention, "bare": _bare,
    "tied": _tied, "losses": _linear,
}  # fmt: skip


# Losses -----------------------------------------------------------------------------------------


def _classes(draw: Callable, shape: tuple[int, ...], dtype: torch.dtype, every: bool) -> tuple[Callable, Tensor]:
    options: dict[str, Any] = {}
    y = torch.randint(shape[1], (shape[0], *shape[2:]))
    weight = None
    if every:
        if draw(st.booleans()):
            weight = torch.rand(shape[1], dtype=dtype) + 0.5
        if draw(st.booleans()):
            options["ignore_index"] = draw(st.sampled_from([-100, 0]))
            y.view(-1)[::2] = options["ignore_index"]
        kind = draw(st.sampled_from(["plain", "smooth", "soft", "nll"]))
        if kind == "nll":
            return lambda z, y, r: F.nll_loss(z.log_softmax(1), y, _like(z, weight), reduction=r, **options), y
        if kind == "smooth":
            options["label_smoothing"] = 0.2
        if kind == "soft":
            options.pop("ignore_index", None)
            y = torch.rand(shape, dtype=dtype).softmax(1)
    return lambda z, y, r: F.cross_entropy(z, y, _like(z, weight), reduction=r, **options), y


def _like(z: Tensor, constant: Tensor | None) -> Tensor | None:
    """A constant of the loss in the type of its input, since programs are also run in float64."""
    return None if constant is None else constant.to(z.dtype)


def _values(draw: Callable, shape: tuple[int, ...], dtype: torch.dtype, every: bool) -> tuple[Callable, Tensor]:
    y = torch.randn(shape, dtype=dtype)
    kind = draw(st.sampled_from(["bce", "huber", "smooth_l1", "poisson", "gaussian", "mse"])) if every else "mse"
    positive = torch.rand(shape[-1], dtype=dtype) + 0.5
    if kind == "bce":
        y = (y > 0).to(dtype)
    if kind == "poisson":
        y = y.abs().round()
    call = {
        "mse": lambda z, y, r: F.mse_loss(z, y, reduction=r),
        "bce": lambda z, y, r: F.binary_cross_entropy_with_logits(z, y, pos_weight=_like(z, positive), reduction=r),
        "huber": lambda z, y, r: F.huber_loss(z, y, reduction=r, delta=0.7),
        "smooth_l1": lambda z, y, r: F.smooth_l1_loss(z, y, reduction=r, beta=0.7),
        "poisson": lambda z, y, r: F.poisson_nll_loss(z, y, reduction=r),
        "gaussian": lambda z, y, r: F.gaussian_nll_loss(z, y, positive.to(z.dtype).expand(z.shape), reduction=r),
    }[kind]
    return call, y


@st.composite
def programs(draw: Callable, family: str) -> Program:
    """Programs of one family."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    n, i, o = draw(st.integers(0, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    model, inputs = FAMILIES[family](draw, i, o)
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    model = model.to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.6)  # a saturated softmax has a Hessian that brute force knows to few digits
    for p in model.parameters():
        p.requires_grad_(draw(st.integers(0, 4)) > 0)
    x = tuple(
        torch.randint(4, (n, *shape[1:])) if shape[:1] == ("tokens",) else torch.randn(n, *shape, dtype=dtype)
        for shape in inputs
    )
    kind = draw(st.sampled_from([_classes, _values]))
    call, y = kind(draw, (n, o), dtype, every=family == "losses")
    factor = draw(st.sampled_from([1.0, 1.0, 10.0]))
    return Program(
        model, x, y, call, draw(st.sampled_from(["mean", "sum", "none"])), factor, f"{kind.__name__}, {dtype}"
    )
