"""What comes of a call that reads a parameter: every function of torch and every module, against brute force."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import calls_table as table
import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layerwise as lw
from layerwise import errors

__all__ = ["Found", "every", "measure", "namespaces", "rows_of", "unlisted"]

N = 5
NO_GRADIENT = "no gradient"
NO_DERIVATIVE = (
    "derivative for", "does not support automatic differentiation", "is now removed", "Could not run",
    "INTERNAL ASSERT", "is not differentiable", "modified by an inplace operation",
)  # fmt: skip
EXACT, SLOWER, REFUSED = "exact", "exact, slower", "refused"


@dataclass(frozen=True)
class Found:
    """What came of a call: kind, and why where it is refused or there is nothing to ask."""

    kind: str
    why: str = ""


def namespaces() -> dict[str, ModuleType]:
    """The namespaces of functions by the name that the page gives them."""
    return {
        "torch": torch, "torch.nn.functional": F, "torch.linalg": torch.linalg, "torch.special": torch.special,
        "torch.fft": torch.fft,
    }  # fmt: skip


def every(space: ModuleType) -> list[str]:
    """The public functions of a namespace, or its classes where it has few functions."""
    classes = space.__name__ in ("torch.nn", "torch.optim")
    names = [name for name in dir(space) if not name.startswith("_") and callable(getattr(space, name))]
    return sorted(name for name in names if inspect.isclass(getattr(space, name)) == classes)


def unlisted() -> dict[str, list[str]]:
    """Names of torch that no table holds, and names of the tables that torch lacks, by namespace."""
    known = table.CALLS.keys() | table.LOSSES.keys() | table.ASIDE.keys()
    found = {space: [n for n in every(ns) if n not in known and n.removesuffix("_") not in known]
             for space, ns in namespaces().items()}  # fmt: skip
    modules = table.MODULES.keys() | table.MODULE_LOSSES.keys() | table.MODULES_ASIDE.keys()
    found["torch.nn"] = sorted(set(every(nn)) ^ modules)
    found["torch.optim"] = sorted(set(every(torch.optim)) ^ table.OPTIMIZERS.keys())
    there = {name for ns in namespaces().values() for name in every(ns)}
    found["tables"] = sorted(known - there)
    return {space: names for space, names in found.items() if names}


# Calls of functions -----------------------------------------------------------------------------


class _Call(nn.Module):
    """The parameters of the table, and what a call of them makes of the data."""

    def __init__(self, run: Callable[[dict[str, Any]], Any] | None) -> None:
        super().__init__()
        leaves = {
            "w": torch.randn(4), "v": torch.randn(4), "u": 0.2 + 0.6 * torch.rand(4), "p": 1.5 + torch.rand(4),
            "W": torch.eye(4) + 0.2 * torch.randn(4, 4), "B": torch.randn(2, 4, 4), "K": torch.randn(2, 2, 2),
        }  # fmt: skip
        self.leaves = nn.ParameterDict({name: nn.Parameter(x) for name, x in leaves.items()})
        self.run, self.constants = run, _constants()

    def forward(self, data: dict[str, Tensor]) -> Any:
        given = dict(self.leaves)
        z = data["x"] * given["w"] + given["v"]
        made = {**given, **data, **self.constants, "S": given["W"] @ given["W"].T + torch.eye(4), "z": z}
        torch.manual_seed(0)
        return z if self.run is None else self.run(made)


def _data() -> dict[str, Tensor]:
    return {
        "x": torch.randn(N, 4), "i": torch.randint(4, (N, 4)), "q": torch.randn(N, 2, 6), "y": torch.randn(N, 4),
        "g": torch.randn(N, 2, 6, 6), "t": 0.1 + 0.8 * torch.rand(N, 4), "c": torch.arange(N) % 4,
        "s": torch.randn(N, 4).sign(),
    }  # fmt: skip


def _constants() -> dict[str, Any]:
    return {
        "a": torch.randn(4, 4), "j": torch.randint(4, (4, 4)), "m": torch.rand(4, 4) > 0.5,
        "e": torch.tensor([3, 0, 2, 1]), "torch": torch, "nn": nn,
    }  # fmt: skip


def _logits(out: Any, data: dict[str, Tensor], rows: bool) -> Tensor | None:
    """Rows `[N,...]` of what a call returned, or of what it made of parameters alone; None without a gradient."""
    parts = [x for x in _tensors(out) if x.requires_grad]
    parts = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in parts]
    parts = [x.to_dense() if x.layout != torch.strided else x for x in parts]
    if not parts:
        return None
    if rows:
        return torch.cat([x.reshape(N, -1) for x in parts], 1)
    flat = torch.cat([x.reshape(-1).to(torch.float64) for x in parts])
    return (data["x"][:, :1] * flat).tanh()


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        for part in out:
            yield from _tensors(part)


def _function(space: ModuleType, name: str) -> tuple[Callable[..., Any], str]:
    f = getattr(space, name)
    if name in table.CALLS or not name.endswith("_"):
        return f, table.CALLS[name]
    return (lambda a, *more, **options: f(a.clone(), *more, **options)), table.CALLS[name.removesuffix("_")]


def rows_of(expression: str) -> bool:
    """Whether an expression names data."""
    return any(f"{name}{end}" in expression.replace("torch", "") for name in "xiqgz" for end in ",.)[ ]")


def _call_of(space: ModuleType, name: str) -> Found:
    f, expression = _function(space, name)
    code, data, options = compile(expression, name, "eval"), _data(), _orders(space)
    model = _Call(lambda given: eval(code, {**given, **options, "f": f}))
    return _first_order(model, data, lambda: _output(model, data, rows_of(expression)))


def _orders(space: ModuleType) -> dict[str, Any]:
    """Where `torch` has the arguments of a call in another order than its other namespaces, or no defaults for them."""
    if space is not torch:
        same = lambda *given: given  # noqa: E731
        return {"norm": {}, "stats": {}, "look": same, "bag": same, "factors": lambda lu, b: (*lu, b)}
    more = {"momentum": 0.1, "eps": 1e-5, "cudnn_enabled": False}
    stats = {"running_mean": None, "running_var": None, "use_input_stats": True}
    return {
        "norm": {**more, "training": False}, "stats": {**more, **stats}, "look": lambda i, w: (w, i),
        "bag": lambda i, w: (w, i.flatten(), torch.arange(0, 4 * N, 4)), "factors": lambda lu, b: (b, *lu),
    }  # fmt: skip


def _output(model: _Call, data: dict[str, Tensor], rows: bool) -> Tensor | None:
    out = model(data)
    first = next(iter(_tensors(out)), None)
    return _logits(out, data, rows and first is not None and first.dim() > 0 and len(first) == N)


def _first_order(model: nn.Module, data: Any, logits: Callable[[], Tensor | None]) -> Found:
    """Per-sample gradients of a mean squared error against brute force."""
    try:
        plain = logits()
        if plain is not None:
            torch.autograd.grad(plain.sum(), list(model.parameters()), allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        if not any(text in str(error) for text in NO_DERIVATIVE):
            raise
        return Found(NO_GRADIENT, "torch has no derivative of it")
    if plain is None:
        return Found(NO_GRADIENT)
    y = torch.linspace(-1, 1, plain[0].numel()).to(plain.dtype)

    def terms() -> Tensor:
        z = logits()
        assert z is not None
        return (z.flatten(1) - y).square().mean(1) / N

    params = oracle.parameters(model)
    used = oracle.used_names(params, lambda: terms().sum())
    grads = oracle.per_sample_grad({name: params[name] for name in used}, terms)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with lw.observe(model, lw.PerSampleGrad()) as seen:
                z = logits()
                assert z is not None
                F.mse_loss(z.flatten(1), y.expand(N, -1)).backward()
    except errors.LayerwiseError as error:
        return Found(REFUSED, f"{type(error).__name__}: {error}")
    oracle.assert_close(dict(seen.per_sample_grad), grads)
    return Found(SLOWER if any(issubclass(w.category, errors.SlowPath) for w in said) else EXACT)


# Losses -----------------------------------------------------------------------------------------


def _loss_of(expression: str, f: Any = None) -> Found:
    code, data = compile(expression, "loss", "eval"), _data()
    model = _Call((lambda given: given["z"].sigmoid()) if "(r," in expression else None)
    given = {**_constants(), "f": f}

    def loss(z: Tensor, n: slice = slice(None)) -> Tensor:
        return eval(code, {**given, **{name: x[n] for name, x in data.items()}, "z": z[n], "r": z[n]})

    def terms(z: Tensor) -> Tensor:
        return torch.stack([loss(z, slice(n, n + 1)) for n in range(N)]) / N

    params = oracle.parameters(model)
    named = {name: params[name] for name in oracle.used_names(params, lambda: loss(model(data)))}
    try:
        with lw.observe(model, lw.PerSampleGrad()) as seen:
            loss(model(data)).backward()
        oracle.assert_close(dict(seen.per_sample_grad), oracle.per_sample_grad(named, lambda: terms(model(data))))
    except errors.LayerwiseError as error:
        return Found(REFUSED, f"{type(error).__name__}: {error}")
    try:
        with lw.observe(model, lw.DiagGGN()) as seen:
            loss(model(data)).backward()
    except errors.LayerwiseError as error:
        return Found(EXACT, f"curvature refused, {type(error).__name__}: {error}")
    whole = lambda z: terms(z).sum()  # noqa: E731
    oracle.assert_close(dict(seen.diag_ggn), oracle.diag_ggn(named, lambda: model(data), whole))
    return Found(EXACT, "curvature exact")


# Modules and optimizers -------------------------------------------------------------------------


def _module(name: str) -> Found:
    make, _, given = table.MODULES[name].partition(" @ ")
    data = _data()
    inputs = eval(f"({given or 'x'},)", {**data, **_constants()})
    module = eval(make.replace("nn.F", f"nn.{name}"), {"nn": nn})
    with torch.no_grad():
        torch.manual_seed(0)
        module(*inputs)  # lazy ones are made
    scale = nn.Parameter(torch.rand(()) + 0.5)
    holder = nn.ModuleDict({"module": module})
    holder.register_parameter("scale", scale)

    def logits() -> Tensor | None:
        torch.manual_seed(0)
        first, *more = inputs
        out = module(first if not first.is_floating_point() else first * scale, *more)
        out = out[0] if isinstance(out, tuple) and name != "LSTMCell" else out
        return _logits(out, data, rows=True)

    return _first_order(holder, data, logits)


def _optimizer(name: str) -> Found:
    """Gradients after a step are those at the new parameters."""
    make = table.OPTIMIZERS[name]
    sparse = make.endswith("sparse")
    model: nn.Module = nn.Embedding(5, 4, sparse=True) if sparse else nn.Linear(4, 4)
    x, y = torch.tensor([0, 1, 1, 4, 2]) if sparse else torch.randn(N, 4), torch.randn(N, 4)
    opt = eval(make.partition(", sparse")[0].replace("o.F", f"torch.optim.{name}"),
               {"torch": torch, "params": list(model.parameters())})  # fmt: skip

    def closure() -> Tensor:
        opt.zero_grad()
        with lw.observe(model, lw.PerSampleGrad()):
            loss = F.mse_loss(model(x), y)
            loss.backward()
        return loss

    for _ in range(2):
        opt.step(closure)
        opt.zero_grad()
    with lw.observe(model, lw.PerSampleGrad()) as seen:
        F.mse_loss(model(x), y).backward()
    if sparse:
        model.sparse = False
    want = oracle.per_sample_grad(oracle.parameters(model), lambda: (model(x) - y).square().mean(1) / N)
    oracle.assert_close(dict(seen.per_sample_grad), want)
    return Found(EXACT)


def measure(space: str, name: str) -> Found:
    """What comes of a name in `torch`, ..., `torch.nn`, `torch.optim`.

    Raises: AssertionError where a value is wrong, and any error that is no LayerwiseError.
    """
    torch.manual_seed(1)
    if space == "torch.optim":
        return Found("nothing to ask", table.OPTIMIZERS[name]) if name == "Optimizer" else _optimizer(name)
    if space == "torch.nn":
        if name in table.MODULES_ASIDE:
            return Found("nothing to ask", table.MODULES_ASIDE[name])
        if name in table.MODULE_LOSSES:
            return _loss_of(table.MODULE_LOSSES[name].replace("nn.F", f"nn.{name}"))
        return _module(name)
    if (aside := table.ASIDE.get(name, table.ASIDE.get(name.removesuffix("_")))) is not None:
        return Found("nothing to ask", aside)
    if name in table.LOSSES:
        return _loss_of(_old(space, name), getattr(namespaces()[space], name))
    return _call_of(namespaces()[space], name)


def _old(space: str, name: str) -> str:
    """The call of a loss; those of `torch` itself know a reduction by its number, and have it not by default."""
    call = table.LOSSES[name]
    if space != "torch":
        return call
    if name == "poisson_nll_loss":
        return call.removesuffix(")") + ", True, False, 1e-8, 1)"
    if name == "binary_cross_entropy_with_logits":
        return call.removesuffix(")") + ", None, None, 1)"
    return call.removesuffix(")") + ", reduction=1)"
