"""Brute force: every quantity by loops over samples, outputs and elements, in plain torch autograd.

The library is tested against this file, so nothing here imports it, nothing is batched and nothing
is clever. Functions take `params`, a mapping from name to leaf tensor, and closures that run the
model, so that any program is a subject: a module, a dictionary of tensors, a loss made in `forward`.

    terms:   () -> [N], the samples' terms of the loss as written; they sum to the loss
    logits:  () -> the tensor (or tuple of tensors) that the loss calls receive
    loss_of: logits -> the loss; terms_of: logits -> [N]

Scaling is `scale="loss"` unless said otherwise: g_n is the gradient of term n, so sum_n g_n = .grad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.attention
from oracle_rows import EVERY, PRODUCTS, bias_rows, input_rows, output_rows, unfold
from torch import Tensor, nn

__all__ = [
    "assert_close",
    "clipped_grad",
    "diag_ggn",
    "diag_hessian",
    "ggn",
    "gradient",
    "hessian",
    "kfac_factors",
    "kfra_factors",
    "noise_scale",
    "pairwise_dot",
    "parameters",
    "per_sample_grad",
    "plain_operations",
    "second_moment",
    "sketch",
    "squared_norm",
    "total",
    "unfold",
    "used_names",
    "variance",
]

Named = dict[str, Tensor]
Outputs = Tensor | Sequence[Tensor]


def parameters(model: Any) -> Named:
    """The trainable parameters by name, of a module or of a mapping of leaf tensors."""
    pairs = model.items() if isinstance(model, Mapping) else model.named_parameters()
    return {name: p for name, p in pairs if p.requires_grad}


def _pull(out: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
    """The gradient of one scalar, zeros where there is no path."""
    if not out.requires_grad:
        return [torch.zeros_like(p) for p in params.values()]
    grads = torch.autograd.grad(out, list(params.values()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params.values(), strict=True)]


def gradient(params: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> Named:
    """The gradient of the loss, shapes of the parameters."""
    return dict(zip(params, _pull(loss(), params), strict=True))


def used_names(params: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> set[str]:
    """The names of the parameters from which some path leads to the loss."""
    grads = torch.autograd.grad(loss(), list(params.values()), allow_unused=True)
    return {name for name, g in zip(params, grads, strict=True) if g is not None}


# First order ------------------------------------------------------------------------------------


def per_sample_grad(params: Mapping[str, Tensor], terms: Callable[[], Tensor]) -> Named:
    """g_n, the gradient of each sample's term: `[N, *shape]`, one backward pass per sample."""
    rows = [_pull(term, params) for term in terms().unbind()]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(params)}


def squared_norm(grads: Mapping[str, Tensor]) -> Named:
    """||g_n||² per parameter, `[N]`, from per-sample gradients; see `total` for the whole model's."""
    return {name: torch.stack([(row * row).sum() for row in g]) for name, g in grads.items()}


def total(values: Mapping[str, Tensor]) -> Tensor:
    """The sum over parameters of values of one shape (the whole model's squared norms)."""
    return torch.stack(list(values.values())).sum(0)


def second_moment(grads: Mapping[str, Tensor], scale: str = "loss") -> Named:
    """M = sum_n g_n²; with scale="sample", for a mean loss, M = (1/N) sum_n (N g_n)²."""
    factor = {"loss": 1, "sample": len(next(iter(grads.values())))}[scale]
    return {name: torch.stack([factor * row * row for row in g]).sum(0) for name, g in grads.items()}


def variance(grads: Mapping[str, Tensor], scale: str = "loss") -> Named:
    """V = sum_n g_n²/N - (sum_n g_n/N)²; with scale="sample", of N g_n instead of g_n (a mean loss).

    Computed as the mean square of deviations, which equals the formula and cancels nothing.
    """
    n = len(next(iter(grads.values())))
    factor = {"loss": 1, "sample": n}[scale]
    means = {name: g.sum(0) / n for name, g in grads.items()}
    return {
        name: torch.stack([(factor * (row - means[name])) ** 2 for row in g]).sum(0) / n for name, g in grads.items()
    }


