"""Brute force of one case, computed once, and for every quantity the assertion that a result equals it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import oracle
import pytest
import torch
from oracle_slices import gradient_factors, slice_factors
from torch import Tensor
from zoo import Case, Functional, Instance

import layerwise as lw
from layerwise.losses import Likelihood
from layerwise.quantities.hessian import diag_hessian as diag_hessian_module

Named = Mapping[str, Tensor]

# Models in which linear layers read [T, N, i], and what the names of these layers start with.
TIME_FIRST = {
    "seq_first_flat_square": "", "seq_first_square": "", "seq_first_pooled": "", "transformer_pre_norm": "encoder.",
}  # fmt: skip
UNHOOKED = {"no_grad_gate"}  # the oracle pulls at every call, and one of this model's has no gradient
SUMS = {"bce_pos_weight", "poisson_nll"}  # and those that have it in their name
FEW = 120  # second derivatives for every sample; of larger models some elements are drawn


# What was drawn ---------------------------------------------------------------------------------


@dataclass
class Drawn:
    """Random numbers of one run: of each loss call what it got, with `[draws, *logits]`; signs for each parameter."""

    roots: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    signs: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[Drawn]:
    """Keep what the library draws, without changing it. That the draws have their law is tested elsewhere."""
    drawn = Drawn()
    sample, signs = Likelihood.sample, diag_hessian_module._signs

    def keep_root(self: Likelihood, draws: int, generator: torch.Generator) -> Tensor:
        drawn.roots.append((self.logits, sample(self, draws, generator)))
        return drawn.roots[-1][1]

    def keep_signs(p: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn.signs.append(signs(p, generator))
        return drawn.signs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Likelihood, "sample", keep_root)
        patch.setattr(diag_hessian_module, "_signs", keep_signs)
        yield drawn


# Brute force ------------------------------------------------------------------------------------


class Truth:
    """What brute force says about a case, each part when it is first asked for.

    samples: what the user says as `samples=`.
    """

    samples: int | Tensor | None = None

    def __init__(self, case: Case) -> None:
        self.case = case
        self.instance: Instance = case.make(seed=0)
        used = oracle.used_names(self.instance.params, self.instance.loss)
        self.params = {name: p for name, p in self.instance.params.items() if name in used}
        self.rel = case.problem.rel

    def fresh(self) -> Instance:
        """The instance without gradients."""
        for p in self.instance.params.values():
            p.grad = None
        return self.instance

    @cached_property
    def grads(self) -> dict[str, Tensor]:
        """Per-sample gradients."""
        return oracle.per_sample_grad(self.params, self.instance.terms)

    @property
    def factor(self) -> int:
        """From g_n to the gradient of a sample's own loss: N under a mean; the user's own reduction counts as a sum."""
        name = self.case.loss.name
        return 1 if name in SUMS or "sum" in name or "user" in name else self.instance.n

    @cached_property
    def max_norm(self) -> float:
        """A clip at which some samples are clipped and, but for single samples, some are not."""
        norms = oracle.total(oracle.squared_norm(self.grads)).sqrt()
        return float(norms[norms > 0].median()) * 0.9

    @cached_property
    def jacobian(self) -> Tensor:
        """Of everything that the losses receive, `[D,P]`."""
        parts = oracle._jacobian(oracle._flat(self.instance.logits()), self.params)
        return torch.cat([part.to(torch.float64) for part in parts], 1)

    @cached_property
    def loss_hessian(self) -> Tensor:
        """In what the losses receive, `[D,D]`."""
        leaf, shaped = oracle._leaf(self.instance.logits())
        return oracle._hessian(self.instance.loss_of(shaped), leaf).to(torch.float64)

    @cached_property
    def ggn(self) -> Tensor:
        """`[P,P]`."""
        return self.jacobian.T @ self.loss_hessian @ self.jacobian

    @cached_property
    def hessian(self) -> Tensor:
        """`[P,P]`."""
        with oracle.plain_operations():
            return oracle.hessian(self.params, self.instance.loss)

    @cached_property
    def owners(self) -> Tensor:
        """The sample of everything that the losses receive, as masks `[N,D]`."""
        leaf, shaped = oracle._leaf(self.instance.logits())
        parts = shaped if isinstance(shaped, tuple) else (shaped,)
        sums = sum(self.case.problem.per_sample(part, self.instance.n) for part in parts)
        masks = torch.stack([torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in sums])
        assert bool((masks.sum(0) == 1).all())
        return masks.to(torch.float64)

    def flat_roots(self, drawn: Drawn) -> Tensor:
        """The drawn columns of all loss calls over what they receive, `[V,D]`; each call has columns of its own."""
        z = self.instance.logits()
        leaf, shaped = oracle._leaf(z)
        parts = shaped if isinstance(shaped, tuple) else (shaped,)
        places = [*parts, *(row for part in parts for row in part.unbind(-1))]  # or a call for each step
        columns = []
        for logits, s in drawn.roots:
            place = next(v for v in places if v.shape == logits.shape and torch.allclose(v, logits, 1e-6))
            columns += [torch.autograd.grad(place, leaf, column, retain_graph=True)[0] for column in s]
        return torch.stack(columns).to(torch.float64)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """`[..., P]` by parameter."""
        parts = flat.split([p.numel() for p in self.params.values()], -1)
        return {
            name: part.reshape((*flat.shape[:-1], *p.shape))
            for (name, p), part in zip(self.params.items(), parts, strict=True)
        }

    def flat(self, named: Named, lead: int = 0) -> Tensor:
        """`[..., P]` from tensors by parameter with some leading axes."""
        return torch.cat([named[name].reshape(*named[name].shape[:lead], -1) for name in self.params], -1)

    def axes(self) -> dict[str, int]:
        """The sample axis of the layers where it is not 0."""
        first = TIME_FIRST.get(self.case.problem.name, "none")
        return {name: 1 for name, _ in self.instance.model.named_modules() if name.startswith(first)}

    def form(self, name: str) -> str | None:
        """The form that the factors of a parameter must have; None where brute force does not say."""
        return form_of(self.case.problem.name, name)

    def row_factors(self, sharing: str, s: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(A, B) of the parameters of layers, from the columns of a root of the loss Hessian `[V,D]`."""
        instance = self.instance
        if isinstance(instance.model, Functional) or self.case.problem.name in UNHOOKED:
            return {}
        return oracle.kfac_factors(
            instance.model, instance.logits, instance.loss_of, sharing=sharing, axis=self.axes(), every=True,
            hessian=s.T @ s,
        )  # fmt: skip


