"""Small random programs of what users write between the layers, a kind for certain in each and others by chance.

The kinds: one tensor twice in a call, writes in place, complex weights, hooks on parameters, weights assembled in
place, attention with learned parts and dropout, sparse embeddings; and, as losses, those of `random_losses`.

python -m tests.random_programs --seconds 600
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import oracle
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from random_losses import LOSSES, Ends, Sizes
from torch import Tensor, nn
from zoo.parts import Apply, leaf

__all__ = ["KINDS", "Kind", "kinds"]

Draw = Callable[[Any], Any]
Step = Callable[[Any, Tensor], Tensor]  # (model, [N,T,h]) -> [N,T,h]
Hook = Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """A name, what it does, the parts it needs, and the hooks on some of its parameters."""

    name: str
    step: Step
    parts: Mapping[str, Any] = MappingProxyType({})
    hooks: Mapping[str, Hook] = MappingProxyType({})


@dataclass(repr=False)
class Kind:
    """A drawn model with its batch and the ends of its loss.

    seed: of the generator before each run, for dropout.
    """

    model: nn.Module
    x: Tensor
    ends: Ends
    description: str
    seed: int
    hooks: dict[str, Hook] = field(default_factory=dict)

    def __repr__(self) -> str:
        trained = {name: tuple(p.shape) for name, p in self.model.named_parameters() if p.requires_grad}
        return f"{self.description}, x {tuple(self.x.shape)}, {trained}"

    def logits(self) -> Any:
        """Where the Gauss-Newton matrix splits."""
        torch.manual_seed(self.seed)
        return (self.ends.logits or self.ends.run)(self.model, self.x)

    def loss(self) -> Tensor:
        """The loss as its user writes it."""
        torch.manual_seed(self.seed)
        return self.ends.loss(self.ends.run(self.model, self.x))

    def terms(self) -> Tensor:
        """Each sample's term, `[N]`, by plain operations."""
        return self.ends.terms(self.logits())

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The user's hooks on parameters, which brute force goes without."""
        params = dict(self.model.named_parameters())
        handles = [params[name].register_hook(hook) for name, hook in self.hooks.items() if params[name].requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def plain(self) -> Iterator[None]:
        """By formulas where torch's own have no second derivative: attention, dense gradients of embeddings."""
        sparse = [m for m in self.model.modules() if getattr(m, "sparse", False)]
        for m in sparse:
            m.sparse = False
        try:
            with oracle.plain_operations():
                yield
        finally:
            for m in sparse:
                m.sparse = True


def _one(draw: Draw, options: dict[str, Any]) -> tuple[str, Any]:
    name = draw(st.sampled_from(list(options)))
    return name, options[name]


# One tensor twice in a call ---------------------------------------------------------------------


def _rows(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A call on a matrix, for any rows."""
    return lambda z: call(z.reshape(-1, z.shape[-1])).reshape(z.shape)


def _twice(draw: Draw, key: str, size: Sizes) -> Block:
    h = size.h
    vectors: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "einsum": lambda z, v: torch.einsum("ntd,d,d->ntd", z, v, v),
        "einsum_three": lambda z, v: torch.einsum("d,ntd,d,d->ntd", v, z, v, v),
        "layer_norm": lambda z, v: F.layer_norm(z, (h,), v, v),
        "addcmul": lambda z, v: torch.addcmul(z, v, v, value=0.5),
        "where": lambda z, v: torch.where(z > 0, v, v.exp()) * z,
        "lerp": lambda z, v: torch.lerp(z, v, v.sigmoid()),
        "cat": lambda z, v: torch.cat([v.expand_as(z), z, v.expand_as(z)], -1).unflatten(-1, (3, h)).tanh().sum(-2),
        "stack": lambda z, v: torch.stack([v.expand_as(z), v.expand_as(z) * z]).prod(0),
        "outer": lambda z, v: z @ torch.outer(v, v),
        "addcdiv": lambda z, v: torch.addcdiv(z, v, v.exp()),
        "dot": lambda z, v: z * torch.dot(v, v),
        "batch_norm": lambda z, v: F.batch_norm(z.mT, z.new_zeros(h), z.new_ones(h), v, v).mT,
        "group_norm": lambda z, v: F.group_norm(z.mT, 1, v, v).mT,
    }
    squares: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "multi_dot": lambda z, w: _rows(lambda z: torch.linalg.multi_dot([z, w, w]))(z),
        "multi_dot_view": lambda z, w: _rows(lambda z: torch.linalg.multi_dot([z, w, w.T]))(z),
        "matrix": lambda z, w: torch.einsum("nti,ij,kj->ntk", z, w, w),
        "derived": lambda z, w: (lambda d: torch.einsum("nti,ij,jk->ntk", z, d, d))(w.tanh()),
        "linear": lambda z, w: F.linear(z, w, w[0]),
        "addmm": lambda z, w: _rows(lambda z: torch.addmm(w[0], z, w, beta=0.3))(z),
        "bilinear": lambda z, w: F.bilinear(z, z, w.expand(h, h, h), w[0]),
        "memory": lambda z, w: F.scaled_dot_product_attention(z, w, w),
        "chain": lambda z, w: torch.chain_matmul(w, w.T, w)[0] * z,
        "kron": lambda z, w: z @ torch.kron(w, w)[:h, :h],
        "square": lambda z, w: z @ (w @ w) + z @ torch.matrix_power(w, 2),
        "cdist": lambda z, w: torch.cdist(z, w).tanh() @ w,
    }
    vector = draw(st.booleans())
    name, call = _one(draw, vectors if vector else squares)
    part = leaf(h) if vector else leaf(h, h)
    return Block(f"twice {name}", lambda m, z: call(z, getattr(m, key)), {key: part})


# Writes in place --------------------------------------------------------------------------------


def _set(z: Tensor, index: Any, value: Any) -> Tensor:
    z[index] = value
    return z


def _onto(z: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    write(z)
    return z


def _written(draw: Draw, key: str, size: Sizes) -> Block:
    h = size.h
    writes: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
        "add_p": lambda v, z, x: z.add_(v),
        "iadd_p": lambda v, z, x: _onto(z, lambda z: z.__iadd__(v)),
        "mul_p": lambda v, z, x: z.mul_(v),
        "addcmul": lambda v, z, x: z.addcmul_(x, v),
        "lerp": lambda v, z, x: z.lerp_(x, 0.3),
        "relu": lambda v, z, x: F.relu(z, inplace=True),
        "elu": lambda v, z, x: F.elu(z, inplace=True),
        "leaky": lambda v, z, x: F.leaky_relu(z, 0.2, inplace=True),
        "dropout": lambda v, z, x: F.dropout(z, 0.3, inplace=True),
        "scaled": lambda v, z, x: z.mul_(2).sub_(0.1),
        "tanh": lambda v, z, x: z.tanh_(),
        "residual": lambda v, z, x: z.add_(x),
        "own": lambda v, z, x: z.add_(z.tanh()),
        "masked": lambda v, z, x: z.masked_fill_(x > 0, 0.5),
        "slice": lambda v, z, x: _set(z, (slice(None), slice(0, 1)), 0.0),
        "set_p": lambda v, z, x: _set(z, (slice(None), 0), v),
        "first_p": lambda v, z, x: _onto(z, lambda z: z[..., 0].add_(v[0])),
        "part": lambda v, z, x: _onto(z, lambda z: z[..., :1].mul_(3.0)),
        "gated": lambda v, z, x: _onto(z, lambda z: z[..., :1].mul_(z[..., 1:2].tanh())),
        "turned": lambda v, z, x: _onto(z, lambda z: z.mT.add_(v[:, None])),
        "flat": lambda v, z, x: _onto(z, lambda z: z.view(len(z), -1).mul_(0.7)),
        "index_add": lambda v, z, x: z.index_add_(1, torch.tensor([0, 0]), x[:, :1].expand(-1, 2, -1)),
        "index_copy": lambda v, z, x: z.index_copy_(2, torch.tensor([0]), x[..., :1]),
        "scatter": lambda v, z, x: z.scatter_(2, torch.zeros(*z.shape[:2], 1, dtype=torch.long), 0.0),
        "copy": lambda v, z, x: _onto(z, lambda z: z[..., 1].copy_(x[..., 0] * v[0])),
        "chunk": lambda v, z, x: _onto(z, lambda z: z.chunk(2, -1)[0].mul_(2)),
        "clamp": lambda v, z, x: z.clamp_(-1.5, 1.5),
        "fill_diagonal": lambda v, z, x: _onto(z, lambda z: z.diagonal(0, 1, 2).zero_()),
    }
    bases: dict[str, Step] = {
        "linear": lambda m, x: getattr(m, f"{key}l")(x),
        "einsum": lambda m, x: torch.einsum("nti,oi->nto", x, getattr(m, f"{key}l").weight),
        "permuted": lambda m, x: torch.einsum("nti,oi->not", x, getattr(m, f"{key}l").weight).mT,
        "matmul": lambda m, x: x @ getattr(m, f"{key}l").weight,
        "transposed": lambda m, x: getattr(m, f"{key}l")(x.transpose(0, 1)).transpose(0, 1),
        "scaled": lambda m, x: x * getattr(m, f"{key}l").bias,
        "norm": lambda m, x: F.layer_norm(x, (h,), getattr(m, f"{key}l").bias),
        "sliced": lambda m, x: F.pad(getattr(m, f"{key}l")(x), (1, 1))[..., 1:-1],
    }
    base, make = _one(draw, bases)
    chosen = [_one(draw, writes) for _ in range(draw(st.integers(1, 3)))]

    def step(m: Any, x: Tensor) -> Tensor:
        z = make(m, x)
        for _, write in chosen:
            z = write(getattr(m, key), z, x)
        return z

    names = " ".join(name for name, _ in chosen)
    return Block(f"written {base}: {names}", step, {key: leaf(h), f"{key}l": nn.Linear(h, h)})


# Complex weights --------------------------------------------------------------------------------


def _complex(draw: Draw, key: str, size: Sizes) -> Block:
    h, k = size.h, size.h // 2 + 1
    real = draw(st.booleans())
    shape = {"w": (k, k), "c": (k,)}
    parts = {f"{key}{n}": leaf(*s, 2) for n, s in shape.items()}
    parts = parts if real else {n: nn.Parameter(torch.view_as_complex(p.detach().double())) for n, p in parts.items()}
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "mul": lambda z, w, c: z * c,
        "einsum": lambda z, w, c: torch.einsum("nti,io->nto", z, w),
        "matmul": lambda z, w, c: z @ w + c.conj(),
        "linear": lambda z, w, c: F.linear(z, w, c),
        "adjoint": lambda z, w, c: z @ w.mH,
        "derived": lambda z, w, c: z @ (w.conj().T * c),
        "twice": lambda z, w, c: torch.einsum("nti,ij,jk->ntk", z, w, w),
        "real": lambda z, w, c: z * w.real.sum(0) + c.imag,
        "abs": lambda z, w, c: z * c.abs() + c.angle(),
        "outer": lambda z, w, c: z @ torch.outer(c, c.conj()),
    }
    ends: dict[str, Callable[[Tensor], Tensor]] = {
        "irfft": lambda z: torch.fft.irfft(z, n=h),
        "abs": lambda z: F.pad(z.abs(), (0, h - k)),
        "parts": lambda z: torch.view_as_real(z).flatten(-2)[..., :h],
        "power": lambda z: F.pad((z * z.conj()).real, (0, h - k)),
    }
    (name, call), (end, back) = _one(draw, calls), _one(draw, ends)

    def step(m: Any, z: Tensor) -> Tensor:
        w, c = (getattr(m, f"{key}{n}") for n in shape)
        w, c = (torch.view_as_complex(w), torch.view_as_complex(c)) if real else (w, c)
        return back(call(torch.fft.rfft(z), w, c))

    return Block(f"complex {name}, {end}, {'real' if real else 'complex'} parameters", step, parts)


# Hooks, assembled weights -----------------------------------------------------------------------


def _hooked(draw: Draw, key: str, size: Sizes) -> Block:
    mask = (torch.rand(size.h, size.h) > 0.5).double()
    hook = draw(st.sampled_from([lambda g: 2 * g, lambda g: g * mask, lambda g: g.clamp(-0.01, 0.01), torch.sign]))
    return Block("hooked", lambda m, z: getattr(m, key)(z), {key: nn.Linear(size.h, size.h)}, {f"{key}.weight": hook})


def _assembled(draw: Draw, key: str, size: Sizes) -> Block:
    h = size.h
    upper, lower, every = torch.triu_indices(h, h, 1), torch.tril_indices(h, h, -1), range(h)
    writes: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
        "upper": lambda U, u, d: _set(U, (upper[0], upper[1]), u),
        "lower": lambda U, u, d: _set(U, (lower[0], lower[1]), u.tanh()),
        "diagonal": lambda U, u, d: _set(U, (every, every), F.softplus(d)),
        "diagonal_view": lambda U, u, d: U.diagonal().copy_(d),
        "row": lambda U, u, d: _set(U, 0, d),
        "column": lambda U, u, d: U[:, -1].add_(d),
        "ones": lambda U, u, d: _set(U, (every, every), 1.0),
        "scaled": lambda U, u, d: U.mul_(d),
        "tanh": lambda U, u, d: U.tanh_(),
        "masked": lambda U, u, d: U.masked_fill_(torch.eye(h).bool(), 0.3),
        "flat": lambda U, u, d: _set(U.view(-1), slice(0, h), d * u[0]),
        "itself": lambda U, u, d: _set(U, 0, U[1].clone() * d),
        "scatter": lambda U, u, d: U.view(-1).index_add_(0, torch.arange(h), d),
    }
    uses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "matmul": lambda z, U: z @ U,
        "linear": lambda z, U: F.linear(z, U),
        "product": lambda z, U: z @ (U @ U.T),
        "solved": lambda z, U: torch.linalg.solve(torch.eye(h, dtype=z.dtype) + (U - U.T), z.mT).mT,
        "bias": lambda z, U: z + U[0],
        "einsum": lambda z, U: torch.einsum("nti,oi->nto", z, U),
    }
    chosen = [_one(draw, writes) for _ in range(draw(st.integers(1, 4)))]
    use, call = _one(draw, uses)

    def step(m: Any, z: Tensor) -> Tensor:
        U = z.new_zeros(h, h)
        for _, write in chosen:
            write(U, getattr(m, f"{key}u"), getattr(m, f"{key}d"))
        return call(z, U)

    names = " ".join(name for name, _ in chosen)
    return Block(
        f"assembled {names}, {use}", step, {f"{key}u": leaf(h * (h - 1) // 2), f"{key}d": leaf(h)}
    )  # fmt: skip


# Attention, embeddings, common layers -----------------------------------------------------------


def _attention(draw: Draw, key: str, size: Sizes) -> Block:
    h, t = size.h, size.t
    p = draw(st.sampled_from([0.0, 0.0, 0.5]))
    shape = draw(st.sampled_from([(t, t), (1, t, t), (1, t), (t, 1)]))
    sdpa = F.scaled_dot_product_attention
    ways: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
        "fused": lambda b, q, k, v: sdpa(q, k, v, b, p),
        "by_hand": lambda b, q, k, v: F.dropout(F.softmax(q @ k.mT / h**0.5 + b, -1), p) @ v,
        "in_place": lambda b, q, k, v: F.dropout(F.softmax((q @ k.mT).mul_(0.5).add_(b), -1), p) @ v,
        "masked": lambda b, q, k, v: sdpa(
            q, k, v, b.expand(t, t).masked_fill(torch.ones(t, t).triu(1).bool(), -1e9), p
        ),
        "query": lambda b, q, k, v: sdpa(b.expand(t, t).sum(0)[:, None].expand_as(q), k, v, dropout_p=p),
        "causal": lambda b, q, k, v: sdpa(q, k * b.sum(), v, is_causal=True, dropout_p=p),
        "heads": lambda b, q, k, v: sdpa(q[:, None], k[:, None], v[:, None], b, p)[:, 0],
    }
    name, attend = _one(draw, ways)

    def step(m: Any, z: Tensor) -> Tensor:
        return attend(getattr(m, key), *getattr(m, f"{key}q")(z).chunk(3, -1))

    return Block(f"attention {name} {shape} p={p}", step, {key: leaf(*shape), f"{key}q": nn.Linear(h, 3 * h)})


def _sparse(draw: Draw, key: str, size: Sizes) -> Block:
    h = size.h
    padding = draw(st.sampled_from([None, 0]))
    index = torch.randint(4, (size.n, size.t))
    if draw(st.booleans()):
        table: nn.Module = nn.Embedding(4, h, padding_idx=padding, sparse=True)
        return Block("sparse embedding", lambda m, z: z + getattr(m, key)(index), {key: table})
    mode = draw(st.sampled_from(["sum", "mean"]))
    bag = nn.EmbeddingBag(4, h, mode=mode, padding_idx=padding, sparse=True)
    return Block(f"sparse bag {mode}", lambda m, z: z * getattr(m, key)(index)[:, None], {key: bag})


def _common(draw: Draw, key: str, size: Sizes) -> Block:
    h = size.h
    layers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(h, h), "norm": lambda: nn.LayerNorm(h), "rms": lambda: nn.RMSNorm(h),
        "deep": lambda: nn.Sequential(nn.Linear(h, 2), nn.GELU(), nn.Linear(2, h)),
        "prelu": lambda: nn.PReLU(),
    }  # fmt: skip
    name, make = _one(draw, layers)
    return Block(name, lambda m, z: getattr(m, key)(z), {key: make()})


_BLOCKS: dict[str, Callable[[Draw, str, Sizes], Block]] = {
    "twice": _twice, "written": _written, "complex": _complex, "hooked": _hooked, "assembled": _assembled,
    "attention": _attention, "sparse": _sparse, "common": _common,
}  # fmt: skip
KINDS = (*(name for name in _BLOCKS if name != "common"), *LOSSES)


# Programs ---------------------------------------------------------------------------------------


def _between(draw: Draw) -> tuple[str, Callable[[Tensor], Tensor]]:
    return _one(
        draw,
        {"": lambda z: z, "tanh": torch.tanh, "gelu": F.gelu, "sigmoid": torch.sigmoid, "softplus": F.softplus},
    )


@st.composite
def kinds(draw: Draw, kind: str) -> Kind:
    """Programs with one kind for certain."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    n, t, h = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 3))
    size = Sizes(n, t, h, draw(st.integers(2, 3)))
    names = [kind] if kind in _BLOCKS else []
    names += [draw(st.sampled_from([*_BLOCKS, "common", "common"])) for _ in range(draw(st.integers(0, 2)))]
    blocks = [_BLOCKS[name](draw, f"p{at}", size) for at, name in enumerate(draw(st.permutations(names)))]
    acts = [_between(draw) for _ in blocks]
    residual = draw(st.booleans())
    loss = kind if kind in LOSSES else draw(st.sampled_from([*LOSSES, "known", "known"]))

    def body(m: Any, x: Tensor) -> Tensor:
        z = m.first(x).tanh()
        for block, (_, act) in zip(blocks, acts, strict=True):
            out = act(block.step(m, z))
            z = z + out if residual else out
        return z

    parts = {name: part for block in blocks for name, part in block.parts.items()}
    said, make = LOSSES[loss](draw, size)
    model, ends = make(Apply(body, first=nn.Linear(2, h), **parts))
    model = model.double()
    for p in model.parameters():
        p.requires_grad_(draw(st.integers(0, 6)) > 0)
    prefix = next(name for name, m in model.named_modules() if type(m) is Apply and m.function is body)
    hooks = {f"{prefix}.{name}".lstrip("."): hook for block in blocks for name, hook in block.hooks.items()}
    text = ", ".join([f"{b.name} {act}".strip() for b, (act, _) in zip(blocks, acts, strict=True)])
    return Kind(
        model, torch.randn(n, t, 2, dtype=torch.float64), ends,
        f"[{text}] {'residual ' if residual else ''}under {said}, size {tuple(size)}", draw(st.integers(0, 99)), hooks,
    )  # fmt: skip