def pairwise_dot(grads: Mapping[str, Tensor]) -> Named:
    """<g_n, g_m> per parameter, `[N,N]`, one pair at a time."""
    return {name: torch.stack([torch.stack([(a * b).sum() for b in g]) for a in g]) for name, g in grads.items()}


def noise_scale(grads: Mapping[str, Tensor], factor: float) -> dict[str, Named]:
    """Unbiased estimates from h_n = factor * g_n: "noise", the trace of the sample covariance of h, and "signal",
    the mean of <h_n, h_m> over pairs of different samples; "snr" is mean(h)² over the elementwise sample variance.
    """
    found: dict[str, Named] = {"noise": {}, "signal": {}, "snr": {}}
    for name, g in grads.items():
        h = [factor * row for row in g]
        mean = sum(h) / len(h)
        variance = sum((row - mean) ** 2 for row in h) / (len(h) - 1)
        pairs = [(a * b).sum() for i, a in enumerate(h) for j, b in enumerate(h) if i != j]
        found["noise"][name] = variance.sum()
        found["signal"][name] = sum(pairs) / len(pairs)
        found["snr"][name] = mean**2 / variance
    return found


def clipped_grad(grads: Mapping[str, Tensor], max_norm: float, factor: float = 1.0) -> tuple[Named, Tensor]:
    """sum_n min(1, C / |factor g_n|) g_n, with the norm over all parameters, and these norms `[N]`."""
    out = {name: torch.zeros_like(g[0]) for name, g in grads.items()}
    norms = []
    for n in range(len(next(iter(grads.values())))):
        norm = torch.cat([factor * g[n].reshape(-1) for g in grads.values()]).norm()
        weight = 1.0 if norm <= max_norm else max_norm / norm
        for name, g in grads.items():
            out[name] += weight * g[n]
        norms.append(norm)
    return out, torch.stack(norms)


def sketch(grads: Mapping[str, Tensor], matrices: Mapping[str, Tensor]) -> Named:
    """<R_j, g_n> per parameter, `[N, dim]`, for projections `[dim, *shape]` given as dense tensors."""
    return {
        name: torch.stack([torch.stack([(row * r).sum() for r in matrices[name]]) for row in g])
        for name, g in grads.items()
    }


# Second order -----------------------------------------------------------------------------------


def _flat(z: Outputs) -> Tensor:
    return torch.cat([part.reshape(-1) for part in ([z] if isinstance(z, Tensor) else z)])


def _leaf(z: Outputs) -> tuple[Tensor, Outputs]:
    """A detached flat leaf, and the same numbers in the shapes of `z` as views of it."""
    leaf = _flat(z).detach().requires_grad_()
    if isinstance(z, Tensor):
        return leaf, leaf.view(z.shape)
    parts = leaf.split([part.numel() for part in z])
    return leaf, tuple(flat.view(part.shape) for flat, part in zip(parts, z, strict=True))


def _hessian(value: Tensor, leaf: Tensor) -> Tensor:
    """The Hessian of a scalar by double autograd, one row at a time: `[D, D]`."""
    zero = torch.zeros(leaf.numel(), leaf.numel(), dtype=leaf.dtype)
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    if not grad.requires_grad:  # the loss is linear
        return zero
    rows = [torch.autograd.grad(g, leaf, retain_graph=True, allow_unused=True)[0] for g in grad]
    return torch.stack([zero[0] if row is None else row for row in rows])