def _close(truth: Truth, got: Named, want: Named, rel: float | None = None) -> None:
    assert list(got) == list(truth.params), "the results' names are not those of the trained parameters, in order"
    if truth.rel > 1e-6:  # the model rounds: errors are relative to the largest of all parameters
        peak = max(float(w.abs().max()) for w in want.values())
        for name, w in want.items():
            assert got[name].shape == w.shape
            assert float((got[name] - w).abs().max()) <= truth.rel * peak, name
        return
    oracle.assert_close(dict(got), dict(want), rel=rel or truth.rel)


# First order ------------------------------------------------------------------------------------


def per_sample_grad(truth: Truth, got: Any, _: Drawn) -> None:
    _close(truth, got, truth.grads)


def squared_norm(truth: Truth, got: Any, _: Drawn) -> None:
    want = oracle.squared_norm(truth.grads)
    _close(truth, got, want)
    oracle.assert_close(got.total, oracle.total(want), rel=truth.rel)


def pairwise_dot(truth: Truth, got: Any, _: Drawn) -> None:
    want = oracle.pairwise_dot(truth.grads)
    _close(truth, got, want)
    oracle.assert_close(got.total, oracle.total(want), rel=truth.rel)


def second_moment(truth: Truth, got: Any, _: Drawn) -> None:
    _close(truth, got, oracle.second_moment(truth.grads))


def variance(truth: Truth, got: Any, _: Drawn) -> None:
    _close(truth, got, oracle.variance(truth.grads))


def noise_scale(truth: Truth, got: Any, _: Drawn) -> None:
    """Noise and signal are differences of numbers as large as the squared gradients: errors are relative to those."""
    grads, factor = truth.grads, truth.factor
    want = oracle.noise_scale(grads, factor)
    sizes = {name: float((factor * g).square().sum() / len(g)) for name, g in grads.items()}
    peak = max(sizes.values())
    for name, g in grads.items():
        tiny = truth.rel * max(sizes[name], 1e-4 * peak)
        for key, values in (("noise", got.noise), ("signal", got.signal)):
            assert abs(float(values[name] - want[key][name])) <= tiny, (key, name)
        noise, signal = float(want["noise"][name]), float(want["signal"][name])
        if signal > 1e-4 * sizes[name] and sizes[name] > 1e-4 * peak:
            assert abs(float(got[name]) - noise / signal) <= 1e5 * truth.rel * (1 + noise / signal)
        elif signal < -1e-4 * sizes[name] and sizes[name] > 1e-4 * peak:
            assert float(got[name]) == float("inf")
        mean, moment = factor * g.mean(0), (factor * g).square().mean(0)
        clear = (moment - mean**2 > 1e-3 * moment) & (moment > 1e-6 * peak)
        assert got.snr[name].shape == g.shape[1:]
        oracle.assert_close(got.snr[name][clear], want["snr"][name][clear], rel=100 * truth.rel)
        assert bool((got.snr[name] >= 0).all())
    total = sum(want["noise"].values()) / sum(want["signal"].values())
    if total > 0:
        oracle.assert_close(got.total, torch.as_tensor(total), rel=1e3 * truth.rel)
    else:
        assert float(got.total) == float("inf")


def clipped_grad(truth: Truth, got: Any, _: Drawn) -> None:
    want, norms = oracle.clipped_grad(truth.grads, truth.max_norm)
    _close(truth, got, want)
    oracle.assert_close(got.norms, norms, rel=truth.rel)


def sketch(truth: Truth, got: Any, _: Drawn) -> None:
    """Against the same projections as dense matrices."""
    same = lw.Sketch(3, torch.Generator().manual_seed(7))
    want = oracle.sketch(truth.grads, {name: same.matrix(name, g.shape[1:], g) for name, g in truth.grads.items()})
    _close(truth, got, want)
    oracle.assert_close(got.total, oracle.total(want), rel=truth.rel)


def fisher_of_data(truth: Truth, got: Any, _: Drawn) -> None:
    _close(truth, got, {name: truth.factor * m for name, m in oracle.second_moment(truth.grads).items()})


# Diagonals and roots ----------------------------------------------------------------------------


def diag_ggn(truth: Truth, got: Any, _: Drawn) -> None:
    _close(truth, got, truth.named(truth.ggn.diagonal()))


def diag_ggn_each(truth: Truth, got: Any, _: Drawn) -> None:
    """With the Hessian of every sample's own term."""
    instance = truth.instance
    leaf, shaped = oracle._leaf(instance.logits())
    hessians = [oracle._hessian(term, leaf).to(torch.float64) for term in instance.terms_of(shaped)]
    rows = [(truth.jacobian * (h @ truth.jacobian)).sum(0) for h in hessians]
    _close(truth, got, truth.named(torch.stack(rows)))


def _columns(truth: Truth, drawn: Drawn) -> Tensor:
    """The drawn columns of each sample, pulled back to the parameters: `[V,N,P]`."""
    return _samples_apart(truth, truth.flat_roots(drawn))


def _samples_apart(truth: Truth, s: Tensor) -> Tensor:
    """Columns over what the losses receive, `[V,D]`, of each sample and pulled back: `[V,N,P]`."""
    return torch.stack([torch.stack([(column * mask) @ truth.jacobian for mask in truth.owners]) for column in s])


def sampled_diag_ggn(truth: Truth, got: Any, drawn: Drawn) -> None:
    _close(truth, got, truth.named(_columns(truth, drawn).square().sum((0, 1))))


def sqrt_ggn(truth: Truth, got: Any, _: Drawn) -> None:
    assert all(got[name].shape[1:] == (truth.instance.n, *p.shape) for name, p in truth.params.items())
    s = truth.flat(got, lead=2).flatten(0, 1)
    oracle.assert_close(s.T @ s, truth.ggn, rel=truth.rel)


def sampled_sqrt_ggn(truth: Truth, got: Any, drawn: Drawn) -> None:
    _close(truth, got, truth.named(_columns(truth, drawn)))


def diag_hessian(truth: Truth, got: Any, _: Drawn) -> None:
    _close(truth, got, truth.named(truth.hessian.diagonal()))