def _jacobian(out: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
    """One backward pass per output element: for each parameter `[D, P]`."""
    rows = [_pull(z, params) for z in out]
    return [torch.stack([row[i].reshape(-1) for row in rows]) for i in range(len(params))]


def diag_ggn(
    params: Mapping[str, Tensor],
    logits: Callable[[], Outputs],
    loss_of: Callable[[Any], Tensor],
    *,
    per_sample: bool = False,
) -> Named:
    """The diagonal of JᵀHJ, J over every output element, H by double autograd at a detached leaf.

    With `per_sample=True`, `loss_of` gives the terms `[N]` and the result is `[N, *shape]`, with the
    Hessian of each sample's own term.
    """
    z = logits()
    leaf, shaped = _leaf(z)
    values = loss_of(shaped)
    hessians = [_hessian(v, leaf) for v in (values if per_sample else values.reshape(1))]
    out = {}
    for (name, p), jac in zip(params.items(), _jacobian(_flat(z), params), strict=True):
        diagonals = torch.stack([(jac * (h @ jac)).sum(0).view(p.shape) for h in hessians])
        out[name] = diagonals if per_sample else diagonals[0]
    return out


def diag_hessian(params: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> Named:
    """The diagonal of the Hessian of the loss, one double backward per parameter element."""
    grads = torch.autograd.grad(loss(), list(params.values()), create_graph=True, allow_unused=True)
    out = {}
    for (name, p), grad in zip(params.items(), grads, strict=True):
        diagonal = torch.zeros(p.numel(), dtype=p.dtype)
        if grad is not None and grad.requires_grad:
            for i, g in enumerate(grad.reshape(-1)):
                (row,) = torch.autograd.grad(g, p, retain_graph=True, allow_unused=True)
                diagonal[i] = 0.0 if row is None else row.reshape(-1)[i]
        out[name] = diagonal.view(p.shape)
    return out


@contextmanager
def plain_operations() -> Iterator[None]:
    """Attention, bags and weight norm by their formulas: torch's own have no second derivative, or a wrong one."""
    fused, bag = torch._weight_norm, nn.functional.embedding_bag
    torch._weight_norm, nn.functional.embedding_bag = _weight_norm, _embedding_bag
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch._weight_norm, nn.functional.embedding_bag = fused, bag


def _embedding_bag(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    """`F.embedding_bag` as `nn.EmbeddingBag` calls it, all by position: bags `[N, T]`, or in one row by offsets."""
    offsets, mode, padding = options[0], options[4], options[8]
    if offsets is not None:
        bags = torch.tensor_split(x, offsets[1:])
        return torch.cat([_embedding_bag(bag[None], weight, None, *options[1:]) for bag in bags])
    kept = (x != (-1 if padding is None else padding)).to(weight.dtype)
    if mode == "max":  # an empty bag is zero
        none = weight.new_full((len(x), 1, weight.shape[1]), -torch.inf)
        rows = weight[x].masked_fill(kept.unsqueeze(-1) == 0, -torch.inf)
        return torch.cat([rows, none], 1).amax(1).masked_fill(kept.sum(1, keepdim=True) == 0, 0)
    out = (weight[x] * kept.unsqueeze(-1)).sum(1)
    return out / kept.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else out


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm` by its formula."""
    other = [axis for axis in range(v.dim()) if axis != dim]
    return g * v / (v * v).sum(other, keepdim=True).sqrt()


def _sizes(params: Mapping[str, Tensor]) -> list[int]:
    return [p.numel() for p in params.values()]


def hessian(params: Mapping[str, Tensor], loss: Callable[[], Tensor]) -> Tensor:
    """The Hessian of the loss over all parameters, flat in their order: `[P, P]`, one row at a time.

    It is symmetric: a row is found from its own parameter on, and the columns to the left are those of earlier rows.
    """
    names = list(params)
    grads = torch.autograd.grad(loss(), list(params.values()), create_graph=True, allow_unused=True)
    rows = torch.zeros(sum(_sizes(params)), sum(_sizes(params)), dtype=torch.float64)
    start = 0
    for k, grad in enumerate(grads):
        later = {name: params[name] for name in names[k:]}
        stop = start + params[names[k]].numel()
        if grad is not None and grad.requires_grad:
            for i, g in enumerate(grad.reshape(-1)):
                rows[start + i, start:] = torch.cat([row.reshape(-1) for row in _pull(g, later)])
        rows[stop:, start:stop] = rows[start:stop, stop:].T
        start = stop
    return rows


def ggn(params: Mapping[str, Tensor], logits: Callable[[], Outputs], loss_of: Callable[[Any], Tensor]) -> Tensor:
    """JᵀHJ over all parameters, flat in their order: `[P, P]`."""
    z = logits()
    leaf, shaped = _leaf(z)
    jac = torch.cat(_jacobian(_flat(z), params), dim=1)
    return jac.T @ _hessian(loss_of(shaped), leaf) @ jac


def residual_terms(
    params: Mapping[str, Tensor],
    loss: Tensor,
    calls: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]],
    modify: Callable[[float], float],
) -> Tensor:
    """Sum over calls y = s(x) and their units of `modify(g s''(x))` times the outer product of the unit's gradient."""
    size = sum(_sizes(params))
    total = torch.zeros(size, size, dtype=torch.float64)
    for x, y, s in calls:
        (g,) = torch.autograd.grad(loss, y, retain_graph=True)
        for unit, value, back in zip(x.reshape(-1), x.detach().reshape(-1), g.reshape(-1), strict=True):
            point = value.clone().requires_grad_()
            (first,) = torch.autograd.grad(s(point), point, create_graph=True)
            (second,) = torch.autograd.grad(first, point)
            row = torch.cat([j.reshape(-1) for j in _pull(unit, params)])
            total += modify(float(back * second)) * torch.outer(row, row)
    return total


# Kronecker factors ------------------------------------------------------------------------------


def kfac_factors(
    model: nn.Module,
    logits: Callable[[], Outputs],
    loss_of: Callable[[Any], Tensor],
    *,
    sharing: str = "expand",
    axis: int | Mapping[str, int] = 0,
    joint: bool = False,
    every: bool = False,
    hessian: Tensor | None = None,
    rows: str = "real",
) -> dict[str, tuple[Tensor, Tensor]]:
    """The exact Kronecker factors (A, B) `[K,I,I], [K,O,O]` of every nn.Linear and nn.Conv weight.

    expand: A = mean over n, t of a aᵀ, B = sum over n, t of Jᵀ H J, with J `[D, O]` the derivative of
    all logits by the layer's output at (n, t) and H the Hessian of the loss in the logits; this is
    the sum over v of s sᵀ for any root of H, and the expectation of sampled K-FAC's B.
    reduce: a is averaged and J summed over t first. A module called several times: its calls are
    further positions t. `axis` is the sample axis of the Linear layers' inputs (or of those that
    are not 0, by module name). K is 1 but for groups.
    joint: a layer with a bias has the constant 1 as its last input.
    every: also embeddings, norms and PReLU, and each bias by itself, whose A is 1.
    hessian: `[D, D]` in place of H, such as the sum of s sᵀ over drawn columns.
    rows: "real" leaves out of A the rows with a derivative of logits of which the loss has no curvature, and of no
    others, and the rows with no derivative at all that read such rows; "all" none.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    read: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            calls.setdefault(name, []).append((args[0].detach().clone(), out))
            read.setdefault(name, []).append(args[0])
            return out.clone()  # so that an in-place activation does not change what was kept

        return hook

    kinds = EVERY if every else PRODUCTS
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    handles = [m.register_forward_hook(keep(name)) for name, m in layers.items()]
    try:
        z = logits()
    finally:
        for handle in handles:
            handle.remove()
    if hessian is None:
        leaf, shaped = _leaf(z)
        hessian = _hessian(loss_of(shaped), leaf)
    axes = dict.fromkeys(calls, axis) if isinstance(axis, int) else {name: axis.get(name, 0) for name in calls}
    found = {}
    for name, kept in calls.items():
        layer, at = layers[name], axes[name]
        columns = [_pull(element, {str(i): out for i, (_, out) in enumerate(kept)}) for element in _flat(z)]
        a = torch.cat([input_rows(layer, x, out.detach(), at) for x, out in kept], dim=1)
        bias = getattr(layer, "bias", None)
        if joint and bias is not None:
            a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
        for part, rows_of in [("weight", output_rows), ("bias", bias_rows)]:
            if part == "bias" and (bias is None or joint or not every):
                continue
            j = torch.stack(
                [torch.cat([rows_of(layer, x, g, at) for (x, _), g in zip(kept, gs, strict=True)], 1) for gs in columns]
            )
            inputs = (a if part == "weight" else torch.ones_like(j[0, ..., :1])).to(hessian.dtype)
            real = _real(j, hessian) if rows == "real" else torch.ones(j.shape[1:3], dtype=torch.bool)
            silent = ~(j != 0).any(4).any(3).any(0)
            if rows == "real" and silent.any() and isinstance(layer, (nn.Linear, nn.LayerNorm)):
                below = []
                for element in _flat(z):
                    gs = _at_rows_read(element, read[name], [out for _, out in kept])
                    below.append(torch.cat([rows_of(layer, x, g, at) for (x, _), g in zip(kept, gs, strict=True)], 1))
                real = torch.where(silent, _real(torch.stack(below), hessian), real)
            found[f"{name}.{part}" if name else part] = _factors(inputs, j.to(hessian.dtype), hessian, sharing, real)
    return found


def _at_rows_read(out: Tensor, read: Sequence[Tensor], made: Sequence[Tensor]) -> list[Tensor]:
    """For each call, the largest derivative of a scalar by any feature of a row that it read, at the row it made."""
    known = {str(i): x for i, x in enumerate(read) if x.requires_grad}
    grads = dict(zip(known, _pull(out, known), strict=True)) if known else {}
    return [
        grads[str(i)].abs().amax(-1, keepdim=True).expand_as(y) if str(i) in grads else torch.zeros_like(y)
        for i, y in enumerate(made)
    ]


def _real(j: Tensor, hessian: Tensor) -> Tensor:
    """`[N, T]`: the real rows, from derivatives `[D,N,T,K,O]`."""
    size = hessian.abs()
    curved = size.amax(1) > 1e-12 * size.max()  # a product of roots leaves rounding where there is no curvature
    counts, other = ((j[which] != 0).any(4).any(3).any(0) for which in (curved, ~curved))
    return counts | ~other


def _factors(a: Tensor, j: Tensor, hessian: Tensor, sharing: str, real: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) from inputs `[N,T,K,I]`, derivatives of the logits `[D,N,T,K,O]` and the loss Hessian `[D,D]`.

    real: `[N,T]`, the rows that A is the mean of.
    """
    if sharing == "reduce":
        a = torch.stack([a[i, real[i]].mean(0) if real[i].any() else 0 * a[i, 0] for i in range(len(a))])[:, None]
        j, real = j.sum(2, keepdim=True), real.any(1, keepdim=True)
    _, n, t, k, _ = j.shape
    cells = [(i, p) for i in range(n) for p in range(t)]
    kept = [(i, p) for i, p in cells if real[i, p]]
    nothing = torch.zeros_like(torch.outer(a[0, 0, 0], a[0, 0, 0]))
    factor_a = [
        sum((torch.outer(a[i, p, q], a[i, p, q]) for i, p in kept), nothing) / max(1, len(kept)) for q in range(k)
    ]
    factor_b = [sum(j[:, i, p, q].T @ hessian @ j[:, i, p, q] for i, p in cells) for q in range(k)]
    return torch.stack(factor_a), torch.stack(factor_b)


def kfra_factors(
    model: nn.Module,
    logits: Callable[[], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    *,
    sharing: str = "expand",
    joint: bool = False,
    blocks: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """KFRA's factors (A, B) of every nn.Linear and nn.Conv weight and bias of a chain, samples on dim 0 of all.

    With z_l the outputs of the modules that hold trainable parameters, flat for each sample, and H_n the
    Hessian of the loss in the logits of sample n: G_L = sum_n J^T H_n J, G_l = (1/N) sum_n J^T G_{l+1} J
    with J the Jacobian of sample n. B sums G_l's blocks over positions with themselves ("expand") or over all
    pairs ("reduce"). A as in `kfac_factors`, 1 for a bias. blocks: filled with each module's output and G.
    """
    kept: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(m: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            kept.append((name, m, args[0].detach().clone(), out))
            return out.clone()

        return hook

    named = [(n, m) for n, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    handles = [m.register_forward_hook(keep(name)) for name, m in named]
    try:
        z = logits()
    finally:
        for handle in handles:
            handle.remove()
    leaf, shaped = _leaf(z)
    hessian = _hessian(loss_of(shaped), leaf).view(len(z), z[0].numel(), len(z), z[0].numel())
    found: dict[str, tuple[Tensor, Tensor]] = {}
    above, below_top = z, torch.zeros(0)
    for level, (name, layer, x, out) in enumerate(reversed(kept)):
        total = z.new_zeros(out[0].numel(), out[0].numel())
        for n in range(len(z)):
            j = torch.stack([_pull(element, {"": out})[0][n].flatten() for element in above[n].flatten()])
            j = j.to(z)
            total += j.T @ (hessian[n, :, n] if level == 0 else below_top / len(z)) @ j
        above, below_top = out, total
        if blocks is not None:
            blocks[name] = out, total
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            found |= _kfra_of(
                f"{name}." if name else "", layer, input_rows(layer, x, layer(x), 0), out, total, sharing, joint
            )
    return found


def _kfra_of(
    prefix: str, layer: nn.Module, a: Tensor, out: Tensor, block: Tensor, sharing: str, joint: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of one layer from its input rows and the block over one sample's outputs."""
    joint = joint and layer.bias is not None and layer.bias.requires_grad and layer.weight.requires_grad
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if joint else a
    a = a.mean(1, keepdim=True) if sharing == "reduce" else a
    factor_a = torch.stack([sum(torch.outer(r, r) for r in a[:, :, k].flatten(0, 1)) for k in range(a.shape[2])])
    places = output_rows(layer, out, torch.arange(out[0].numel()).view(1, *out.shape[1:]), 0)[0]  # [T,K,O]

    def factor_b(places: Tensor) -> Tensor:
        t = range(len(places))
        pairs = [(u, u) for u in t] if sharing == "expand" else [(u, w) for u in t for w in t]
        groups = range(places.shape[1])
        return torch.stack([sum(block[places[u, k]][:, places[w, k]] for u, w in pairs) for k in groups])

    found = {}
    if layer.weight.requires_grad:
        found[f"{prefix}weight"] = factor_a / (a.shape[0] * a.shape[1]), factor_b(places)
    if layer.bias is not None and layer.bias.requires_grad and not joint:
        found[f"{prefix}bias"] = torch.ones(1, 1, 1), factor_b(places.flatten(1)[:, None])
    return found


def assert_close(got: Mapping[str, Tensor] | Tensor, want: Mapping[str, Tensor] | Tensor, rel: float = 1e-10) -> None:
    """Same names, same shapes, and max|got - want| <= rel · scale for every name.

    The scale is max|want| of that tensor. A tensor far smaller than the others may be zero in truth
    and rounding noise of theirs, so the allowed error is never less than 1e-4 · rel or 1e-14 of the
    largest in the mapping; where all of `want` is zero it is 1e-6 · rel. NaN and infinity fail.
    """
    got = {"": got} if isinstance(got, Tensor) else dict(got)
    want = {"": want} if isinstance(want, Tensor) else dict(want)
    assert got.keys() == want.keys(), (
        f"names differ: missing {sorted(want.keys() - got.keys())}, extra {sorted(got.keys() - want.keys())}"
    )
    peaks = {name: float(w.detach().abs().max()) if w.numel() else 0.0 for name, w in want.items()}
    floor = max(1e-4, 1e-14 / rel) * max(peaks.values(), default=0.0) or 1e-6
    bad = []
    for name, w in want.items():
        g = got[name].detach()
        if g.shape != w.shape:
            bad.append(f"{name!r}: shape {tuple(g.shape)}, expected {tuple(w.shape)}")
        elif not (torch.isfinite(g).all() and torch.isfinite(w).all()):
            bad.append(f"{name!r}: not finite")
        elif w.numel():
            error = float((g.to(w.dtype) - w.detach()).abs().max()) / max(peaks[name], floor)
            if not error <= rel:
                bad.append(f"{name!r}: relative error {error:.3e} > {rel:.1e} (largest {peaks[name]:.3e})")
    assert not bad, "\n".join(bad)