def diag_hessian_each(truth: Truth, got: Any, _: Drawn) -> None:
    """Every element of small models, some of large ones; their sum over the samples is the whole diagonal."""
    _close(truth, {name: g.sum(0) for name, g in got.items()}, truth.named(truth.hessian.diagonal()))
    instance, flat = truth.instance, truth.flat(got, lead=1)
    places = [(name, i) for name, p in truth.params.items() for i in range(p.numel())]
    some = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[: max(1, FEW // instance.n)]
    want = torch.zeros(instance.n, len(some), dtype=torch.float64)
    with oracle.plain_operations():
        for n, term in enumerate(instance.terms()):
            found = torch.autograd.grad(term, list(truth.params.values()), create_graph=True, allow_unused=True)
            grads = dict(zip(truth.params, found, strict=True))
            for j, (name, i) in enumerate(places[k] for k in some.tolist()):
                if (grad := grads[name]) is not None:
                    (second,) = oracle._pull(grad.reshape(-1)[i], {name: truth.params[name]})
                    want[n, j] = second.reshape(-1)[i]
    oracle.assert_close(flat[:, some], want, rel=1e-9 if truth.rel < 1e-9 else truth.rel)


def sampled_diag_hessian(truth: Truth, got: Any, drawn: Drawn) -> None:
    """The mean over draws of s ∘ H s for the drawn signs."""
    count = len(truth.params)
    draws = [drawn.signs[i : i + count] for i in range(0, len(drawn.signs), count)]
    flat = torch.stack([torch.cat([s.flatten() for s in signs]) for signs in draws]).to(truth.hessian)
    _close(truth, got, truth.named((flat * (flat @ truth.hessian)).mean(0)))


# Kronecker factors ------------------------------------------------------------------------------


def dense_factors(operator: lw.Kronecker) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each block; a diagonal A as a matrix, a constant one as `[K,1,1]`."""
    found = {}
    for name, block in operator.blocks.items():
        a = block.input_factor
        found[name] = torch.diag_embed(a) if a.ndim == 2 else a, block.B
    return found


# Parameters without a matrix of their own: their uses read slices of them, or their factors come from gradients.
SLICED = {
    "chunked": ("qkv", "bias"), "transformer_decoder": ("decoder.multihead_attn.in_proj",),
    "attention_cross": ("one.in_proj", "three.in_proj"),
}  # fmt: skip
FROM_GRADIENTS = {
    "position_embedding": ("position",), "unknown_call": ("centres",), "temperature": ("log_t",),
    "affine_by_hand": ("scale",), "tied_embedding": ("embed",), "tied_autoencoder": ("w",), "matmul_forms": ("bias",),
    "weight_norm": ("0.para", "2.para"), "weight_norm_conv": ("0.para",), "spectral_norm": ("0.para",),
    "orthogonal": ("0.para",), "lora": ("up", "down", "out_"), "chunked": ("top", "bottom"),
    "softmax_weights": ("w", "v", "a", "b"), "seq_first_recurrent": ("u", "b"), "constant_start": ("u.",),
    "constant_input": ("inner.",), "learned_start": ("start", "u"), "causal_lm": ("embed.",),
    "attention_learned_queries": ("queries", "attend.in_proj"), "char_gpt": ("embed.", "place."),
    "gru_learned_start": ("start", "cell.weight_hh", "cell.bias_hh"),
}  # fmt: skip


def form_of(problem: str, name: str) -> str:
    """The form that the factors of a parameter must have."""
    if name.startswith(SLICED.get(problem, ("-",))):
        return "slices"
    return "gradients" if name.startswith(FROM_GRADIENTS.get(problem, ("-",))) else "rows"


def check_forms(truth: Truth, got: Any) -> list[str]:
    """Assert the form of every parameter; the names of those with rows."""
    forms = {name: truth.form(name) or got.forms[name] for name in truth.params}
    assert dict(got.forms) == forms
    assert all(block.form == forms[block.parameter or key] for key, block in got.blocks.items())
    return [name for name, form in forms.items() if form == "rows"]


def _factors(truth: Truth, got: Any, sharing: str, s: Tensor) -> None:
    """s: the columns of a root of the loss Hessian, `[V,D]`."""
    every, ours = dense_factors(got), check_forms(truth, got)
    sizes = dict.fromkeys(truth.params, 0)
    for key, (a, b) in every.items():  # of every block, also those that no module of the oracle's shows
        for factor in (a, b):
            oracle.assert_close(factor, factor.mT)
            assert float(torch.linalg.eigvalsh(factor).min()) >= -0.01 * truth.rel * max(
                float(factor.abs().max()), 1e-300
            )
        assert a.shape[0] == b.shape[0]
        sizes[got.blocks[key].parameter or key] += a.shape[-1] * b.shape[-1] * len(b)
    assert sizes == {name: p.numel() for name, p in truth.params.items()}
    _without_rows(truth, got, every, sharing, s)
    have, want = {name: every[name] for name in ours}, truth.row_factors(sharing, s)
    names = want.keys() & have.keys()
    oracle.assert_close({n: have[n][0] for n in names}, {n: want[n][0] for n in names}, rel=truth.rel)
    # before an instance norm positions cancel and B is zero: the other blocks say how large rounding may be
    others = {n: b for n, (_, b) in have.items() if n not in names}
    oracle.assert_close({n: b for n, (_, b) in have.items()}, {n: want[n][1] for n in names} | others, rel=truth.rel)


def _without_rows(truth: Truth, got: Any, have: Mapping[str, tuple[Tensor, Tensor]], sharing: str, s: Tensor) -> None:
    """The factors of slices, and those from gradients."""
    problem, want = truth.case.problem.name, {}
    if problem in SLICED:
        found = slice_factors(
            truth.params, truth.instance.logits, s.T @ s, sharing=sharing, axis=int(problem != "chunked")
        )
        want |= {key: (torch.ones(1, 1, 1) if a is None else a, b) for key, (a, b) in found.items()}
    if derived := [n for n in truth.params if truth.form(n) == "gradients"]:
        columns = truth.named(_samples_apart(truth, s).flatten(0, 1))
        want |= {n: gradient_factors(columns[n]) for n in derived}
    others = {key for key, block in got.blocks.items() if block.form != "rows"}
    assert want.keys() == {key for key in others if truth.form(got.blocks[key].parameter or key) is not None}
    for i in (0, 1):
        oracle.assert_close({k: have[k][i] for k in want}, {k: pair[i] for k, pair in want.items()}, rel=truth.rel)


def factors(sharing: str) -> Callable[[Truth, Any, Drawn], None]:
    def check(truth: Truth, got: Any, _: Drawn) -> None:
        values, vectors = torch.linalg.eigh(truth.loss_hessian)
        _factors(truth, got, sharing, (vectors * values.clamp(min=0).sqrt()).T)

    return check


def sampled_factors(sharing: str) -> Callable[[Truth, Any, Drawn], None]:
    return lambda truth, got, drawn: _factors(truth, got, sharing, truth.flat_roots(drawn))


def eigenvectors(operator: lw.EigenKronecker, key: str) -> Tensor:
    """The block's eigenvectors as columns `[p, K·O·I]`, in the order of its spectrum."""
    block = operator.blocks[key]
    eye = torch.eye(block.size.numel(), dtype=block.spectrum.dtype).view(-1, *block.size)
    return block.fold(block.rotate_back(eye)).reshape(len(eye), -1).T


def ekfac(truth: Truth, got: Any, _: Drawn) -> None:
    """The eigenvalues are the GGN's diagonal along the eigenvectors, which are orthonormal."""
    check_forms(truth, got)
    spectra, exact, start = {}, {}, 0
    for name, p in truth.params.items():
        block = truth.ggn[start : start + p.numel(), start : start + p.numel()]
        keys = [key for key, b in got.blocks.items() if (b.parameter or key) == name]
        q = torch.cat([eigenvectors(got, key) for key in keys], 1).to(torch.float64)
        oracle.assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype), rel=max(truth.rel, 1e-6 * (p.dtype != q.dtype)))
        spectra[name] = torch.cat([got.eigenvalues[key].flatten() for key in keys])
        exact[name] = (q.T @ block @ q).diagonal()
        start += p.numel()
    _close(truth, spectra, exact)


# Operators --------------------------------------------------------------------------------------


def _operator(truth: Truth, got: Any, matrix: Tensor) -> None:
    params = truth.instance.params  # with those that are not used
    assert got.names == list(params) and got.shape == (sum(p.numel() for p in params.values()),) * 2
    v = torch.randn(got.shape[0], 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    used = torch.cat([torch.full((p.numel(),), name in truth.params) for name, p in params.items()])
    want = torch.zeros_like(v)
    want[used] = matrix @ v[used]
    oracle.assert_close((got @ v.to(got.dtype)).to(torch.float64), want, rel=truth.rel)


def ggn_operator(truth: Truth, got: Any, _: Drawn) -> None:
    _operator(truth, got, truth.ggn)


def hessian_operator(truth: Truth, got: Any, _: Drawn) -> None:
    _operator(truth, got, truth.hessian)


# Refusals ---------------------------------------------------------------------------------------


def refusal_says_enough(truth: Truth, column: Any, error: Exception, names: bool) -> None:
    """The message names a parameter (or the call that is at fault) and is a sentence or two long."""
    text = str(error)
    assert len(text) > 60, text
    if names and not column.second and not column.chain:
        assert any(name in text for name in truth.params), text
